"""The format of sparse matrices as non-zeros and one bit per entry, its operators, and their specification in plain torch.

The matrix is split into blocks of 4 rows and groups of 32 columns, padded with zeros. Block by block, and within a block group
by group, 4 rows per group:

* `masks`, int32 of shape (blocks, groups, 4): bit k of a mask is set where column k of the group is not zero;
* `values`, 1-D, in the matrix's dtype: the non-zeros in the same order, columns ascending, then `PADDING` zeros, so that a
  kernel may load 32 values from any position;
* `starts`, int64 of length blocks + 1: the position of each block's first value, and their number.

At half density a bfloat16 matrix takes 36 bytes per 64 dense ones, for any pattern. The 4 rows of a block are interleaved so that
a product reads one stream of values and one of masks, and loads each group of the input once per 4 rows. Values have no fixed
stride per group: counting bits is free when memory is the bottleneck, and with a stride "50%", whose groups of 32 keep up to 28,
would take 1.5 times as much as 16:32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from bisparse.kernels.registration import ANY_DEVICE, define, register_kernel, unviewed

__all__ = [
    "BLOCK_ROWS",
    "DTYPES",
    "GROUP",
    "MIN_ENTRIES_PER_BAND",
    "PADDING",
    "BitmaskPacked",
    "check_packed",
    "linear_bitmask",
    "pack_bitmask",
    "pack_integers",
    "packed_bytes",
    "reference_linear",
    "reference_unpack",
    "unpack_bitmask",
]

BLOCK_ROWS = 4
GROUP = 32
PADDING = 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of packed matrices; float64 is only supported by the specification."""
MIN_ENTRIES_PER_BAND = 1 << 16
"""Minimum number of matrix entries times tokens per band for which another thread is worthwhile."""
BAND_ENTRIES = 1 << 20
"""Maximum number of entries packed at a time, to bound memory."""


class BitmaskPacked(NamedTuple):
    """A packed matrix."""

    values: Float[Tensor, " P"]
    masks: Int[Tensor, "B G 4"]
    starts: Int[Tensor, " S"]


define("pack_bitmask(Tensor matrix) -> (Tensor values, Tensor masks, Tensor starts)")
define("unpack_bitmask(Tensor values, Tensor masks, Tensor starts, int rows, int columns) -> Tensor")
define(
    "linear_bitmask(Tensor input, Tensor values, Tensor masks, Tensor starts, Tensor? bias, int rows, int max_tokens) -> Tensor"
)


def pack_bitmask(matrix: Float[Tensor, "R C"]) -> BitmaskPacked:
    """Pack a matrix: its non-zeros, including NaN, and their positions; -0.0 counts as zero.

    Raises:
        ValueError: not a matrix of one of `DTYPES`.
    """
    if matrix.ndim != 2 or matrix.dtype not in DTYPES:
        raise ValueError(
            f"a {matrix.dtype} tensor of shape {tuple(matrix.shape)} cannot be packed: expected a matrix of bfloat16, float16, "
            "float32 or float64"
        )
    return BitmaskPacked(*torch.ops.bisparse.pack_bitmask(matrix))


def unpack_bitmask(packed: BitmaskPacked, rows: int, columns: int) -> Float[Tensor, "R C"]:
    """The (rows, columns) matrix that was packed; its zeros are 0.0."""
    check_packed(packed, rows, columns)
    matrix: Tensor = torch.ops.bisparse.unpack_bitmask(*packed, rows, columns)
    return matrix


def linear_bitmask(
    input: Float[Tensor, "*T I"], packed: BitmaskPacked, bias: Float[Tensor, " O"] | None, rows: int, max_tokens: int = 16
) -> Float[Tensor, "*T O"]:
    """``input W^T + bias`` in the input's dtype, with gradients of input and bias; W is a constant.

    Args:
        max_tokens: up to this number of tokens W is multiplied in packed form; for more, bands of it are unpacked and
            multiplied by torch's dense product.

    Raises:
        ValueError: dtypes or shapes do not agree.
    """
    columns = input.shape[-1] if input.ndim else 0
    check_packed(packed, rows, columns)
    if input.dtype != packed.values.dtype or (bias is not None and bias.shape != (rows,)):
        given = "no bias" if bias is None else f"a bias of shape {tuple(bias.shape)}"
        raise ValueError(
            f"a {input.dtype} input of shape {tuple(input.shape)} and {given} do not fit a matrix of {rows} rows packed in "
            f"{packed.values.dtype}: convert the input to that dtype"
        )
    output: Tensor = torch.ops.bisparse.linear_bitmask(input, *packed, bias, rows, max_tokens)
    return output


def packed_bytes(rows: int, columns: int, kept: int, dtype: torch.dtype) -> int:
    """Bytes of a packed matrix with `kept` non-zeros."""
    blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // GROUP)
    return (kept + PADDING) * dtype.itemsize + 4 * BLOCK_ROWS * blocks * groups + 8 * (blocks + 1)


def check_packed(packed: BitmaskPacked, rows: int, columns: int) -> None:
    """Raise ValueError unless the three tensors fit a (rows, columns) matrix, since kernels address memory by them.

    The values of `starts` and `masks` are not checked: they come from `pack_bitmask`.
    """
    blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // GROUP)
    expected = (blocks, groups, BLOCK_ROWS)
    values, masks, starts = packed
    if masks.shape != expected or starts.shape != (blocks + 1,) or values.ndim != 1 or values.numel() < PADDING:
        raise ValueError(
            f"a {rows} x {columns} matrix packs into masks of shape {expected} and {blocks + 1} starts, not {tuple(masks.shape)} "
            f"and {tuple(starts.shape)}"
        )


def pack_integers(matrix: Int[Tensor, "R C"]) -> BitmaskPacked:
    """`pack_bitmask` for integers, which `linear_bitmask` does not take."""
    return BitmaskPacked(*_pack(matrix))


@register_kernel("pack_bitmask", ANY_DEVICE)
def _pack(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.shape
    blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // GROUP)
    masks = matrix.new_empty((blocks, groups, BLOCK_ROWS), dtype=torch.int32)
    starts = matrix.new_zeros(blocks + 1, dtype=torch.int64)
    values = []
    step = max(1, BAND_ENTRIES // max(1, BLOCK_ROWS * GROUP * groups))
    places = torch.arange(GROUP, dtype=torch.int32, device=matrix.device)
    for first in range(0, blocks, step):
        band = matrix[first * BLOCK_ROWS : (first + step) * BLOCK_ROWS]
        band = pad(band, (0, groups * GROUP - columns, 0, -band.shape[0] % BLOCK_ROWS))
        band = band.view(band.shape[0] // BLOCK_ROWS, BLOCK_ROWS, groups, GROUP).transpose(1, 2)
        kept = band != 0
        last = first + band.shape[0]
        masks[first:last] = (kept.int() << places).sum(-1, dtype=torch.int32)
        starts[first + 1 : last + 1] = kept.flatten(1).sum(1)
        values.append(band[kept])
    with torch.autocast(matrix.device.type, enabled=False):  # which raises for halves of the other kind
        return torch.cat([*values, matrix.new_zeros(PADDING)]), masks, starts.cumsum(0)


@register_kernel("unpack_bitmask", ANY_DEVICE)
def reference_unpack(values: Tensor, masks: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    """The specification of `unpack_bitmask`."""
    del starts  # not needed here, since the values of all blocks are contiguous
    places = torch.arange(GROUP, dtype=torch.int32, device=masks.device)
    kept = (masks.unsqueeze(-1) >> places) & 1 != 0
    matrix = values.new_zeros(kept.shape)
    matrix[kept] = values[: values.numel() - PADDING]
    return matrix.transpose(1, 2).reshape(BLOCK_ROWS * masks.shape[0], GROUP * masks.shape[1])[:rows, :columns].contiguous()


@register_kernel("linear_bitmask", ANY_DEVICE)
def reference_linear(
    input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int, max_tokens: int
) -> Tensor:
    """The specification of `linear_bitmask`, without gradients."""
    del max_tokens  # only affects speed
    bias = None if bias is None else bias.to(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        output: Tensor = linear(input, reference_unpack(values, masks, starts, rows, input.shape[-1]), bias)
    return unviewed(output, *output.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, masks, starts, bias, ctx.rows, _ = inputs
    ctx.columns = input.shape[-1]
    ctx.save_for_backward(values, masks, starts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_input, to_bias = None, None
    if ctx.needs_input_grad[0]:
        to_input = gradient @ torch.ops.bisparse.unpack_bitmask(*ctx.saved_tensors, ctx.rows, ctx.columns)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype)
    return to_input, None, None, None, to_bias, None, None


def _no_gradient(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("a packed matrix is a constant without a gradient: pack matrix.detach()")


torch.library.register_autograd("bisparse::linear_bitmask", _backward, setup_context=_context)
torch.library.register_autograd("bisparse::pack_bitmask", _no_gradient)


@torch.library.register_fake("bisparse::pack_bitmask")
def _(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks, groups = -(-matrix.shape[0] // BLOCK_ROWS), -(-matrix.shape[1] // GROUP)
    count = torch.library.get_ctx().new_dynamic_size(min=PADDING)
    masks = matrix.new_empty((blocks, groups, BLOCK_ROWS), dtype=torch.int32)
    return matrix.new_empty(count), masks, matrix.new_empty(blocks + 1, dtype=torch.int64)


@torch.library.register_fake("bisparse::unpack_bitmask")
def _(values: Tensor, masks: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


@torch.library.register_fake("bisparse::linear_bitmask")
def _(input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int, max_tokens: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)
