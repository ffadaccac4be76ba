"""Which tensors the compiled kernels mask, and their calls; numba is imported at the first one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

__all__ = ["CHANNELS_LAST", "MIN_WEIGHTS", "add_masked_each", "applies", "fits", "keep_only_each", "masked"]

MIN_WEIGHTS = 1 << 15
"""Fewer are left to torch: the call takes as long as the pass, and small models never need to compile the kernel."""
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By number of dimensions."""


def applies(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> bool:
    """Whether the kernels take a tensor and its mask, and are faster than torch: `fits`, and it has not few weights."""
    return tensor.numel() >= MIN_WEIGHTS and fits(tensor, mask)


def fits(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> bool:
    """Whether the kernels take a tensor and its mask: plain, dense, on the CPU, and in one memory format."""
    return (
        type(tensor) in (Tensor, nn.Parameter)  # subclasses need not hold plain memory
        and type(mask) is Tensor
        and tensor.device.type == "cpu"
        and mask.device.type == "cpu"
        and mask.dtype is torch.bool
        and not (tensor.is_complex() or tensor.is_neg())
        and tensor.shape == mask.shape
        and _in_one_format(tensor, mask)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # such as a tracer, which sees torch's operators alone
    )


def _in_one_format(tensor: Tensor, mask: Tensor) -> bool:
    own = torch.contiguous_format if tensor.is_contiguous() else CHANNELS_LAST.get(tensor.ndim, torch.contiguous_format)
    return tensor.is_contiguous(memory_format=own) and mask.is_contiguous(memory_format=own)


def masked(out: Tensor, tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."], *, kept: bool) -> None:
    """Write the values of a tensor where the mask is `kept`, and zeros elsewhere.

    Args:
        out: another tensor of its dtype, shape and memory format.
        tensor: one that `applies` accepts.
    """
    from bisparse.kernels.masking.cpu import masked as compiled

    compiled(out, tensor, mask, kept=kept)


def keep_only_each(pairs: Sequence[tuple[Shaped[Tensor, "..."], Bool[Tensor, "..."]]]) -> None:
    """Write zeros into tensors where their masks are False, all in one call.

    Args:
        pairs: tensors of the same element size with their masks, that `fits` accepts; at least one.
    """
    from bisparse.kernels.masking.cpu import keep_only_each as compiled

    compiled(pairs)


def add_masked_each(
    rows: Sequence[tuple[Float[Tensor, "..."], Float[Tensor, "..."], Bool[Tensor, "..."], float]], *, in_place: bool
) -> None:
    """Add a factor times the values where the mask is False, rounded once, as `Tensor.add_` does; all in one call.

    Args:
        rows: target, values, mask and factor of each; float32, of one shape and memory format, that `fits` accepts.
        in_place: every target is the tensor of the values itself; otherwise they share no memory.
    """
    from bisparse.kernels.masking.cpu import add_masked_each as compiled

    compiled(rows, in_place=in_place)
