"""The inner loops of products with packed matrices, in LLVM vector code for AVX-512 and AVX2.

The values of a group of 32 columns are moved to the places that its mask selects, by AVX-512's expand instruction. AVX2 has none,
so 8 places at a time are filled by a table of 256 permutations. There are three ways:

* `AVX512_BF16`: bfloat16 only; 32 values at once, and the dot product of pairs that adds in float32;
* `AVX512`: 16 values at a time, as float32, and fused multiply-adds;
* `AVX2`: 8 values at a time, as float32.

Addresses are int64 and count bytes; nothing is bounds-checked. Sums are float32; the order of additions differs between ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bisparse.kernels.numba_runtime.llvm import BIT, F32, I8, I16, I32, I64, call_llvm, load, number, store
from bisparse.kernels.numba_runtime.target import processor
from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, GROUP

__all__ = [
    "BF16",
    "INT8",
    "MASK_BYTES",
    "MAX_TOKENS",
    "NUMBERS",
    "Way",
    "expand_block",
    "expand_groups",
    "from_float",
    "multiply_block",
    "usable_ways",
    "vector_at",
    "write_vector",
]

Codegen = Callable[[Any, Any, Any, Any], Any]

PREFETCH_AHEAD = 4096
"""Prefetch distance in bytes of values. 2 to 8 KiB were equally fast; without it, hardware prefetching was too slow for
matrices larger than the caches."""
MASK_BYTES = 4 * BLOCK_ROWS


class Way(IntEnum):
    """The instruction set of a kernel."""

    AVX512_BF16 = 0
    AVX512 = 1
    AVX2 = 2


FEATURES = {
    Way.AVX512_BF16: {"avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512vbmi2"},
    Way.AVX512: {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    Way.AVX2: {"avx2", "fma", "f16c"},
}
LANES = {Way.AVX512_BF16: 16, Way.AVX512: 16, Way.AVX2: 8}
"""Float32 sums per register."""
MAX_TOKENS = {Way.AVX512_BF16: 4, Way.AVX512: 4, Way.AVX2: 2}
"""Number of tokens multiplied at once; the sums of 4 rows times this number take half of the registers."""


@cache
def usable_ways(dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways that the processor supports according to numba, fastest first; empty on other processors."""
    there = processor()[1]
    if dtype not in NUMBERS:
        return ()
    return tuple(way for way in Way if FEATURES[way] <= there and (dtype == torch.bfloat16 or way != Way.AVX512_BF16))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat type, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOAT, HALF = _BFloat(), ir.HalfType()
BF16, F16, F32_NUMBER, INT8 = range(4)
NUMBERS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32_NUMBER}
"""Numbers of the dtypes in kernels; `INT8` is that of weights with one scale per row, whose products are bfloat16."""


def _pointer(b: Any, address: Any, element: ir.Type) -> Any:
    return b.inttoptr(address, element.as_pointer())


def vector_at(b: Any, address: Any, element: ir.Type, count: int) -> Any:
    """`count` elements from an address on, as a vector."""
    return load(b, _pointer(b, address, element), ir.Constant(I64, 0), element, count)


def write_vector(b: Any, vector: Any, address: Any) -> None:
    """Store a vector at an address, of no particular alignment beyond its elements'."""
    store(b, vector, _pointer(b, address, vector.type.element), ir.Constant(I64, 0))


def _plus(b: Any, address: Any, bytes_: int) -> Any:
    return b.add(address, ir.Constant(I64, bytes_))


def _shuffle(b: Any, x: Any, y: Any, places: Sequence[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(places)), list(places)))


def _raw(kind: int) -> ir.Type:
    return {F32_NUMBER: I32, INT8: I8}.get(kind, I16)


def _size(kind: int) -> int:
    return {F32_NUMBER: 4, INT8: 1}.get(kind, 2)


def _kind_of_output(kind: int) -> int:
    return BF16 if kind == INT8 else kind


def _to_float_bits(b: Any, raw: Any, kind: int) -> Any:
    """Convert numbers to the int32 bits of float32."""
    bits = ir.VectorType(I32, raw.type.count)
    if kind == F32_NUMBER:
        return raw
    if kind == BF16:
        return b.shl(b.zext(raw, bits), number(I32, raw.type.count, 16))
    wide = b.fpext(b.bitcast(raw, ir.VectorType(HALF, raw.type.count)), ir.VectorType(F32, raw.type.count))
    return b.bitcast(wide, bits)


def from_float(b: Any, vector: Any, kind: int) -> Any:
    """Convert float32 to the bits of another kind, as integers of its width, rounded to nearest, ties to even."""
    count = vector.type.count
    if kind == F32_NUMBER:
        return b.bitcast(vector, ir.VectorType(I32, count))
    if kind == F16:
        return b.bitcast(b.fptrunc(vector, ir.VectorType(HALF, count)), ir.VectorType(I16, count))
    # In integer arithmetic, since not every target has the conversion, and LLVM would call a missing function.
    bits = b.bitcast(vector, ir.VectorType(I32, count))
    upper = b.lshr(bits, number(I32, count, 16))
    odd = b.and_(upper, number(I32, count, 1))
    rounded = b.lshr(b.add(b.add(bits, number(I32, count, 0x7FFF)), odd), number(I32, count, 16))
    nan = b.fcmp_unordered("uno", vector, vector)
    return b.trunc(b.select(nan, b.or_(upper, number(I32, count, 0x40)), rounded), ir.VectorType(I16, count))


def _permutations(module: Any) -> Any:
    """A table with, for each byte of a mask, the source of each of 8 places, -1 for zero."""
    name = "bisparse.permutations"
    if name in module.globals:
        return module.globals[name]
    rows = []
    for mask in range(256):
        kept = iter(range(8))
        rows += [next(kept) if mask >> place & 1 else -1 for place in range(8)]
    table = ir.GlobalVariable(module, ir.ArrayType(I8, len(rows)), name)
    table.linkage, table.global_constant = "internal", True
    table.initializer = ir.Constant(ir.ArrayType(I8, len(rows)), rows)
    return table


def _expand(b: Any, way: int, address: Any, mask: Any, kind: int, convert: Callable[[Any], Any]) -> list[Any]:
    """Expand a group of 32 columns from its values and mask into vectors: one of int16, or several of int32 after `convert`."""
    if way == Way.AVX512_BF16:
        flags = b.bitcast(mask, ir.VectorType(BIT, GROUP))
        if kind == INT8:
            return [_int8_to_bf16(b, vector_at(b, address, I8, GROUP), flags)]
        vector = ir.VectorType(I16, GROUP)
        raw = vector_at(b, address, I16, GROUP)
        return [call_llvm(b, "llvm.x86.avx512.mask.expand.v32i16", vector, [raw, number(I16, GROUP, 0), flags])]
    lanes, parts = LANES[Way(way)], []
    for first in range(0, GROUP, lanes):
        own = b.trunc(b.lshr(mask, ir.Constant(I32, first)), ir.IntType(lanes))
        loaded = convert(vector_at(b, address, _raw(kind), lanes))
        zeros = number(I32, lanes, 0)
        if way == Way.AVX512:
            flags = b.bitcast(own, ir.VectorType(BIT, lanes))
            parts.append(call_llvm(b, f"llvm.x86.avx512.mask.expand.v{lanes}i32", loaded.type, [loaded, zeros, flags]))
        else:
            start = b.ptrtoint(_permutations(b.module), I64)
            row = vector_at(b, b.add(start, b.shl(b.zext(own, I64), ir.Constant(I64, 3))), I8, lanes)
            places = b.sext(row, loaded.type)
            moved = call_llvm(b, "llvm.x86.avx2.permd", loaded.type, [loaded, places])
            parts.append(b.select(b.icmp_signed("<", places, zeros), zeros, moved))
        address = b.add(address, b.mul(b.zext(b.ctpop(own), I64), ir.Constant(I64, _size(kind))))
    return parts


def _int8_to_bf16(b: Any, raw: Any, flags: Any) -> Any:
    """Expand 32 int8 values and convert them to the bits of bfloat16, which represents all of them.

    The upper halves of their float32 bits, with the two of a 32-bit lane apart: vectors are not taken to pieces.
    """
    moved = call_llvm(b, "llvm.x86.avx512.mask.expand.v32i8", raw.type, [raw, number(I8, GROUP, 0), flags])
    words, lanes = ir.VectorType(I16, GROUP), ir.VectorType(I32, GROUP // 2)
    half = number(I32, GROUP // 2, 16)
    pairs = b.bitcast(b.sext(moved, words), lanes)
    odd, even = b.ashr(pairs, half), b.ashr(b.shl(pairs, half), half)
    lower, upper = (b.bitcast(b.sitofp(one, ir.VectorType(F32, GROUP // 2)), lanes) for one in (even, odd))
    return b.bitcast(b.or_(b.lshr(lower, half), b.and_(upper, number(I32, GROUP // 2, -65536))), words)


def _packed_group(b: Any, values: Any, masks: Any, group: Any, kind: int) -> tuple[list[tuple[Any, Any]], Any]:
    """(address of the values, mask) of each row of a group whose values begin at an address, and the address after them."""
    first = b.add(masks, b.mul(group, ir.Constant(I64, MASK_BYTES)))
    rows, before = [], ir.Constant(I64, 0)
    for row in range(BLOCK_ROWS):
        mask = b.load(_pointer(b, _plus(b, first, 4 * row), I32), align=4)
        # The next group only depends on one addition, that of the sum of all counts.
        rows.append((b.add(values, b.mul(before, ir.Constant(I64, _size(kind)))), mask))
        before = b.add(before, b.zext(b.ctpop(mask), I64))
    return rows, b.add(values, b.mul(before, ir.Constant(I64, _size(kind))))


def _prefetch(b: Any, address: Any, kind: int) -> None:
    reads, kept, data = (ir.Constant(I32, flag) for flag in (0, 3, 1))
    for line in range(0, BLOCK_ROWS * GROUP // 2 * _size(kind), 64):
        ahead = _pointer(b, _plus(b, address, PREFETCH_AHEAD + line), I8)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [ahead, reads, kept, data])


def _sums(b: Any, vectors: list[Any]) -> Any:
    """The sum of each of 4 vectors, as one vector of 4."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        count = vectors[0].type.count
        vectors = [b.fadd(_shuffle(b, x, y, range(0, 2 * count, 2)), _shuffle(b, x, y, range(1, 2 * count, 2))) for x, y in pairs]
    total = vectors[0]
    while (count := total.type.count) > BLOCK_ROWS:
        total = b.fadd(_shuffle(b, total, total, range(0, count, 2)), _shuffle(b, total, total, range(1, count, 2)))
    return total


@intrinsic(prefer_literal=True)
def multiply_block(
    typing: Any, way: Any, kind: Any, tokens: Any, packed: Any, values: Any, masks: Any, groups: Any, x: Any, x_stride: Any,
    scales: Any, bias: Any, out: Any, out_stride: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Write the products of a block of 4 rows with 1 to 4 tokens, times the rows' scales for `INT8`, plus the bias unless at 0.

    The block is packed, or with `packed` 0 already expanded by `expand_block`. The input is bfloat16 for `AVX512_BF16` and
    float32 otherwise, in rows of whole groups; bias and output have the matrix's kind, for `INT8` bfloat16; scales are float32.
    """
    way_, kind_, tokens_, packed_ = (one.literal_value for one in (way, kind, tokens, packed))
    lanes = LANES[Way(way_)]
    zeros = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, masks, groups, x, x_stride, scales, bias, out, out_stride = args[4:]
        kind_out = _kind_of_output(kind_)
        sums = [[cgutils.alloca_once(b, zeros.type) for _ in range(BLOCK_ROWS)] for _ in range(tokens_)]
        for place in (place for row in sums for place in row):
            b.store(zeros, place)
        position = cgutils.alloca_once(b, I64)
        b.store(values, position)
        with cgutils.for_range(b, groups) as loop:
            address = b.load(position)
            inputs = [_inputs(b, way_, b.add(x, b.mul(x_stride, ir.Constant(I64, t))), loop.index) for t in range(tokens_)]
            if packed_:
                _prefetch(b, address, kind_)
                packed_rows, behind = _packed_group(b, address, masks, loop.index, kind_)
            else:
                behind = _plus(b, address, BLOCK_ROWS * GROUP * _operand_size(way_))
            for row in range(BLOCK_ROWS):
                if packed_:
                    parts = _expand(b, way_, *packed_rows[row], kind_, lambda raw: _to_float_bits(b, raw, kind_))
                else:
                    parts = _inputs(b, way_, address, ir.Constant(I64, row))
                for t in range(tokens_):
                    for part, other in zip(parts, inputs[t], strict=True):
                        b.store(_dot(b, way_, b.load(sums[t][row]), part, other), sums[t][row])
            b.store(behind, position)
        for t in range(tokens_):
            summed = _sums(b, [b.load(place) for place in sums[t]])
            if kind_ == INT8:
                summed = b.fmul(summed, vector_at(b, scales, F32, BLOCK_ROWS))
            total = cgutils.alloca_once_value(b, summed)
            with b.if_then(b.icmp_signed("!=", bias, ir.Constant(I64, 0))):
                raw = _to_float_bits(b, vector_at(b, bias, _raw(kind_out), BLOCK_ROWS), kind_out)
                b.store(b.fadd(b.load(total), b.bitcast(raw, ir.VectorType(F32, BLOCK_ROWS))), total)
            place = _pointer(b, b.add(out, b.mul(out_stride, ir.Constant(I64, t))), _raw(kind_out))
            store(b, from_float(b, b.load(total), kind_out), place, ir.Constant(I64, 0))
        return context.get_dummy_value()

    return types.void(way, kind, tokens, packed, *(types.int64,) * 9), codegen


def _operand_size(way: int) -> int:
    """Bytes per number of the input and of an expanded block."""
    return 2 if way == Way.AVX512_BF16 else 4


def _inputs(b: Any, way: int, token: Any, group: Any) -> list[Any]:
    """A token's group, split into the same vectors as in `_expand`."""
    first, lanes = b.add(token, b.mul(group, ir.Constant(I64, GROUP * _operand_size(way)))), LANES[Way(way)]
    if way == Way.AVX512_BF16:
        return [vector_at(b, first, I16, GROUP)]
    return [vector_at(b, _plus(b, first, 4 * part), F32, lanes) for part in range(0, GROUP, lanes)]


def _dot(b: Any, way: int, total: Any, part: Any, other: Any) -> Any:
    if way == Way.AVX512_BF16:
        numbers = [b.bitcast(one, ir.VectorType(BFLOAT, GROUP)) for one in (other, part)]
        return call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total, *numbers])
    return call_llvm(b, f"llvm.fma.v{total.type.count}f32", total.type, [b.bitcast(part, total.type), other, total])


@intrinsic(prefer_literal=True)
def expand_block(
    typing: Any, way: Any, kind: Any, operand: Any, values: Any, masks: Any, groups: Any, out: Any, row_stride: Any,
    group_stride: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Write a block of 4 rows as dense numbers, with each group at ``out + row * row_stride + group * group_stride``.

    With `operand` 1 in the dtype that `multiply_block` multiplies, otherwise in the matrix's dtype.
    """
    way_, kind_, operand_ = (one.literal_value for one in (way, kind, operand))
    as_float = operand_ and way_ != Way.AVX512_BF16
    element = I32 if as_float else _raw(_kind_of_output(kind_))

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, masks, groups, out, row_stride, group_stride = args[3:]
        position = cgutils.alloca_once(b, I64)
        b.store(values, position)

        def convert(raw: Any) -> Any:
            if as_float:
                return _to_float_bits(b, raw, kind_)
            return raw if kind_ == F32_NUMBER else b.zext(raw, ir.VectorType(I32, raw.type.count))

        with cgutils.for_range(b, groups) as loop:
            address = b.load(position)
            _prefetch(b, address, kind_)
            packed_rows, behind = _packed_group(b, address, masks, loop.index, kind_)
            for row, packed_row in enumerate(packed_rows):
                target = b.add(b.add(out, b.mul(row_stride, ir.Constant(I64, row))), b.mul(group_stride, loop.index))
                for part in _expand(b, way_, *packed_row, kind_, convert):
                    numbers = part if part.type.element == element else b.trunc(part, ir.VectorType(element, part.type.count))
                    store(b, numbers, _pointer(b, target, element), ir.Constant(I64, 0))
                    target = _plus(b, target, numbers.type.count * element.width // 8)
            b.store(behind, position)
        return context.get_dummy_value()

    return types.void(way, kind, operand, *(types.int64,) * 6), codegen


@intrinsic(prefer_literal=True)
def expand_groups(
    typing: Any, kind: Any, values: Any, masks: Any, groups: Any, out: Any, row_stride: Any, group_stride: Any
) -> tuple[Any, Codegen]:
    """Write groups of a block in bfloat16 or int8 as bfloat16, like `expand_block`; returns the address after their values."""
    kind_ = kind.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, masks, groups, out, row_stride, group_stride = args[1:]
        position = cgutils.alloca_once(b, I64)
        b.store(values, position)
        with cgutils.for_range(b, groups) as loop:
            address = b.load(position)
            _prefetch(b, address, kind_)
            packed_rows, behind = _packed_group(b, address, masks, loop.index, kind_)
            for row, packed_row in enumerate(packed_rows):
                target = b.add(b.add(out, b.mul(row_stride, ir.Constant(I64, row))), b.mul(group_stride, loop.index))
                (numbers,) = _expand(b, Way.AVX512_BF16, *packed_row, kind_, lambda raw: raw)
                store(b, numbers, _pointer(b, target, I16), ir.Constant(I64, 0))
            b.store(behind, position)
        return b.load(position)

    return types.int64(kind, *(types.int64,) * 6), codegen
