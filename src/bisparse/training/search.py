"""Mask search for many layers at once: their scores are gathered into few matrices, solved warm, and dealt out again.

Layers of the same pattern and (padded) number of columns stand one below the other in one matrix, so that a model costs a few
calls of the solver, whatever its number of layers. Over ranks, each solves a band of whole tile rows of every such matrix
and receives the others' bands: masks are the same everywhere, and tiles that straddle shards are whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.pattern import Structure, Unstructured
from bisparse.solution import Certificate, Solution
from bisparse.solve import choose_solver, solve
from bisparse.solvers import Solver
from bisparse.tiles import Layout, LayoutKind, from_matrices, to_matrices
from bisparse.training.layer import SparseLayer

__all__ = ["MaskSearch", "Prices", "Score", "magnitude"]

Score = Callable[[str, Tensor], Tensor]
"""(layer name, dense weight) -> scores of the same shape, non-negative and finite."""

GATHERED_WEIGHTS = 1 << 25
"""Layers are gathered up to this many weights, which bounds the memory that a search needs beyond the model's."""


def magnitude(name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """How large each weight is."""
    return weight.abs()


@dataclass(frozen=True)
class Prices:
    """Dual prices of one layer's tiles, where its next search starts: (tiles, M), (tiles, M), (tiles)."""

    u: Tensor
    v: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class _Place:
    """Where a layer lies in its gathered matrix: `count` matrices of `rows` (padded) rows from row `start` on."""

    layer: SparseLayer
    start: int
    count: int
    rows: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.rows


@dataclass(frozen=True)
class _Gathered:
    """The layers that are solved as one matrix."""

    pattern: Structure
    columns: int
    places: tuple[_Place, ...]

    @property
    def transposable(self) -> bool:
        return self.places[0].layer.transposable

    @property
    def side(self) -> int:
        """M; 1 for unstructured patterns."""
        return int(getattr(self.pattern, "m", 1))

    @property
    def tiles_in_band(self) -> int:
        return self.columns // self.side

    @property
    def rows(self) -> int:
        return self.places[-1].end


class MaskSearch:
    """The masks of a model's layers, and the prices that the next search starts from.

    Args:
        layers: those to solve together.
        solver: for transposable patterns; by default the exact one.
        score: what makes a weight worth keeping.
    """

    def __init__(self, layers: Iterable[SparseLayer], solver: Solver | None, score: Score) -> None:
        self.solver, self.score = solver, score
        self.prices: dict[str, Prices] = {}
        self._gathered = _gather(layers)

    def masks(
        self, names: Iterable[str] | None = None, *, share: bool = False
    ) -> dict[str, tuple[Bool[Tensor, "..."], Float[Tensor, "..."]]]:
        """(mask, scores) of each named layer; with `share` the work is divided over the ranks (a collective call).

        Raises:
            ValueError: scores that are NaN, infinite or negative; the message names the layer.
        """
        wanted = None if names is None else set(names)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for gathered in self._gathered:
            places = [place for place in gathered.places if wanted is None or place.layer.name in wanted]
            if len(places) == len(gathered.places):
                found |= self._solve(gathered, share)
            else:
                found |= {
                    name: result
                    for alone in _gather(place.layer for place in places)
                    for name, result in self._solve(alone, share).items()
                }
        return found

    def _solve(self, gathered: _Gathered, share: bool) -> dict[str, tuple[Tensor, Tensor]]:
        scores = {place.layer.name: self._scores(place.layer) for place in gathered.places}
        first = next(iter(scores.values()))
        matrix = torch.zeros(gathered.rows, gathered.columns, dtype=first.dtype, device=first.device)
        for place in gathered.places:
            own = to_matrices(scores[place.layer.name], place.layer.layout)
            matrix[place.start : place.end].view(place.count, place.rows, -1)[:, : own.shape[1], : own.shape[2]] = own
        try:
            mask = self._solve_shared(gathered, matrix) if share else self._solve_here(gathered, matrix)
        except ValueError as error:
            raise self._explained(error, scores) from error
        results = {}
        for place in gathered.places:
            layer, own_scores = place.layer, scores[place.layer.name]
            rows, columns = to_matrices(own_scores, layer.layout).shape[1:]
            own_mask = mask[place.start : place.end].view(place.count, place.rows, -1)[:, :rows, :columns]
            results[layer.name] = (from_matrices(own_mask, layer.layout, own_scores.shape), own_scores)
        return results

    def _scores(self, layer: SparseLayer) -> Tensor:
        weight = layer.full_weight()
        scores = self.score(layer.name, weight)
        if scores.shape != weight.shape:
            raise ValueError(
                f"{layer.name}: the score function gave shape {tuple(scores.shape)} for a weight of shape {tuple(weight.shape)}; "
                "it must return one score a weight"
            )
        return scores

    def _explained(self, error: ValueError, scores: Mapping[str, Tensor]) -> ValueError:
        for name, own in scores.items():
            if not bool(torch.isfinite(own).all()):
                return ValueError(
                    f"{name}: its scores (weight of shape {tuple(own.shape)}, {own.dtype}) hold NaN or infinite numbers, so no "
                    "mask can be found. Training diverged: lower the learning rate, clip gradients, or resume from a checkpoint."
                )
            if bool((own < 0).any()):
                return ValueError(f"{name}: its scores hold negative numbers; the score function must return magnitudes")
        return error

    def _solve_here(self, gathered: _Gathered, matrix: Float[Tensor, "R C"]) -> Bool[Tensor, "R C"]:
        solver = self.solver or choose_solver(gathered.pattern)
        if isinstance(gathered.pattern, Unstructured):
            (place,) = gathered.places
            matrices = matrix.view(place.count, place.rows, -1)
            return solve(matrices, gathered.pattern, layout=Layout(LayoutKind.EXPERTS)).mask.view(matrix.shape)
        if not _priced(gathered, solver):
            return solve(matrix, gathered.pattern, solver).mask
        solution = solve(matrix, gathered.pattern, solver, warm_start=self._start(gathered, matrix, solver))
        certificate = solution.certificate
        if certificate is not None:
            self._keep(gathered, Prices(certificate.u, certificate.v, certificate.exponent))
        return solution.mask

    def _solve_shared(self, gathered: _Gathered, matrix: Float[Tensor, "R C"]) -> Bool[Tensor, "R C"]:
        if isinstance(gathered.pattern, Unstructured):  # a matrix is one piece of work, and selection is cheap
            return self._solve_here(gathered, matrix)
        solver = self.solver or choose_solver(gathered.pattern)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        height = gathered.side if gathered.transposable else 1
        bands = gathered.rows // height
        bounds = [bands * place // world for place in range(world + 1)]
        rows = [slice(bounds[one] * height, bounds[one + 1] * height) for one in range(world)]
        tiles = [slice(bounds[one] * gathered.tiles_in_band, bounds[one + 1] * gathered.tiles_in_band) for one in range(world)]
        mask = torch.zeros(matrix.shape, dtype=torch.bool, device=matrix.device)
        prices, warm = None, None
        if _priced(gathered, solver):
            warm = self._start(gathered, matrix, solver)
            prices = warm.certificate if warm is not None else None
            prices = prices or _no_prices(bands * gathered.tiles_in_band, gathered.side, solver.exactly, matrix.device)
        if bounds[rank + 1] > bounds[rank]:
            own = matrix[rows[rank]]
            start = _warm(own, gathered.pattern, _part(prices, tiles[rank])) if warm is not None and prices is not None else None
            solution = solve(own, gathered.pattern, solver, warm_start=start)
            mask[rows[rank]] = solution.mask
            if prices is not None and solution.certificate is not None:
                for side in ("u", "v", "exponent"):
                    getattr(prices, side)[tiles[rank]] = getattr(solution.certificate, side)
        for source in range(world):
            if bounds[source + 1] > bounds[source]:
                torch.distributed.broadcast(mask.view(torch.uint8)[rows[source]], source)
                if prices is not None:
                    for side in (prices.u, prices.v, prices.exponent):
                        torch.distributed.broadcast(side[tiles[source]], source)
        if prices is not None:
            self._keep(gathered, Prices(prices.u, prices.v, prices.exponent))
        return mask

    def _start(self, gathered: _Gathered, matrix: Tensor, solver: Solver) -> Solution | None:
        own = [self.prices.get(place.layer.name) for place in gathered.places]
        if any(prices is None for prices in own):
            return None
        known = [prices for prices in own if prices is not None]
        u, v, exponent = (torch.cat([getattr(one, side) for one in known]).to(matrix.device) for side in ("u", "v", "exponent"))
        return _warm(matrix, gathered.pattern, Certificate(u, v, exponent, exactly=solver.exactly))

    def _keep(self, gathered: _Gathered, prices: Prices) -> None:
        m = prices.u.shape[1]
        for place in gathered.places:
            part = slice(place.start // m * (gathered.columns // m), place.end // m * (gathered.columns // m))
            self.prices[place.layer.name] = Prices(prices.u[part], prices.v[part], prices.exponent[part])


def _priced(gathered: _Gathered, solver: Solver) -> bool:
    """Whether prices speed up the next search: not at M = 4, whose tiles are solved without them."""
    return gathered.transposable and solver.exact and gathered.side > 4


def _warm(matrix: Tensor, pattern: Structure, certificate: Certificate) -> Solution:
    """Prices in the form in which `solve` takes a start."""
    return Solution(matrix.new_zeros(0, dtype=torch.bool), matrix, pattern, Layout(), certificate.exactly, lambda: certificate)


def _part(prices: Certificate, tiles: slice) -> Certificate:
    return Certificate(prices.u[tiles], prices.v[tiles], prices.exponent[tiles], prices.exactly)


def _no_prices(tiles: int, m: int, exactly: bool, device: torch.device) -> Certificate:
    zero = torch.zeros(2, tiles, m, dtype=torch.int64, device=device)
    return Certificate(zero[0], zero[1], torch.zeros(tiles, dtype=torch.int64, device=device), exactly)


def _gather(layers: Iterable[SparseLayer]) -> list[_Gathered]:
    """Layers of one pattern, width, dtype and device together, in order, up to `GATHERED_WEIGHTS` weights."""
    by_kind: dict[tuple[object, ...], list[list[_Place]]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for layer in layers:
        weight = layer.weight
        count, rows, columns = _matrices_shape(layer)
        m = getattr(layer.pattern, "m", 1)
        columns += -columns % m
        rows += -rows % m if layer.transposable else 0
        kind = (layer.pattern, columns, weight.dtype, weight.device)
        alone = isinstance(layer.pattern, Unstructured)
        batches = by_kind.setdefault(kind, [])
        size = count * rows * columns
        if not batches or alone or sizes[kind] + size > GATHERED_WEIGHTS:
            batches.append([])
            sizes[kind] = 0
        start = batches[-1][-1].end if batches[-1] else 0
        batches[-1].append(_Place(layer, start, count, rows))
        sizes[kind] += size
    return [_Gathered(kind[0], kind[1], tuple(batch)) for kind, batches in by_kind.items() for batch in batches]  # type: ignore[arg-type]


def _matrices_shape(layer: SparseLayer) -> tuple[int, int, int]:
    with torch.no_grad():
        count, rows, columns = to_matrices(torch.empty(layer.weight.shape, device="meta"), layer.layout).shape
    return count, rows, columns
