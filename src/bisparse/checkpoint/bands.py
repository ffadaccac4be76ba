"""Prunes or checks a stored weight in bands of rows, so that memory does not grow with its size.

The rows of a band are a multiple of M, so tiles and groups do not cross bands, and the mask is the one that `solve` finds for
the whole weight. Only unstructured masks couple a whole matrix: their threshold is found first, digit by digit of the scores'
bits, in passes over the file. Of scores equal to the threshold, a transposed weight may keep others than `solve` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from bisparse._solve import solve
from bisparse.checkpoint.layer_selection import StoredLayer
from bisparse.checkpoint.sidecar import SampleTile
from bisparse.checkpoint.stored_tensor import StoredTensor, as_bytes
from bisparse.errors import CheckpointError
from bisparse.kernels.figures.cpu import add_digits, keep_above, kept_and_total, magnitudes, prune_in_place
from bisparse.pattern import Structure, Unstructured
from bisparse.results import LayerResult, has_bound
from bisparse.scores import magnitude
from bisparse.solution import ScoreRangeError
from bisparse.solvers import Solver
from bisparse.tiles import Layout, LayoutKind, from_matrices, kernel_positions, to_matrices

__all__ = ["Band", "BitPacker", "bands", "prune_stored"]

BAND_WEIGHTS = 1 << 20
"""Maximum number of weights per band, unless M rows have more."""
DIGIT = 8
"""Bits of a score that are processed per pass over the file."""


@dataclass(frozen=True)
class Band:
    """Some rows of a stored weight, as a separate small weight."""

    weight: Shaped[Tensor, "..."]
    layout: Layout
    first: int
    """Number of entries of the stored weight before the band."""
    matrix: int
    """Number of GEMM matrices of the stored weight before the band's."""
    row: int
    """Number of stored rows before the band in the same matrices."""


def bands(tensor: StoredTensor, layout: Layout, m: int, weights: int | None = None) -> Iterator[Band]:
    """Yield a stored weight in bands of about `weights` weights, in storage order."""
    shape = tensor.shape
    blocks, inner = _blocks(shape, layout)
    rows, matrices = inner[0], kernel_positions(inner, layout)
    row_size = math.prod(inner[1:])
    step = max(m, (weights or BAND_WEIGHTS) // max(row_size, 1) // m * m)
    for block in range(blocks):
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            first = (block * rows + row) * row_size
            weight = tensor.read(first, first + (stop - row) * row_size).view(stop - row, *inner[1:])
            yield Band(weight, replace(layout, groups=1, parts=1, kind=_band_kind(layout.kind)), first, block * matrices, row)


def _blocks(shape: tuple[int, ...], layout: Layout) -> tuple[int, tuple[int, ...]]:
    """(number of consecutive equal parts of a weight with independent tiles, shape of a part)."""
    match layout.kind:
        case LayoutKind.EXPERTS | LayoutKind.EXPERTS_TRANSPOSED:
            return shape[0], shape[1:]
        case LayoutKind.PACKED:
            return layout.parts, (shape[0] // layout.parts, *shape[1:])
        case LayoutKind.CONV | LayoutKind.CONV_LAST | LayoutKind.CONV_TRANSPOSED:
            return layout.groups, (shape[0] // layout.groups, *shape[1:])
        case _:
            return 1, shape


def _band_kind(kind: LayoutKind) -> LayoutKind:
    if kind is LayoutKind.EXPERTS_TRANSPOSED:
        return LayoutKind.TRANSPOSED
    return LayoutKind.LINEAR if kind in (LayoutKind.PACKED, LayoutKind.EXPERTS) else kind


class BitPacker:
    """Packs masks given in pieces, eight weights per byte, with the first in the highest bit."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._rest = np.zeros(0, dtype=np.bool_)

    def add(self, mask: Bool[Tensor, "..."]) -> None:
        """Append the mask of the next weights."""
        bits = np.concatenate([self._rest, mask.flatten().numpy()])
        whole = len(bits) // 8 * 8
        self._write(np.packbits(bits[:whole]).tobytes())
        self._rest = bits[whole:]

    def finish(self) -> None:
        """Write the last byte, padded with zeros."""
        self._write(np.packbits(self._rest).tobytes())
        self._rest = self._rest[:0]


@dataclass
class _Sums:
    """Sums over the bands."""

    kept: int = 0
    value: float = 0.0
    total: float = 0.0
    bound: float | None = 0.0
    time_s: float = 0.0
    sample: SampleTile | None = field(default=None)


def prune_stored(
    layer: StoredLayer, solver: Solver | None, write: Callable[[memoryview], None], write_mask: Callable[[bytes], None]
) -> tuple[LayerResult, SampleTile | None]:
    """Prune a stored weight by magnitude, and pass its bytes and its packed mask on, band by band.

    Raises:
        CheckpointError: NaN or infinite weights; names the file and the tensor.
    """
    tensor, layout, pattern = layer.tensor, layer.layout, layer.pattern
    m = getattr(pattern, "m", 1)
    packer = BitPacker(write_mask)
    sums = _Sums()
    choose = _unstructured_chooser(layer, sums) if isinstance(pattern, Unstructured) else None
    for band in bands(tensor, layout, m):
        start = time.perf_counter()
        scores = _scores(band, tensor)
        if choose:
            mask = choose(band, scores)
            kept, total = kept_and_total(scores, mask) or (
                float(torch.where(mask, scores, 0).sum(dtype=torch.float64)),
                float(scores.sum(dtype=torch.float64)),
            )
        else:
            mask, kept, total, gap = _solved(layer, band, scores, solver)
            sums.bound = None if sums.bound is None or gap is None else sums.bound + kept + gap
        sums.value += kept
        sums.total += total
        sums.time_s += time.perf_counter() - start
        if sums.sample is None:
            sums.sample = _sample(layer.name, band, mask, pattern)
        # A mask may keep weights that were already zero.
        nonzeros = prune_in_place(band.weight, mask)
        sums.kept += int(torch.count_nonzero(band.weight.masked_fill_(~mask, 0))) if nonzeros is None else nonzeros
        write(as_bytes(band.weight))
        packer.add(mask)
    packer.finish()
    if not math.isfinite(sums.total):
        raise CheckpointError(
            tensor.path,
            "holds weights whose sum exceeds float64",
            "repair the checkpoint, or leave the layer dense with --exclude",
            tensor=tensor.name,
        )
    relative_gap = None if sums.bound is None else max(0.0, sums.bound - sums.value) / sums.bound if sums.bound > 0 else 0.0
    result = LayerResult(
        layer.name,
        tensor.name,
        tensor.shape,
        str(tensor.torch_dtype).removeprefix("torch."),
        layout,
        str(pattern),
        sums.kept / tensor.size,
        sums.value / sums.total if sums.total > 0 else 1.0,
        relative_gap,
        sums.value,
        sums.time_s,
    )
    return result, sums.sample


def _scores(band: Band, tensor: StoredTensor) -> Float[Tensor, "..."]:
    if (found := magnitudes(band.weight)) is not None:
        scores, finite = found
    else:
        scores = magnitude(band.weight)
        finite = not scores.numel() or bool(torch.isfinite(scores.amax()))
    if not finite:
        bad = (~torch.isfinite(scores)).flatten().nonzero()
        if len(bad):
            place = np.unravel_index(band.first + int(bad[0]), tensor.shape)
            raise CheckpointError(
                tensor.path,
                f"holds {len(bad)} numbers that are NaN or infinite in one band; the first, at index "
                f"{tuple(map(int, place))}, is {band.weight.flatten()[int(bad[0])].item()}",
                "repair the checkpoint, or leave the layer dense with --exclude",
                tensor=tensor.name,
            )
    return scores


def _solved(
    layer: StoredLayer, band: Band, scores: Float[Tensor, "..."], solver: Solver | None
) -> tuple[Bool[Tensor, "..."], float, float, float | None]:
    """The mask; in score units the sum kept, the sum of all, and the gap, None for a solver without a bound."""
    solution = solve(scores, layer.pattern, solver, layout=band.layout)
    try:
        gap = solution.gap if has_bound(solution) else None  # first, since one pass finds all three
        return solution.mask, solution.value, solution.total, gap
    except ScoreRangeError:
        return solution.mask, math.inf, math.inf, math.inf


def _sample(name: str, band: Band, mask: Bool[Tensor, "..."], pattern: Structure) -> SampleTile:
    weights, kept = (to_matrices(tensor, band.layout)[0] for tensor in (band.weight, mask))
    row, column = (0, band.row) if band.layout.inputs_first else (band.row, 0)
    return SampleTile.middle(name, weights, kept, pattern, (band.matrix, row, column))


def _unstructured_chooser(layer: StoredLayer, sums: _Sums) -> Callable[[Band, Float[Tensor, "..."]], Bool[Tensor, "..."]]:
    """A function from a band to its part of the mask, which keeps the largest scores of each matrix.

    Ties at the threshold of a matrix are kept in storage order.
    """
    assert isinstance(layer.pattern, Unstructured)
    blocks, inner = _blocks(layer.tensor.shape, layer.layout)
    matrices = kernel_positions(inner, layer.layout)
    kept = layer.pattern.kept(math.prod(inner) // max(matrices, 1))
    count = blocks * matrices
    start = time.perf_counter()
    threshold, ties = _thresholds(layer, kept, count)
    sums.time_s += time.perf_counter() - start
    # By weak duality, thresholds as prices bound the score of any mask: kept * price + sum of max(0, score - price).
    sums.bound = kept * float(threshold.sum(dtype=torch.float64)) if kept else 0.0

    def choose(band: Band, scores: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        assert sums.bound is not None
        matrices = to_matrices(scores, band.layout)
        own = slice(band.matrix, band.matrix + matrices.shape[0])
        if len(matrices) == 1 and (
            found := keep_above(matrices.reshape(-1), float(threshold[band.matrix]), int(ties[band.matrix]))
        ):
            mask, ties[band.matrix], excess = found
            sums.bound += excess
            return from_matrices(mask.view_as(matrices), band.layout, band.weight.shape)
        price = threshold[own, None, None]
        mask = matrices > price
        equal = (matrices == price).flatten(1)
        nth = equal.cumsum(1)
        mask |= (equal & (nth <= ties[own, None])).view_as(mask)
        ties[own] = (ties[own] - nth[:, -1]).clamp(min=0)
        sums.bound += float((matrices.double() - price.double()).clamp(min=0).sum())
        return from_matrices(mask, band.layout, band.weight.shape)

    return choose


def _bits(scores: Float[Tensor, " S"]) -> Int[Tensor, " S"]:
    """Integers in the order of the scores: the bits of non-negative floats."""
    return scores.contiguous().view(torch.int64 if scores.dtype == torch.float64 else torch.int32)


def _thresholds(layer: StoredLayer, kept: int, count: int) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
    """For each matrix, its `kept`-th largest score, and the number of scores equal to it that are kept."""
    double = layer.tensor.dtype == "F64"
    if kept == 0:
        return torch.full((count,), math.inf, dtype=torch.float64 if double else torch.float32, device="cpu"), torch.zeros(
            count, dtype=torch.int64, device="cpu"
        )
    width = 64 if double else 32
    prefix = torch.zeros(count, dtype=torch.int64, device="cpu")
    wanted = torch.full((count,), kept, dtype=torch.int64, device="cpu")
    last = 16 if layer.tensor.dtype == "BF16" else 0  # all bits below are zero
    for shift in range(width - DIGIT, last - 1, -DIGIT):
        histogram = torch.zeros(count, 1 << DIGIT, dtype=torch.int64, device="cpu")
        for band in bands(layer.tensor, layer.layout, 1):
            matrices = to_matrices(_scores(band, layer.tensor), band.layout).flatten(1)
            for index, line in enumerate(matrices, start=band.matrix):
                if add_digits(line, shift, int(prefix[index]), histogram[index]):
                    continue
                line = _bits(line)
                # The sign bit is never set, so a shift by one more digit than there are leaves zero for all scores.
                alike = line[(line >> shift >> DIGIT) == prefix[index]]
                histogram[index] += torch.bincount((alike >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        at_least = histogram.flip(1).cumsum(1).flip(1)
        digit = (at_least >= wanted[:, None]).sum(1) - 1
        own = digit[:, None]
        wanted = wanted - (at_least.gather(1, own) - histogram.gather(1, own))[:, 0]
        prefix = (prefix << DIGIT) | digit
    prefix <<= last
    return (prefix if double else prefix.int()).view(torch.float64 if double else torch.float32), wanted
