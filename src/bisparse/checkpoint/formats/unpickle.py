"""Reads the pickles in torch files without executing them: tensors become references, and unknown classes become stubs.

Every global of a pickle is resolved here, to a few functions of this file, `OrderedDict`, `set` and `tuple`; all others become
`Stub` classes that record their arguments. The pickle cannot change any of these.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

__all__ = ["NotPlain", "StorageRef", "Stub", "TensorRef", "Wrapped", "load_pickle"]

STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8, "QInt8": torch.qint8,
    "QUInt8": torch.quint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
}  # fmt: skip
"""Dtypes by storage class, such as ``torch.FloatStorage``."""
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}
"""Opcodes that torch.save does not write: extensions, and lengths that are allocated before they are checked."""


class StorageRef(NamedTuple):
    """A storage that was not read."""

    key: str
    dtype: torch.dtype
    entries: int
    """Number of entries."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, according to the pickle."""
        return self.entries * self.dtype.itemsize


class TensorRef(NamedTuple):
    """A strided view of a storage that was not read."""

    storage: StorageRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Offset in entries."""
    problem: str = ""
    """Why the bytes are not the values; None if they are."""
    remedy: str = ""


class NotPlain(NamedTuple):
    """A tensor that is not a view of one storage."""

    problem: str
    remedy: str


class Wrapped(NamedTuple):
    """A tensor subclass, with its parts."""

    kind: str
    """Path of its class."""
    shape: tuple[int, ...]
    parts: dict[str, object]


class Stub:
    """An object of a class that is not loaded, with the content of its pickle."""

    path = ""
    """Module and name of the class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        made = super().__new__(cls)
        made.__dict__.update(args=args, state={}, items={}, elements=[])
        return made

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]
    elements: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Record an element."""
        self.elements.append(value)

    add = append

    def extend(self, values: Any) -> None:
        """Record elements."""
        self.elements.extend(values)


class _Known:
    """A function that a pickle may call but not change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("a pickle that changes functions")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a pickle that changes functions")


class _StorageType(NamedTuple):
    dtype: torch.dtype


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(not isinstance(one, int) or one < 0 for one in values):
        raise ValueError(f"a tensor of shape or stride {values!r}")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    """``_rebuild_tensor(storage, offset, size, stride)`` and ``_rebuild_tensor_v2(..., requires_grad, hooks, metadata)``."""
    return _typed(storage, offset, size, stride, storage.dtype, rest[2] if len(rest) > 2 else None)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> TensorRef:
    return _typed(storage, offset, size, stride, dtype, rest[0] if rest else None)


def _typed(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, metadata: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a storage")
    (start,), shape, steps = _numbers((offset,)), _numbers(size), _numbers(stride)
    if len(shape) != len(steps):
        raise ValueError(f"a tensor of shape {shape} and stride {steps}")
    for key, what, how in (("neg", "negated", "resolve_neg"), ("conj", "conjugated", "resolve_conj")):
        if isinstance(metadata, dict) and metadata.get(key):
            problem, remedy = f"is a {what} view, whose bytes are not its values", f"save tensor.{how}()"
            return TensorRef(storage, dtype, shape, steps, start, problem, remedy)
    return TensorRef(storage, dtype, shape, steps, start)


def _quantized(storage: Any, *rest: Any) -> NotPlain:
    return NotPlain(f"is quantized ({str(storage.dtype).removeprefix('torch.')})", "save dense tensors")


def _sparse(layout: Any, *rest: Any) -> NotPlain:
    return NotPlain(f"is stored as {layout}", "save dense tensors")


def _nested(*rest: Any) -> NotPlain:
    return NotPlain("is a nested tensor, not a plain one", "save dense tensors")


def _meta(*rest: Any) -> NotPlain:
    return NotPlain("is on the meta device and has no data", "save it from a device that holds it")


def _wrapper(kind: Any, dtype: Any, size: Any, *rest: Any) -> Wrapped:
    return Wrapped(getattr(kind, "path", "tensor subclass"), _numbers(size), {})


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> object:
    """``_rebuild_from_type(_v2)``: a tensor of a subclass, and its attributes."""
    made = function(*args)
    parts: dict[str, object] = {}
    for one in state if isinstance(state, tuple) else (state,):
        if isinstance(one, dict):
            parts |= one
    path = getattr(kind, "path", "")
    if not path or path in ("torch.Tensor", "torch.nn.parameter.Buffer"):
        return made
    return Wrapped(path, made.shape if isinstance(made, Wrapped | TensorRef) else (), {"data": made, **parts})


def _first(value: Any, *rest: Any) -> Any:
    return value


def _text(value: Any) -> str:
    return str(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.serialization._get_layout": _text,
}
KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": tuple,
    **{path: _Known(function) for path, function in FUNCTIONS.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, stubs: dict[str, type[Stub]]) -> None:
        super().__init__(file, encoding="utf-8")
        self._stubs = stubs

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in KNOWN:
            return KNOWN[path]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            dtype = STORAGES.get(name.removesuffix("Storage"))
            if dtype is not None:
                return _StorageType(dtype)
        if path not in self._stubs:
            self._stubs[path] = type(name.rsplit(".", 1)[-1], (Stub,), {"path": path})
        return self._stubs[path]

    def persistent_load(self, saved: Any) -> Any:
        if saved[0] in ("module", b"module"):  # a class with its source code, as written by torch < 1.6
            return saved[1]
        kind, storage_type, key, _, count, *views = saved
        if kind not in ("storage", b"storage") or not isinstance(storage_type, _StorageType) or any(views):
            raise pickle.UnpicklingError(f"a reference to {kind!r} instead of a storage")
        (number,) = _numbers((count,))
        return StorageRef(str(key), storage_type.dtype, number)


def load_pickle(file: BinaryIO, stubs: dict[str, type[Stub]] | None = None) -> Any:
    """Read the next object of a stream of pickles, without executing anything.

    Args:
        stubs: stub classes by path; new ones are added.

    Raises:
        pickle.UnpicklingError, ValueError, TypeError and others: the bytes are damaged.
    """
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in REFUSED_OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}, which torch does not write")
        # The unpickler allocates memory for all indices up to the largest at once.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > 2 * count + 256:
            raise pickle.UnpicklingError(f"memo index {argument} after {count} opcodes")
    stop = file.tell()
    file.seek(start)
    return _Unpickler(io.BytesIO(file.read(stop - start)), {} if stubs is None else stubs).load()
