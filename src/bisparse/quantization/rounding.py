"""Rounds rows of weights to stored numbers: to nearest, or column by column with error feedback.

Error feedback: columns are rounded from left to right, and later columns compensate for the change in the layer's output, by the
inverse Hessian, as SparseGPT compensates for pruned weights. A weight that is zero stays zero, and later columns compensate for
the update that it would have received.
Cost: like SparseGPT, one Cholesky of K x K and one product (O, K) x (K, K) per layer.
Source: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, algorithm 1.
With a pattern, masks are chosen in the same sweep (Frantar and Alistarh, "SparseGPT", ICML 2023, section 3.5).
Departures: zeros are kept; scales of groups are searched (see `Scheme.scales`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.pruning.methods.error_feedback import ColumnSweep, upper_inverse
from bisparse.quantization.scheme import Scheme
from bisparse.scores import hessian

__all__ = ["Choose", "round_to_nearest", "round_with_feedback"]

COLUMNS = 128
"""Number of columns rounded before later columns are updated, if the scheme has no groups."""

Stored = tuple[Float[Tensor, "G O K"], Float[Tensor, "G O S"]]
"""The stored numbers as float32, and their scales."""


@dataclass(frozen=True)
class Choose:
    """How a mask is chosen in the sweep, as SparseGPT does: for M columns at a time, once those before have been rounded."""

    mask: Callable[[Float[Tensor, "O M"]], Bool[Tensor, "O M"]]
    """The best mask for scores."""
    width: int
    """Number of columns of a mask."""
    inputs: int
    """Number of columns per kernel position; no mask reaches into the next position."""
    factor: float
    """Weights are multiplied by it before they are squared, so that squares neither underflow nor overflow."""


def _parts(columns: int, scheme: Scheme, choose: Choose | None) -> list[slice]:
    """The columns that are rounded before later ones are updated."""
    width, whole = (scheme.group or COLUMNS, columns) if choose is None else (choose.width, choose.inputs)
    starts = [(start, first + whole) for first in range(0, columns, whole) for start in range(first, first + whole, width)]
    return [slice(start, min(start + width, end)) for start, end in starts]


def round_to_nearest(rows: Float[Tensor, "G O K"], scheme: Scheme, dtype: torch.dtype) -> Stored:
    """Round each weight to the nearest stored number."""
    scale = scheme.scales(rows, dtype, scheme.unit(rows, dtype))
    return scheme.round(rows, scheme.spread(scale, rows.shape[-1])), scale


def round_with_feedback(
    rows: Float[Tensor, "G O K"],
    kept: Bool[Tensor, "G O K"],
    gram: Float[Tensor, "G K K"],
    scheme: Scheme,
    dtype: torch.dtype,
    name: str,
    choose: Choose | None = None,
) -> Stored:
    """Round columns from left to right, and feed each column's error back to those after it.

    Args:
        kept: where weights may be non-zero.
        gram: the damped second moments of the inputs.
        choose: prunes in the same sweep; `kept` then becomes the mask.

    Raises:
        ValueError: the moments are singular; names the layer.
    """
    stored, scales = torch.empty_like(rows), []
    columns, unit = rows.shape[-1], scheme.unit(rows, dtype)
    for g in range(rows.shape[0]):
        weight = rows[g].clone()
        upper = upper_inverse(gram[g], name)
        sweep = ColumnSweep(weight, upper)
        if scheme.group is None:
            own = scheme.scales(weight, dtype).to(weight.device)
        else:
            own = torch.empty(len(weight), columns // scheme.group, device=weight.device)
        for part in _parts(columns, scheme, choose):
            start = part.start
            if scheme.group is not None and start % scheme.group == 0:
                # Scales of the current weights, which previous columns have changed.
                whole = slice(start, start + scheme.group)
                own[:, start // scheme.group] = scheme.scales(sweep.current(whole) * kept[g][:, whole], dtype, unit)[:, 0]
            scale = own[:, 0 if scheme.group is None else start // scheme.group]
            if choose is not None:
                scores = hessian(sweep.current(part) * choose.factor, upper[part, part].diagonal().square()) * kept[g][:, part]
                kept[g][:, part] &= choose.mask(scores)

            def rounded(column: Tensor, j: int, g: int = g, scale: Tensor = scale, start: int = start) -> Tensor:
                value = scheme.round(column, scale) * kept[g][:, start + j]
                stored[g][:, start + j] = value
                result: Tensor = value * scale
                return result

            sweep.replace(part, rounded)
        scales.append(own)
    return stored, torch.stack(scales)
