"""Packed matrices in int8 with one scale per row: their format, operator, and specification in plain torch.

A weight w of a row with scale s is stored as the integer nearest to w / s, from -127 to 127; s is the largest magnitude of the
row divided by 127. Zeros stay zeros, and a non-zero below s / 2 becomes one. Inputs are not rounded: bfloat16 represents all 255
integers, so products are those of a bfloat16 matrix of integers, whose sums are multiplied by the scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, PADDING, BitmaskPacked, check_packed, pack_integers, reference_unpack
from bisparse.kernels.registration import ANY_DEVICE, define, register_kernel, unviewed

__all__ = ["LARGEST", "Int8Packed", "dequantized", "linear_bitmask_int8", "pack_int8", "reference_linear_int8"]

LARGEST = 127


class Int8Packed(NamedTuple):
    """A packed matrix of integers with a scale per row."""

    values: Int[Tensor, " P"]
    masks: Int[Tensor, "B G 4"]
    starts: Int[Tensor, " S"]
    scales: Float[Tensor, " R"]
    """float32, one per row of whole blocks of 4."""


define(
    "linear_bitmask_int8(Tensor input, Tensor values, Tensor masks, Tensor starts, Tensor scales, Tensor? bias, int rows) "
    "-> Tensor"
)


def pack_int8(matrix: Float[Tensor, "R C"]) -> Int8Packed:
    """Round a matrix to int8 and pack it.

    Raises:
        ValueError: not a floating-point matrix, or it holds NaN or infinities.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"a {matrix.dtype} tensor of shape {tuple(matrix.shape)} cannot be rounded to int8: expected a float matrix"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("a matrix with NaN or infinities cannot be rounded to int8")
    wide = matrix.float()
    largest = wide.abs().amax(1) if matrix.shape[1] else wide.new_zeros(matrix.shape[0])
    scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    integers = (wide / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    packed = pack_integers(integers)
    missing = BLOCK_ROWS * packed.masks.shape[0] - scales.numel()
    values = pad(packed.values, (0, -packed.values.numel() % 8))  # a whole number of values of any dtype
    return Int8Packed(values, packed.masks, packed.starts, pad(scales, (0, missing)))


def dequantized(packed: Int8Packed, rows: int, columns: int) -> Float[Tensor, "R C"]:
    """The rounded matrix, in float32."""
    values, masks, starts, scales = packed
    kept = values[: int(starts[-1]) + PADDING]
    return reference_unpack(kept, masks, starts, rows, columns).float() * scales[:rows, None]


def linear_bitmask_int8(
    input: Float[Tensor, "*T I"], packed: Int8Packed, bias: Float[Tensor, " O"] | None, rows: int
) -> Float[Tensor, "*T O"]:
    """``input W^T + bias`` in bfloat16, with gradients of input and bias; W is a constant.

    Raises:
        ValueError: dtypes or shapes do not agree.
    """
    columns = input.shape[-1] if input.ndim else 0
    check_packed(BitmaskPacked(*packed[:3]), rows, columns)
    if input.dtype != torch.bfloat16 or (bias is not None and bias.shape != (rows,)):
        given = "no bias" if bias is None else f"a bias of shape {tuple(bias.shape)}"
        raise ValueError(
            f"a {input.dtype} input of shape {tuple(input.shape)} and {given} do not fit a matrix of {rows} rows packed in int8: "
            "convert the input to bfloat16"
        )
    output: Tensor = torch.ops.bisparse.linear_bitmask_int8(input, *packed, bias, rows)
    return output


@register_kernel("linear_bitmask_int8", ANY_DEVICE)
def reference_linear_int8(
    input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, scales: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    """The specification of `linear_bitmask_int8`, without gradients."""
    weight = dequantized(Int8Packed(values, masks, starts, scales), rows, input.shape[-1])
    bias = None if bias is None else bias.float()
    with torch.autocast(input.device.type, enabled=False):
        output = linear(input.float(), weight, bias).to(input.dtype)
    return unviewed(output, *output.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, masks, starts, scales, bias, ctx.rows = inputs
    ctx.columns = input.shape[-1]
    ctx.save_for_backward(values, masks, starts, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_input, to_bias = None, None
    if ctx.needs_input_grad[0]:
        weight = dequantized(Int8Packed(*ctx.saved_tensors), ctx.rows, ctx.columns)
        to_input = (gradient.float() @ weight).to(gradient.dtype)
    if ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype)
    return to_input, None, None, None, None, to_bias, None


torch.library.register_autograd("bisparse::linear_bitmask_int8", _backward, setup_context=_context)


@torch.library.register_fake("bisparse::linear_bitmask_int8")
def _(input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, scales: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)
