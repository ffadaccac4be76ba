"""Trains peft's LoRA layers under the masks of their base weights, so that merging keeps the pattern exactly.

The layers stay peft's, with their adapters, names and files, but multiply by ``mask * (W + s B A)``, materialized in each step.
peft's own `merge_and_unload` then keeps the zeros too, since the adapter's part off the mask is zero.
peft itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bisparse.layers import Filter, matches
from bisparse.pattern import Structure, parse_pattern
from bisparse.static_mask import static_mask
from bisparse.training.masked_lora import tied_reason, users_of_weights
from bisparse.training.parametrizations import own_parametrization
from bisparse.verification import PatternError, verify
from bisparse.wrappers import check_module

__all__ = ["REWRITTEN", "MaskedPeft", "is_conv1d", "lora_layers", "mask_lora_", "why_not_linear"]

REWRITTEN = (
    "Initializations such as PiSSA, OLoRA and CorDA rewrite the base weight when they start, so that it has no zeros left: start "
    "adapters of sparse weights with init_lora_weights=True"
)


class MaskedPeft:
    """First base class of a LoRA layer of peft that trains under its mask."""

    def base_mask(self) -> Tensor:
        """The mask, of the base weight's shape: that of a static run, otherwise the non-zeros of the base weight."""
        base = self.get_base_layer()  # type: ignore[attr-defined]
        held = static_mask(base, "weight")
        mask: Tensor = base.weight != 0 if held is None else held
        return mask

    def get_delta_weight(self, adapter: str) -> Tensor:
        """An adapter's part of the merged weight, zero off the mask; peft merges and unmerges with it."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return torch.where(self.base_mask(), delta, 0)

    def merged_weight(self) -> Tensor:
        """``mask * (W + s B A)`` of the active adapters, in the base weight's dtype; with DoRA, its rows rescaled."""
        layer: Any = self
        base = layer.get_base_layer()
        weight = base.weight
        adapters = [one for one in layer.active_adapters if one in layer.lora_A]
        with torch.autocast(weight.device.type, enabled=False):  # merging runs without autocast
            total = weight
            for one in adapters:
                total = total + self.get_delta_weight(one)
            total = torch.where(self.base_mask(), total, 0)
            for one in adapters:
                if one in layer.lora_variant:  # DoRA, the only one that is not refused
                    across = 0 if is_conv1d(base) else 1
                    norm = torch.linalg.vector_norm(total.detach(), dim=across, keepdim=True)
                    magnitude = layer.lora_magnitude_vector[one].weight.view_as(norm)
                    total = total * (magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny))
            merged: Tensor = total.to(weight.dtype)
            return merged

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the merged weight; dropout applies to the adapters' part only, as in peft."""
        layer: Any = self
        adapters = [one for one in layer.active_adapters if one in layer.lora_A]
        if layer.disable_adapters or layer.merged or not adapters:
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names= (a different adapter for each row of a batch) is not possible under one mask")
        base, weight = layer.get_base_layer(), self.merged_weight()
        dropouts = [layer.lora_dropout[one] for one in adapters]
        if not layer.training or all(isinstance(one, nn.Identity) for one in dropouts):
            return _product(x, weight, base, base.bias)
        result = _product(x, base.weight, base, base.bias)
        if len(adapters) > 1:
            raise ValueError("several active adapters with dropout cannot train under one mask: use lora_dropout=0")
        return result + _product(dropouts[0](x), weight - base.weight, base, None)


def _product(x: Tensor, weight: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight.T if is_conv1d(base) else weight, bias)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


_CLASSES: dict[type, type] = {}


def mask_lora_(model: nn.Module, pattern: str | Structure, *, exclude: Filter | None = None) -> list[str]:
    """Train the LoRA layers of a peft model under the masks of their base weights; returns the layers' names.

    Call it after ``get_peft_model``, before the model is wrapped or compiled. For Linear layers and transformers' Conv1D, LoRA,
    rsLoRA and DoRA are exact, including dropout: `merge_lora_` and peft's own ``merge_and_unload`` return the trained weights,
    with their zeros.

    ::

        bisparse.prune_(model, "4:8-T")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", use_rslora=True))
        mask_lora_(model, "4:8-T")

    Args:
        pattern: the one that the base weights obey.
        exclude: LoRA layers whose base weight is dense, by name, glob, ``re:`` or function; they are left unchanged.

    Raises:
        PatternError: a base weight does not obey the pattern, for example because PiSSA or OLoRA has rewritten it.
        ValueError: the model has no such layer, or one of another kind: embeddings, convolutions, variants other than DoRA, LoRA
            with a bias, quantised, tied or dynamic sparse weights, merged adapters, DoRA next to another adapter or on a row
            without a kept weight. On an error nothing is changed.
    """
    check_module(model)
    structure = parse_pattern(pattern)
    chosen: list[tuple[str, nn.Module]] = []
    users = users_of_weights(model)
    for name, module in lora_layers(model):
        if exclude is not None and matches(exclude, name, module):
            continue
        if (reason := _why_not_masked(module)) is not None:
            raise ValueError(f"{name}: {reason}; exclude the layer or train it without a mask. Nothing was changed")
        if (reason := tied_reason(users, module.base_layer, "weight")) is not None:  # type: ignore[arg-type]
            raise ValueError(f"{name}: {reason}; untie them, or exclude the layer. Nothing was changed")
        if isinstance(module, MaskedPeft):
            raise ValueError(f"{name} already trains under its mask; nothing was changed")
        base: Any = module.base_layer
        held = static_mask(base, "weight")
        weight = base.weight if held is None else held
        try:
            verify(weight.T if is_conv1d(base) else weight, structure, name=name).check()
        except PatternError as error:
            raise PatternError(f"{error}. {REWRITTEN}, and leave dense layers out by exclude=") from error
        chosen.append((name, module))
    if not chosen:
        raise ValueError("the model has no LoRA layer to mask (peft's base_layer, lora_A, lora_B, scaling)")
    for _, module in chosen:
        kind = type(module)
        if kind not in _CLASSES:
            _CLASSES[kind] = type(f"Masked{kind.__name__}", (MaskedPeft, kind), {"__module__": kind.__module__})
        module.__class__ = _CLASSES[kind]
    return [name for name, _ in chosen]


def lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The LoRA layers of peft in a model, by name."""
    parts = ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")
    return [(name, module) for name, module in model.named_modules() if all(hasattr(module, part) for part in parts)]


def why_not_linear(layer: Any) -> str | None:
    """Why the base layer of a LoRA layer has no plain weight (O, I) or (I, O) to merge into; None if it has one."""
    base = layer.base_layer
    if any(len(getattr(layer, part, ())) for part in ("lora_embedding_A", "lora_embedding_B")):
        return "it is an adapter of an embedding, which has no mask"
    if getattr(layer, "merged", False):
        return "peft has already merged its adapter, which leaves no zeros; call unmerge_adapter() first"
    if own_parametrization(base, "weight") is not None:
        return "its base layer is in dynamic sparse training; call finalize_(model) first"
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"its base layer is a {type(base).__name__}; only Linear and Conv1D are possible"
    weight = base._parameters.get("weight")
    if weight is None or weight is not base.weight or not weight.is_floating_point() or hasattr(base, "dense_weight"):
        return "the weight of its base layer is quantised, packed, parametrized or accelerated, not a plain parameter"
    return None


def _why_not_masked(layer: Any) -> str | None:
    if (reason := why_not_linear(layer)) is not None:
        return reason
    variants = dict(getattr(layer, "lora_variant", None) or {})
    for adapter, variant in variants.items():
        if type(variant).__name__ != "DoraLinearVariant":
            return f"adapter {adapter!r} is the variant {type(variant).__name__}, which is not W + s B A"
    if variants and len(layer.lora_A) > 1:
        return "DoRA next to another adapter would rescale that one too"
    if variants:
        kept = layer.base_layer.weight != 0
        if not bool(kept.any(0 if is_conv1d(layer.base_layer) else 1).all()):
            return "DoRA on a row without a kept weight divides by its norm, 0"
    for adapter, part in layer.lora_B.items():
        if getattr(part, "bias", None) is not None:
            return f"adapter {adapter!r} has a bias (lora_bias=True), which cannot be merged into the weight"
        if type(part) is not nn.Linear or type(layer.lora_A[adapter]) is not nn.Linear:
            return f"adapter {adapter!r} consists of {type(part).__name__} layers, not of two Linear layers"
    return None
