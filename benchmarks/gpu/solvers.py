"""Exact masks and packed operands on a GPU, against their targets, a device copy, and torch's own tile pruning.

    python benchmarks/gpu/solvers.py [--side 8192] [--fresh] [--rehearse]

Everything is verified first: certificates are recomputed by the judge, 2:4 masks and packed operands compared with the CPU's, bit
by bit. Contenders take turns; times are medians between CUDA events. Rows go to benchmarks/results/gpu_solvers.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from environment import clocked, need_gpu, record_on, take_turns
from torch import Tensor

from bisparse import Pattern, solve
from bisparse.kernels.exact import ops
from bisparse.kernels.sparse24 import pack
from record import RESULTS, Record, gaussian

PATTERNS = ("4:8-T", "8:16-T", "16:32-T")
DRIFT = 0.01
ROUNDS = 50
GREEDY_BY_MAGNITUDE = "largest_abs_values_greedy"
"""Torch's tile pruning by magnitude; its default prunes by signed value."""

Call = Callable[[], Any]


class Bench:
    """Times contenders of one side, and keeps rows; a rehearsal keeps none."""

    def __init__(self, device: torch.device, side: int, record: Record | None) -> None:
        self.device, self.side, self.record = device, side, record

    def take(self, pattern: str, dtype: str, contenders: dict[str, tuple[Call, dict[str, Any]]]) -> None:
        """Time what has no row yet."""
        place = {"benchmark": "gpu solvers", "pattern": pattern, "side": self.side, "dtype": dtype, "input": "gaussian"}
        new = {
            name: call
            for name, (call, _) in contenders.items()
            if self.record is None or self.record.find({**place, "contender": name}) is None
        }
        if not new:
            return
        programs = {name: lambda call=call: clocked(call, device=self.device) for name, call in new.items()}
        for name, (medians, spreads) in take_turns(programs, ROUNDS if self.record else 2).items():
            figures = {"time_ms": medians[0], "spread": spreads[0], **contenders[name][1]}
            if self.record is not None:
                self.record.add({**place, "contender": name}, figures)
            print(f"{pattern:8s} {dtype:9s} {name:32s} {medians[0]:8.4f} ms", flush=True)


def exact_masks(bench: Bench, scores: Tensor) -> None:
    """4:8-T, 8:16-T, 16:32-T of a float32 matrix: as users call it, the operator alone, and from a start that has drifted."""
    generator = torch.Generator().manual_seed(1)
    drifted = scores * (1 + DRIFT * torch.randn(scores.shape, generator=generator)).abs().to(scores.device)
    copied = torch.empty_like(scores)
    bench.take("copy", "float32", {"device copy": (lambda: copied.copy_(scores), {"share": None})})
    for pattern in PATTERNS:
        shape = Pattern.parse(pattern)
        assert isinstance(shape, Pattern)
        n, m = shape.n, shape.m
        solution = solve(scores, pattern).check()
        solve(drifted, pattern, warm_start=solution).check()
        certificate = solution.certificate
        assert certificate is not None
        start = certificate.u.int(), certificate.v.int(), certificate.exponent.int()
        figures = {"certified": True, "share": solution.retained}

        def operator(n: int = n, m: int = m) -> Any:
            return ops.exact_solve(scores, n, m, False)

        def warm(n: int = n, m: int = m, start: tuple[Tensor, Tensor, Tensor] = start) -> Any:
            return ops.exact_solve(drifted, n, m, False, start)

        contenders: dict[str, tuple[Call, dict[str, Any]]] = {
            "solve": (lambda pattern=pattern: solve(scores, pattern), figures),
            "operator": (operator, figures),
            f"operator, warm, {DRIFT:.0%} drift": (warm, figures),
        }
        bench.take(pattern, "float32", contenders)


def masks_and_packing(bench: Bench, weight: Tensor) -> None:
    """2:4-T of a bfloat16 matrix, alone and fused with packing, beside a copy of the same matrix and torch's tile pruning."""
    scores = weight.abs() if weight.is_cuda else weight.abs().float()
    on_cpu = ops.exact_mask(scores.cpu().float(), 2, 4, False)[0]
    assert torch.equal(ops.exact_mask(scores, 2, 4, False)[0].cpu(), on_cpu), "2:4 masks differ from the CPU's"
    packed = pack.pack_2to4_transposable(weight)
    for one, other in zip(packed, pack.pack_2to4_transposable(weight.cpu()), strict=True):
        assert torch.equal(one.cpu(), other), "packed operands differ from the specification's"
    mask, total = packed[0], scores.double().sum()
    figures = {"share": float(scores.double()[mask].sum() / total)}
    copied = torch.empty_like(weight)
    contenders: dict[str, tuple[Call, dict[str, Any]]] = {
        "device copy": (lambda: copied.copy_(weight), {"share": None}),
        "solve": (lambda: solve(scores, "2:4-T"), figures),
        "operator": (lambda: ops.exact_mask(scores, 2, 4, False), figures),
        "mask and pack": (lambda: pack.pack_2to4_transposable(weight), figures),
        "pack under a mask": (lambda: pack.pack_2to4(weight, mask), figures),
    }
    if weight.is_cuda:

        def torch_own() -> Any:
            return torch._sparse_semi_structured_tile(weight, algorithm=GREEDY_BY_MAGNITUDE, use_cutlass=True)

        try:
            own = float(torch_own()[0].double().abs().sum() / total)
        except RuntimeError as error:
            print(f"torch's tile pruning is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            assert own <= figures["share"] + 1e-6, "torch's tiles keep more than the optimum: the comparison is wrong"
            contenders["torch's tile pruning, packed"] = (torch_own, {"share": own})
    bench.take("2:4-T", "bfloat16", contenders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_solvers.jsonl")
    parser.add_argument("--fresh", action="store_true", help="start over, losing the rows there are")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU at a small size, and write nothing")
    options = parser.parse_args()
    if options.rehearse:
        device, side, record = torch.device("cpu"), 128, None
    else:
        device, side = need_gpu("solvers.py"), options.side
        record = record_on(device, options.results, options.fresh)
        try:
            record.environment["versions"]["triton"] = version("triton")
        except PackageNotFoundError:
            record.environment["versions"]["triton"] = "none: the reference ran"
    bench = Bench(device, side, record)
    matrix = gaussian(side, side)
    masks_and_packing(bench, matrix.bfloat16().to(device))
    exact_masks(bench, matrix.abs().to(device))


if __name__ == "__main__":
    main()
