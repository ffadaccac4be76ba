"""Merging low-rank adapters into sparse weights without losing the zeros.

``W + s B A`` is dense even where W is sparse. `merged_weight` keeps the pattern of W: ``mask * (W + s B A)`` with W's own mask,
or with the best mask for the sum. What the adapter did on pruned positions is lost; the result says how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bisparse._solve import solve
from bisparse.pattern import Structure, parse_pattern
from bisparse.solution import verify

__all__ = ["MergedAdapter", "merge_lora_", "merged_weight"]


@dataclass(frozen=True)
class MergedAdapter:
    """One layer after its adapter was merged."""

    name: str
    weight: Float[Tensor, "O I"]
    mask: Bool[Tensor, "O I"]
    lost: float
    """Share of the norm of ``W + s B A`` that fell to the mask."""


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
    pattern = parse_pattern(pattern)
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
        verify(weight, pattern, name=name).check()
        mask = weight != 0
    kept = torch.where(mask, merged, 0)
    norm = merged.float().norm()
    return MergedAdapter(name, kept, mask, float((merged - kept).float().norm() / norm) if norm > 0 else 0.0)


@torch.no_grad()
def merge_lora_(model: nn.Module, pattern: str | Structure, *, new_mask: bool = False) -> list[MergedAdapter]:
    """Merge the active adapters of a peft model into their base layers, which keep the pattern. Adapters are zeroed.

    A layer is recognised as peft makes them: it has `base_layer`, `lora_A`, `lora_B`, `scaling` and `active_adapters`. After
    the call the model computes with the merged base weights, and ``model.unload()`` of peft gives the plain model.

    Raises:
        ValueError: the model has no such layer, or an adapter is merged already.
    """
    merged = []
    for name, module in model.named_modules():
        if not all(hasattr(module, part) for part in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")):
            continue
        layer: Any = module
        if getattr(layer, "merged", False):
            raise ValueError(
                f"{name}: its adapter is merged already, by peft, which leaves no zeros; call unmerge_adapter() first"
            )
        base = layer.base_layer
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            result = merged_weight(base.weight, a, b, float(layer.scaling[adapter]), pattern, new_mask=new_mask, name=name)
            base.weight.copy_(result.weight)
            b.zero_()  # B A = 0: the adapter is now in the base weight
            merged.append(result)
    if not merged:
        raise ValueError("the model has no LoRA layer with an active adapter (peft's base_layer, lora_A, lora_B, scaling)")
    return merged
