"""Bad values by type hints, for public functions and all options of the command line: an error of ours, nothing changed."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import bisparse
from attack.found import Found, attempt, bits, run_command, tree
from attack.jobs import model_and_data
from bisparse.solvers import SOLVERS

__all__ = ["attack"]

MODULES = (
    "checkpoint",
    "pruning",
    "training",
    "accelerate",
    "report",
    "layers",
    "scores",
    "tiles",
    "diversity",
    "pattern",
    "solution",
    "_solve",
)
LEFT_OUT = {
    "MVUELinear",
    "PackedLinear",
    "SparseLinear",
    "remove_journal",
    "measure_linear",
    "advise",
    "stored_grids",
    "usable_backends",
}
"""Modules that bisparse makes of others; what deletes what it is given, or measures for a long time."""


@cache
def functions() -> list[Callable[..., Any]]:
    """Every public function and class that can be called."""
    found = {}
    for name in MODULES:
        module = import_module(f"bisparse.{name}")
        for one in module.__all__:
            item = getattr(module, one)
            ours = callable(item) and getattr(item, "__module__", "").startswith("bisparse") and not inspect.isabstract(item)
            error = inspect.isclass(item) and issubclass(item, BaseException)
            if one not in LEFT_OUT and ours and not error:
                found[f"{item.__module__}.{item.__qualname__}"] = item
    return [found[name] for name in sorted(found)]


def a_model() -> nn.Module:
    return model_and_data()[0].train()


def good(choose: random.Random, folder: Path) -> dict[str, Callable[[], Any]]:
    """A plausible value for a parameter of that name."""
    weight = torch.randn(16, 16)
    return {
        "model": a_model,
        "module": lambda: nn.Linear(16, 16),
        "pattern": lambda: choose.choice(["2:4", "4:8-T", "2:4-T", bisparse.Pattern(2, 4)]),
        "scores": lambda: weight.abs(),
        "weight": lambda: weight,
        "tensor": lambda: weight,
        "matrix": lambda: weight,
        "target": lambda: weight,
        "mask": lambda: weight > 0,
        "batches": lambda: [torch.randn(8, 48)] * 2,
        "batch": lambda: torch.randn(8, 48),
        "m": lambda: 4,
        "n": lambda: 2,
        "shape": lambda: (16, 16),
        "rows": lambda: 16,
        "columns": lambda: 16,
        "text": lambda: "2:4",
        "method": lambda: choose.choice(["magnitude", "wanda", "adaprune"]),
        "solver": lambda: choose.choice(list(SOLVERS)),
        "source": lambda: folder / "model",
        "path": lambda: folder / "model",
        "folder": lambda: folder / "model",
        "name": lambda: "layer",
        "progress": lambda: None,
        "group": lambda: None,
        "forward": lambda: None,
    }


def bad_tensors(choose: random.Random) -> list[Callable[[], Tensor]]:
    shape = choose.choice([(0, 4), (4,), (), (16, 16), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1, 1), (48, 48)])
    return [
        lambda: torch.full(shape, float("nan")),
        lambda: torch.full(shape, float("-inf")),
        lambda: -torch.ones(shape),
        lambda: torch.ones(
            shape, dtype=choose.choice([torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float16, torch.int32])
        ),
        lambda: torch.ones(shape).to(torch.float8_e4m3fn),
        lambda: torch.ones(shape, device="meta"),
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.ones(shape, requires_grad=True),
        lambda: torch.ones(()).expand(shape),
        lambda: torch.full(shape, 1e38),
        lambda: torch._neg_view(torch.ones(shape)),
        lambda: nn.Parameter(torch.ones(shape)),
        lambda: torch.full(shape, 1e-45),
        lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        lambda: torch.ones(3, 5).to_mkldnn(),
    ]


def bad_models(choose: random.Random) -> list[Callable[[], nn.Module]]:
    def of(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            model = a_model()
            change(model)
            return model

        return make

    def fill(value: float) -> Callable[[nn.Module], Any]:
        return lambda model: model.blocks[1][0].weight.data.fill_(value)

    return [
        nn.Identity,
        lambda: nn.Linear(0, 4),
        lambda: nn.Linear(4, 4, device="meta"),
        lambda: nn.Sequential(),
        of(fill(float("nan"))),
        of(fill(0.0)),
        of(fill(1e38)),
        lambda: a_model().to("meta"),
        lambda: a_model().to(torch.float16),
        lambda: a_model().to(torch.complex64),
        of(lambda model: torch.nn.utils.parametrizations.weight_norm(model.blocks[0][0])),
        lambda: torch.nn.LazyLinear(4),
        of(lambda model: bisparse.sparsify_(model, "2:4")),
        of(lambda model: bisparse.prune_(model, "2:4-T")),
        of(lambda model: torch.nn.utils.prune.l1_unstructured(model.blocks[2][0], "weight", 0.5)),
        lambda: nn.Embedding(4, 4),
    ]


NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**63, -(2**70), 10**6, 3]
FLOATS: list[Any] = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308, 5e-324, 1.5, 10**400, -0.0]
TEXTS: list[Any] = [
    "",
    " ",
    "x",
    "2:4",
    "4:2",
    "0:4",
    "2:4-T ",
    "1:99999-T",
    "2:4-t",
    "50%",
    "101%",
    "nan%",
    "\x00",
    "\x1b[2J",
    "re:(",
    "*",
    "../x",
    "ä" * 300,
    "mean",
    "2:4:8",
    "-1:4",
    "٢:٤",
    "1e9:2",
    "cuda:99",
    "meta",
    "\ud800",
]


def bad(hint: Any, choose: random.Random, folder: Path) -> tuple[Any, bool]:
    """A value of the hinted Python type that is likely to be wrong; and whether it is of another type."""
    if choose.random() < 0.15:
        return choose.choice(
            [None, object(), [], {}, (), 1j, b"2:4", "x", 7, 0.5, lambda *_: None, torch.ones(2), Path("x"), int]
        ), True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return bad(choose.choice([one for one in inner if one is not type(None)] or inner), choose, folder)
    if origin is typing.Literal:
        return choose.choice(TEXTS), False
    if origin is typing.Annotated:
        return bad(inner[0], choose, folder)
    if isinstance(hint, type):
        for kind, make in (
            (bool, lambda: choose.random() < 0.5),
            (int, lambda: choose.choice(NUMBERS)),
            (float, lambda: choose.choice(FLOATS)),
            (str, lambda: choose.choice(TEXTS)),
            (Path, lambda: folder / choose.choice(["absent", "model", "file", "", "x" * 300, "model/model.safetensors"])),
            (nn.Module, lambda: choose.choice(bad_models(choose))()),
            (Tensor, lambda: choose.choice(bad_tensors(choose))()),
            (torch.dtype, lambda: choose.choice([torch.int8, torch.complex64, torch.bool])),
            (torch.device, lambda: torch.device(choose.choice(["meta", "cuda:63", "xpu"]))),
        ):
            if issubclass(hint, kind):
                return make(), False
    if origin is None and "Tensor" in str(hint):  # jaxtyping's shapes
        return choose.choice(bad_tensors(choose))(), False
    if origin is not None and isinstance(origin, type):
        if issubclass(origin, Mapping):
            return {
                str(bad(str, choose, folder)[0]) if choose.random() < 0.5 else "blocks.*": bad(inner[-1], choose, folder)[0]
            }, True
        if issubclass(origin, tuple):
            return tuple(bad(one, choose, folder)[0] for one in inner if one is not Ellipsis), True
        if hasattr(origin, "__iter__"):
            return [bad(one, choose, folder)[0] for one in inner * choose.randrange(3)], True
    return choose.choice([None, "x", -1, [], {}]), True


def snapshot(value: Any) -> Any:
    if isinstance(value, nn.Module):
        with contextlib.suppress(Exception):
            return (
                {name: bits(one) if not one.is_meta else one.shape for name, one in value.state_dict(keep_vars=True).items()},
                [
                    (name, type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks))
                    for name, one in value.named_modules()
                ],
                [one.requires_grad for one in value.parameters()],
            )
    return None


def _function(found: Found, folder: Path, choose: random.Random) -> None:
    function = choose.choice(functions())
    try:
        signature, hints = (
            inspect.signature(function),
            typing.get_type_hints(function.__init__ if inspect.isclass(function) else function),
        )
    except (ValueError, NameError, TypeError):
        return
    plausible, names = (
        good(choose, folder) | ({"target": lambda: folder / "new"} if "source" in signature.parameters else {}),
        [one for one in signature.parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)],
    )
    if not names:
        return
    spoiled = set(choose.sample([one.name for one in names], min(len(names), choose.choice([1, 1, 2]))))
    arguments, other_types = {}, False
    for one in names:
        if one.name in spoiled:
            arguments[one.name], other = bad(hints.get(one.name, Any), choose, folder)
            other_types |= other
        elif one.name in plausible and one.default is one.empty:
            arguments[one.name] = plausible[one.name]()
        elif one.default is one.empty:
            arguments[one.name], other = bad(hints.get(one.name, Any), choose, folder)
            other_types |= other
    models = [value for value in arguments.values() if isinstance(value, nn.Module)]
    before = [snapshot(one) for one in models]
    positional = [arguments.pop(one.name) for one in names if one.kind is one.POSITIONAL_ONLY and one.name in arguments]
    shown = ", ".join(f"{name}={' '.join(repr(value).split())[:60]}" for name, value in arguments.items())
    with contextlib.redirect_stdout(io.StringIO()):
        worked, _ = attempt(
            found, f"{function.__qualname__}({shown})", lambda: function(*positional, **arguments), types_too=other_types
        )
    if not worked and [snapshot(one) for one in models] != before:
        found.add("half-changed", f"{function.__qualname__}({shown})")


def _bad_option(kind: Any, choose: random.Random, folder: Path) -> str:
    """A text for an option of that Python type."""
    if kind is int:
        return choose.choice(["-1", "0", "1", "3", "99999999999999999999", "x", "1.5", "", "٣"])
    if kind is float:
        return choose.choice(["nan", "inf", "-1", "0", "1e400", "x", "1e-320"])
    if kind is Path:
        return str(
            folder
            / choose.choice(
                [
                    "absent",
                    "file",
                    "model",
                    "new",
                    "pruned",
                    "x" * 300,
                    "model/model.safetensors",
                    "absent/deeper/x",
                    "pipe",
                    "link",
                ]
            )
        )
    return choose.choice(
        [text for text in TEXTS if "\x00" not in text and "\ud800" not in text]
        + ["layers.0.up=2:4", "*=linear", "*=groups:0", "=", "64x64", "0x0", "9x99999999"]
    )


def _options(found: Found, folder: Path, choose: random.Random) -> None:
    """A command with some of its options bad, from typer's own tree of commands."""
    from typer.main import get_command

    from bisparse.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    name = choose.choice(sorted(commands))
    plausible = {
        "source": "model",
        "target": "new",
        "path": "pruned",
        "pruned": "pruned",
        "subject": choose.choice(["model", "4:8-T"]),
        "model": choose.choice(["model", "64x64"]),
        "tokens": "64",
        "output": "page.html",
        "to": "2:4",
    }
    if name == "convert" or choose.random() < 0.2:
        plausible["source"] = "attack.jobs:model_and_data"
    parameters = [one for one in commands[name].params if not one.is_eager]
    spoiled = set(choose.sample([one.name for one in parameters], min(len(parameters), choose.choice([1, 1, 2, 3]))))
    arguments = []
    for one in parameters:
        if one.name in spoiled:
            value: list[str] = (
                [] if getattr(one, "is_flag", False) else [_bad_option(one.type_descriptor.annotation, choose, folder)]
            )
        elif one.name in plausible:
            value = [plausible[one.name]]
        else:
            continue
        arguments += value if one.param_type_name == "argument" else [max(one.opts, key=len), *value]
    before, existed = {path: tree(folder / path) for path in ("model", "pruned")}, (folder / "new").exists()
    code = run_command(found, [name, *arguments])
    for path, held in before.items():
        if tree(folder / path) != held:
            found.add("wrong", f"bisparse {name} {arguments}: changed {path}, which is not its output")
    if code == 2 and not existed and (folder / "new").exists():
        found.add("wrong", f"bisparse {name} {arguments}: wrong use, and an output was written")


def attack(seed: int, folder: Path) -> Found:
    """Eight calls of functions and three commands."""
    import os

    from attack.jobs import make_input

    found, choose = Found(), random.Random(seed)
    torch.manual_seed(seed)
    make_input(folder / "model", 0, layers=1)
    (folder / "file").write_text("no weights")
    (folder / "link").symlink_to(folder / "model")
    os.mkfifo(folder / "pipe")
    bisparse.prune_checkpoint(folder / "model", folder / "pruned", "2:4")
    for _ in range(8):
        torch.set_num_threads(1)
        _function(found, folder, choose)
    for _ in range(3):
        _options(found, folder, choose)
    return found
