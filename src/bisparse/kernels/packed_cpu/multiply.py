"""Products with a packed matrix on a CPU: by kernels for a few tokens, by unpacked bands and torch's product for many."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from bisparse.kernels.numba_runtime.thread_pool import over_bands
from bisparse.kernels.packed_cpu import amx
from bisparse.kernels.packed_cpu.instructions import NUMBERS, Way, usable_ways
from bisparse.kernels.packed_cpu.kernels import expand_kernel, multiply_kernel
from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, GROUP, reference_linear, reference_unpack

__all__ = ["expand", "multiply", "multiply_bands", "product", "unpack"]

MIN_ENTRIES_PER_BAND = 1 << 16
"""Minimum of matrix entries times tokens per band, below which another thread does not pay off."""
MIN_TOKENS_AMX = 5
"""From here on AMX is faster than dot products, which take another pass per 4 tokens."""
WORKSPACE_BYTES = 1 << 22
"""Bytes of unpacked rows that are multiplied at a time."""


def unpack(values: Tensor, masks: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    """`layout.unpack_bitmask` on a CPU."""
    ways = usable_ways(values.dtype)
    if not ways:
        return reference_unpack(values, masks, starts, rows, columns)
    blocks, groups, _ = masks.shape
    matrix = values.new_empty(blocks * BLOCK_ROWS, groups * GROUP)
    expand(ways[0], values, masks, starts, matrix, 0, blocks)
    return matrix[:rows, :columns].contiguous()


def expand(way: Way, values: Tensor, masks: Tensor, starts: Tensor, out: Tensor, first: int, blocks: int) -> None:
    """Write so many blocks from the first on as dense rows of whole groups."""
    groups, size = masks.shape[1], values.element_size()
    code = expand_kernel(int(way), NUMBERS[values.dtype], size)
    arguments = values, masks, starts, out, groups, first
    over_bands(code, arguments, blocks, 1, max(1, MIN_ENTRIES_PER_BAND // max(1, BLOCK_ROWS * GROUP * groups)))


def product(
    input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int, max_tokens: int
) -> Tensor:
    """`layout.linear_bitmask` on a CPU, without gradients."""
    ways = usable_ways(values.dtype)
    if not ways:
        return reference_linear(input, values, masks, starts, bias, rows, max_tokens)
    flat = input if input.ndim == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    if values.dtype == torch.bfloat16 and MIN_TOKENS_AMX <= flat.shape[0] <= amx.MAX_TOKENS and amx.amx_works():
        output = amx.multiply_amx(flat, values, masks, starts, bias, rows)
        return output if input.ndim == 2 else output.view(*input.shape[:-1], rows)
    few = flat.shape[0] <= max_tokens
    output = (multiply if few else multiply_bands)(ways[0], flat, values, masks, starts, bias, rows)
    return output if input.ndim == 2 else output.view(*input.shape[:-1], rows)


def multiply(way: Way, x: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product as the matrix is stored, in one pass over it."""
    tokens, columns = x.shape
    blocks, groups, _ = masks.shape
    x = x if way == Way.AVX512_BF16 else x.float()
    missing = groups * GROUP - columns
    x = pad(x, (0, missing)) if missing else x.contiguous()
    whole = rows == blocks * BLOCK_ROWS
    output = values.new_empty(tokens, blocks * BLOCK_ROWS)
    if bias is not None and not whole:
        bias = pad(bias, (0, blocks * BLOCK_ROWS - rows))
    added = 0 if bias is None else bias.contiguous()
    size = values.element_size()
    code = multiply_kernel(int(way), NUMBERS[values.dtype], size)
    strides = x.element_size() * GROUP * groups, size * BLOCK_ROWS * blocks
    worth = max(1, MIN_ENTRIES_PER_BAND // max(1, BLOCK_ROWS * GROUP * groups * tokens))
    over_bands(code, (values, masks, starts, x, added, output, groups, tokens, *strides), blocks, 1, worth)
    return output if whole else output[:, :rows].contiguous()


def multiply_bands(way: Way, x: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product by torch, band by band, each unpacked into the same workspace."""
    tokens, columns = x.shape
    blocks, groups, _ = masks.shape
    output = x.new_empty(tokens, rows)
    step = max(1, WORKSPACE_BYTES // max(1, BLOCK_ROWS * GROUP * groups * values.element_size()))
    step = -(-blocks // -(-blocks // step)) if blocks else 1  # bands of equal height
    workspace = values.new_empty(min(step, blocks) * BLOCK_ROWS, groups * GROUP)
    with torch.autocast("cpu", enabled=False):  # numbers must not depend on which way a product takes
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            expand(way, values, masks, starts, workspace, first, last - first)
            top, bottom = first * BLOCK_ROWS, min(last * BLOCK_ROWS, rows)
            band = workspace[: bottom - top, :columns]
            output[:, top:bottom] = linear(x, band, None if bias is None else bias[top:bottom])
    return output
