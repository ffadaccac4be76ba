"""Building blocks of intrinsics: LLVM types, and loads, stores and arithmetic on whole vectors.

`b` is llvmlite's builder throughout; offsets count elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

__all__ = [
    "BIT",
    "F32",
    "I8",
    "I16",
    "I32",
    "I64",
    "at",
    "call_llvm",
    "data_of",
    "from_bits",
    "larger",
    "load",
    "number",
    "row_of",
    "smaller",
    "spread",
    "store",
    "to_bits",
]

BIT, I8, I16, I32, I64, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def data_of(context: Any, builder: Any, signature: Any, args: Any, position: int) -> Any:
    """Pointer to the first entry of an array argument."""
    array = signature.args[position]
    return context.make_array(array)(context, builder, value=args[position]).data


def load(b: Any, pointer: Any, offset: Any, element: ir.Type, count: int) -> Any:
    """`count` entries as a vector, from `offset` entries on."""
    instruction = b.load(b.bitcast(b.gep(pointer, [offset]), ir.VectorType(element, count).as_pointer()))
    instruction.align = _bytes_of(element)
    return instruction


def _bytes_of(element: ir.Type) -> int:
    """Size of an entry in bytes; types other than integers are float32."""
    return element.width // 8 if isinstance(element, ir.IntType) else 4


def store(b: Any, vector: Any, pointer: Any, offset: Any) -> Any:
    """Write a vector, from `offset` entries on; the instruction."""
    instruction = b.store(vector, b.bitcast(b.gep(pointer, [offset]), vector.type.as_pointer()))
    instruction.align = _bytes_of(vector.type.element)
    return instruction


def number(element: ir.Type, count: int, value: int) -> Any:
    """A vector of one number."""
    return ir.Constant(ir.VectorType(element, count), [value] * count)


def spread(b: Any, scalar: Any, count: int) -> Any:
    """A vector of one number known at run time."""
    vector = b.insert_element(ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), number(I32, count, 0))


def call_llvm(b: Any, name: str, result: ir.Type, args: Sequence[Any]) -> Any:
    """Call an intrinsic of LLVM, declared on first use."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return b.call(function, args)


def smaller(b: Any, x: Any, y: Any) -> Any:
    """Entry by entry, signed."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def larger(b: Any, x: Any, y: Any) -> Any:
    """Entry by entry, signed."""
    return b.select(b.icmp_signed(">", x, y), x, y)


def at(b: Any, offset: Any, plus: int) -> Any:
    """An offset plus a constant."""
    return b.add(offset, ir.Constant(I64, plus))


def row_of(b: Any, base: Any, stride: Any, row: int) -> Any:
    """The offset of a row."""
    return b.add(base, b.mul(stride, ir.Constant(I64, row)))


def to_bits(b: Any, flags: Any, count: int) -> Any:
    """A vector of flags as the lowest bits of an int64."""
    bits = b.bitcast(flags, ir.IntType(count))
    return bits if count == 64 else b.zext(bits, I64)


def from_bits(b: Any, bits: Any, count: int) -> Any:
    """The lowest bits of an int64 as a vector of flags."""
    return b.bitcast(bits if count == 64 else b.trunc(bits, ir.IntType(count)), ir.VectorType(BIT, count))
