"""Products that skip torch's dispatcher if it would only call the kernel, such as when a language model decodes.

An operator written in Python costs about 12 microseconds per call, as much as the product of a 192 x 576 weight with one token.
Everything that could observe or change the call is checked here: gradients, autocast, modes, tracing, `torch.func`, the profiler,
and tensor subclasses. With any of them the operator is called as usual.

Only this file reads torch's dispatch keys, which are private; if torch lacks them, nothing is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bisparse.kernels.packed_cpu.layout import BitmaskPacked, linear_bitmask

__all__ = ["linear_at_once"]


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


def linear_at_once(input: Tensor, packed: BitmaskPacked, bias: Tensor | None, rows: int, columns: int, max_tokens: int) -> Tensor:
    """`layout.linear_bitmask` for a packed matrix of (rows, columns) that was checked when it was packed.

    Raises:
        ValueError: dtypes or shapes do not agree.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(input) is not Tensor
        or input.dtype != packed.values.dtype
        or input.ndim == 0
        or input.shape[-1] != columns
        or torch._C._dispatch_keys(input).raw_repr() not in TENSORS
        or torch._C._dispatch_keys(packed.values).raw_repr() not in TENSORS
    ):
        return linear_bitmask(input, packed, bias, rows, max_tokens)  # type: ignore[no-any-return]
    keys, watched = _intercepted()
    if watched or keys not in CALLS:
        return linear_bitmask(input, packed, bias, rows, max_tokens)  # type: ignore[no-any-return]
    from bisparse.kernels.packed_cpu.multiply import product

    output: Tensor = product(input, *packed, bias, rows, max_tokens)
    return output
