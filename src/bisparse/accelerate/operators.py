"""The products as torch operators with gradients, so that `torch.compile`, checkpointing and wrappers need no special cases.

`linear_2to4` multiplies by a weight in training: it takes the dense weight and reads its values at the mask's positions in every
pass; positions and metadata are found when the mask changes. `packed_linear_2to4` multiplies by a packed constant.

    y  = x W^T + b         sparse
    dx = g W               sparse if W^T is 2:4 too (its positions or its packed matrix are given), otherwise dense
    dW = g^T x             dense, or sparse by the unbiased 2:4 estimate of g (MVUE)

Second derivatives, as for a gradient penalty, are exact, since the backward formulas consist of operators with gradients; dx is
the same operator with W^T. The derivative of MVUE's estimate of dW is that of its expectation, g^T x.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.autograd import forward_ad

from bisparse.accelerate.backends import BACKENDS, HALF
from bisparse.kernels.mvue.ops import estimate_2to4, pack_estimate
from bisparse.kernels.mvue.philox import draw_seed
from bisparse.kernels.registration import unviewed
from bisparse.kernels.sparse24.metadata import WORD
from bisparse.kernels.sparse24.positions import put_values, take_values

__all__ = ["autocast_dtype", "checked_input", "in_forward_mode", "linear_2to4", "packed_linear_2to4", "refuse_onnx"]

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define(
    "linear_2to4(Tensor input, Tensor weight, Tensor? bias, Tensor positions, Tensor metadata, Tensor? positions_t,"
    " Tensor? metadata_t, str backend, bool mvue, bool fixed, bool search) -> Tensor"
)
_LIBRARY.define("masked_2to4(Tensor weight, Tensor positions, bool straight_through) -> Tensor")
_LIBRARY.define(
    "weight_gradient_2to4(Tensor gradient, Tensor input, str backend, bool search) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_LIBRARY.define(
    "packed_linear_2to4(Tensor input, Tensor packed, Tensor metadata, Tensor? packed_t, Tensor? metadata_t, Tensor? bias,"
    " int rows, str backend, bool search) -> Tensor"
)
_LIBRARY.define("unpack_2to4(Tensor packed, Tensor metadata, int rows, int columns, str backend) -> Tensor")


def linear_2to4(
    input: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None,
    positions: UInt8[Tensor, "O G"],
    metadata: Shaped[Tensor, "..."],
    transposed: tuple[UInt8[Tensor, "I H"], Shaped[Tensor, "..."]] | None,
    backend: str,
    *,
    mvue: bool = False,
    fixed: bool = False,
    search: bool = False,
) -> Float[Tensor, "*T O"]:
    """``x W~^T + b`` in the input's dtype; W~ is the weight at the mask's positions and zero elsewhere.

    The weight's gradient has the weight's dtype, for all entries (straight through), or for the kept ones with `fixed`.

    Args:
        positions, metadata: positions of W's kept entries, and metadata in the backend's layout, empty if that is unknown.
        transposed: the same for W^T, if the mask is transposable; the gradient of the input is then a sparse product too.
        mvue: compute the weight's gradient as a sparse product with an unbiased estimate of the output's gradient.
        search: let the backend search for its fastest algorithm, once per shape.
    """
    positions_t, metadata_t = transposed if transposed is not None else (None, None)
    output: Tensor = torch.ops.bisparse.linear_2to4(
        input, weight, bias, positions, metadata, positions_t, metadata_t, backend, mvue, fixed, search
    )
    return output


def packed_linear_2to4(
    input: Float[Tensor, "*T I"],
    packed: Shaped[Tensor, "..."],
    metadata: Shaped[Tensor, "..."],
    transposed: tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]] | None,
    bias: Float[Tensor, " O"] | None,
    rows: int,
    backend: str,
    *,
    search: bool = False,
) -> Float[Tensor, "*T O"]:
    """``x W^T + b`` with a packed constant W; `transposed` is the packed W^T, for a sparse gradient of the input."""
    packed_t, metadata_t = transposed if transposed is not None else (None, None)
    output: Tensor = torch.ops.bisparse.packed_linear_2to4(
        input, packed, metadata, packed_t, metadata_t, bias, rows, backend, search
    )
    return output


def refuse_onnx() -> None:
    """Raise ValueError if a model is being exported to ONNX, which has no operators for these products."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "ONNX has no sparse products: export the plain model that finalize_(copy.deepcopy(model)) makes; its zeros stay "
            "in the weights"
        )


def in_forward_mode() -> bool:
    """Whether derivatives may be computed in forward mode, where operators written in Python drop tangents without an error."""
    return forward_ad._current_level >= 0


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts this input of a Linear; None if it does not cast it."""
    kind = input.device.type
    if kind == "meta" or input.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def checked_input(input: Tensor, columns: int) -> Tensor:
    """The input unchanged; raises ValueError if its last dimension is not `columns`."""
    if input.shape[-1:] != (columns,):
        raise ValueError(f"an input of shape {tuple(input.shape)} does not fit a layer of {columns} inputs")
    return input


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    metadata: Tensor,
    positions_t: Tensor | None,
    metadata_t: Tensor | None,
    backend: str,
    mvue: bool,
    fixed: bool,
    search: bool,
) -> Tensor:
    rows = weight.shape[0]
    if input.numel() == 0:
        return _empty_product(input, rows, bias)
    packed, filled = BACKENDS[backend].fill(weight, positions, metadata, input.dtype)
    return _multiply(input, packed, filled, bias, rows, backend, search)


def _masked(weight: Tensor, positions: Tensor, straight_through: bool) -> Tensor:
    output: Tensor = put_values(take_values(weight, positions), positions, weight.shape[1])
    return output


def _weight_gradient(gradient: Tensor, input: Tensor, backend: str, search: bool) -> Tensor:
    """``g~^T x`` with g~ the estimate of g, which keeps at most 2 of every 4 tokens in each column."""
    own = BACKENDS[backend]
    tokens, rows = gradient.shape
    if tokens == 0:  # such as an expert that got no token
        return input.new_zeros(rows, input.shape[1])
    multiple = max(own.column_multiple, WORD)
    columns = -(-tokens // multiple) * multiple
    if (reason := own.probed_reason(rows, columns, gradient.dtype, gradient.device)) is not None:
        warnings.warn(f"the weight's gradient is a dense product, without MVUE: {reason}", stacklevel=2)
        return gradient.t() @ input
    seed = draw_seed(gradient.device)
    # search=False means that the number of tokens varies, so that finding a layout per shape is not worthwhile.
    known = gradient.dtype in HALF and (search or not own.learns_layout)
    layout = own.metadata_layout(rows, columns, gradient.dtype, gradient.device) if known else None
    if layout is None:
        packed, metadata = own.pack(estimate_2to4(gradient, seed, columns // 4))
    else:
        packed, metadata = own.split(pack_estimate(gradient, seed, columns // 4, layout), rows, columns)
    if columns > tokens:
        input = torch.nn.functional.pad(input, (0, 0, 0, columns - tokens))
    output: Tensor = own.multiply(packed, metadata, input.contiguous(), rows, search=search)
    return output


def _packed_linear(
    input: Tensor,
    packed: Tensor,
    metadata: Tensor,
    packed_t: Tensor | None,
    metadata_t: Tensor | None,
    bias: Tensor | None,
    rows: int,
    backend: str,
    search: bool,
) -> Tensor:
    if input.numel() == 0:
        return _empty_product(input, rows, bias)
    return _multiply(input, packed, metadata, bias, rows, backend, search)


def _unpack(packed: Tensor, metadata: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    matrix: Tensor = BACKENDS[backend].unpack(packed, metadata, rows, columns)
    return matrix


def _multiply(
    input: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None, rows: int, backend: str, search: bool
) -> Tensor:
    flat = input.reshape(-1, input.shape[-1]).contiguous()
    cast = None if bias is None else bias.to(input.dtype)
    output: Tensor = BACKENDS[backend].multiply(packed, metadata, flat.t(), rows, cast, transposed=True, search=search)
    return unviewed(output, *input.shape[:-1], rows)


def _empty_product(input: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    zeros = input.new_zeros(*input.shape[:-1], rows)
    return zeros if bias is None else zeros + bias.to(input.dtype)


for _name, _kernel in {
    "linear_2to4": _linear,
    "masked_2to4": _masked,
    "weight_gradient_2to4": _weight_gradient,
    "packed_linear_2to4": _packed_linear,
    "unpack_2to4": _unpack,
}.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("bisparse::linear_2to4")
def _(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("bisparse::masked_2to4")
def _(weight: Tensor, positions: Tensor, straight_through: bool) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.register_fake("bisparse::weight_gradient_2to4")
def _(gradient: Tensor, input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(gradient.shape[1], input.shape[1])


@torch.library.register_fake("bisparse::packed_linear_2to4")
def _(
    input: Tensor,
    packed: Tensor,
    metadata: Tensor,
    packed_t: Tensor | None,
    metadata_t: Tensor | None,
    bias: Tensor | None,
    rows: int,
    *_: Any,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


@torch.library.register_fake("bisparse::unpack_2to4")
def _(packed: Tensor, metadata: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    return packed.new_empty(rows, columns)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, positions, metadata, positions_t, metadata_t, *ctx.options = inputs
    # Save the weight itself, not its packed transpose: it is in memory anyway, and a sharded weight may be freed and gathered
    # again between the passes.
    ctx.save_for_backward(input, weight, positions, metadata, positions_t, metadata_t)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, positions, metadata, positions_t, metadata_t = ctx.saved_tensors
    backend, mvue, fixed, search = ctx.options
    ops = torch.ops.bisparse
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    to_input, to_weight, to_bias = None, None, None
    if needs_input and positions_t is not None:
        sides = (positions_t, metadata_t, positions, metadata)
        to_input = ops.linear_2to4(gradient, weight.t(), None, *sides, backend, False, fixed, search)
    elif needs_input:
        to_input = gradient @ ops.masked_2to4(weight, positions, not fixed).to(gradient.dtype)
    flat = gradient.reshape(-1, gradient.shape[-1])
    if needs_weight:
        inputs = input.reshape(-1, input.shape[-1])
        to_weight = ops.weight_gradient_2to4(flat, inputs, backend, search) if mvue else flat.t() @ inputs
        to_weight = to_weight.to(weight.dtype)
        if fixed:
            to_weight = ops.masked_2to4(to_weight, positions, False)
    if needs_bias:
        to_bias = flat.sum(0).to(ctx.bias_dtype)
    return to_input, to_weight, to_bias, *(None,) * 8


def _masked_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.straight_through = inputs
    ctx.save_for_backward(positions)


def _masked_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.straight_through:
        return gradient, None, None
    (positions,) = ctx.saved_tensors
    return torch.ops.bisparse.masked_2to4(gradient, positions, False), None, None


def _weight_gradient_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _weight_gradient_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of the expectation ``g^T x``; the derivative of the sample itself would be biased."""
    gradient, input = ctx.saved_tensors
    return input @ upstream.t(), gradient @ upstream, None, None


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed, metadata, packed_t, metadata_t, bias, ctx.rows, ctx.backend, ctx.search = inputs
    ctx.columns = input.shape[-1]
    ctx.save_for_backward(packed, metadata, packed_t, metadata_t)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _packed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, metadata, packed_t, metadata_t = ctx.saved_tensors
    ops = torch.ops.bisparse
    to_input, to_bias = None, None
    if ctx.needs_input_grad[0] and packed_t is not None:
        sides = (packed_t, metadata_t, packed, metadata)
        to_input = ops.packed_linear_2to4(gradient, *sides, None, ctx.columns, ctx.backend, ctx.search)
    elif ctx.needs_input_grad[0]:
        to_input = gradient @ ops.unpack_2to4(packed, metadata, ctx.rows, ctx.columns, ctx.backend)
    if ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype)
    return to_input, None, None, None, None, to_bias, None, None, None


for _name, _backward, _context in (
    ("linear_2to4", _linear_backward, _linear_context),
    ("masked_2to4", _masked_backward, _masked_context),
    ("weight_gradient_2to4", _weight_gradient_backward, _weight_gradient_context),
    ("packed_linear_2to4", _packed_backward, _packed_context),
):
    torch.library.register_autograd(f"bisparse::{_name}", _backward, setup_context=_context)
