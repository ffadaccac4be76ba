"""Queries about an optimizer in sparse training: which weights it has, and whether it takes this step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from bisparse.training.layer import SparseLayer

__all__ = [
    "after_each_step",
    "around_each_step",
    "divides_gradients",
    "flattened",
    "held_by",
    "learning_rate",
    "skipped_by_scaler",
    "unwrapped",
    "why_not_followed",
]


class Held(NamedTuple):
    """A sparse layer whose weight is in an optimizer."""

    layer: SparseLayer
    weight: Tensor
    """The parameter, looked up once."""
    group: dict[str, Any]
    """Its parameter group."""


def held_by(optimizer: Optimizer, layers: Iterable[SparseLayer]) -> list[Held]:
    """Those of `layers` whose weight is currently in the optimizer; groups may change at any step."""
    groups = {id(held): group for group in optimizer.param_groups for held in group["params"]}
    pairs = ((layer, layer.weight) for layer in layers)
    return [Held(layer, weight, group) for layer, weight in pairs if (group := groups.get(id(weight))) is not None]


def divides_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides gradients by their size, by settings of its groups that such optimizers have.

    "betas": Adam, Lion; "eps": RMSprop, Adagrad, Adadelta, Adafactor, Muon; "etas": Rprop.
    """
    return any(name in group for group in optimizer.param_groups for name in ("betas", "eps", "etas"))


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """The learning rate of a parameter group; 1 for an optimizer that has none, or computes it, as Adafactor may."""
    rate: float | Tensor | None = group.get("lr")
    return 1.0 if rate is None else rate


def why_not_followed(optimizer: Optimizer, method: str) -> str | None:
    """Why sparse training cannot follow an optimizer; None if it can."""
    kind = type(optimizer).__name__
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return f"{kind} has no step hooks: its __init__ must call super().__init__(params, defaults) of torch.optim.Optimizer"
    if method == "sr-ste" and any(group.get("lr") is None for group in optimizer.param_groups):
        return f'method="sr-ste" decays by the learning rate, and a parameter group of {kind} has no "lr": use "masked-decay"'
    return None


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps, inside wrappers such as accelerate's, Lookahead or SAM, which have it as an attribute.

    An inner optimizer of only some of the weights, as in ZeroRedundancyOptimizer, is not unwrapped.
    """
    while (inner := _inner(optimizer)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"attach() needs a torch.optim.Optimizer, not {type(optimizer).__name__}")
    return optimizer


def _inner(outer: Any) -> Optimizer | None:
    held = _weights_of(outer)
    found = [one for one in vars(outer).values() if isinstance(one, Optimizer)] if hasattr(outer, "__dict__") else []
    return next((one for one in found if one is not outer and _weights_of(one) >= held), None)


def _weights_of(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None)
    return {id(weight) for group in groups for weight in group["params"]} if isinstance(groups, list) else set()


def after_each_step(outer: Any, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` after each step of an optimizer's wrapper, which may have no step hooks; returns a function to undo it."""
    step, on = outer.step, True

    @functools.wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if on:
            then()
        return result

    def undo() -> None:
        nonlocal on
        on = False
        if vars(outer).get("step") is stepped:  # a learning rate scheduler may have wrapped it since
            outer.step = step

    outer.step = stepped
    return undo


def around_each_step(
    optimizer: Optimizer,
    before: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None],
    after: Callable[[], None],
) -> list[Callable[[], None]]:
    """Call `before` and `after` around each step of an optimizer; returns functions to undo it.

    torch calls step hooks again where a `step` calls that of its base class, which is then a part of the same step.
    """
    runs = nested = False

    def pre(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal runs, nested
        if runs and _steps_in_progress(optimizer) > 1:
            nested = True
            return None
        runs, nested = True, False  # if it was True, the last step has raised an error
        return before(args, kwargs)

    def post(*_: object) -> None:
        nonlocal runs
        if nested and _steps_in_progress(optimizer) > 1:
            return
        runs = False
        after()

    return [optimizer.register_step_pre_hook(pre).remove, optimizer.register_step_post_hook(post).remove]


def _steps_in_progress(optimizer: Optimizer) -> int:
    """The calls of an optimizer's `step` that this code is in, by the frames of torch's function around it."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        around = frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer"
        count += around and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count


def flattened(weight: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has made a weight part of a flat parameter."""
    return hasattr(weight, "_fsdp_flattened") or not isinstance(weight, nn.Parameter)


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether GradScaler makes a fused optimizer skip this step; it does not call other optimizers in that case."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
