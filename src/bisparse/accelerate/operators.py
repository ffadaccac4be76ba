"""The products as torch operators with gradients: `torch.compile` sees them whole, checkpointing and wrappers need know nothing.

`linear_2to4` multiplies by a weight in training: the dense weight is an argument, its values are taken at the mask's positions in
every pass, the positions and metadata found only where the mask changes. `packed_linear_2to4` multiplies by a packed constant.

    y  = x W^T + b         sparse
    dx = g W               sparse where W^T is 2:4 too (its positions or its packed form are given), dense otherwise
    dW = g^T x             dense, or sparse by the unbiased 2:4 estimate of g (MVUE)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from bisparse.accelerate.backends.base import BACKENDS, HALF
from bisparse.kernels.mvue.ops import estimate_2to4, pack_estimate
from bisparse.kernels.mvue.philox import draw_seed
from bisparse.kernels.sparse24.metadata import WORD
from bisparse.kernels.sparse24.positions import put_values, take_values

__all__ = ["checked_input", "linear_2to4", "packed_linear_2to4"]

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define(
    "linear_2to4(Tensor input, Tensor weight, Tensor? bias, Tensor positions, Tensor metadata, Tensor? positions_t,"
    " Tensor? metadata_t, str backend, bool mvue, bool fixed, bool search) -> Tensor"
)
_LIBRARY.define(
    "product_2to4(Tensor input, Tensor weight, Tensor? bias, Tensor positions, Tensor metadata, bool transposed,"
    " str backend, bool search) -> Tensor"
)
_LIBRARY.define("masked_2to4(Tensor weight, Tensor positions) -> Tensor")
_LIBRARY.define(
    "weight_gradient_2to4(Tensor gradient, Tensor input, str backend, bool search) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_LIBRARY.define(
    "packed_linear_2to4(Tensor input, Tensor packed, Tensor metadata, Tensor? packed_t, Tensor? metadata_t, Tensor? bias,"
    " int rows, str backend, bool search) -> Tensor"
)
_LIBRARY.define(
    "packed_product_2to4(Tensor input, Tensor packed, Tensor metadata, Tensor? bias, int rows, str backend, bool search)"
    " -> Tensor"
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
    """``x W~^T + b`` in the input's dtype, where W~ is the weight at the mask's positions and zero elsewhere.

    The weight's gradient is in the weight's dtype, of all entries (straight through), or of the kept ones with `fixed`.

    Args:
        positions, metadata: of W: the places of what the mask keeps, and metadata in the backend's `form`; none without one.
        transposed: the same of W^T, where the mask is transposable: then the input's gradient is a sparse product too.
        mvue: the weight's gradient by a sparse product with an unbiased estimate of the output's gradient.
        search: let the backend find its fastest algorithm for these shapes, once.
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
    """``x W^T + b`` with a packed W, a constant; `transposed` is the packed W^T, for a sparse gradient of the input."""
    packed_t, metadata_t = transposed if transposed is not None else (None, None)
    output: Tensor = torch.ops.bisparse.packed_linear_2to4(
        input, packed, metadata, packed_t, metadata_t, bias, rows, backend, search
    )
    return output


def checked_input(input: Tensor, columns: int) -> Tensor:
    """The input, if a layer of so many inputs takes it."""
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
    return _product(input, weight, bias, positions, metadata, False, backend, search)


def _product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    metadata: Tensor,
    transposed: bool,
    backend: str,
    search: bool,
) -> Tensor:
    matrix = weight.t() if transposed else weight
    rows = matrix.shape[0]
    if input.numel() == 0:
        return _empty_product(input, rows, bias)
    packed, found = BACKENDS[backend].fill(matrix, positions, metadata, input.dtype)
    return _multiply(input, packed, found, bias, rows, backend, search)


def _masked(weight: Tensor, positions: Tensor) -> Tensor:
    output: Tensor = put_values(take_values(weight, positions), positions, weight.shape[1])
    return output


def _weight_gradient(gradient: Tensor, input: Tensor, backend: str, search: bool) -> Tensor:
    """``g~^T x`` with g~ the estimate of g: at most 2 of every 4 tokens in each column."""
    own = BACKENDS[backend]
    tokens, rows = gradient.shape
    if tokens == 0:  # as of an expert that no token was routed to
        return input.new_zeros(rows, input.shape[1])
    multiple = max(own.column_multiple, WORD)
    columns = -(-tokens // multiple) * multiple
    if (reason := own.refusal(rows, columns, gradient.dtype, gradient.device)) is not None:
        warnings.warn(f"the weight's gradient is a dense product, without MVUE: {reason}", stacklevel=2)
        return gradient.t() @ input
    seed = draw_seed(gradient.device)
    # Whoever lets nothing be searched for a shape has many of them.
    known = gradient.dtype in HALF and (search or not own.learns_forms)
    form = own.form(rows, columns, gradient.dtype, gradient.device) if known else None
    if form is None:
        packed, metadata = own.pack(estimate_2to4(gradient, seed, columns // 4))
    else:
        packed, metadata = own.split(pack_estimate(gradient, seed, columns // 4, form), rows, columns)
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
    return _packed_product(input, packed, metadata, bias, rows, backend, search)


def _packed_product(
    input: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None, rows: int, backend: str, search: bool
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
    number = None if bias is None else bias.to(input.dtype)
    output: Tensor = BACKENDS[backend].multiply(packed, metadata, flat.t(), rows, number, transposed=True, search=search)
    return output.view(*input.shape[:-1], rows)


def _empty_product(input: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    zeros = input.new_zeros(*input.shape[:-1], rows)
    return zeros if bias is None else zeros + bias.to(input.dtype)


for _name, _kernel in {
    "linear_2to4": _linear,
    "product_2to4": _product,
    "masked_2to4": _masked,
    "weight_gradient_2to4": _weight_gradient,
    "packed_linear_2to4": _packed_linear,
    "packed_product_2to4": _packed_product,
    "unpack_2to4": _unpack,
}.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("bisparse::linear_2to4")
def _(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("bisparse::product_2to4")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, metadata: Tensor, transposed: bool, *_: Any
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


@torch.library.register_fake("bisparse::masked_2to4")
def _(weight: Tensor, positions: Tensor) -> Tensor:
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


@torch.library.register_fake("bisparse::packed_product_2to4")
def _(input: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None, rows: int, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


@torch.library.register_fake("bisparse::unpack_2to4")
def _(packed: Tensor, metadata: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    return packed.new_empty(rows, columns)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, positions, _, positions_t, metadata_t, *ctx.options = inputs
    # The weight itself and not its packed transpose: nothing is held between the passes that would not be held anyway, and a
    # sharded weight may be freed and gathered again.
    ctx.save_for_backward(input, weight, positions, positions_t, metadata_t)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, positions, positions_t, metadata_t = ctx.saved_tensors
    backend, mvue, fixed, search = ctx.options
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    to_input, to_weight, to_bias = None, None, None
    if needs_input and positions_t is not None:
        to_input = torch.ops.bisparse.product_2to4(gradient, weight, None, positions_t, metadata_t, True, backend, search)
    elif needs_input:
        to_input = gradient @ torch.ops.bisparse.masked_2to4(weight, positions).to(gradient.dtype)
    flat = gradient.reshape(-1, gradient.shape[-1])
    if needs_weight:
        inputs = input.reshape(-1, input.shape[-1])
        to_weight = torch.ops.bisparse.weight_gradient_2to4(flat, inputs, backend, search) if mvue else flat.t() @ inputs
        to_weight = to_weight.to(weight.dtype)
        if fixed:
            to_weight = torch.ops.bisparse.masked_2to4(to_weight, positions)
    if needs_bias:
        to_bias = flat.sum(0).to(ctx.bias_dtype)
    return to_input, to_weight, to_bias, *(None,) * 8


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed, metadata, packed_t, metadata_t, bias, ctx.rows, ctx.backend, ctx.search = inputs
    ctx.columns = input.shape[-1]
    ctx.save_for_backward(packed, metadata, packed_t, metadata_t)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _packed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, metadata, packed_t, metadata_t = ctx.saved_tensors
    to_input, to_bias = None, None
    if ctx.needs_input_grad[0] and packed_t is not None:
        to_input = torch.ops.bisparse.packed_product_2to4(
            gradient, packed_t, metadata_t, None, ctx.columns, ctx.backend, ctx.search
        )
    elif ctx.needs_input_grad[0]:
        to_input = gradient @ torch.ops.bisparse.unpack_2to4(packed, metadata, ctx.rows, ctx.columns, ctx.backend)
    if ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype)
    return to_input, None, None, None, None, to_bias, None, None, None


torch.library.register_autograd("bisparse::linear_2to4", _linear_backward, setup_context=_linear_context)
torch.library.register_autograd("bisparse::packed_linear_2to4", _packed_backward, setup_context=_packed_context)
