"""Products with a packed matrix on a CPU: by kernels for few tokens, by unpacked bands and torch's product for many."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from bisparse.kernels.numba_runtime.thread_pool import Call, over_bands, prepared, run
from bisparse.kernels.packed_cpu import amx
from bisparse.kernels.packed_cpu.instructions import INT8, NUMBERS, Way, usable_ways
from bisparse.kernels.packed_cpu.int8 import Int8Packed, reference_linear_int8
from bisparse.kernels.packed_cpu.kernels import expand_kernel, multiply_kernel
from bisparse.kernels.packed_cpu.layout import (
    BLOCK_ROWS,
    GROUP,
    MIN_ENTRIES_PER_BAND,
    BitmaskPacked,
    reference_linear,
    reference_unpack,
)
from bisparse.kernels.registration import unviewed

__all__ = ["call_of", "expand", "expands", "multiply", "multiply_bands", "product", "product_int8", "unpack"]

Packed = BitmaskPacked | Int8Packed
MIN_TOKENS_AMX = 4
"""Minimum number of tokens for AMX, which is then faster than dot products with one pass per 4 tokens."""
WORKSPACE_BYTES = 1 << 24
"""Bytes of unpacked rows that are multiplied at a time; each calling thread keeps a workspace of this size. With 512 tokens,
torch reads the input again for every band: on one thread, a bfloat16 matrix of 4096 x 14336 took 23 % longer than the dense
product in bands of 8 MiB, 3 % in bands of 16 and of 32 MiB."""


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
    """Write `blocks` blocks, beginning with `first`, as dense rows of whole groups."""
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
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    tokens = math.prod(input.shape[:-1])
    uses_amx = _uses_amx(values.dtype, tokens)
    if not uses_amx and _in_one_pass(values.dtype, tokens, max_tokens):
        return multiply(ways[0], input, BitmaskPacked(values, masks, starts), bias, rows)
    flat = input if input.ndim == 2 else input.reshape(tokens, input.shape[-1])
    if uses_amx:
        output = amx.multiply_amx(flat, values, masks, starts, bias, rows)
    else:
        output = multiply_bands(ways[0], flat, BitmaskPacked(values, masks, starts), bias, rows)
    return output if input.ndim == 2 else unviewed(output, *input.shape[:-1], rows)


def expands(dtype: torch.dtype) -> bool:
    """Whether products with many tokens expand the matrix for torch's product; by AMX they do not."""
    return dtype != torch.bfloat16 or not amx.amx_works()


def _in_one_pass(dtype: torch.dtype, tokens: int, max_tokens: int) -> bool:
    """Whether products without AMX read the packed matrix once; otherwise they expand it in bands."""
    return tokens <= max_tokens or not expands(dtype)


def _uses_amx(dtype: torch.dtype, tokens: int) -> bool:
    return tokens >= MIN_TOKENS_AMX and not expands(dtype)


def multiply(way: Way, x: Tensor, packed: Packed, bias: Tensor | None, rows: int) -> Tensor:
    """The product in packed form, in one pass over the matrix; the input may have any number of dimensions."""
    tokens = math.prod(x.shape[:-1])
    blocks, groups, _ = packed.masks.shape
    x = x if way == Way.AVX512_BF16 else x.float()
    missing = groups * GROUP - x.shape[-1]
    x = pad(x, (0, missing)) if missing else x.contiguous()
    whole = rows == blocks * BLOCK_ROWS
    dtype = torch.bfloat16 if isinstance(packed, Int8Packed) else packed.values.dtype
    output = x.new_empty(*x.shape[:-1], blocks * BLOCK_ROWS, dtype=dtype)
    if bias is not None and not whole:
        bias = pad(bias, (0, blocks * BLOCK_ROWS - rows))
    added = 0 if bias is None else bias.contiguous()
    if blocks:
        run(_call(way, packed, x, added, output, tokens), (packed, x, added, output))
    return output if whole else output[..., :rows].clone(memory_format=torch.contiguous_format)


def _call(way: Way, packed: Packed, x: Tensor | int, bias: Tensor | int, output: Tensor | int, tokens: int) -> Call:
    """A call of the kernel; tensors that are not known yet are 0."""
    values, masks, starts = packed[:3]
    scales = packed.scales if isinstance(packed, Int8Packed) else 0
    blocks, groups, _ = masks.shape
    size = values.element_size()
    code = multiply_kernel(int(way), INT8 if isinstance(packed, Int8Packed) else NUMBERS[values.dtype], size)
    strides = (2 if way == Way.AVX512_BF16 else 4) * GROUP * groups, max(size, 2) * BLOCK_ROWS * blocks
    worth = max(1, MIN_ENTRIES_PER_BAND // max(1, BLOCK_ROWS * GROUP * groups * tokens))
    tensors = [one if isinstance(one, int) else one.data_ptr() for one in (values, masks, starts, x, bias, output, scales)]
    return prepared(code, (*tensors, groups, tokens, *strides), blocks, 1, worth)


def call_of(packed: Packed, rows: int, columns: int, tokens: int, max_tokens: int) -> Call | None:
    """The kernel's call for contiguous inputs of this many tokens, without input, bias and output; None if it needs more steps.

    More steps are a conversion of the input, padding, AMX, or unpacking in bands.
    """
    dtype = torch.bfloat16 if isinstance(packed, Int8Packed) else packed.values.dtype
    ways = usable_ways(dtype)
    blocks, groups, _ = packed.masks.shape
    converts = dtype != torch.float32 and Way.AVX512_BF16 not in ways[:1]
    padded = columns != groups * GROUP or rows != blocks * BLOCK_ROWS
    once = isinstance(packed, Int8Packed) or _in_one_pass(dtype, tokens, max_tokens)
    if not ways or converts or padded or not blocks or tokens < 1 or not once or _uses_amx(dtype, tokens):
        return None
    return _call(ways[0], packed, 0, 0, 0, tokens)


def product_int8(input: Tensor, packed: Int8Packed, bias: Tensor | None, rows: int) -> Tensor:
    """`int8.linear_bitmask_int8` on a CPU, without gradients; by AVX-512 with bfloat16, otherwise as specified."""
    if Way.AVX512_BF16 not in usable_ways(torch.bfloat16):
        return reference_linear_int8(input, *packed, bias, rows)
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    tokens = math.prod(input.shape[:-1])
    if not _uses_amx(torch.bfloat16, tokens):
        return multiply(Way.AVX512_BF16, input, packed, bias, rows)
    flat = input if input.ndim == 2 else input.reshape(tokens, input.shape[-1])
    output = amx.multiply_amx(flat, *packed[:3], bias, rows, packed.scales)
    return output if input.ndim == 2 else unviewed(output, *input.shape[:-1], rows)


def multiply_bands(way: Way, x: Tensor, packed: BitmaskPacked, bias: Tensor | None, rows: int) -> Tensor:
    """The product by torch, band by band, with each band unpacked into the same workspace."""
    tokens, columns = x.shape
    values, masks, starts = packed
    blocks, groups, _ = masks.shape
    step = max(1, WORKSPACE_BYTES // max(1, BLOCK_ROWS * GROUP * groups * values.element_size()))
    step = -(-blocks // -(-blocks // step)) if blocks else 1  # bands of equal height
    workspace = _workspace(min(step, blocks) * BLOCK_ROWS, groups * GROUP, values.dtype)
    enabled = torch.is_autocast_enabled("cpu")  # entering the context takes 20 microseconds
    # Results must not depend on the way in which a product is computed.
    with torch.autocast("cpu", enabled=False) if enabled else nullcontext():
        if step >= blocks:
            expand(way, values, masks, starts, workspace, 0, blocks)
            return linear(x, _part(workspace, rows, columns), bias)
        output = x.new_empty(tokens, rows)
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            expand(way, values, masks, starts, workspace, first, last - first)
            top, bottom = first * BLOCK_ROWS, min(last * BLOCK_ROWS, rows)
            band = _part(workspace, bottom - top, columns)
            output[:, top:bottom] = linear(x, band, None if bias is None else bias[top:bottom])
    return output


def _part(workspace: Tensor, rows: int, columns: int) -> Tensor:
    return workspace if workspace.shape == (rows, columns) else workspace[:rows, :columns]


_held = threading.local()


def _workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Workspace for a band, kept for the thread's next call, since page faults of fresh memory took longer than the expansion."""
    views: dict[tuple[int, int, torch.dtype], Tensor] = _held.__dict__.setdefault("views", {})
    if (found := views.get((rows, columns, dtype))) is not None:
        return found
    needed = rows * columns * dtype.itemsize
    room: Tensor | None = getattr(_held, "room", None)
    with torch.inference_mode(False):  # the workspace outlives the mode of this call
        if room is None or room.numel() < needed:
            views.clear()
            room = _held.room = torch.empty(max(needed, WORKSPACE_BYTES), dtype=torch.uint8, device="cpu")
        return views.setdefault((rows, columns, dtype), room[:needed].view(dtype).view(rows, columns))
