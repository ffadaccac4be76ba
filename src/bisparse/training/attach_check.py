"""Checks of `Sparsity.attach`: whether sparse training can follow these optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

from bisparse.training.decay import AnnealedDecay, Decay
from bisparse.training.layer import SparseLayer
from bisparse.training.optimizer import flattened, why_not_followed
from bisparse.training.unattached import Watched

__all__ = ["attach_error", "check_not_flattened", "other_run_on", "run_length_error"]


def run_length_error(decays: Iterable[Decay | None], steps: int | None) -> ValueError | None:
    """The error, not raised, for a decay that is defined over the whole run if the number of its steps is not known; or None."""
    if steps is None and any(isinstance(one, AnnealedDecay) or (isinstance(one, float | int) and one > 0) for one in decays):
        return ValueError(
            "decay is a total over the whole run, whose length is not known: pass steps= to sparsify_ (or use a trainer's "
            "callback, which knows it), or give a fixed lambda: decay=FixedDecay(2e-4)"
        )
    return None


def check_not_flattened(layers: Iterable[SparseLayer]) -> None:
    """Raise ValueError if FullyShardedDataParallel (FSDP1) has flattened the weight of a layer."""
    if names := [one.name for one in layers if flattened(one.weight)]:
        raise ValueError(
            f"FullyShardedDataParallel has flattened the weights of {len(names)} sparse layers, the first {names[0]!r}: "
            "masks need whole matrices. Shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
        )


def other_run_on(optimizers: Sequence[Optimizer], own: Watched, runs: Iterable[Watched]) -> Watched | None:
    """Another of these runs that has some of the same weights and is attached to one of these optimizers."""
    weights = {id(weight) for weight in own.weights}
    for other in runs:
        attached = any(one is mine for one in other.attached for mine in optimizers)
        if other is not own and attached and any(id(weight) in weights for weight in other.weights):
            return other
    return None


def attach_error(optimizers: Sequence[Optimizer], layers: Sequence[SparseLayer], method: str, other: object) -> ValueError | None:
    """Why the optimizers cannot train these layers, as an error that has not been raised; None if they can.

    Args:
        other: another `Sparsity` of the same weights that one of the optimizers is attached to; None if there is none.
    """
    held = {id(weight) for one in optimizers for group in one.param_groups for weight in group["params"]}
    missing = [one.name for one in layers if one.weight.requires_grad and id(one.weight) not in held]
    if missing:
        return ValueError(
            f"the optimizer does not hold the weights of {len(missing)} sparse layers, the first {missing[0]!r}: build it "
            "from model.parameters() after sparsify_ (and after wrapping the model), or freeze these layers, or exclude them"
        )
    for one in optimizers:
        if (reason := why_not_followed(one, method)) is not None:
            return ValueError(reason)
    if other is not None:
        return ValueError(
            f"this optimizer is attached to another Sparsity of the same weights ({other!r}): end that with finalize_, or "
            "call its detach()"
        )
    return None
