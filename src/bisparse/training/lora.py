"""Merges low-rank adapters into sparse weights without losing the zeros.

``W + s B A`` is dense even where W is sparse. `merged_weight` keeps the pattern of W: ``mask * (W + s B A)`` with W's own mask,
or with the best mask for the sum. The adapter's part at pruned positions is lost; the result states how much. In a static run
the run's mask is used, which may keep a weight that is currently zero. Adapters that were trained under the mask
(`add_masked_lora_`, `mask_lora_`) lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bisparse._solve import solve
from bisparse.arguments import check_dense, check_flag
from bisparse.layers import dtype_reason
from bisparse.pattern import Structure, parse_pattern
from bisparse.rollback import Rollback
from bisparse.static_mask import static_mask
from bisparse.tiles import Layout, default_layout
from bisparse.training.masked_lora import masked_adapters, remove_adapter, tied_reason, users_of_weights
from bisparse.training.masked_peft import REWRITTEN, MaskedPeft, is_conv1d, lora_layers, why_not_linear
from bisparse.verification import PatternError, verify
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
        ValueError: shapes that do not match.
    """
    check_flag("new_mask", new_mask)
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, not {type(name).__name__}")
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
    precise = torch.promote_types(weight.dtype, torch.float32)
    merged = (weight.to(precise) + scaling * (b.to(precise) @ a.to(precise))).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ValueError(
            f"{name or 'adapter'}: W + s B A has NaN or infinite values in {str(weight.dtype).removeprefix('torch.')}, so it was "
            "not merged; check the weight, A, B and the scaling"
        )
    if new_mask:
        mask = solve(merged.abs(), pattern).mask
    else:
        try:
            verify(weight if mask is None else mask, pattern, name=name).check()
        except PatternError as error:
            raise PatternError(f"{error}. {REWRITTEN}, or pass new_mask=True") from error
        mask = weight != 0 if mask is None else mask
    kept = torch.where(mask, merged, 0)
    # Relative to the largest entry, since squares of float64 weights may be too large or too small for float64.
    largest = merged.abs().amax().to(precise) if merged.numel() else merged.new_zeros((), dtype=precise)
    if largest == 0:
        return MergedAdapter(name, kept, mask, 0.0)
    scaled, lost = merged.to(precise) / largest, (merged - kept).to(precise) / largest
    return MergedAdapter(name, kept, mask, float(lost.norm() / scaled.norm()))


@torch.no_grad()
def merge_lora_(model: nn.Module, pattern: str | Structure, *, new_mask: bool = False) -> list[MergedAdapter]:
    """Merge LoRA adapters into their base layers, which keep the pattern: those of `add_masked_lora_`, and peft's active ones.

    Adapters of `add_masked_lora_` are removed, and the weights they trained are plain parameters again. peft's adapters are
    zeroed; those that were trained under the mask (`mask_lora_`) lose nothing, including DoRA. The rest is about other adapters.

    A LoRA layer of peft is recognised by `base_layer`, `lora_A`, `lora_B`, `scaling` and `active_adapters`. ``W + s B A`` is
    merged, for any s (also rsLoRA's), into a Linear or transformers' Conv1D whose weight is a plain parameter; several active
    adapters are merged as one. Afterwards the model uses the merged base weights, and peft's ``model.unload()`` returns the
    plain model.

    Returns:
        One record per layer.

    Raises:
        PatternError: a base weight does not obey the pattern and `new_mask` is not set, for example because PiSSA, OLoRA or
            another initialization has rewritten it. Nothing is changed.
        ValueError: the model has no such layer, an adapter is already merged, or an adapter or base layer is of another kind
            (DoRA and other variants, embeddings, convolutions, LoRA with a bias, quantised, tied or dynamic sparse weights).
            Nothing is changed.
    """
    check_flag("new_mask", new_mask)
    check_module(model)
    pattern = parse_pattern(pattern)
    own = [(name, module, parameter, adapter) for name, module, parameter, adapter in masked_adapters(model)]
    if own and new_mask:
        raise ValueError(f"{own[0][0]}: its adapter was trained under the mask, which merging keeps; leave out new_mask")
    exact = []
    for name, module, parameter, adapter in own:
        weight = getattr(module, parameter)
        exact.append(_trained_under_mask(name, weight, weight != 0, pattern, adapter.layout))
    merged: list[tuple[Any, list[str], MergedAdapter]] = []
    for name, module in model.named_modules():
        if any(len(getattr(module, part, ())) for part in ("lora_embedding_A", "lora_embedding_B")):
            raise ValueError(f"{name}: merge_lora_ cannot merge the adapter of an embedding; train without it, or drop it")
    users = users_of_weights(model)
    for name, module in lora_layers(model):
        layer: Any = module
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if (reason := _why_not_merged(layer, adapters, new_mask)) is not None:
            raise ValueError(f"{name}: {reason}; nothing was merged")
        if adapters and (reason := tied_reason(users, layer.base_layer, "weight")) is not None:
            raise ValueError(f"{name}: {reason}: untie them; nothing was merged")
        if adapters:
            merged.append((layer, adapters, _merged(name, layer, adapters, pattern, new_mask)))
    if not merged and not exact:
        raise ValueError("the model has no LoRA layer with an active adapter (peft's base_layer, lora_A, lora_B, scaling)")
    with Rollback(model if own else None) as rollback:
        for layer, adapters, result in merged:
            base = layer.base_layer
            rollback.touch(base.weight, *(layer.lora_B[adapter].weight for adapter in adapters))
            base.weight.copy_(result.weight.T if is_conv1d(base) else result.weight)
            for one in adapters:
                layer.lora_B[one].weight.zero_()  # B A = 0: the adapter is now in the base weight
        for _, module, parameter, adapter in own:
            rollback.touch(module.parametrizations[parameter].original)  # type: ignore[index, union-attr]
            remove_adapter(module, parameter, adapter)
    return [*exact, *(result for *_, result in merged)]


def _merged(name: str, layer: Any, adapters: list[str], pattern: Structure, new_mask: bool) -> MergedAdapter:
    """The merged weight of one LoRA layer of peft's, (O, I)."""
    base = layer.base_layer
    held = static_mask(base, "weight")
    mask = None if held is None else held.T if is_conv1d(base) else held
    weight = base.weight.T if is_conv1d(base) else base.weight
    if isinstance(layer, MaskedPeft):
        own, mask = layer.merged_weight(), layer.base_mask()
        return _trained_under_mask(name, *((own.T, mask.T) if is_conv1d(base) else (own, mask)), pattern)
    precise = torch.promote_types(weight.dtype, torch.float32)
    a = torch.cat([float(layer.scaling[adapter]) * layer.lora_A[adapter].weight.to(precise) for adapter in adapters])
    b = torch.cat([layer.lora_B[adapter].weight.to(precise) for adapter in adapters], 1)
    return _merge(weight, a, b, 1.0, pattern, mask, new_mask=new_mask, name=name)


def _trained_under_mask(
    name: str, weight: Float[Tensor, "..."], mask: Bool[Tensor, "..."], pattern: Structure, layout: Layout | None = None
) -> MergedAdapter:
    """The record of an adapter that was trained under its mask: nothing is lost."""
    verify(weight, pattern, layout=default_layout(2) if layout is None else layout, name=name).check()
    return MergedAdapter(name, weight.detach().clone(), mask, 0.0)


def _why_not_merged(layer: Any, adapters: list[str], new_mask: bool) -> str | None:
    """Why ``mask * (W + s B A)`` is not the merged weight of a layer's adapters; None if it is."""
    base = layer.base_layer
    if adapters and getattr(layer, "disable_adapters", False):
        return "its adapters are disabled; call enable_adapter_layers() first"
    if (adapters or getattr(layer, "merged", False)) and (reason := why_not_linear(layer)) is not None:
        return reason
    if not adapters:
        return None
    if isinstance(layer, MaskedPeft):
        return "its adapter was trained under the mask, which merging keeps; leave out new_mask" if new_mask else None
    if new_mask and static_mask(base, "weight") is not None:
        return "its base layer is in static sparse training, whose mask is fixed; call finalize_(model) before new_mask=True"
    variants = dict(getattr(layer, "lora_variant", None) or {})
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    for adapter in adapters:
        if (getattr(layer, "use_dora", None) or {}).get(adapter) or (magnitudes is not None and adapter in magnitudes):
            return f"adapter {adapter!r} is DoRA, which rescales the merged weight, so masking afterwards would not be exact"
        if adapter in variants:
            return f"adapter {adapter!r} is the variant {type(variants[adapter]).__name__}, which is not W + s B A"
        if (getattr(layer, "lora_bias", None) or {}).get(adapter) or getattr(layer.lora_B[adapter], "bias", None) is not None:
            return f"adapter {adapter!r} has a bias (lora_bias=True), which cannot be merged into the weight"
        if any(type(part[adapter]) is not nn.Linear for part in (layer.lora_A, layer.lora_B)):
            return f"adapter {adapter!r} consists of {type(layer.lora_A[adapter]).__name__} layers, not of two Linear layers"
    return None
