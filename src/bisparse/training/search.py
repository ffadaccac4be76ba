"""Mask search for many layers at once: their scores are gathered into few matrices, solved warm, and dealt out again.

Layers of the same pattern and (padded) number of columns stand one below the other in one matrix, so that a model costs a few
calls of the solver, whatever its number of layers. Over ranks, each solves a band of whole tile rows of every such matrix
and receives the others' bands: masks are the same everywhere, and tiles that straddle shards are whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Bool, Float, Shaped
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

GATHERED_WEIGHTS = {"cpu": 1 << 22}
GATHERED_ELSEWHERE = 1 << 25
"""Layers are gathered up to this many weights, which bounds the memory that a search needs beyond the model's. On a CPU that is
16 MB of float32, which the allocator keeps: fresh pages cost as much as a tenth of the search."""


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
    inside: tuple[int, int]
    """Rows and columns of each matrix without its padding."""

    @property
    def end(self) -> int:
        return self.start + self.count * self.rows

    def cut(self, matrix: Shaped[Tensor, "R C"]) -> Shaped[Tensor, "B O I"]:
        """The layer's own matrices, without padding; a view."""
        own = matrix[self.start : self.end].view(self.count, self.rows, -1)
        return own[:, : self.inside[0], : self.inside[1]]


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
    def padded(self) -> bool:
        return any(place.inside != (place.rows, self.columns) for place in self.places)

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
        self._whole: dict[str, tuple[list[Prices], Certificate]] = {}
        """By a gathered matrix's first layer: the prices of its layers, and what they were cut from."""
        self._gathered = _gather(layers)

    def masks(
        self, names: Iterable[str] | None = None, *, share: bool = False
    ) -> dict[str, tuple[Bool[Tensor, "..."], Float[Tensor, "B O I"]]]:
        """(mask, its GEMM matrices' scores) of each named layer; with `share` the ranks divide the work (a collective call).

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
        matrix = self._scores(gathered)
        try:
            mask = self._solve_shared(gathered, matrix) if share else self._solve_here(gathered, matrix)
        except ValueError as error:
            raise _explained(error, gathered, matrix) from error
        return {
            place.layer.name: (
                from_matrices(place.cut(mask), place.layer.layout, place.layer.weight.shape),
                place.cut(matrix),
            )
            for place in gathered.places
        }

    def _scores(self, gathered: _Gathered) -> Tensor:
        """The scores of all layers, one below the other, zero where they are padded."""
        matrix = None
        for place in gathered.places:
            layer, weight = place.layer, place.layer.full_weight()
            scores = weight if self.score is magnitude else self.score(layer.name, weight)
            if scores.shape != weight.shape:
                raise ValueError(
                    f"{layer.name}: the score function gave shape {tuple(scores.shape)} for a weight of shape "
                    f"{tuple(weight.shape)}; it must return one score a weight"
                )
            if matrix is None:
                make = torch.zeros if gathered.padded else torch.empty
                matrix = make(gathered.rows, gathered.columns, dtype=scores.dtype, device=scores.device)
            own, place_of_own = to_matrices(scores, layer.layout), place.cut(matrix)
            if self.score is not magnitude:
                place_of_own.copy_(own)
            elif own.dtype == matrix.dtype and own.device == matrix.device:
                torch.abs(own, out=place_of_own)
            else:  # layers that were moved or cast apart since they were gathered
                place_of_own.copy_(own.abs())
        assert matrix is not None
        return matrix

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
            self._keep(gathered, certificate)
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
            prices = _copy(warm.certificate) if warm is not None and warm.certificate is not None else None
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
            self._keep(gathered, prices)
        return mask

    def _start(self, gathered: _Gathered, matrix: Tensor, solver: Solver) -> Solution | None:
        own = [prices for place in gathered.places if (prices := self.prices.get(place.layer.name)) is not None]
        if len(own) < len(gathered.places):
            return None
        parts, whole = self._whole.get(gathered.places[0].layer.name, ([], None))
        if whole is None or len(parts) != len(own) or any(one is not part for one, part in zip(own, parts, strict=True)):
            u, v, exponent = (torch.cat([getattr(one, side) for one in own]).to(matrix.device) for side in ("u", "v", "exponent"))
            whole = Certificate(u, v, exponent, exactly=solver.exactly)
        return _warm(matrix, gathered.pattern, whole)

    def _keep(self, gathered: _Gathered, prices: Certificate) -> None:
        m, parts = prices.u.shape[1], []
        for place in gathered.places:
            part = slice(place.start // m * (gathered.columns // m), place.end // m * (gathered.columns // m))
            parts.append(Prices(prices.u[part], prices.v[part], prices.exponent[part]))
            self.prices[place.layer.name] = parts[-1]
        self._whole[gathered.places[0].layer.name] = parts, prices


def _explained(error: ValueError, gathered: _Gathered, matrix: Float[Tensor, "R C"]) -> ValueError:
    for place in gathered.places:
        name, shape, own = place.layer.name, tuple(place.layer.weight.shape), place.cut(matrix)
        if not bool(torch.isfinite(own).all()):
            return ValueError(
                f"{name}: its scores (weight of shape {shape}, {own.dtype}) hold NaN or infinite numbers, so no mask can be "
                "found. Training diverged: lower the learning rate, clip gradients, or resume from a checkpoint."
            )
        if bool((own < 0).any()):
            return ValueError(f"{name}: its scores hold negative numbers; the score function must return magnitudes")
    return error


def _priced(gathered: _Gathered, solver: Solver) -> bool:
    """Whether prices speed up the next search: not at M = 4, whose tiles are solved without them."""
    return gathered.transposable and solver.exact and gathered.side > 4


def _warm(matrix: Tensor, pattern: Structure, certificate: Certificate) -> Solution:
    """Prices in the form in which `solve` takes a start."""
    return Solution(matrix.new_zeros(0, dtype=torch.bool), matrix, pattern, Layout(), certificate.exactly, lambda: certificate)


def _copy(prices: Certificate) -> Certificate:
    return Certificate(prices.u.clone(), prices.v.clone(), prices.exponent.clone(), prices.exactly)


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
        count, *inside = _matrices_shape(layer)
        rows, columns = inside
        m = getattr(layer.pattern, "m", 1)
        columns += -columns % m
        rows += -rows % m if layer.transposable else 0
        kind = (layer.pattern, columns, weight.dtype, weight.device)
        alone = isinstance(layer.pattern, Unstructured)
        batches = by_kind.setdefault(kind, [])
        size = count * rows * columns
        if not batches or alone or sizes[kind] + size > GATHERED_WEIGHTS.get(weight.device.type, GATHERED_ELSEWHERE):
            batches.append([])
            sizes[kind] = 0
        start = batches[-1][-1].end if batches[-1] else 0
        batches[-1].append(_Place(layer, start, count, rows, (inside[0], inside[1])))
        sizes[kind] += size
    return [_Gathered(kind[0], kind[1], tuple(batch)) for kind, batches in by_kind.items() for batch in batches]  # type: ignore[arg-type]


def _matrices_shape(layer: SparseLayer) -> tuple[int, int, int]:
    with torch.no_grad():
        count, rows, columns = to_matrices(torch.empty(layer.weight.shape, device="meta"), layer.layout).shape
    return count, rows, columns
