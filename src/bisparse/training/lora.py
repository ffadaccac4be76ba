"""Merging low-rank adapters into sparse weights without losing the zeros.

``W + s B A`` is dense even where W is sparse. `merged_weight` keeps the pattern of W: ``mask * (W + s B A)`` with W's own mask,
or with the best mask for the sum. The adapter's part at pruned positions is lost; the result says how much that is. In a static
run the mask is that of the run, which may keep a weight that is currently zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bisparse._solve import solve
from bisparse.arguments import check_dense
from bisparse.layers import dtype_reason
from bisparse.pattern import Structure, parse_pattern
from bisparse.rollback import Rollback
from bisparse.solution import PatternError, verify
from bisparse.static_mask import static_mask
from bisparse.training.parametrizations import own_parametrization
from bisparse.wrappers import check_module

__all__ = ["MergedAdapter", "merge_lora_", "merged_weight"]


@dataclass(frozen=True)
class MergedAdapter:
    """One layer after its adapter was merged."""

    name: str
    weight: Float[Tensor, "O I"]
    mask: Bool[Tensor, "O I"]
    lost: float
    """Fraction of the norm of ``W + s B A`` that the mask removed."""


@torch.no_grad()
def merged_weight(
    weight: Float[Tensor, "O I"],
    a: Float[Tensor, "R I"],
    b: Float[Tensor, "O R"],
    scaling: float,
    pattern: str | Structure,
    *,
    new_mask: bool = False,
    name: str = "",
) -> MergedAdapter:
    """``mask * (W + scaling * B A)``, which obeys the pattern that W obeys.

    Args:
        new_mask: find the best mask for the merged weight, instead of keeping the zeros of W.

    Raises:
        PatternError: W does not obey the pattern, and `new_mask` is not set.
        ValueError: shapes that do not fit.
    """
    for argument, tensor in (("weight", weight), ("a", a), ("b", b)):
        check_dense(argument, tensor)
        if not tensor.is_floating_point() or tensor.ndim != 2:
            raise ValueError(
                f"{argument} of shape {tuple(tensor.shape)} and {tensor.dtype}: expected a matrix of floating-point numbers"
            )
    if (reason := dtype_reason(weight)) is not None:
        raise ValueError(f"{name or 'weight'}: {reason}")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not -1e300 < scaling < 1e300:
        raise ValueError(f"scaling={scaling!r:.40}: expected a finite number")
    return _merge(weight, a, b, scaling, parse_pattern(pattern), None, new_mask=new_mask, name=name)


def _merge(
    weight: Float[Tensor, "O I"],
    a: Float[Tensor, "R I"],
    b: Float[Tensor, "O R"],
    scaling: float,
    pattern: Structure,
    mask: Bool[Tensor, "O I"] | None,
    *,
    new_mask: bool,
    name: str,
) -> MergedAdapter:
    out, inside = weight.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inside or b.shape[0] != out or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{name or 'adapter'}: A of shape {tuple(a.shape)} and B of {tuple(b.shape)} do not fit a weight of "
            f"{tuple(weight.shape)}; expected (rank, {inside}) and ({out}, rank)"
        )
    merged = (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)
    if new_mask:
        mask = solve(merged.abs(), pattern).mask
    else:
        try:
            verify(weight if mask is None else mask, pattern, name=name).check()
        except PatternError as error:
            raise PatternError(
                f"{error}. Initializations such as PiSSA, OLoRA and CorDA rewrite the base weight when they start, so that it "
                "has no zeros left: start adapters of sparse weights with init_lora_weights=True, or pass new_mask=True"
            ) from error
        mask = weight != 0 if mask is None else mask
    kept = torch.where(mask, merged, 0)
    norm = merged.float().norm()
    return MergedAdapter(name, kept, mask, float((merged - kept).float().norm() / norm) if norm > 0 else 0.0)


@torch.no_grad()
def merge_lora_(model: nn.Module, pattern: str | Structure, *, new_mask: bool = False) -> list[MergedAdapter]:
    """Merge the active LoRA adapters of a peft model into their base layers, which keep the pattern. Adapters are zeroed.

    A layer is recognised as peft makes them: it has `base_layer`, `lora_A`, `lora_B`, `scaling` and `active_adapters`. What is
    merged is ``W + s B A``, with whatever s is (rsLoRA's too), into a Linear or transformers' Conv1D whose weight is a plain
    parameter; several active adapters are merged as one. After the call the model computes with the merged base weights, and
    ``model.unload()`` of peft gives the plain model.

    Returns:
        One record per layer.

    Raises:
        PatternError: a base weight does not obey the pattern and `new_mask` is not set, as where PiSSA, OLoRA or another
            initialization has rewritten it.
        ValueError: the model has no such layer, an adapter is merged already, or an adapter or a base layer is of another
            kind (DoRA and other variants, embeddings, convolutions, LoRA with a bias, quantised or dynamic sparse weights). In
            either case nothing is changed.
    """
    check_module(model)
    pattern = parse_pattern(pattern)
    merged: list[tuple[Any, list[str], MergedAdapter]] = []
    for name, module in model.named_modules():
        layer: Any = module
        if any(len(getattr(layer, part, ())) for part in ("lora_embedding_A", "lora_embedding_B")):
            raise ValueError(f"{name}: an adapter of an embedding, which merge_lora_ cannot merge; train without it, or drop it")
        if not all(hasattr(module, part) for part in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")):
            continue
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if (reason := _why_not_merged(layer, adapters, new_mask)) is not None:
            raise ValueError(f"{name}: {reason}; nothing was merged")
        if not adapters:
            continue
        base = layer.base_layer
        weight = base.weight.T if _is_conv1d(base) else base.weight
        a = torch.cat([float(layer.scaling[adapter]) * layer.lora_A[adapter].weight.float() for adapter in adapters])
        b = torch.cat([layer.lora_B[adapter].weight.float() for adapter in adapters], 1)
        held = static_mask(base, "weight")
        mask = None if held is None else held.T if _is_conv1d(base) else held
        merged.append((layer, adapters, _merge(weight, a, b, 1.0, parse_pattern(pattern), mask, new_mask=new_mask, name=name)))
    if not merged:
        raise ValueError("the model has no LoRA layer with an active adapter (peft's base_layer, lora_A, lora_B, scaling)")
    with Rollback() as rollback:
        for layer, adapters, result in merged:
            base = layer.base_layer
            rollback.touch(base.weight, *(layer.lora_B[adapter].weight for adapter in adapters))
            base.weight.copy_(result.weight.T if _is_conv1d(base) else result.weight)
            for adapter in adapters:
                layer.lora_B[adapter].weight.zero_()  # B A = 0: the adapter is now in the base weight
    return [result for *_, result in merged]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _why_not_merged(layer: Any, adapters: list[str], new_mask: bool) -> str | None:
    """Why ``mask * (W + s B A)`` is not what the adapters of a layer would give; None where it is."""
    base = layer.base_layer
    if getattr(layer, "merged", False):
        return "its adapter is merged already, by peft, which leaves no zeros; call unmerge_adapter() first"
    if not adapters:
        return None
    if getattr(layer, "disable_adapters", False):
        return "its adapters are disabled; call enable_adapter_layers() first"
    if own_parametrization(base, "weight") is not None:
        return "its base layer is in dynamic sparse training; call finalize_(model) first"
    if not isinstance(base, nn.Linear) and not _is_conv1d(base):
        return f"its base layer is a {type(base).__name__}; merge_lora_ is for Linear and Conv1D"
    weight = base._parameters.get("weight")
    if weight is None or weight is not base.weight or not weight.is_floating_point() or hasattr(base, "dense_weight"):
        return "the weight of its base layer is quantised, packed, parametrized or accelerated, and no plain parameter"
    if new_mask and static_mask(base, "weight") is not None:
        return "its base layer is in static sparse training, whose mask is fixed; call finalize_(model) before new_mask=True"
    variants = dict(getattr(layer, "lora_variant", None) or {})
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    for adapter in adapters:
        if (getattr(layer, "use_dora", None) or {}).get(adapter) or (magnitudes is not None and adapter in magnitudes):
            return f"adapter {adapter!r} is DoRA, which rescales the merged weight: masking it after would not be exact"
        if adapter in variants:
            return f"adapter {adapter!r} is of the variant {type(variants[adapter]).__name__}, and not W + s B A"
        if (getattr(layer, "lora_bias", None) or {}).get(adapter) or getattr(layer.lora_B[adapter], "bias", None) is not None:
            return f"adapter {adapter!r} has a bias (lora_bias=True), which the weight cannot take"
        if any(type(part[adapter]) is not nn.Linear for part in (layer.lora_A, layer.lora_B)):
            return f"adapter {adapter!r} is made of {type(layer.lora_A[adapter]).__name__} layers, not of two Linear ones"
    return None
