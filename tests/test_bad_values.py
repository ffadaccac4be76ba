"""Bad values given to every public function and class: an error of ours or a Python type error, and a model that is unchanged.

Each public callable is called with good arguments, and then, one argument at a time, with bad values for its type hint. Whatever
is raised must be ValueError (our own types are such), TypeError, or what the callable's docstring names.
"""

import copy
import dataclasses
import inspect
import math
import typing
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse import tiles
from bisparse.accelerate import BackendError, LayerShape
from bisparse.layers import matrix_sides

MODULES = (
    "bisparse", "bisparse.solvers", "bisparse.results", "bisparse.layers", "bisparse.scores", "bisparse.tiles",
    "bisparse.pattern", "bisparse.verification",
    "bisparse.solution", "bisparse.pruning", "bisparse.training", "bisparse.diversity", "bisparse.accelerate",
    "bisparse.evaluation", "bisparse.quantization",
)  # fmt: skip

ALLOWED = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, BackendError)
"""Wrong values; wrong Python types; a path that is none, as Python says it."""

NUMBERS = [-1, 0, 2**40, 10**400, True, math.nan, math.inf, -math.inf, -0.5, 1.5, 1e-320]
TEXTS = ["", "no such thing", "\x00", "5:4", "2:4-no", "re:(", "[", "*" * 50]
TENSORS = [
    torch.empty(0),
    torch.empty(0, 4),
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(2, 3, 4, 5, 6, 7),
    torch.full((16, 16), math.nan),
    torch.full((16, 16), math.inf),
    torch.full((16, 16), -1.0),
    torch.full((16, 16), 1e30),
    torch.zeros(16, 16, dtype=torch.complex64),
    torch.zeros(16, 16, dtype=torch.bool),
    torch.ones(16, 16, dtype=torch.bool),
    torch.zeros(16, 16, dtype=torch.int64),
    torch.zeros(16, 16, dtype=torch.uint8),
    torch.zeros(16, 16).to(torch.float8_e4m3fn),
    torch.zeros(16, 16, device="meta"),
    torch.eye(16).to_sparse(),
    torch.ones(16, 16).to_mkldnn(),
]
OTHERS: list[Any] = [
    None,
    [],
    {},
    (),
    {"no such layer": "2:4"},
    ["no such layer"],
    {"0": "5:4"},
    {"0": None},
    object(),
    b"2:4",
    1j,
    torch.ones(2),
]


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))


def layer_problem() -> Any:
    torch.manual_seed(4)
    from bisparse.pruning import LayerProblem

    return LayerProblem("0", torch.randn(1, 16, 16), bisparse.Pattern(2, 4))


def one_mask() -> Any:
    return bisparse.solve(torch.rand(16, 16), "2:4-T").mask


def good_values(name: str, hint: str, folder: Path) -> Any:
    """A value that a parameter of this name accepts; what is not here has a default."""
    made: dict[str, Callable[[], Any]] = {  # only when asked for
        **dict.fromkeys(("model", "module", "student", "other"), model), **dict.fromkeys(("mask", "kept"), one_mask),
        "problem": layer_problem, "solution": lambda: bisparse.solve(torch.rand(16, 16), "2:4-T"),
        **dict.fromkeys(("target", "base"), lambda: torch.randn(16, 16) * one_mask()),
    }  # fmt: skip
    if name in made:
        return made[name]()
    known: dict[str, Any] = {
        "pattern": "2:4-T", "origin": "4:8", "m": 4, "n": 2, "fraction": 0.5,
        "example": torch.randn(4, 16), "batch": torch.randn(4, 16), "batches": [torch.randn(8, 16) for _ in range(6)],
        "scores": torch.rand(16, 16), "weight": torch.randn(16, 16),
        "zeros": 0.8, "layout": bisparse.tiles.Layout(), "shape": (16, 16), "folder": folder, "source": folder,
        "path": folder, "text": "linear" if "Layout" in hint else "2:4", "name": "0", "chosen": "0", "method": "magnitude",
        "tensor": torch.rand(16, 16),
        "total_steps": 100, "rate": 0.1, "matrices": torch.rand(1, 16, 16), "output": folder / "out",
        "activations": torch.rand(8, 16),
        "reason": "", "kind": bisparse.tiles.LayoutKind.LINEAR, "inputs": torch.rand(8, 16), "norm": torch.rand(16),
        "gradient": torch.randn(16, 16),
        "doing": "pruning", "layouts": {"0": "linear"}, "patterns": {"0": "2:4"}, "solver": "exact",
        "tiles": torch.rand(16, 4, 4), "multiple": 4, "layer": "0", "parameter": "weight", "structure": "2:4",
        "a": torch.randn(2, 16), "b": torch.randn(16, 2), "scaling": 1.0,
        "input_norms": torch.rand(16),
        "shapes": [LayerShape("0", (64, 64))], "ids": torch.arange(64), "rank": 2,
        "dense": torch.randn(16, 16),
        "ndim": 2, "matrix": torch.rand(16, 16), "remainder": "pad", "included": None, "excluded": False, "size": (16, 16),
        "scheme": "int8", "bits": 8, "labels": torch.zeros(8, dtype=torch.int64),
        "choices": {"0": 1},
        "generator": None, "tokens": 8, "rows": 16, "columns": 16, "side": 4,
    }  # fmt: skip
    return known.get(name, inspect.Parameter.empty)


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    seen = set()
    for module_name in MODULES:
        module = import_module(module_name)
        for name in module.__all__:
            one = getattr(module, name)
            if not callable(one) or isinstance(one, typing._GenericAlias) or id(one) in seen:  # type: ignore[attr-defined]
                continue
            if inspect.isclass(one) and (
                inspect.isabstract(one) or issubclass(one, BaseException) or getattr(one, "_is_protocol", False)
            ):
                continue
            seen.add(id(one))
            yield f"{module_name}.{name}", one


CALLABLES = dict(callables())
RECORDS = (
    "LayerResult", "PruneReport", "MaskChange", "MergedAdapter", "PatternViolation", "PermutationReport", "Pruned", "Statistics",
    "Layer", "Skipped", "Kind", "Certificate", "Violation", "Verification", "MaskDiversity", "Hardware", "FileEvidence",
    "Sparsity",
    "LayerProblem", "Solution", "GPU", "PermutedSpace", "write_report",
    "AcceleratedLayer", "AccelerationReport", "Advice", "DevicePrediction", "Grid", "GridPoint", "LayerAdvice", "LayerPrediction",
    "PackedLinear", "Pass", "SparseLinear", "Timing", "LayerShape", "Agreement", "Classification", "Perplexity", "Similarity",
    "TaskResults", "QuantizationReport", "QuantizedLayer", "stored_values", "Guarantee", "load_accelerated_",
    "prune_checkpoint", "verify_checkpoint", "save", "load", "Statistic", "Phase", "LayoutKind", "MVUELinear",
)  # fmt: skip
"""What functions return, or make for the caller to read: their fields are no arguments; files have their own tests."""


def bad_values(hint: str) -> list[Any]:
    found: list[Any] = [*OTHERS]
    if any(word in hint for word in ("int", "float", "Number")):
        found += NUMBERS
    if any(word in hint for word in ("str", "Filter", "Path", "Literal", "Structure", "Pattern", "Method", "Solver", "Order")):
        found += TEXTS
    if any(word in hint for word in ("Tensor", "Float[", "Real[", "Shaped[", "Bool[", "Int[", "Any")):
        found += TENSORS
    if "Iterable" in hint or "Sequence" in hint:
        found += [[one] for one in TENSORS]
    return found


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, nn.Module):
        return True
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and one.training == other.training and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )  # fmt: skip


def arguments(function: Callable[..., Any], folder: Path) -> tuple[dict[str, inspect.Parameter], dict[str, Any]] | None:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:
        return None
    good = {}
    for name, parameter in parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        if parameter.default is inspect.Parameter.empty:
            good[name] = good_values(name, str(parameter.annotation), folder)
            if good[name] is inspect.Parameter.empty:
                return None
    return parameters, good


@pytest.mark.parametrize("where", [name for name in CALLABLES if name.rsplit(".", 1)[1] not in RECORDS])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_bad_value_is_refused_in_our_own_words_and_changes_nothing(where: str, every: int, tmp_path: Path) -> None:
    function = CALLABLES[where]
    torch.save(model().state_dict(), tmp_path / "weights.pt")
    prepared = arguments(function, tmp_path)
    if prepared is None:
        pytest.skip("a required argument has no good value in the table")
    parameters, good = prepared
    foreign, changed = [], []
    for name, parameter in parameters.items():
        if name in ("progress", "device", "group", "resume") or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        for bad in bad_values(str(parameter.annotation))[zlib.crc32(f"{where}{name}".encode()) % every :: every]:
            given = {key: copy.deepcopy(value) for key, value in good.items()} | {name: bad}
            before = copy.deepcopy({key: value for key, value in given.items() if isinstance(value, nn.Module)})
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**given)
                continue  # some values are as good as others
            except ALLOWED:
                pass
            except Exception as error:  # noqa: BLE001
                if isinstance(error, AttributeError) and any(bad is one for one in OTHERS):
                    continue  # a wrong Python type, not a bad value
                foreign.append(f"{name}={described(bad)}: {type(error).__name__}: {str(error)[:120]}")
            changed += [f"{name}={described(bad)}" for key, value in before.items() if not same(given[key], value)]
    assert not foreign, f"{len(foreign)} foreign exceptions:\n" + "\n".join(foreign)
    assert not changed, f"a half-changed model after: {changed}"


def described(bad: Any) -> str:
    if isinstance(bad, Tensor):
        return f"{tuple(bad.shape)} {bad.dtype} {bad.layout} {bad.device}"
    return f"[{described(bad[0])}]" if isinstance(bad, list) and bad else repr(bad)[:60]


def test_the_table_reaches_most_of_what_is_public(tmp_path: Path) -> None:
    names = [name for name in CALLABLES if name.rsplit(".", 1)[1] not in RECORDS]
    out = [name for name in names if arguments(CALLABLES[name], tmp_path) is None]
    assert len(out) <= len(names) // 7, out


def test_dataclasses_of_settings_refuse_bad_numbers() -> None:
    """Settings with a range: each bad number is refused when the object is made, not later."""
    for name, kind in CALLABLES.items():
        if name.rsplit(".", 1)[1] in RECORDS or not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
            continue
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING or not isinstance(field.default, int | float):
                continue
            with pytest.raises((ValueError, TypeError)):
                kind(**{field.name: "x"})
            if not isinstance(field.default, bool):
                with pytest.raises((ValueError, TypeError)):
                    kind(**{field.name: math.nan})


TAKES_MODELS = sorted(
    name for name, one in CALLABLES.items() if inspect.isfunction(one) and "model" in inspect.signature(one).parameters
)
MAPPINGS = sorted(
    (name, argument)
    for name, one in CALLABLES.items()
    if inspect.isfunction(one)
    for argument in ("patterns", "layouts")
    if argument in inspect.signature(one).parameters
)


@pytest.mark.parametrize("where", TAKES_MODELS)
@pytest.mark.parametrize("bad", [None, "model", {}, nn.Linear], ids=str)
def test_what_is_no_model_is_refused_in_our_own_words(where: str, bad: Any, tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "weights.pt")
    parameters = inspect.signature(CALLABLES[where]).parameters
    given = {
        name: good_values(name, str(one.annotation), tmp_path)
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
    with pytest.raises((TypeError, ValueError), match=r"torch module"):
        CALLABLES[where](**given | {"model": bad})


@pytest.mark.parametrize(("where", "argument"), MAPPINGS)
@pytest.mark.parametrize("bad", ["2:4", "linear", ["0"], 5])
def test_patterns_and_layouts_that_are_no_mappings_are_refused(where: str, argument: str, bad: Any, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    torch.save(model().state_dict(), source / "weights.pt")
    parameters = inspect.signature(CALLABLES[where]).parameters
    if bad == ["0"] and "budget" in parameters:
        pytest.skip("with a budget, patterns= is a list")
    given = {
        name: good_values(name, str(one.annotation), source)
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
    given |= {"target": tmp_path / "out"} if "target" in parameters else {}
    given |= {"folder": tmp_path / "out"} if "folder" in parameters else {}
    given |= {"pattern": "2:4"} if "pattern" in parameters and where != "bisparse.quantization.quantize_" else {}
    given |= {"folder": source} if where == "bisparse.accelerate.load_accelerated_" else {}
    given |= {"target": model()} if where == "bisparse.verify" else {}
    with pytest.raises((TypeError, ValueError), match=r"expected a mapping|is no layout|patterns="):
        CALLABLES[where](**given | {argument: bad})


@pytest.mark.parametrize("bad", [None, "linear", tiles.LayoutKind.LINEAR, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: tiles.to_matrices(torch.ones(4, 4), bad),
        lambda bad: tiles.from_matrices(torch.ones(1, 4, 4), bad, (4, 4)),
        lambda bad: tiles.kernel_positions((4, 4), bad),
        lambda bad: matrix_sides(torch.ones(4, 4), bad),
    ],
)
def test_a_layout_of_another_type_is_refused(call: Callable[[Any], Any], bad: Any) -> None:
    with pytest.raises(TypeError, match="layout must be a Layout"):
        call(bad)


@pytest.mark.parametrize(
    "fields",
    [("sideways",), (None,), ("linear", 2), ("linear", 1, 3), ("conv", 0), ("packed", 1, 0), ("packed", 1, -1), ("experts", 4)],
)
def test_a_layout_that_cannot_be_is_not_made(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="Layout"):
        tiles.Layout(*fields)
    assert tiles.Layout("conv", 2).kind is tiles.LayoutKind.CONV


@pytest.mark.parametrize("call", ["save", "load", "report", "state"])
def test_saving_and_loading_refuse_wrong_types(call: str, tmp_path: Path) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: bisparse.save(None, tmp_path / "out", "2:4"),  # type: ignore[arg-type]
        "load": lambda: bisparse.load(None, tmp_path),  # type: ignore[arg-type]
        "report": lambda: bisparse.save(model(), tmp_path / "out", report="2:4"),  # type: ignore[arg-type]
        "state": lambda: bisparse.save(model(), tmp_path / "out", "2:4", state="x"),  # type: ignore[arg-type]
    }
    with pytest.raises((TypeError, ValueError), match=r"torch module|expected"):
        calls[call]()
    assert not (tmp_path / "out").exists()
