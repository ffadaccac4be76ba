"""Rearranges GEMM matrices into independent least-squares problems: one row per output, over all inputs summed into it.

A Linear layer is one problem of O rows over I inputs. A convolution couples its kernel positions: one output row sums over
C_in * R * S products, so its problems are (C_out / g, R * S * C_in / g), one per group of the g groups, with the kernel
position outermost. Each C_in / g consecutive columns are then a row of one of the matrices that a pattern applies to.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from bisparse.tiles import Layout, kernel_positions

__all__ = ["positions", "to_matrices_of_rows", "to_rows"]


def positions(layout: Layout, shape: tuple[int, ...] | torch.Size) -> int:
    """How many matrices of the weight share one least-squares problem: a convolution's kernel positions, otherwise 1."""
    return kernel_positions(shape, layout)


def to_rows(matrices: Shaped[Tensor, "B O I"], positions: int) -> Shaped[Tensor, "G O K"]:
    """B = G * P matrices as G problems of O outputs over K = P * I reduced inputs."""
    rows: Tensor = matrices.unflatten(0, (-1, positions)).transpose(1, 2).flatten(2)
    return rows


def to_matrices_of_rows(rows: Shaped[Tensor, "G O K"], positions: int) -> Shaped[Tensor, "B O I"]:
    """The inverse of `to_rows`."""
    matrices: Tensor = rows.unflatten(2, (positions, -1)).transpose(1, 2).flatten(0, 1)
    return matrices
