"""Low-rank adapters trained under the mask: the weight is ``mask * (W + s B A)`` in training, and so is the merged one.

Merging an adapter that was trained without the mask loses what it learned off the mask. Here the zeros of W hold throughout, and
`merge_lora_` returns exactly the trained weights. A step materializes one weight-sized product per layer and the gradient of the
whole weight, like training W itself; optimizer state and saved files stay low-rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bisparse.arguments import check_flag
from bisparse.layers import Filter, Layer, computed_reason, dtype_reason, find_layers, memory_of
from bisparse.pattern import Structure, parse_pattern
from bisparse.rollback import Rollback
from bisparse.static_mask import static_masks
from bisparse.tiles import Layout, from_matrices, to_matrices
from bisparse.training.parametrizations import masked_parameters
from bisparse.training.shared_classes import separate_class, share_class
from bisparse.verification import PatternError, verify

__all__ = ["MaskedLoRA", "add_masked_lora_", "masked_adapters", "remove_adapter", "tied_reason", "users_of_weights"]


def check_rank(rank: object) -> None:
    """Raise ValueError for what is no rank of a matrix."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 1 << 63:
        raise ValueError(f"rank={rank!r:.40}: expected an integer of 1 or more")


class MaskedLoRA(nn.Module):
    """A parametrization whose weight is ``mask * (W + s B A)``, with the zeros of W as the mask.

    A and B are the adapter's matrices of small rank, and s its scale.

    DoRA (Liu et al. 2024) trains the norm of each row of the GEMM matrix: ``m * V / ||V||`` with ``V = mask * (W + s B A)``; the
    divisor gets no gradient, as in its section 4.3. The zeros are those of V.
    """

    def __init__(
        self, weight: Float[Tensor, "..."], layout: Layout, rank: int, scaling: float, pattern: Structure, *, dora: bool = False
    ) -> None:
        super().__init__()
        check_rank(rank)
        check_flag("dora", dora)
        if (reason := dtype_reason(weight)) is not None:
            raise ValueError(reason)
        _, out, inside = to_matrices(weight, layout).shape
        if rank > min(out, inside):
            raise ValueError(f"rank {rank} is more than a {out} x {inside} matrix can have")
        self.layout, self.scaling, self.pattern, self.trainable = layout, scaling, pattern, weight.requires_grad
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, inside, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(_row_norms(to_matrices(weight.detach(), layout)[0].to(dtype))) if dora else None

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        with torch.autocast(weight.device.type, enabled=False):  # merging runs without autocast
            delta = from_matrices((self.scaling * (self.lora_B @ self.lora_A))[None], self.layout, weight.shape)
            merged = torch.where(weight != 0, weight + delta, 0)
            if self.magnitude is not None:
                matrix = to_matrices(merged, self.layout)[0]
                rows = self.magnitude / _row_norms(matrix.detach()).clamp(min=torch.finfo(matrix.dtype).tiny)
                merged = from_matrices((matrix * rows[:, None])[None], self.layout, weight.shape)
            return merged.to(weight.dtype)

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Assigning to the weight sets the base weight."""
        return weight

    def extra_repr(self) -> str:
        dora = ", DoRA" if self.magnitude is not None else ""
        return f"{self.pattern}, rank={self.lora_A.shape[0]}, scaling={self.scaling:g}{dora}"


def _row_norms(matrix: Float[Tensor, "O I"]) -> Float[Tensor, " O"]:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms


def add_masked_lora_(
    model: nn.Module,
    pattern: str | Structure,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    include: Filter | None = None,
    exclude: Filter | None = None,
) -> list[nn.Parameter]:
    """Add adapters under the masks of a pruned model's sparse layers, freeze the rest, and return the adapters' parameters.

    Does not need peft; for a peft model see `mask_lora_`. Train the returned parameters, then call `merge_lora_`. A kept weight
    that is exactly zero counts as pruned.

    >>> from bisparse.pruning import prune_
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = prune_(model, "4:8-T")
    >>> optimizer = torch.optim.AdamW(add_masked_lora_(model, "4:8-T", rank=4), lr=1e-3)

    Args:
        pattern: the one that the layers obey.
        rank: rank of B A.
        alpha: B A is scaled by ``alpha / rank``; by default 2 * rank.
        rslora: scale by ``alpha / sqrt(rank)`` instead (Kalajdzievski 2023).
        dora: also train the norms of the rows.
        include, exclude: which layers, as `bisparse.layers.find_layers` takes them.

    Raises:
        PatternError: a layer does not obey the pattern.
        ValueError: wrong arguments, a model that is in sparse training or already has such adapters, a layer of several
            matrices (experts, packed projections, convolutions with kernels), or one whose weight is tied to another module's.
            On an error nothing is changed.
    """
    pattern = parse_pattern(pattern)
    check_flag("rslora", rslora)
    check_flag("dora", dora)
    check_rank(rank)
    scale = 2.0 * rank if alpha is None else alpha
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ValueError(f"alpha={alpha!r}: expected a positive number")
    _check_plain(model)
    layers, skipped = find_layers(model, include, exclude)
    if not layers:
        raise ValueError(f"the model has no layer to adapt ({'; '.join(f'{one.name}: {one.reason}' for one in skipped[:5])})")
    users = users_of_weights(model)
    for layer in layers:
        _check_layer(layer, pattern, rank)
        if (reason := tied_reason(users, layer.module, layer.parameter)) is not None:
            raise ValueError(f"{layer.name}: {reason}; untie them, or exclude the layer")
    scaling = float(scale) / (math.sqrt(rank) if rslora else rank)
    made: list[nn.Parameter] = []
    with Rollback(model):
        adapters = [MaskedLoRA(layer.weight, layer.layout, rank, scaling, pattern, dora=dora) for layer in layers]
        model.requires_grad_(False)
        for layer, adapter in zip(layers, adapters, strict=True):
            parametrize.register_parametrization(layer.module, layer.parameter, adapter)
            share_class(layer.module)
            made += list(adapter.parameters())
    return made


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"add_masked_lora_ needs a torch module, not {type(model).__name__}")
    training = [name for name, *_ in masked_parameters(model)]
    training += [name for name, module in model.named_modules() if static_masks(module)]
    if training:
        raise ValueError(
            f"the model is in sparse training (at {training[0]!r}): call finalize_(model) first, which keeps its zeros"
        )
    if adapted := masked_adapters(model):
        raise ValueError(f"the model already has adapters under its masks (at {adapted[0][0]!r}): call merge_lora_ first")


Users = dict[Hashable, list[tuple[str, nn.Module, str]]]


def users_of_weights(model: nn.Module) -> Users:
    """By memory, the parameters that are this memory, as (full name, module, name in the module)."""
    users: Users = {}
    for name, module in model.named_modules():
        for own, held in module._parameters.items():
            if held is not None:
                users.setdefault(memory_of(held), []).append((f"{name}.{own}" if name else own, module, own))
    return users


def tied_reason(users: Users, module: nn.Module, parameter: str) -> str | None:
    """Why an adapter of one module's weight is not exact: another module has the same weight; None if no other has it."""
    for name, other, own in users[memory_of(module._parameters[parameter])]:  # type: ignore[arg-type]
        if (other, own) != (module, parameter):
            return f"its weight is tied to {name}, which has no part in the adapter and would change when it is merged"
    return None


def _check_layer(layer: Layer, pattern: Structure, rank: int) -> None:
    weight = layer.weight
    if (reason := computed_reason(layer.module, layer.parameter) or dtype_reason(weight)) is not None:
        raise ValueError(f"{layer.name}: {reason}")
    if not isinstance(layer.module._parameters.get(layer.parameter), Tensor):
        raise ValueError(f"{layer.name}: its weight is not a plain parameter of the module; exclude the layer")
    matrices, out, inside = to_matrices(weight, layer.layout).shape
    if matrices != 1:
        raise ValueError(f"{layer.name}: its weight consists of {matrices} matrices, but B A is only one: exclude the layer")
    if isinstance(layer.module, nn.RNNBase):
        raise ValueError(f"{layer.name}: {type(layer.module).__name__} does not read its weights at each step; exclude the layer")
    if rank > min(out, inside):
        raise ValueError(f"{layer.name}: rank {rank} is more than a {out} x {inside} matrix can have")
    try:
        verify(weight, pattern, layout=layer.layout, name=layer.name).check()
    except PatternError as error:
        raise PatternError(f"{error}. Prune the layer first, or exclude it") from error


def masked_adapters(model: nn.Module) -> list[tuple[str, nn.Module, str, MaskedLoRA]]:
    """(name of the layer, module, parameter, adapter) of each layer with an adapter of `add_masked_lora_`."""
    found = []
    for name, module in model.named_modules():
        chains = module.parametrizations.items() if parametrize.is_parametrized(module) else ()
        for parameter, chain in chains:
            found += [(name, module, parameter, own) for own in chain if isinstance(own, MaskedLoRA)]
    return found


@torch.no_grad()
def remove_adapter(module: nn.Module, parameter: str, own: MaskedLoRA) -> None:
    """Merge an adapter into its weight, which becomes a plain parameter again, trained or frozen as it was before."""
    separate_class(module)
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    getattr(module, parameter).requires_grad_(own.trainable)
