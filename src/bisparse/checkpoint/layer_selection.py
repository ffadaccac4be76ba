"""Which tensors of a checkpoint are weights to prune, from their names, shapes and config.json, without the model.

The rules are those of `find_layers`, as far as names tell: what a model calls its parameters is all there is. Whatever
stays dense has a reason, and `include` overrules the defaults, by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.layers import Skipped, head_reason, matches, remainder_reason
from bisparse.pattern import Pattern, Structure
from bisparse.tiles import Layout, LayoutKind

__all__ = ["NameFilter", "StoredLayer", "choose_layers", "layer_name"]

NameFilter = str | Iterable[str]
"""A layer's name, a glob, ``"re:..."``, or a list of these."""

PRUNABLE = ("F64", "F32", "F16", "BF16")

EMBEDDINGS = (
    "embed", "embed_*", "embedding", "embeddings", "*_embed", "*_embedding", "*_embeddings", "tok_embeddings",
    "wte", "wpe", "shared", "relative_attention_bias", "emb",
)  # fmt: skip
"""Last names of embeddings, in the habits of transformers, timm, fairseq and Llama's own code."""

OUTPUT_HEADS = ("*predictions.decoder", "*generator_lm_head", "embed_out", "*.embed_out")
"""Heads that `head_reason` does not know by their last name."""

ROUTERS = ("gate", "router", "wg")
"""Last names of a mixture's router, where experts stand beside it."""

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""GPT-2's `Conv1D` stores (inputs, outputs). Models of that family, and the layers in them that are one."""

EXPERTS_BY_INPUT = ("gpt_oss", "llama4", "llama4_text")
"""Models that store experts as (E, inputs, outputs)."""

FIRST_CONVOLUTIONS = r"patch_embed|(^|\.)(conv_in|conv_stem)$|encoder\.conv1$"
"""Names of first convolutions that do not read three channels."""

_NO_MODULE = nn.Identity()


@dataclass(frozen=True)
class StoredLayer:
    """A tensor to prune, as what, and to which pattern."""

    name: str
    tensor: StoredTensor
    layout: Layout
    pattern: Structure


def layer_name(parameter: str) -> str:
    """A parameter's name without ``.weight``, as `find_layers` names layers."""
    return parameter.removesuffix(".weight")


def choose_layers(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    pattern: Structure,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, Structure] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[list[StoredLayer], list[Skipped]]:
    """The tensors to prune, and a reason for each matrix or larger tensor left dense.

    Args:
        config: the content of config.json, or nothing.
        include, exclude: by the layer's or the parameter's name. `include` overrules the defaults for the layers that it
            matches and leaves out the others; `exclude` always wins.
        patterns: patterns of single layers, by filter; the first that matches counts.
        layouts: layouts of single layers, by filter, where the name and config tell too little, such as the groups of a
            grouped convolution.

    Raises:
        ValueError: a filter that matches nothing, or ``remainder="error"`` and a layer that M does not divide.
    """
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    patterns, layouts = patterns or {}, layouts or {}
    unused = {*patterns, *layouts}
    transposed = _stores_inputs_first(tensors, config)
    prefixes_of_experts = {name.split("expert")[0] for name in tensors if "expert" in name}
    chosen: list[StoredLayer] = []
    left: list[Skipped] = []
    included = False
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2:
            continue
        layer = layer_name(name)
        wanted = include is not None and _meant(include, layer, name)
        included |= wanted
        forced = next((one for one in layouts if _meant(one, layer, name)), None)
        said = tensor.operand
        found = said if isinstance(said, Layout) else _layout(layer, tensor, transposed)
        layout = layouts[forced] if forced else found
        structure_key = next((one for one in patterns if _meant(one, layer, name)), None)
        structure = patterns[structure_key] if structure_key else pattern
        unused -= {forced, structure_key}
        reason = _kind_reason(tensor, layout) or (said if isinstance(said, str) and not forced else None)
        if reason is None and exclude is not None and _meant(exclude, layer, name):
            reason = "excluded by the caller"
        if reason is None and include is not None and not wanted:
            reason = "not among the layers asked for"
        if reason is None and not wanted and said is None:
            reason = _name_reason(name, layer, tensor, prefixes_of_experts)
        if reason is None and _inputs_first_experts(layout, config) and not _both_ways(structure):
            reason = "experts stored as (E, inputs, outputs): only transposable patterns are supported"
        if reason is None:
            reason = remainder_reason(_sides(tensor.shape, layout), structure, remainder, layer)
        if reason is None:
            chosen.append(StoredLayer(layer, tensor, layout, structure))
        else:
            left.append(Skipped(layer, reason))
    if include is not None and not included:
        raise ValueError(
            f"include={include!r} matches no tensor; those of two or more dimensions begin with {_examples(tensors)}"
        )
    if exclude and isinstance(exclude, str | Sequence) and not any(_meant(exclude, layer_name(name), name) for name in tensors):
        raise ValueError(f"exclude={exclude!r} matches no tensor: a layer that should stay dense would be pruned")
    if unused:
        raise ValueError(f"{sorted(unused)} match no tensor; those of two or more dimensions begin with {_examples(tensors)}")
    return chosen, left


def _meant(chosen: NameFilter, layer: str, parameter: str) -> bool:
    filters = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    return matches(filters, layer, _NO_MODULE) or matches(filters, parameter, _NO_MODULE)


def _examples(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return [layer_name(name) for name, tensor in tensors.items() if len(tensor.shape) >= 2][:8]


def _layout(layer: str, tensor: StoredTensor, transposed: bool) -> Layout:
    last = layer.rsplit(".", 1)[-1]
    if len(tensor.shape) == 2:
        if last == "in_proj_weight" and tensor.shape[0] % 3 == 0:
            return Layout(LayoutKind.PACKED, parts=3)
        if transposed and last in CONV1D_NAMES:
            return Layout(LayoutKind.TRANSPOSED)
        return Layout(LayoutKind.LINEAR)
    if len(tensor.shape) == 3 and _is_experts(layer):
        return Layout(LayoutKind.EXPERTS)
    return Layout(LayoutKind.CONV)


def _is_experts(layer: str) -> bool:
    return "expert" in ".".join(layer.split(".")[-2:]).lower()


def _model_types(config: Mapping[str, Any]) -> set[str]:
    inner = (part for part in config.values() if isinstance(part, Mapping))
    return {str(part["model_type"]) for part in (config, *inner) if "model_type" in part}


def _stores_inputs_first(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> bool:
    """Whether ``c_attn`` and its like are `Conv1D`: by the architecture, or, without a config, by the biases' lengths."""
    if types := _model_types(config):
        return bool(types & set(CONV1D_MODELS))
    if architectures := config.get("architectures"):
        return any(str(one).startswith(("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer", "Clvp")) for one in architectures)
    for name, tensor in tensors.items():
        layer = layer_name(name)
        bias = tensors.get(f"{layer}.bias")
        if layer.rsplit(".", 1)[-1] in CONV1D_NAMES and bias is not None and len(tensor.shape) == 2:
            outputs_first, outputs_last = (tensor.shape[side] == bias.shape[0] for side in (0, 1))
            if outputs_first != outputs_last:
                return outputs_last
    return False


def _kind_reason(tensor: StoredTensor, layout: Layout) -> str | None:
    """Why a tensor cannot be pruned, whatever the caller asks for."""
    if tensor.dtype not in PRUNABLE:
        return f"dtype {tensor.dtype}: integers, quantised and packed weights cannot be pruned"
    if tensor.size == 0:
        return "empty"
    if len(tensor.shape) > 5:
        return f"{len(tensor.shape)} dimensions: no weight that a GEMM multiplies by"
    if layout.kind is LayoutKind.CONV and tensor.shape[1] == 1 and tensor.shape[0] > 1 and len(tensor.shape) > 2:
        return "depthwise convolution: one input channel a filter, no reduction to make sparse"
    return None


def _name_reason(parameter: str, layer: str, tensor: StoredTensor, prefixes_of_experts: set[str]) -> str | None:
    """Why a tensor stays dense by default, by its name; None where it is a layer."""
    last = layer.rsplit(".", 1)[-1]
    is_weight = parameter.endswith(".weight") or parameter == "weight" or last.endswith("proj_weight")
    if (head := head_reason(layer)) is not None:
        return head
    if any(fnmatch.fnmatchcase(layer, glob) for glob in OUTPUT_HEADS):
        return "output head (by its name); include it by name to prune it"
    if len(tensor.shape) == 2 and any(fnmatch.fnmatchcase(last.lower(), glob) for glob in EMBEDDINGS):
        return "embedding: looked up, not multiplied"
    if len(tensor.shape) == 3 and _is_experts(layer):
        return None
    if not is_weight:
        return "not named as a layer's weight; include it by name to prune it"
    if last in ROUTERS and any(layer.startswith(prefix) for prefix in prefixes_of_experts):
        return "router of a mixture of experts; include it by name to prune it"
    if len(tensor.shape) > 2:
        if re.search(r"conv_?transpose|deconv|up_?conv", layer.lower()):
            return "transposed convolution (by its name): not supported"
        if tensor.shape[1] == 3 or re.search(FIRST_CONVOLUTIONS, layer.lower()):
            return f"first convolution (reads {tensor.shape[1]} channels); include it by name to prune it"
    return None


def _inputs_first_experts(layout: Layout, config: Mapping[str, Any]) -> bool:
    return layout.kind is LayoutKind.EXPERTS and bool(_model_types(config) & set(EXPERTS_BY_INPUT))


def _both_ways(pattern: Structure) -> bool:
    return isinstance(pattern, Pattern) and pattern.transposable


def _sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    match layout.kind:
        case LayoutKind.TRANSPOSED:
            return shape[1], shape[0]
        case LayoutKind.EXPERTS:
            return shape[1], shape[2]
        case LayoutKind.CONV:
            return shape[0] // layout.groups, shape[1]
        case _:
            return shape[0] // layout.parts, shape[1]
