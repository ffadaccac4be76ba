"""Models whose n-th step fails: functions with a trailing underscore, and `load`, leave the model as it was, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bisparse
from attack.found import Found, bits, is_domain_error, where
from bisparse.pruning import AdaPrune, BlockReconstruction, fold_batch_norms_, permute_, reestimate_batch_norms_
from bisparse.training import merge_lora_

__all__ = ["attack", "everything"]


class Stop(BaseException):
    """No Exception, as KeyboardInterrupt: nothing catches it by accident."""


class Broken(RuntimeError):
    """What a user's hook or setter raises."""


class Net(nn.Module):
    """A chain of blocks with batch norms, a dropout, a frozen parameter, gradients, hooks and one layer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.1))
            for _ in range(2)
        )
        self.unused = nn.Parameter(torch.tensor([float("nan"), -0.0]))
        self.blocks[0][0].weight.requires_grad_(False)
        self.blocks[1][3].weight.grad = torch.ones(16, 16)
        self.blocks[1][0].register_forward_hook(lambda *_: None)
        self.blocks[1][3].eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Adapted(nn.Module):
    """A layer as peft leaves it: a base and A, B in dictionaries."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.scaling, self.active_adapters, self.merged = {"default": 0.5}, ["default"], False
        self.use_dora = {"default": False}

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def everything(model: nn.Module) -> Any:
    """All that a user could see of a model, and the next random number."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (bits(one), one.requires_grad, None if one.grad is None else bits(one.grad)) for name, one in tensors.items()},
        list(model.state_dict()),
        [
            (
                name,
                type(one),
                one.training,
                tuple(one._forward_hooks),
                tuple(one._forward_pre_hooks),
                tuple(one._backward_hooks),
                tuple(one._state_dict_hooks),
                tuple(one._load_state_dict_pre_hooks),
                sorted(vars(one)),
            )
            for name, one in model.named_modules(remove_duplicate=False)
        ],
        bits(torch.get_rng_state()),
    )


Job = Callable[[nn.Module, list[Tensor], Path], Any]
BEFORE: dict[str, Callable[[nn.Module], Any]] = {
    "finalize_": lambda model: bisparse.sparsify_(model, "2:4-T"),
    "finalize_ static": lambda model: bisparse.sparsify_(model, "2:4", mode="static"),
    "accelerate_": lambda model: bisparse.prune_(model, "2:4-T"),
    "accelerate_ in eval mode": lambda model: bisparse.prune_(model.eval(), "2:4-T"),
    "sparsify_ static again": lambda model: bisparse.prune_(model, "4:8"),
    "fold_batch_norms_": lambda model: model.eval(),
    "merge_lora_": lambda model: _adapt(model),
    "merge_lora_ new mask": lambda model: _adapt(model),
}
JOBS: dict[str, Job] = {
    "prune_": lambda model, data, _: bisparse.prune_(model, "2:4-T"),
    "prune_ Wanda": lambda model, data, _: bisparse.prune_(model, "2:4", "wanda", data),
    "prune_ AdaPrune": lambda model, data, _: bisparse.prune_(model, "2:4", AdaPrune(), data),
    "prune_ SparseGPT parallel": lambda model, data, _: bisparse.prune_(model, "4:8-T", "sparsegpt", data, order="parallel"),
    "prune_ ALPS": lambda model, data, _: bisparse.prune_(model, "2:4", bisparse.ALPS(iterations=3), data),
    "prune_ blocks": lambda model, data, _: bisparse.prune_(
        model, "2:4", AdaPrune(), data, reconstruction=BlockReconstruction(epochs=2)
    ),
    "prune_ journal": lambda model, data, folder: bisparse.prune_(model, "2:4", AdaPrune(), data, resume=folder / "journal"),
    "convert_": lambda model, data, _: bisparse.convert_(model, "2:4", None, data),
    "convert_ regrow": lambda model, data, _: bisparse.convert_(model, "2:4", None, data, regrow=True),
    "sparsify_": lambda model, *_: bisparse.sparsify_(model, "2:4-T"),
    "sparsify_ mvue": lambda model, *_: bisparse.sparsify_(model, "2:4-T", mvue=True),
    "sparsify_ static": lambda model, *_: bisparse.sparsify_(model, "2:4", mode="static"),
    "sparsify_ static again": lambda model, *_: bisparse.sparsify_(model, "2:4", mode="static"),
    "finalize_": lambda model, *_: bisparse.finalize_(model),
    "finalize_ static": lambda model, *_: bisparse.finalize_(model),
    "accelerate_": lambda model, *_: bisparse.accelerate_(model, "reference"),
    "accelerate_ in eval mode": lambda model, *_: bisparse.accelerate_(model, "reference"),
    "merge_lora_": lambda model, *_: merge_lora_(model, "2:4"),
    "merge_lora_ new mask": lambda model, *_: merge_lora_(model, "2:4-T", new_mask=True),
    "permute_": lambda model, data, _: permute_(model, "2:4", data[0], steps=2, rounds=1),
    "fold_batch_norms_": lambda model, data, _: fold_batch_norms_(model, data[0]),
    "reestimate_batch_norms_": lambda model, data, _: reestimate_batch_norms_(model, data),
    "load": lambda model, data, folder: bisparse.load(model, folder / "saved"),
}


def _adapt(model: nn.Module) -> None:
    bisparse.prune_(model, "2:4")
    for block in model.blocks:
        for at in (0, 3):
            block[at].requires_grad_(False)
            block[at] = Adapted(block[at])
            nn.init.normal_(block[at].lora_B["default"].weight)


POINTS: dict[str, list[tuple[Any, str]]] = {
    "setter": [(nn.Module, "__setattr__")],
    "deleter": [(nn.Module, "__delattr__")],
    "hook": [(nn.Module, "register_forward_hook"), (nn.Module, "register_forward_pre_hook")],
    "buffer": [(nn.Module, "register_buffer")],
    "parameter": [(nn.Module, "register_parameter")],
    "parametrization": [
        (torch.nn.utils.parametrize, "register_parametrization"),
        (torch.nn.utils.parametrize, "remove_parametrizations"),
    ],
    "write": [(Tensor, "copy_")],
    "mode": [(nn.Module, "train")],
    "forward": [(nn.Linear, "forward"), (nn.BatchNorm1d, "forward"), (nn.ReLU, "forward")],
    "gradient": [(Tensor, "requires_grad_")],
    "state": [(nn.Module, "load_state_dict"), (nn.Module, "state_dict")],
    "masked": [(Tensor, "masked_fill_"), (Tensor, "mul_"), (Tensor, "set_"), (Tensor, "zero_")],
}


@contextmanager
def failing(points: list[tuple[Any, str]], at: int, error: type[BaseException], after: bool) -> Iterator[list[Any]]:
    """The n-th call of any of these functions raises, before or after its work. Gives the errors raised; for -1, the count."""
    count, raised, originals = [0], [], [(owner, name, getattr(owner, name)) for owner, name in points]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] != at:
                return original(*args, **kwargs)
            if after:
                original(*args, **kwargs)
            raised.append(error)
            raise error("the n-th step")

        return call

    for owner, name, original in originals:
        setattr(owner, name, wrapped(original))
    try:
        yield count if at < 0 else raised
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class Failing:
    """A user's forward hook that raises at its n-th call."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.at:
            raise Broken("a hook of the user's")


def attack(seed: int, folder: Path) -> Found:
    """A job once to count its steps, then with steps of it failing; and with a hook of the model's own that fails."""
    found, choose = Found(), random.Random(seed)
    job = list(JOBS)[seed % len(JOBS)] if choose.random() < 0.5 else choose.choice(list(JOBS))
    kind = choose.choice([*POINTS, "hook of the model"])
    torch.manual_seed(seed)
    model, data = Net(), [torch.randn(12, 16) for _ in range(4)]
    if choose.random() < 0.2:
        model.blocks[1][2] = model.blocks[0][2]  # one module under two names
    if job == "load":
        other = copy.deepcopy(model)
        bisparse.prune_(other, "2:4")
        with torch.no_grad():
            other.unused.nan_to_num_()
        bisparse.save(other, folder / "saved", "2:4")
    if job in BEFORE:
        BEFORE[job](model)
    if kind == "hook of the model":
        _with_a_hook(found, job, model, data, folder, choose)
        return found
    points = POINTS[kind]
    counted = copy.deepcopy(model)
    with failing(points, -1, Stop, False) as count:
        JOBS[job](counted, data, folder)
    for at in sorted({choose.randint(1, count[0]) for _ in range(6)}) if count[0] else ():
        tried, after = copy.deepcopy(model), choose.random() < 0.5
        before, error = everything(tried), choose.choice([Stop, Broken, KeyboardInterrupt, MemoryError])
        held = dict(tried.named_parameters()) if choose.random() < 0.5 else {}
        what = f"{job}, {'after' if after else 'before'} call {at} of {count[0]} of {kind}, {error.__name__}"
        place = folder if job == "load" else folder / f"{at}"
        if _fails(found, what, lambda tried=tried, place=place: JOBS[job](tried, data, place), failing(points, at, error, after)):
            _compare(found, what, before, everything(tried))
            if any(one is not held[name] for name, one in tried.named_parameters() if name in held):
                found.add("half-changed", f"{what}: other parameters than those that an optimizer holds")
    return found


def _fails(found: Found, what: str, call: Callable[[], Any], failure: Any) -> bool:
    found.calls += 1
    try:
        with failure as raised:
            call()
    except (Stop, Broken, KeyboardInterrupt, MemoryError, ValueError):
        pass
    except RuntimeError as other:
        if not isinstance(other.__cause__ or other.__context__, Broken):
            found.add("foreign", f"{what}: {where(other)}")
    except BaseException as other:  # noqa: BLE001
        found.add("foreign", f"{what}: {where(other)}")
    else:
        if raised and not issubclass(raised[0], Exception):
            found.add("wrong", f"{what}: swallowed")
        return False  # a step that it can do without, such as trying a layer's forward pass
    return True


def _with_a_hook(found: Found, job: str, model: nn.Module, data: list[Tensor], folder: Path, choose: random.Random) -> None:
    for _ in range(4):
        tried, hook = copy.deepcopy(model), Failing(choose.randint(1, 12))
        module = choose.choice([one for one in tried.modules() if not list(one.children())])
        choose.choice([module.register_forward_hook, module.register_forward_pre_hook])(hook)
        before, what = everything(tried), f"{job}, hook of the model, call {hook.at}"
        found.calls += 1
        try:
            JOBS[job](tried, data, folder)
        except Exception as error:  # noqa: BLE001
            if hook.count < hook.at and not is_domain_error(error):
                found.add("foreign", f"{what}: {where(error)}")
            _compare(found, what, before, everything(tried))
            if (folder / "journal").exists():
                bisparse.pruning.remove_journal(folder / "journal")


def _compare(found: Found, what: str, before: Any, after: Any) -> None:
    parts = ("tensors", "names", "modules", "random numbers")
    if changed := [part for part, one, other in zip(parts, before, after, strict=True) if one != other]:
        detail = ""
        if "modules" in changed:
            detail = str([(one, other) for one, other in zip(before[2], after[2], strict=False) if one != other][:1])[:300]
        elif "tensors" in changed:
            detail = str([name for name in before[0] if before[0][name] != after[0].get(name)][:3])
        found.add("half-changed", f"{what}: {', '.join(changed)} {detail}")
