"""Infers the role of a parameter from its name: head, embedding, router, adapter, token or first convolution.

The same rules apply to models and files. They only leave a parameter dense by default; `include` by name overrides them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

__all__ = [
    "BY_NAME",
    "Names",
    "by_layer",
    "head_reason",
    "is_embedding_name",
    "is_transposed_by_name",
    "layer_name",
    "reads_input_by_name",
]

T = TypeVar("T")

BY_NAME = "include it by name"
"""End of the reasons of layers that are left out by default alone, for pruning, verification and all else."""

HEAD_NAMES = (
    "lm_head", "classifier", "head", "fc", "score", "embed_out", "output_layer", "logits", "output_projection", "lm_output",
    "*_head",
)  # fmt: skip
"""Last names of output heads in torch, timm, fairseq and transformers."""
OUTER_HEADS = ("linear", "output", "out", "final", "last_linear", "fc_out", "predict", "prediction", "output_proj")
"""Last names of heads that are only used for top-level layers of models without another head, since they are common."""
HEAD_PATHS = ("*predictions.decoder", "*generator_lm_head")
WRAPPERS = ("module", "model", "_orig_mod", "net", "network", "backbone", "student", "_forward_module", "_fsdp_wrapped_module")
"""First names that wrappers and trainers add."""

EMBEDDINGS = (
    "embed", "embed_*", "embedding", "embeddings", "*_embed", "*_embeds", "*_embedding", "*_embeddings", "tok_embeddings",
    "*_embeddings_[0-9]*", "*_embedder", "*embedder_[0-9]*", "wte", "wpe", "wtt", "shared", "relative_attention_bias", "emb",
    "*_emb", "*_embeds_layer", "*_embedding_table", "*_embeddings_table", "codebook", "lookup_table",
    "relative_position_bias_table", "reference_points", "pe_k", "pe_v", "bias_values", "patchifier",
)  # fmt: skip
"""Last names of embeddings in transformers, timm, fairseq, Whisper and Llama's original code."""
EMBEDDING_PATHS = ("*audio_tower.encoder",)
"""Full names of embeddings whose last part alone does not say so."""

ROUTERS = ("gate", "router", "wg", "gating", "switch")
"""Names of a mixture's router, if experts are next to it."""
ROUTER = r"(^|[._])router([._]|$)|shared_expert_gate$|gate_network"

ADAPTERS = r"(^|[._])(lora|dora|hada|lokr|ia3|vera|vblora|boft|oft)(_|\.)|_lora(\.|$)|(^|\.)prompt_encoder\."
"""Names of low-rank and other adapters in peft, diffusers and kohya."""

TOKENS = r"(^|[._])tokens?$|(^|\.)(query_feat|quer(y|ies)_features|latents|latent_query|probe|prompt)$|^quer(y|ies)$"
"""Names of learned inputs: class and mask tokens, queries of detection transformers, latents of perceivers."""

NORMS = r"(^|[._])(layer|group|batch|rms|instance|input|post)?_?(norm|ln|bn)\d*$|layernorm[a-z_]*$"

FIRST_CONVOLUTIONS = (
    r"patch_embed|(^|\.)(conv_in|conv_stem|stem_conv|conv_first|first_conv|input_conv|conv_input|conv_pre|quant_conv)$|"
    r"(^|\.)stem\.conv(\.conv)?$|(^|\.)(audio_tower|audio_encoder|encoder)\.conv1$"
)
"""Names of convolutions that read the input of a model or of a part of it."""

TRANSPOSED = r"conv_?trans|deconv|trans_?conv|convt_|conv_?tr(\.|$)"
"""Names used only for transposed convolutions."""
ENLARGING = r"up_?conv|upscale|up_?sampl|unpool|(^|[._])(up|resize|conv_up)([._]|\d|$)"
"""Names of upsampling modules: a transposed convolution, or a plain one after interpolation."""
REDUCING = r"down|subsampl|reduc|(^|\.)sr(\.|$)|patch|strid|squeeze|feature_extractor|pool|to_molecules"
"""Names of downsampling modules, which are plain convolutions."""


def layer_name(parameter: str) -> str:
    """The name of a parameter's layer: the parameter's name without ``.weight``."""
    return parameter.removesuffix(".weight")


def by_layer(argument: str, given: Mapping[str, T], layers: Sequence[str]) -> dict[str, T]:
    """What a caller gave for every layer, by the layer's name or its parameter's (``"0"`` or ``"0.weight"``): by layer name.

    Raises:
        ValueError: a layer without a value or with two, or a name that is not a layer's.
    """
    names = {key: layer_name(key) if isinstance(key, str) and key not in layers else key for key in given}
    if unknown := [str(key) for key, name in names.items() if name not in layers]:
        raise ValueError(
            f"{argument}= names {sorted(unknown)[:5]}, which are not among the layers; those are {list(layers)[:10]}"
        )
    found = {name: given[key] for key, name in names.items()}
    if missing := [name for name in layers if name not in found]:
        raise ValueError(f"{argument}= has none for {missing[:5]}: add them, or exclude these layers")
    if len(found) < len(names):
        twice = sorted(name for name in found if list(names.values()).count(name) > 1)
        raise ValueError(f"{argument}= names {twice[:5]} twice, by layer and by parameter")
    return found


def _last(layer: str) -> str:
    # The underscore of private attributes is ignored: EfficientNet's head is `_fc`.
    return layer.rsplit(".", 1)[-1].lower().strip("_")


def head_reason(name: str) -> str | None:
    """Why a layer of this name stays dense by default as an output head; None if it is not one."""
    layer = layer_name(name)
    last = _last(layer)
    if any(fnmatch.fnmatchcase(last, one) for one in HEAD_NAMES) or any(fnmatch.fnmatchcase(layer, one) for one in HEAD_PATHS):
        return f"output head (its name ends in '{last}'); {BY_NAME}"
    return None


def _unwrapped(layer: str) -> str:
    """A layer's name without the parts added by wrappers."""
    first, _, rest = layer.partition(".")
    return _unwrapped(rest) if rest and first.lower() in WRAPPERS else layer


def is_embedding_name(layer: str) -> bool:
    """Whether a layer, or its list of layers, has the name of an embedding."""
    parts = [part for part in layer.split(".") if not part.isdecimal()] or [layer]
    return any(fnmatch.fnmatchcase(_last(one), glob) for glob in EMBEDDINGS for one in (parts[-1], layer)) or any(
        fnmatch.fnmatchcase(layer.lower(), glob) for glob in EMBEDDING_PATHS
    )


def reads_input_by_name(layer: str) -> bool:
    """Whether a convolution has the name of one that reads the model's input."""
    return re.search(FIRST_CONVOLUTIONS, layer.lower()) is not None


def is_transposed_by_name(layer: str, kernel: tuple[int, ...]) -> bool | None:
    """Whether a convolution is transposed, by its name and kernel; None if these do not decide it.

    Usually, transposed convolutions upsample by even factors with even kernels, and plain ones have even kernels to downsample.
    """
    name = layer.lower()
    if re.search(TRANSPOSED, name):
        return True
    if all(size == 1 for size in kernel):
        return False
    if all(size % 2 for size in kernel):
        return None if re.search(r"up_?conv\d*$", name) else False
    # If both kinds of name occur, the later one belongs to the smaller part of the model.
    enlarging, reducing = (max((one.start() for one in re.finditer(rule, name)), default=-1) for rule in (ENLARGING, REDUCING))
    return None if enlarging == reducing else enlarging > reducing


class Names:
    """The names of all parameters of a model or file, from which the role of each is inferred."""

    def __init__(self, parameters: Collection[str]) -> None:
        self._mixtures: set[str] = set()
        self._sequential_ends: dict[str, int] = {}
        layers = {layer_name(name) for name in parameters if name.endswith("weight")}
        outer = {layer for layer in layers if _last(_unwrapped(layer)) in OUTER_HEADS and "." not in _unwrapped(layer)}
        has_head = any(head_reason(layer) for layer in layers)
        self._outer_head = outer.pop() if len(outer) == 1 and len(layers) > 1 and not has_head else None
        for name in parameters:
            if "expert" in name:
                self._mixtures.add(name.split("expert")[0].rpartition(".")[0])
            parent, _, index = layer_name(name).rpartition(".")
            if index.isdecimal():
                self._sequential_ends[parent] = max(self._sequential_ends.get(parent, -1), int(index))

    def default_reason(self, parameter: str) -> str | None:
        """Why a parameter stays dense by default, by its name and those around it; None if there is no such reason."""
        layer = layer_name(parameter)
        if re.search(ADAPTERS, layer):
            return f"low-rank (LoRA) or other adapter: its base layer is the one to prune; {BY_NAME}"
        if self._is_router(layer):
            return f"router of a mixture of experts; {BY_NAME}"
        parent, _, index = layer.rpartition(".")
        is_last = index.isdecimal() and self._sequential_ends.get(parent) == int(index)
        if (head := head_reason(parent if is_last and parent else layer)) is not None:
            return head
        if layer == self._outer_head:
            return f"output head (the model's own '{_last(layer)}'); {BY_NAME}"
        if re.search(NORMS, _last(parent if _last(layer) in ("scale", "shift", "gamma", "beta") else layer)):
            return f"normalisation: it scales and is not the matrix of a product; {BY_NAME}"
        if re.search(TOKENS, layer.lower()):
            return "learned token or query: an input, not a weight that multiplies inputs"
        return None

    def _is_router(self, layer: str) -> bool:
        if re.search(ROUTER, layer.lower()):
            return True
        parts = layer.split(".")
        return any(part.lower() in ROUTERS and ".".join(parts[:at]) in self._mixtures for at, part in enumerate(parts))
