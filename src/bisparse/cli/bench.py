"""`bisparse bench`: how long mask search takes, for every solver, on a checkpoint's layers or on a matrix of a given size."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import (
    SOLVERS,
    AsJson,
    Excluded,
    Included,
    Threads,
    command,
    parse_pattern_option,
    parse_solver,
    print_json,
    progress_bar,
    set_threads,
    table,
    to_stdout,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bisparse.pattern import Structure
    from bisparse.tiles import Layout

__all__ = ["bench"]

LARGEST = 1 << 22
"""A layer of more weights is timed on its first rows, which is said."""


@command
def bench(
    subject: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|RxC", help="Weights to search on, or the size of a Gaussian matrix.")
    ] = "1024x1024",
    pattern: Annotated[str, typer.Option("--pattern", "-p", help="A transposable pattern, such as 4:8-T.")] = "4:8-T",
    solver: Annotated[
        list[str] | None,
        typer.Option("--solver", help=f"One of {', '.join(SOLVERS)}. May be repeated. Default: all that are installed."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of each, after one to warm up; the median counts.")] = 3,
    include: Included = None,
    exclude: Excluded = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time the mask search alone: no reading, no scoring, no proof. Shapes that occur more than once are timed once.

    The share is the score kept, of the best that is possible, which Exact proves.
    """
    import torch

    structure = parse_pattern_option(pattern)
    if not getattr(structure, "transposable", False):
        raise typer.BadParameter(
            f"{structure} needs no solver; choose a transposable pattern such as 4:8-T", param_hint="--pattern"
        )
    names = solver or [name for name in SOLVERS if name != "min-cost-flow" or _has_ortools()]
    for name in names:
        parse_solver(name)
    set_threads(threads)
    weights = list(_weights(subject, structure, include, exclude))
    results = []
    with progress_bar(show=not as_json) as progress:
        for number, (layer, scores, layout, note) in enumerate(weights):
            for place, name in enumerate(names):
                progress(f"{layer}: {name}", number * len(names) + place, len(weights) * len(names))
                results.append({"layer": layer, "note": note, **_measure(scores, structure, name, layout, repeat)})
    conditions = {
        "pattern": str(structure),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": "cpu",
        "repeat": repeat,
    }
    if as_json:
        print_json(
            {
                "ok": True,
                "measured": "mask search only, median seconds of solve(scores, pattern, solver)",
                **conditions,
                "results": results,
            }
        )
        return
    console = to_stdout()
    console.print(
        f"Mask search at {structure}, {conditions['threads']} CPU threads, median of {repeat} runs of solve(): "
        "no reading, no scoring, no proof.",
        markup=False,
    )
    rows = [
        (
            one["layer"] + (f" ({one['note']})" if one["note"] else ""),
            " x ".join(map(str, one["shape"])),
            one["solver"],
            f"{1000 * one['time_s']:,.2f}",
            f"{1e9 * one['time_s'] / one['weights']:,.1f}",
            f"{one['share']:.4%}",
        )
        for one in results
    ]
    console.print(table(("layer", " shape", "solver", " ms", " ns a weight", " of the optimum"), rows))


def _has_ortools() -> bool:
    import importlib.util

    return importlib.util.find_spec("ortools") is not None


def _weights(
    subject: str, pattern: Structure, include: list[str] | None, exclude: list[str] | None
) -> Iterator[tuple[str, Tensor, Layout | None, str]]:
    import torch

    if size := re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", subject):
        scores = torch.randn(int(size[1]), int(size[2]), generator=torch.Generator().manual_seed(0)).abs()
        yield "Gaussian, seed 0", scores, None, ""
        return
    if not Path(subject).exists():
        raise typer.BadParameter(f"{subject} is neither a checkpoint nor a size such as 1024x1024", param_hint="CHECKPOINT|RxC")
    from bisparse.checkpoint import plan_checkpoint
    from bisparse.checkpoint.streaming import bands
    from bisparse.scores import magnitude

    seen = set()
    for layer in plan_checkpoint(subject, pattern, include=include, exclude=exclude).layers:
        if (layer.tensor.shape, layer.layout) in seen:
            continue
        seen.add((layer.tensor.shape, layer.layout))
        if layer.tensor.size <= LARGEST:
            yield layer.name, magnitude(layer.tensor.read().view(layer.tensor.shape)), layer.layout, ""
        else:
            band = next(bands(layer.tensor, layer.layout, getattr(pattern, "m", 1), LARGEST))
            yield layer.name, magnitude(band.weight), band.layout, "its first rows"


def _measure(scores: Tensor, pattern: Structure, name: str, layout: Layout | None, repeat: int) -> dict[str, Any]:
    from bisparse.solve import solve
    from bisparse.solvers import Exact

    chosen = parse_solver(name)

    def search() -> Any:
        return solve(scores, pattern, chosen, layout=layout)

    solution = search()
    best = solve(scores, pattern, Exact(), layout=layout).value
    return {
        "shape": list(scores.shape),
        "weights": scores.numel(),
        "solver": name,
        "time_s": statistics.median(_seconds(search) for _ in range(repeat)),
        "share": solution.value / best if best > 0 else 1.0,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
