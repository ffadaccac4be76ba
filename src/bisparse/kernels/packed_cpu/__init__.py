"""Products on CPUs with any sparse matrix, stored as its non-zeros and a bit mask: format, specification and kernels.

`layout` and `int8` define the formats and the operators, and specify them in plain torch; `instructions` writes the inner loops
for AVX-512 and AVX2; `kernels` compiles them; `multiply` chooses between them and torch's dense product.
"""

from torch import Tensor

from bisparse.kernels.packed_cpu import int8, layout
from bisparse.kernels.registration import register_kernel

__all__ = ["int8", "layout"]


@register_kernel("unpack_bitmask", "CPU")
def _unpack_bitmask(values: Tensor, masks: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    from bisparse.kernels.packed_cpu import multiply

    return multiply.unpack(values, masks, starts, rows, columns)


@register_kernel("linear_bitmask", "CPU")
def _linear_bitmask(
    input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int, max_tokens: int
) -> Tensor:
    from bisparse.kernels.packed_cpu import multiply

    return multiply.product(input, values, masks, starts, bias, rows, max_tokens)


@register_kernel("linear_bitmask_int8", "CPU")
def _linear_bitmask_int8(
    input: Tensor, values: Tensor, masks: Tensor, starts: Tensor, scales: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    from bisparse.kernels.packed_cpu import multiply

    return multiply.product_int8(input, int8.Int8Packed(values, masks, starts, scales), bias, rows)
