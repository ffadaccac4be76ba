"""Products that skip torch's dispatcher if it would only call the kernel, such as when a language model decodes.

An operator written in Python costs about 12 microseconds per call, and the arguments of its kernel another 10: together more than
the product of a 192 x 576 weight with one token. Everything that could observe or change the call is checked here: gradients,
autocast, modes, tracing, `torch.func`, the profiler, and tensor subclasses. With any of them the operator is called as usual.
What does not change between calls is computed once per weight, number of tokens and number of threads.

Only this file reads torch's dispatch keys, which are private; if torch lacks them, nothing is skipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bisparse.kernels.numba_runtime.thread_pool import ARGUMENTS, Call, run
from bisparse.kernels.packed_cpu.int8 import Int8Packed, linear_bitmask_int8
from bisparse.kernels.packed_cpu.layout import BitmaskPacked, linear_bitmask

__all__ = ["Product"]

MAX_CALLS = 64
"""Maximum number of prepared calls per weight."""
X, BIAS, OUTPUT = (ARGUMENTS + place for place in (3, 4, 5))
"""Places of the arguments of `multiply_kernel` that differ between calls."""


def _key_sets() -> tuple[set[int], set[int]]:
    """Dispatch keys of plain CPU tensors, and of calls that are not intercepted; each outside of and in inference mode."""
    try:
        key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
        tensor, call = keys(key.CPU) | keys(key.AutocastCPU), keys(key.BackendSelect)
        autograd, views = keys(key.AutogradCPU), keys(key.ADInplaceOrView)
        found = {tensor.raw_repr(), (tensor | autograd | views).raw_repr()}, {call.raw_repr(), (call | views).raw_repr()}
        _intercepted()
    except (AttributeError, TypeError):
        return set(), set()
    return found


def _intercepted() -> tuple[int, bool]:
    """(current dispatch keys, whether torch functions, a profiler or autocast intercept calls)."""
    watched = (
        torch._C._len_torch_function_stack() > 0 or torch._C._autograd._profiler_enabled() or torch.is_autocast_enabled("cpu")
    )
    return torch._C._dispatch_tls_local_include_set().raw_repr(), watched


TENSORS, CALLS = _key_sets()


class Product:
    """Products of one packed matrix of (rows, columns), checked when it was packed: ``Product(...)(input, bias)``.

    In int8 the input is bfloat16, and `max_tokens` has no meaning.

    Args:
        max_tokens: up to this number of tokens the matrix is multiplied in packed form; see `layout.linear_bitmask`.
    """

    def __init__(self, packed: BitmaskPacked | Int8Packed, rows: int, columns: int, max_tokens: int) -> None:
        self.packed, self.rows, self.columns, self.max_tokens = packed, rows, columns, max_tokens
        self.dtype: torch.dtype = torch.bfloat16 if isinstance(packed, Int8Packed) else packed.values.dtype
        self._addresses: tuple[int, ...] | None = None
        self._calls: dict[tuple[int, int], Call | None] = {}

    def __call__(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """`layout.linear_bitmask`.

        Raises:
            ValueError: dtypes or shapes do not agree.
        """
        output = self.directly(input, bias)
        if output is not None:
            return output
        packed = self.packed
        found: Tensor
        if isinstance(packed, Int8Packed):
            found = linear_bitmask_int8(input, packed, bias, self.rows)
        else:
            found = linear_bitmask(input, packed, bias, self.rows, self.max_tokens)
        return found

    def directly(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product without torch's dispatcher; None if something could observe the call, or the input does not fit."""
        packed = self.packed
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(input) is not Tensor
            or input.dtype != self.dtype
            or input.ndim == 0
            or input.shape[-1] != self.columns
            or torch._C._dispatch_keys(input).raw_repr() not in TENSORS
            or torch._C._dispatch_keys(packed.values).raw_repr() not in TENSORS
            or (bias is not None and torch._C._dispatch_keys(bias).raw_repr() not in TENSORS)
        ):
            return None
        keys, watched = _intercepted()
        if watched or keys not in CALLS or (bias is not None and bias.shape != (self.rows,)):
            return None
        if input.is_contiguous() and (bias is None or (bias.dtype == self.dtype and bias.is_contiguous())):
            call = self._prepared(math.prod(input.shape[:-1]))
            if call is not None:
                numbers = call.numbers
                output = input.new_empty(*input.shape[:-1], self.rows)
                numbers[X], numbers[OUTPUT] = input.data_ptr(), output.data_ptr()
                numbers[BIAS] = 0 if bias is None else bias.data_ptr()
                run(call, (packed, input, bias, output))
                return output
        from bisparse.kernels.packed_cpu.multiply import product, product_int8

        if isinstance(packed, Int8Packed):
            return product_int8(input, packed, bias, self.rows)
        return product(input, *packed, bias, self.rows, self.max_tokens)

    def _prepared(self, tokens: int) -> Call | None:
        """A call of the kernel without the addresses of input, bias and output; None for products that take other ways."""
        addresses = tuple(one.data_ptr() for one in self.packed)
        if addresses != self._addresses:  # the first call, or memory was moved, by `share_memory_` or a copy of the module
            self._addresses, self._calls = addresses, {}
        key = tokens, torch.get_num_threads()
        if key not in self._calls:
            from bisparse.kernels.packed_cpu.multiply import call_of

            if len(self._calls) >= MAX_CALLS:
                self._calls.clear()
            self._calls[key] = call_of(self.packed, self.rows, self.columns, tokens, self.max_tokens)
        call = self._calls[key]
        return None if call is None else call.copy()
