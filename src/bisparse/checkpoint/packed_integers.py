"""Unpacks compressed-tensors' packed weights into the stored numbers, to check their zeros.

``pack-quantized``: 32 / bits integers, each plus 2^(bits - 1), are packed into an int32, the first in the lowest bits.
``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: two e2m1 numbers to a byte, the first in the lower bits.
Without a zero point a stored 0 is the weight 0. The numbers are not weights, and must not be written as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bisparse.checkpoint.reader import Source
from bisparse.checkpoint.stored_tensor import StoredTensor

__all__ = ["unpacked"]

PACKED, SHAPE, ZERO_POINT, ORDER = ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx"
SCALE, GLOBAL_SCALE = ".weight_scale", ".weight_global_scale"
# The float8 e4m3 bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and of their negatives; -0 is a zero.
E2M1 = np.array([0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C], dtype=np.uint8)
E2M1 = np.concatenate([E2M1, np.where(E2M1 == 0, E2M1, E2M1 | 0x80)])
BITS = (2, 4, 8)
"""Bit widths that divide 32, whose packing is the same in all versions of compressed-tensors."""


@dataclass(frozen=True)
class _Packed(StoredTensor):
    """int8 entries of a matrix whose rows are packed into int32."""

    packed: StoredTensor
    bits: int

    def read_bytes(self, start: int, stop: int) -> bytearray:
        columns, words = self.shape[1], self.packed.shape[1]
        first, last = start // columns, -(-stop // columns)
        data = np.frombuffer(self.packed.read_bytes(first * words * 4, last * words * 4), dtype="<i4").astype(np.int64)
        shifts = np.arange(0, 32, self.bits)
        fields = (data[:, None] >> shifts) & ((1 << self.bits) - 1)
        rows = fields.reshape(last - first, -1)[:, :columns] - (1 << (self.bits - 1))
        return bytearray(rows.astype(np.int8).tobytes()[start - first * columns : stop - first * columns])


@dataclass(frozen=True)
class _PackedFp4(StoredTensor):
    """float8 entries of a matrix of e2m1 numbers, two to a byte."""

    packed: StoredTensor

    def read_bytes(self, start: int, stop: int) -> bytearray:
        first, last = start // 2, -(-stop // 2)
        data = np.frombuffer(self.packed.read_bytes(first, last), dtype=np.uint8)
        codes = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
        return bytearray(E2M1[codes].tobytes()[start - 2 * first : stop - 2 * first])


def unpacked(source: Source) -> Source:
    """The source with packed integers (without a zero point) replaced by int8 tensors, for checks of zeros."""
    tensors = source.tensors
    widths = _widths(source.config)
    found = {name: whole for name, one in tensors.items() if (whole := _unpack(name, one, tensors, widths)) is not None}
    found |= {name: whole for name, one in tensors.items() if (whole := _unpack_fp4(name, one, tensors)) is not None}
    if not found:
        return source
    shards = tuple(
        replace(
            shard, tensors=tuple(found.get(one.name, one) for one in shard.tensors if one.name.removesuffix(SHAPE) == one.name)
        )
        for shard in source.shards
    )
    note = f"{len(found)} weights are packed numbers of compressed-tensors; their zeros are read as they are stored"
    return replace(source, shards=shards, notes=(*source.notes, note))


def _unpack(name: str, packed: StoredTensor, tensors: Mapping[str, StoredTensor], widths: frozenset[int]) -> StoredTensor | None:
    layer = name.removesuffix(PACKED)
    shape = tensors.get(layer + SHAPE)
    if layer == name or shape is None or packed.dtype != "I32" or len(packed.shape) != 2 or shape.size != 2:
        return None
    if shape.dtype not in ("I64", "I32") or any(layer + one in tensors for one in (ZERO_POINT, ORDER, ".weight")):
        return None
    rows, columns = (int(side) for side in shape.read().tolist())
    fitting = [bits for bits in BITS if rows == packed.shape[0] and -(-columns * bits // 32) == packed.shape[1] and columns > 0]
    if len(fitting) > 1:
        fitting = [bits for bits in fitting if widths == {bits}]
    if len(fitting) != 1:
        return None
    return _Packed(f"{layer}.weight", "I8", (rows, columns), packed.path, rows * columns, packed=packed, bits=fitting[0])


def _unpack_fp4(name: str, packed: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """A matrix of e2m1 numbers: bytes with a scale per 16 inputs (float8, and a factor) or per 32 (an exponent)."""
    layer = name.removesuffix(PACKED)
    scale = tensors.get(layer + SCALE)
    if layer == name or packed.dtype != "U8" or len(packed.shape) != 2 or scale is None or len(scale.shape) != 2:
        return None
    if any(layer + one in tensors for one in (ZERO_POINT, ORDER, ".weight")):
        return None
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group = {"F8_E4M3": 16, "U8": 32}.get(scale.dtype)
    if group is None or scale.shape != (rows, columns // group) or columns % group:
        return None
    if scale.dtype == "F8_E4M3" and layer + GLOBAL_SCALE not in tensors:
        return None
    return _PackedFp4(f"{layer}.weight", "F8_E4M3", (rows, columns), packed.path, rows * columns, packed=packed)


def _widths(config: Mapping[str, Any]) -> frozenset[int]:
    """The bit widths of weights in a config.json."""
    said = config.get("quantization_config")
    groups = said.get("config_groups") if isinstance(said, Mapping) else None
    weights = [one.get("weights") for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
    widths = [one.get("num_bits") for one in weights if isinstance(one, Mapping)]
    return frozenset(one for one in widths if isinstance(one, int))
