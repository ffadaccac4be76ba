"""The paper's reduction to min-cost flow, solved by OR-tools one tile at a time: the reference, and the baseline for speed.

A unit of flow from row i to column j keeps the entry (i, j), at cost -w_ij and capacity 1; each row sends N units and each
column takes N. For "at most N" an additional node, joined to all rows and columns at no cost, carries the unused flow.

Guarantee: optimal for the scores as rounded to integers: float32, float16 and bfloat16 to 24 bits of each tile's largest score,
half to even, as the exact solver does; float64, integers, and tiles whose scores span too wide a range for that, to 48 bits
(integers below 2**48 are as given, larger ones rounded down). OR-tools' costs must leave room in 64 bits.
Cost: a graph of M * M + 2 M arcs per tile, built and solved (cost scaling) on the CPU whatever the device.
Source: Hubara et al. (2021, arXiv 2102.08124), section 4; OR-tools' SimpleMinCostFlow.
Departures: rows and columns supply and demand flow themselves, in place of a source and a sink; flow keeps instead of pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from bisparse.errors import install_extra
from bisparse.kernels.exact.ops import NEEDS_EXACT
from bisparse.kernels.exact.reference import quantise
from bisparse.solvers.rounding import chunks
from bisparse.solvers.solver import Guarantee, Solver

__all__ = ["MinCostFlow"]

WIDE_BITS = 48
Graph = tuple[Int[np.ndarray, " A"], Int[np.ndarray, " A"], Int[np.ndarray, " A"], Int[np.ndarray, " M2"]]


@dataclass(frozen=True)
class MinCostFlow(Solver):
    """The best mask by OR-tools' min-cost flow. Needs OR-tools, the extra `flow`: ``pip install '.[flow]'``.

    Args:
        exactly: keep exactly N in every row and column, instead of at most N.

    >>> import torch
    >>> from bisparse import solve
    >>> solve(torch.tensor([[4.0, 3.0], [3.0, 1.0]]), "1:2-T", MinCostFlow()).value
    6.0
    """

    exactly: bool = False
    exact: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = Guarantee("kept", 1.0)

    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        flow = _or_tools()
        graph = _graph(scores.shape[-1], n, self.exactly)
        return torch.cat([_solve_chunk(flow, chunk, n, graph) for chunk in chunks(scores)])


def _solve_chunk(flow: Any, scores: Real[Tensor, "B M M"], n: int, graph: Graph) -> Bool[Tensor, "B M M"]:
    tails, heads, capacities, supplies = graph
    tiles, m, _ = scores.shape
    nodes, entries = np.arange(2 * m, dtype=np.int32), np.arange(m * m, dtype=np.int32)
    costs = np.zeros((tiles, tails.size), dtype=np.int64)
    costs[:, : m * m] = -_integers(scores.detach().cpu()).reshape(tiles, m * m).numpy()
    kept = np.empty((tiles, m * m), dtype=np.bool_)
    for tile in range(tiles):
        problem = flow.SimpleMinCostFlow()
        problem.add_arcs_with_capacity_and_unit_cost(tails, heads, capacities, costs[tile])
        problem.set_nodes_supplies(nodes, supplies)
        status = problem.solve()
        if status != problem.OPTIMAL:
            raise RuntimeError(f"OR-tools' min-cost flow returned {status.name} for a tile of side {m}, N = {n}")
        kept[tile] = problem.flows(entries)
    return torch.from_numpy(kept).view(tiles, m, m).to(scores.device)


def _or_tools() -> Any:
    try:
        from ortools.graph.python import min_cost_flow
    except ModuleNotFoundError as error:
        raise ImportError(
            f"MinCostFlow runs on OR-tools, which is not installed; {install_extra('flow')}; or use Exact, which needs nothing "
            "more and is faster"
        ) from error
    return min_cost_flow


def _graph(m: int, n: int, exactly: bool) -> Graph:
    """Tails, heads and capacities of the arcs, entries first; supplies of the nodes: rows, then columns."""
    rows, columns = np.arange(m, dtype=np.int32), np.arange(m, 2 * m, dtype=np.int32)
    tails, heads = np.repeat(rows, m), np.tile(columns, m)
    capacities = np.ones(m * m, dtype=np.int64)
    supplies = np.repeat(np.array([n, -n], dtype=np.int64), m)
    if not exactly:
        spare = np.full(m, 2 * m, dtype=np.int32)
        tails, heads = np.concatenate([tails, rows, spare]), np.concatenate([heads, spare, columns])
        capacities = np.concatenate([capacities, np.full(2 * m, n, dtype=np.int64)])
    return tails, heads, capacities, supplies


def _integers(scores: Real[Tensor, "B M M"]) -> Int[Tensor, "B M M"]:
    if scores.shape[0] == 0:
        return scores.long()
    if not scores.is_floating_point():
        bits = torch.frexp(scores.flatten(1).amax(1).double()).exponent.long()
        return scores.long() >> (bits - WIDE_BITS).clamp(min=0)[:, None, None]
    if scores.dtype == torch.float64:
        return _wide(scores)
    q, exponent = quantise(scores)
    return torch.where((exponent == NEEDS_EXACT)[:, None, None], _wide(scores.double()), q)


def _wide(scores: Float[Tensor, "B M M"]) -> Int[Tensor, "B M M"]:
    exponent = (WIDE_BITS - torch.frexp(scores.flatten(1).amax(1)).exponent.long())[:, None, None]
    # In two steps: the power of two that lifts a subnormal number is itself no number.
    return torch.ldexp(torch.ldexp(scores, exponent // 2), exponent - exponent // 2).round().long()
