"""The CPU backend: weights with any pattern of zeros as non-zeros and a bit mask, packed if a timing shows that it is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import linear

from bisparse.accelerate.backends.base import BackendError, Refusal
from bisparse.kernels.packed_cpu.direct import Product
from bisparse.kernels.packed_cpu.int8 import Int8Packed, dequantized, pack_int8
from bisparse.kernels.packed_cpu.layout import BitmaskPacked, pack_bitmask, unpack_bitmask
from bisparse.rollback import same_bits

__all__ = [
    "ANY_TOKENS",
    "CPU",
    "MANY_TOKENS",
    "MAX_DENSITY",
    "MIN_SPEEDUP",
    "BitmaskWeight",
    "CPUTiming",
    "cpu_reason",
    "density_refusal",
    "int8_reason",
    "measured",
    "rounding_error",
]

CPU = "cpu"
"""The backend's name."""
MAX_DENSITY = 0.8
"""Maximum fraction of non-zeros for which packing is tried; above, it saves less than a seventh of a half-precision weight."""
DENSITY_STEPS = 20
"""Weights of one shape share a timing if their densities agree when rounded to multiples of 1 / this number."""
TOKENS = (4, 8, 16, 32, 64)
"""Numbers of tokens for which the two ways to multiply by a packed weight are compared."""
MANY_TOKENS = 512
"""Number of tokens for which the speed relative to dense is reported too."""
ANY_TOKENS = 2**31 - 1
"""Maximum number of tokens of weights that are faster as stored for `MANY_TOKENS` too, such as float16 without AVX512-FP16."""
MIN_SPEEDUP = 1.05
"""Minimum speedup for a layer to be packed; a smaller one may be noise."""
CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
"""By a weight's number of dimensions."""
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 50, 0.03
"""Timed runs of each contender: as many as fit into the time budget in seconds, within these bounds."""


@dataclass(frozen=True)
class BitmaskWeight:
    """A constant weight with any pattern of zeros, stored as its non-zeros and one bit per entry, exactly or in int8."""

    shape: tuple[int, int]
    """(out_features, in_features)."""
    trainable: bool
    """Whether the dense weight required a gradient."""
    max_tokens: int
    """Maximum number of tokens for which the weight is multiplied in packed form; for more, bands of it are expanded, unless
    AMX multiplies them."""
    packed: BitmaskPacked | Int8Packed
    product: Product = field(init=False, repr=False, compare=False)
    """Products with this weight, without torch's dispatcher if possible."""

    @classmethod
    @torch.inference_mode(False)  # its tensors outlive the mode of the caller
    @torch.no_grad()
    def from_dense(cls, weight: Float[Tensor, "O I"], *, max_tokens: int, int8: bool = False, name: str = "") -> BitmaskWeight:
        """Pack a weight. The packed weight is unpacked once and compared: equal or, in int8, within half a step of each row.

        Raises:
            BackendError: the weight has no values, or unpacking does not return the same weight.
        """
        trainable, weight = weight.requires_grad, weight.detach()
        shape = (weight.shape[0], weight.shape[1])
        if weight.is_meta:
            raise BackendError(f"{name or 'a weight'} of shape {shape} is on the meta device: there are no values to pack")
        if int8:
            return cls(shape, trainable, max_tokens, _rounded(weight, name))
        packed = pack_bitmask(weight)
        if not same_bits(unpack_bitmask(packed, *shape), torch.where(weight == 0, 0.0, weight)):
            raise BackendError(
                f"{name or 'a weight'} of shape {shape} and {weight.dtype}: unpacking does not return the same values; "
                "it is not packed"
            )
        return cls(shape, trainable, max_tokens, packed)

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype, bfloat16 if it is stored in int8."""
        dtype: torch.dtype = torch.bfloat16 if self.int8 else self.packed.values.dtype
        return dtype

    @property
    def int8(self) -> bool:
        """Whether the weight was rounded to int8, with one scale per row."""
        return isinstance(self.packed, Int8Packed)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors."""
        return tuple(self.packed)

    @property
    def description(self) -> str:
        """How the weight is stored, for `repr`."""
        expanded = f", expanded beyond {self.max_tokens} tokens" if self.expands and self.max_tokens < ANY_TOKENS else ""
        return f"packed with a bit mask{', in int8' if self.int8 else expanded}"

    @property
    def expands(self) -> bool:
        """Whether products with more than `max_tokens` tokens expand the weight."""
        from bisparse.kernels.packed_cpu.multiply import expands

        return expands(self.dtype)

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "O I"]:
        """The dense weight. Its zeros are all 0.0, since packed storage does not keep the sign of zeros."""
        if isinstance(self.packed, BitmaskPacked):
            return unpack_bitmask(self.packed, *self.shape)
        if self.packed.values.is_meta:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return dequantized(self.packed, *self.shape).to(self.dtype)

    @torch.inference_mode(False)
    def parameter(self) -> nn.Parameter:
        """The dense weight as a parameter."""
        return nn.Parameter(self.dense(), self.trainable)

    def __post_init__(self) -> None:
        # Not at the first product: torch.compile cannot trace the lock of a cached_property.
        object.__setattr__(self, "product", Product(self.packed, *self.shape, self.max_tokens))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "product"}  # it holds addresses

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def linear(self, input: Float[Tensor, "*T I"], bias: Float[Tensor, " O"] | None) -> Float[Tensor, "*T O"]:
        """``x W^T + b``, in the weight's dtype."""
        return self.product(input, bias)

    def repacked(self, weight: Float[Tensor, "O I"], name: str = "") -> BitmaskWeight:
        """A different dense weight packed the same way; on another device or in float64, products expand all of it.

        Only bfloat16 is rounded to int8; in another dtype the weight keeps its values.
        """
        int8 = self.int8 and weight.dtype == torch.bfloat16
        return replace(self.from_dense(weight, max_tokens=self.max_tokens, int8=int8, name=name), trainable=self.trainable)

    @torch.inference_mode(False)
    @torch.no_grad()
    def mapped(self, fn: Callable[[Tensor], Tensor]) -> BitmaskWeight:
        """A copy with a function applied to all tensors, which keeps the weight's dtype and the bits of the masks."""

        def apply(tensor: Shaped[Tensor, "..."]) -> Tensor:
            # Viewed as the weight's dtype, since a function such as `.type(bfloat16)` would round integers.
            return fn(tensor.view(self.dtype)).view(tensor.dtype)

        return replace(self, packed=type(self.packed)(*(apply(one) for one in self.packed)))


@dataclass(frozen=True)
class CPUTiming:
    """Seconds of a product, dense and packed, and the maximum number of tokens for which the packed one need not expand."""

    dense_s: float
    packed_s: float
    max_tokens: int
    many: float = 1.0
    """Dense time divided by packed time for `MANY_TOKENS` tokens; below 1 the packed weight is slower there."""

    @property
    def speedup(self) -> float:
        """Dense time divided by packed time, for the requested number of tokens."""
        return self.dense_s / self.packed_s


def _rounded(weight: Float[Tensor, "O I"], name: str) -> Int8Packed:
    """A weight in int8, compared with the weight.

    Raises:
        BackendError: it is not finite, or unpacking returns a value that is not the nearest one.
    """
    try:
        packed = pack_int8(weight)
    except ValueError as error:
        raise BackendError(f"{name or 'a weight'}: {error}") from error
    steps = packed.scales[: weight.shape[0], None]
    if bool(((dequantized(packed, *weight.shape) - weight.float()).abs() > 0.501 * steps).any()):
        raise BackendError(f"{name or 'a weight'} of shape {tuple(weight.shape)}: int8 does not return the nearest values")
    return packed


def rounding_error(weight: Float[Tensor, "O I"], packed: BitmaskWeight) -> float:
    """Norm of the difference between a weight and what was packed of it, divided by the weight's norm."""
    if not isinstance(packed.packed, Int8Packed):
        return 0.0
    wide = weight.detach().float()
    return float(
        (dequantized(packed.packed, *packed.shape) - wide).norm() / wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
    )


def cpu_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why packed weights of this dtype have no compiled product on this device; None if they have one."""
    from bisparse.kernels.packed_cpu.instructions import NUMBERS, usable_ways

    if device.type != "cpu":
        return f"{CPU} packs weights that are on the CPU, and they are on {device.type}"
    if not usable_ways(torch.float32):
        return f"{CPU} needs AVX-512 or AVX2, which this processor does not have or numba does not use"
    if dtype is not None and dtype not in NUMBERS:
        taken = ", ".join(str(one).removeprefix("torch.") for one in NUMBERS)
        return f"{CPU} takes {taken}, not {str(dtype).removeprefix('torch.')}"
    return None


def int8_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype have no product in int8 on this processor; None if they have one."""
    from bisparse.kernels.packed_cpu.instructions import Way, usable_ways

    if Way.AVX512_BF16 not in usable_ways(torch.bfloat16):
        return "int8 needs AVX-512 with bfloat16 products, which this processor does not have or numba does not use"
    if dtype != torch.bfloat16:
        return f"int8 takes bfloat16 weights, not {str(dtype).removeprefix('torch.')}: call model.bfloat16() first"
    return None


def density_refusal(weight: Float[Tensor, "O I *K"]) -> Refusal | None:
    """Why a weight has too few zeros to be packed; None if it has enough."""
    density = _density(weight)
    if density == 1.0:
        return Refusal("its weight is dense: prune it first", "weight")
    if density > MAX_DENSITY:
        return Refusal(
            f"its weight keeps {density:.1%} of its entries, and at most {MAX_DENSITY:.0%} are worth packing; it stays as it is",
            "weight",
        )
    return None


_timings: dict[tuple[tuple[int, ...], torch.dtype, int, int, int, bool], CPUTiming] = {}
"""Timings by shape, dtype, rounded density, threads, tokens, and whether in int8."""


@torch.no_grad()
def measured(weight: Float[Tensor, "O I *K"], tokens: int = 1, int8: bool = False) -> CPUTiming:
    """Times of products with a weight on this CPU, dense and packed; measured once per shape, dtype, density, threads and tokens.

    The same product is repeated, so a weight that fits into the caches is timed in the caches. That of a convolution of kernel
    size 1 is timed as a convolution and, packed, as a product with the channels of every position.
    """
    from bisparse.kernels.packed_cpu.multiply import expands

    own = weight.detach()
    weight = own.flatten(1)
    rows, columns = weight.shape
    key = tuple(own.shape), weight.dtype, round(DENSITY_STEPS * _density(weight)), torch.get_num_threads(), tokens, int8
    if key not in _timings:
        packed, generator = pack_int8(weight) if int8 else pack_bitmask(weight), torch.Generator().manual_seed(0)
        inputs = torch.randn(max(*TOKENS, MANY_TOKENS, tokens), columns, generator=generator, dtype=torch.float32, device="cpu")
        inputs = inputs.to(weight.dtype)

        def dense(count: int) -> Callable[[], Tensor]:
            if own.ndim > 2:
                picture = inputs[:count].t().reshape(1, columns, count, *own.shape[3:])
                return lambda: CONVOLUTIONS[own.ndim](picture, own)
            return lambda: linear(inputs[:count], weight)

        def product(count: int, max_tokens: int) -> Callable[[], Tensor]:
            call = Product(packed, rows, columns, max_tokens)
            if own.ndim > 2:
                picture = inputs[:count].t().contiguous()
                return lambda: call(picture.t(), None).t().contiguous()
            return lambda: call(inputs[:count], None)

        most, times = 1, _fastest(dense(1), product(1, 1)) if tokens == 1 else None
        for count in TOKENS if not int8 and expands(weight.dtype) and (times is None or times[1] < times[0]) else ():
            as_stored, expanded = _fastest(product(count, count), product(count, 0))
            if as_stored > expanded:
                break
            most = count
        if most == TOKENS[-1]:
            as_stored, expanded = _fastest(product(MANY_TOKENS, ANY_TOKENS), product(MANY_TOKENS, 0))
            most = ANY_TOKENS if expanded > MIN_SPEEDUP * as_stored else most
        dense_s, packed_s = times or _fastest(dense(tokens), product(tokens, most))
        many = 1.0
        if dense_s > MIN_SPEEDUP * packed_s:
            dense_many, packed_many = _fastest(dense(MANY_TOKENS), product(MANY_TOKENS, most))
            many = dense_many / packed_many
        _timings[key] = CPUTiming(dense_s, packed_s, most, many)
    return _timings[key]


def _density(weight: Tensor) -> float:
    return int(weight.detach().count_nonzero()) / max(1, weight.numel())


def _fastest(*contenders: Callable[[], Tensor]) -> list[float]:
    """The shortest time of each contender in seconds, measured in turns, since other work on the machine can only add time."""
    for run in contenders:  # compiles, and fills caches
        run()
    times: list[list[float]] = [[] for _ in contenders]
    began = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - began > SECONDS * len(contenders):
            break
        for own, run in zip(times, contenders, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]
