"""A Linear forward and backward, sparse against dense: verify first, then time all in turns.

    python benchmarks/gpu/linear.py [--shape 4096x14336] [--tokens 16384] [--grid] [--fresh] [--rehearse]

Weights are float32 under bfloat16 autocast, as in training; the sparse ones follow a 2:4-T mask of `sparsify_`. Outputs and
gradients are compared with the masked-dense layer's in float32 before anything is timed: what fails is not timed, and the exit
code is 1. Rows go to benchmarks/results/gpu.jsonl. With --grid, times over many sizes go into the package, for the advisor; a run
that is cut off goes on from benchmarks/results/gpu_grid.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, clocked, need_gpu, record_on, relative_error, take_turns
from torch import nn

from bisparse import accelerate_, sparsify_
from bisparse.accelerate import BackendError, Grid, GridPoint, Pass, SparseLinear, Timing, measure_linear, usable_backends
from bisparse.accelerate.backends import BACKENDS
from record import ROOT, commit, versions

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
TOKENS = 16384
TARGETS = {"sparse": 1.25, "sparse, MVUE": 1.4}
"""Dense time over sparse time, both passes, at least."""
GRID_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
GRID_TOKENS = (64, 512, 2048, 8192, 32768)
POINTS_A_WRITE = 15
TOLERANCE = 1e-2
"""Relative error that bfloat16 may make."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=size, action="append", help=f"out x in; default {SHAPES}")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--grid", action="store_true", help="measure the advisor's grid instead")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, by the reference backend; writes nothing")
    options = parser.parse_args()
    device = torch.device("cpu") if options.rehearse else need_gpu("linear.py")
    backends = (
        ["reference"]
        if options.rehearse
        else [name for name, reason in usable_backends(device).items() if reason is None and name != "reference"]
    )
    for name, reason in usable_backends(device).items():
        if reason is not None and not options.rehearse:
            print(f"{name} is left out: {reason}")
    if options.grid:
        write_grid(device, backends, options)
        return
    if options.rehearse:
        print("A rehearsal on the CPU by the reference backend: the times below say nothing about a GPU.")
    record = None if options.rehearse else record_on(device, options.results, options.fresh)
    failed = False
    for shape in options.shape or ([(64, 128)] if options.rehearse else SHAPES):
        tokens = 32 if options.rehearse else options.tokens
        key = {
            "benchmark": "linear",
            "shape": list(shape),
            "shape_text": f"{shape[0]}x{shape[1]}",
            "tokens": tokens,
            "dtype": "bfloat16",
        }
        layers = build(shape, backends, device)
        inputs, upstream = numbers(shape, tokens, device)
        errors = {name: verify(layer, inputs, upstream) for name, layer in layers.items()}
        for name in [name for name, error in errors.items() if error > TOLERANCE]:
            print(f"{name}, {shape}: relative error {errors[name]:.1e}: WRONG, not timed", file=sys.stderr)
            failed = True
            del layers[name]
        programs = {name: program(layer, inputs, upstream, device) for name, layer in layers.items()}
        times = take_turns(programs, 3 if options.rehearse else options.rounds)
        dense = sum(times["dense"][0])
        for name, ((forward, backward), spreads) in times.items():
            ratio, target = dense / (forward + backward), TARGETS.get(name.partition(" by ")[0])
            figures = {
                "forward_ms": forward,
                "backward_ms": backward,
                "spread": max(spreads),
                "speedup": ratio,
                "target": target,
                "error": errors[name],
                "metadata_layout": metadata_layout(layers[name], device),
            }
            if record is not None:
                record.add({**key, "contender": name}, figures)
            aim = "" if target is None else f" (target {target}x)"
            print(f"{shape[0]:>6} x {shape[1]:<6} {name:28} {forward:8.3f} + {backward:8.3f} ms  {ratio:5.2f}x{aim}")
    if failed:
        raise SystemExit(1)


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected out x in, such as 4096x14336")
    return int(found[1]), int(found[2])


def build(shape: tuple[int, int], backends: list[str], device: torch.device) -> dict[str, nn.Linear]:
    """The dense layer, and for each backend a sparse one, with and without a sparse weight gradient; the same weights."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], bias=False, device=device)
    layers = {"dense": dense}
    for backend in backends:
        for name, mvue in (("sparse", False), ("sparse, MVUE", True)):
            layer = nn.Linear(shape[1], shape[0], bias=False, device=device)
            layer.load_state_dict(dense.state_dict())
            sparsify_(layer, "2:4-T", include="*", mvue=mvue)
            report = accelerate_(layer, backend, include="*")  # type: ignore[arg-type]
            assert report.layers[0].backward, report
            layers[f"{name} by {backend}"] = layer
    return layers


def metadata_layout(layer: nn.Linear, device: torch.device) -> str | None:
    """The block in which the library orders the metadata of W; that it is not known means that every pass compresses anew."""
    if not isinstance(layer, SparseLinear):
        return None
    found = BACKENDS[layer.products.backend].metadata_layout(layer.out_features, layer.in_features, torch.bfloat16, device)
    return "not known" if found is None else f"{found.height} x {4 * found.width}"


def numbers(shape: tuple[int, int], tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    inputs = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
    return inputs, torch.randn(tokens, shape[0], device=device, dtype=torch.bfloat16, generator=generator)


def verify(layer: nn.Linear, inputs: torch.Tensor, upstream: torch.Tensor) -> float:
    """The largest relative error of output and gradients against the masked weight in float32; of an MVUE gradient, its bias."""
    weight = layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight.detach()
    output = forward(layer, inputs)
    inputs.grad = None
    layer.zero_grad()
    output.backward(upstream)
    (gradient,) = [one.grad for one in layer.parameters()]
    assert inputs.grad is not None and gradient is not None
    wide, up = inputs.detach().float(), upstream.float()
    errors = [relative_error(output.detach(), wide @ weight.t()), relative_error(inputs.grad, up @ weight)]
    exact = up.t() @ wide
    if "mvue" in repr(layer):
        # An estimate: noisy, but it must point where the gradient points, with slope one.
        slope = float((gradient.float() * exact).sum() / exact.square().sum())
        errors.append(max(0.0, abs(slope - 1) - 5 / inputs.shape[0] ** 0.5))
    else:
        errors.append(relative_error(gradient, exact))
    return max(errors)


def forward(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        output: torch.Tensor = layer(inputs)
    return output


def program(
    layer: nn.Linear, inputs: torch.Tensor, upstream: torch.Tensor, device: torch.device
) -> Callable[[], tuple[float, ...]]:
    """Both passes, timed apart."""

    def run() -> tuple[float, ...]:
        layer.zero_grad()
        inputs.grad = None
        made: list[torch.Tensor] = []
        return clocked(lambda: made.append(forward(layer, inputs)), lambda: made[0].backward(upstream), device=device)

    return run


def write_grid(device: torch.device, backends: list[str], options: argparse.Namespace) -> None:
    """Times over sizes and tokens, for `bisparse bench` on machines without this GPU.

    A row is on disk as soon as it is measured, and is not measured again: a run that was cut off goes on where it was.
    """
    sizes, many = ((64, 128), (8, 32)) if options.rehearse else (GRID_SIZES, GRID_TOKENS)
    record = None
    if not options.rehearse:
        record = record_on(device, options.results.with_name(f"{options.results.stem}_grid.jsonl"), options.fresh)
    points, left_out = [], 0
    kinds = ((True, True), (True, False), (False, False))
    # The largest first: they matter most, should the time end before the list does.
    cells = itertools.product(sizes[::-1], sizes[::-1], many[::-1], backends, kinds)
    for rows, columns, tokens, backend, (training, both_ways) in cells:
        key = {"benchmark": "grid", "rows": rows, "columns": columns, "tokens": tokens, "backend": backend}
        key |= {"training": training, "both_ways": both_ways, "dtype": "bfloat16"}
        row = record.find(key) if record is not None else None
        if row is None:
            try:
                timing = measure_linear(
                    (rows, columns), tokens, torch.bfloat16, device, backend,
                    training=training, both_ways=both_ways, rounds=3 if options.rehearse else 9,
                )  # fmt: skip
            except (BackendError, RuntimeError) as error:  # also out of memory; a shape that the library refuses
                print(f"{rows} x {columns}, {tokens} tokens, {backend}: {str(error).splitlines()[0]}", file=sys.stderr)
                left_out += 1
                continue
            if record is not None:
                record.add(key, asdict(timing))
        else:
            timing = Timing(Pass(**row["dense"]), Pass(**row["sparse"]))
        points.append(GridPoint(rows, columns, tokens, backend, training, both_ways, timing))
        if not options.rehearse and len(points) % POINTS_A_WRITE == 0:
            store(points, device)
    print(f"{len(points)} points, {left_out} left out")
    if points and not options.rehearse:
        print(f"written to {store(points, device).relative_to(ROOT)}")


def store(points: list[GridPoint], device: torch.device) -> Path:
    """Write the grid that the advisor reads; also of a run that may yet be cut off."""
    name = torch.cuda.get_device_name(device)
    about: dict[str, Any] = {"versions": versions(), "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    path = ROOT / "src" / "bisparse" / "accelerate" / "grids" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    Grid(name, "bfloat16", tuple(points), about).write(path)
    return path


if __name__ == "__main__":
    main()
