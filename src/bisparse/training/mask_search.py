"""Mask search for many layers at once: scores are gathered into a few matrices, solved with a warm start, and split again.

Layers with the same pattern and (padded) number of columns are stacked in one matrix, so that a model of any number of layers
needs only a few solver calls. Over ranks, each solves a band of whole tile rows of every such matrix and receives the others'
bands, so masks are the same everywhere, and no tile is split between shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bisparse._solve import solve
from bisparse.pattern import Structure, Unstructured
from bisparse.process_group import Ranks
from bisparse.solution import Certificate, Solution
from bisparse.solvers import Exact, Solver, parse_solver
from bisparse.tiles import Layout, LayoutKind, check_padding, from_matrices, to_matrices
from bisparse.training.gpu_batch_search import masks_together
from bisparse.training.layer import SparseLayer, local
from bisparse.training.rank_consistency import is_sharded, raise_together, ranks_of

__all__ = ["MaskSearch", "Prices", "Score", "magnitude"]

Score = Callable[[str, Tensor], Tensor]
"""(layer name, dense weight) -> scores of the same shape, non-negative and finite."""

GATHERED_WEIGHTS = {"cpu": 1 << 22}
GATHERED_ELSEWHERE = 1 << 25
"""Maximum number of weights per gathered matrix, to bound additional memory. On a CPU that is 16 MB of float32, which the
allocator reuses: fresh pages would cost up to a tenth of the search."""


def magnitude(name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The absolute value of each weight."""
    return weight.abs()


@dataclass(frozen=True)
class Prices:
    """Dual prices of one layer's tiles, the start of its next search: (tiles, M), (tiles, M), (tiles)."""

    u: Tensor
    v: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class _Place:
    """A layer's position in its gathered matrix: `count` matrices of `rows` (padded) rows from row `start` on."""

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
        layers: the layers to solve together.
        solver: for transposable patterns; by default the exact one.
        score: (layer name, weight) -> scores.
    """

    def __init__(self, layers: Iterable[SparseLayer], solver: Solver | None, score: Score) -> None:
        self.solver, self.score = solver, score
        self.ranks: Ranks | None = None
        """The ranks that have the layers; None until they are known, which may be after the model is wrapped."""
        self.prices: dict[str, Prices] = {}
        self._whole: dict[str, tuple[list[Prices], Certificate]] = {}
        """By the first layer of a gathered matrix: the prices of its layers, and the solution of which they are slices."""
        self._gathered = _gather(layers)

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be copied.
        return self.__dict__ | {"ranks": None}

    def masks(
        self, names: Iterable[str] | None = None, *, share: bool = False
    ) -> dict[str, tuple[Bool[Tensor, "..."], Callable[[], Float[Tensor, "B O I"]]]]:
        """(mask, function that returns the scores of its GEMM matrices) per named layer.

        With `share` the ranks share the work (a collective call).

        Raises:
            ValueError: scores that are NaN, infinite or negative; names the layer and the ranks that have them.
            OtherRankError: another rank failed in its part. If one rank raises, all raise.
        """
        ranks = (self.ranks or ranks_of(place.layer for one in self._gathered for place in one.places)) if share else Ranks()
        layers = {place.layer.name: place.layer for gathered in self._gathered for place in gathered.places}
        wanted = set(layers) if names is None else set(names)
        found: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
        solver = parse_solver(self.solver)
        if ranks.size == 1 and self.score is magnitude and type(solver) is Exact and not solver.strict:
            own = [layer for name, layer in layers.items() if name in wanted]
            for name, mask in masks_together(own, solver.exactly).items():
                found[name] = mask, partial(_magnitudes, layers[name])
            wanted -= set(found)
        for gathered in self._gathered:
            places = [place for place in gathered.places if place.layer.name in wanted]
            if len(places) == len(gathered.places):
                found |= self._solve(gathered, ranks)
            else:
                found |= {
                    name: result
                    for alone in _gather(place.layer for place in places)
                    for name, result in self._solve(alone, ranks).items()
                }
        return found

    def _solve(self, gathered: _Gathered, ranks: Ranks) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
        weights = [place.layer.full_weight() for place in gathered.places]
        # A matrix with an unstructured pattern cannot be divided, but selection is cheap.
        alone = ranks.size == 1 or isinstance(gathered.pattern, Unstructured)
        matrix, failure = None, None
        try:  # everything up to the next exchange: if one rank left here, the others would wait for it
            matrix = self._scores(gathered, weights)
            mask, prices = (self._solve_here(gathered, matrix), None) if alone else self._solve_band(gathered, matrix, ranks)
        except Exception as error:  # noqa: BLE001 - raised by the next line
            failure = error
        _raise_failures(gathered, matrix, ranks, failure)
        assert matrix is not None
        if not alone:
            self._exchange_bands(gathered, mask, prices, ranks)
        return {
            place.layer.name: (
                from_matrices(place.cut(mask), place.layer.layout, place.layer.weight.shape),
                self._scores_again(place, matrix),
            )
            for place in gathered.places
        }

    def _scores_again(self, place: _Place, matrix: Float[Tensor, "R C"]) -> Callable[[], Float[Tensor, "B O I"]]:
        """A function that returns a layer's scores later; it keeps the matrix only if recomputing them would be expensive."""
        if self.score is magnitude and not is_sharded(place.layer):
            return partial(_magnitudes, place.layer)
        return partial(place.cut, matrix)

    def _scores(self, gathered: _Gathered, weights: list[Tensor]) -> Tensor:
        """The scores of all layers, stacked, zero in the padding."""
        matrix = None
        for place, weight in zip(gathered.places, weights, strict=True):
            layer = place.layer
            scores = weight if self.score is magnitude else self.score(layer.name, weight)
            if scores.shape != weight.shape:
                raise ValueError(
                    f"{layer.name}: the score function returned shape {tuple(scores.shape)} for a weight of shape "
                    f"{tuple(weight.shape)}; it must return one score per weight"
                )
            if matrix is None:
                make = torch.zeros if gathered.padded else torch.empty
                matrix = make(gathered.rows, gathered.columns, dtype=scores.dtype, device=scores.device)
            own, place_of_own = to_matrices(scores, layer.layout), place.cut(matrix)
            if self.score is not magnitude:
                place_of_own.copy_(own)
            elif own.dtype == matrix.dtype and own.device == matrix.device:
                torch.abs(own, out=place_of_own)
            else:  # layers that now have different devices or dtypes
                place_of_own.copy_(own.abs())
        assert matrix is not None
        return matrix

    def _solve_here(self, gathered: _Gathered, matrix: Float[Tensor, "R C"]) -> Bool[Tensor, "R C"]:
        solver = parse_solver(self.solver)
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

    def _solve_band(
        self, gathered: _Gathered, matrix: Float[Tensor, "R C"], ranks: Ranks
    ) -> tuple[Bool[Tensor, "R C"], Certificate | None]:
        """Mask and prices for the whole matrix, filled in for this rank's band only."""
        solver = parse_solver(self.solver)
        rows, tiles = _bands(gathered, ranks.size)[ranks.rank]
        mask = torch.zeros(matrix.shape, dtype=torch.bool, device=matrix.device)
        prices, warm = None, None
        if _priced(gathered, solver):
            warm = self._start(gathered, matrix, solver)
            prices = _copy(warm.certificate) if warm is not None and warm.certificate is not None else None
            count = gathered.rows // gathered.side * gathered.tiles_in_band
            prices = prices or _no_prices(count, gathered.side, solver.exactly, matrix.device)
        if rows.stop > rows.start:
            own = matrix[rows]
            start = _warm(own, gathered.pattern, _part(prices, tiles)) if warm is not None and prices is not None else None
            solution = solve(own, gathered.pattern, solver, warm_start=start)
            mask[rows] = solution.mask
            if prices is not None and solution.certificate is not None:
                for side in ("u", "v", "exponent"):
                    getattr(prices, side)[tiles] = getattr(solution.certificate, side)
        return mask, prices

    def _exchange_bands(self, gathered: _Gathered, mask: Bool[Tensor, "R C"], prices: Certificate | None, ranks: Ranks) -> None:
        """Fill in the other ranks' bands (a collective call)."""
        for source, (rows, tiles) in enumerate(_bands(gathered, ranks.size)):
            if rows.stop > rows.start:
                ranks.broadcast_(mask.view(torch.uint8)[rows], source)
                if prices is not None:
                    for side in (prices.u, prices.v, prices.exponent):
                        ranks.broadcast_(side[tiles], source)
        if prices is not None:
            self._keep(gathered, prices)

    def _start(self, gathered: _Gathered, matrix: Tensor, solver: Solver) -> Solution | None:
        own = [prices for place in gathered.places if (prices := self.prices.get(place.layer.name)) is not None]
        if len(own) < len(gathered.places):
            return None
        parts, whole = self._whole.get(gathered.places[0].layer.name, ([], None))
        if whole is None or len(parts) != len(own) or any(one is not part for one, part in zip(own, parts, strict=True)):
            u, v, exponent = (torch.cat([getattr(one, side).to(matrix.device) for one in own]) for side in ("u", "v", "exponent"))
            whole = Certificate(u, v, exponent, exactly=solver.exactly)
        return _warm(matrix, gathered.pattern, whole.to(matrix.device))  # the model may have moved since

    def _keep(self, gathered: _Gathered, prices: Certificate) -> None:
        m, parts = prices.u.shape[1], []
        for place in gathered.places:
            part = slice(place.start // m * (gathered.columns // m), place.end // m * (gathered.columns // m))
            parts.append(Prices(prices.u[part], prices.v[part], prices.exponent[part]))
            self.prices[place.layer.name] = parts[-1]
        self._whole[gathered.places[0].layer.name] = parts, prices


def _magnitudes(layer: SparseLayer) -> Float[Tensor, "B O I"]:
    return to_matrices(layer.full_weight().abs(), layer.layout)


def _bands(gathered: _Gathered, count: int) -> list[tuple[slice, slice]]:
    """The rows and the tiles of the matrix that each of `count` ranks solves."""
    height = gathered.side if gathered.transposable else 1
    bands = gathered.rows // height
    bounds = [bands * place // count for place in range(count + 1)]
    return [
        (slice(start * height, end * height), slice(start * gathered.tiles_in_band, end * gathered.tiles_in_band))
        for start, end in pairwise(bounds)
    ]


def _raise_failures(gathered: _Gathered, matrix: Tensor | None, ranks: Ranks, failure: Exception | None) -> None:
    """Raise an error of this or another rank, with the name of the layer (a collective call)."""
    if isinstance(failure, ValueError) and matrix is not None:
        explained = _explained(failure, gathered, matrix)
        if explained is not failure:
            explained.__cause__ = failure
        failure = explained
    if ranks.size == 1:
        if failure is not None:
            raise failure
    elif any(ranks.all(failure is not None)):
        # Bands are not shards: the rank that failed need not be the one that has the bad numbers.
        layers = [place.layer for place in gathered.places]
        held = ranks.all([bool(torch.isfinite(local(layer.weight.detach())).all()) for layer in layers])
        for number, layer in enumerate(layers):
            holders = [ranks.name(rank) for rank, finite in enumerate(held) if not finite[number]]
            if holders:
                raise _not_finite(layer, layer.weight.dtype, f" on rank {', '.join(map(str, holders))}") from failure
        raise_together(ranks, failure, f"searching masks of {', '.join(layer.name for layer in layers)}")


def _explained(error: ValueError, gathered: _Gathered, matrix: Float[Tensor, "R C"]) -> ValueError:
    for place in gathered.places:
        own = place.cut(matrix)
        if not bool(torch.isfinite(own).all()):
            return _not_finite(place.layer, own.dtype)
        if bool((own < 0).any()):
            return ValueError(f"{place.layer.name}: its scores are negative; the score function must return non-negative numbers")
    return error


def _not_finite(layer: SparseLayer, dtype: torch.dtype, where: str = "") -> ValueError:
    return ValueError(
        f"{layer.name}: its scores (weight of shape {tuple(layer.weight.shape)}, {dtype}) hold NaN or infinite numbers{where}, "
        "so no mask can be found. Training diverged: lower the learning rate, clip gradients, or resume from a checkpoint."
    )


def _priced(gathered: _Gathered, solver: Solver) -> bool:
    """Whether prices speed up the next search; not at M = 4, which is solved without prices."""
    return gathered.transposable and solver.exact and gathered.side > 4


def _warm(matrix: Tensor, pattern: Structure, certificate: Certificate) -> Solution:
    """Prices as a `warm_start` of `solve`."""
    return Solution(matrix.new_zeros(0, dtype=torch.bool), matrix, pattern, Layout(), certificate.exactly, lambda: certificate)


def _copy(prices: Certificate) -> Certificate:
    return Certificate(prices.u.clone(), prices.v.clone(), prices.exponent.clone(), prices.exactly)


def _part(prices: Certificate, tiles: slice) -> Certificate:
    return Certificate(prices.u[tiles], prices.v[tiles], prices.exponent[tiles], prices.exactly)


def _no_prices(tiles: int, m: int, exactly: bool, device: torch.device) -> Certificate:
    zero = torch.zeros(2, tiles, m, dtype=torch.int64, device=device)
    return Certificate(zero[0], zero[1], torch.zeros(tiles, dtype=torch.int64, device=device), exactly)


def _gather(layers: Iterable[SparseLayer]) -> list[_Gathered]:
    """Groups of layers of the same pattern, width, dtype and device, in order, with up to `GATHERED_WEIGHTS` weights each."""
    by_kind: dict[tuple[object, ...], list[list[_Place]]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for layer in layers:
        weight = layer.weight
        count, *inside = _matrices_shape(layer)
        rows, columns = inside
        m = getattr(layer.pattern, "m", 1)
        columns += -columns % m
        rows += -rows % m if layer.transposable else 0
        check_padding((count, *inside), (count, rows, columns), m)
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
