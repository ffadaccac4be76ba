"""Convolutions of kernel size 1 with a packed weight: a product with the channels of every position."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bisparse.accelerate.linear_packed import PackedLayer

__all__ = ["PACKED_CONVOLUTIONS", "PackedConv1d", "PackedConv2d", "PackedConv3d"]


class _PackedConv(PackedLayer):
    """A convolution of kernel size 1 with a packed weight; see `PackedLayer`. Its stride may be larger."""

    stride: tuple[int, ...]
    in_channels: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return (*self.packed_weight.shape, *(1 for _ in self.stride))

    def forward(self, input: Float[Tensor, "*B I *S"]) -> Float[Tensor, "*B O *T"]:
        channels = -1 - len(self.stride)
        if input.ndim not in (-channels, 1 - channels) or input.shape[channels] != self.in_channels:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} does not fit a {self.plain.__name__} of {self.in_channels} channels"
            )
        # As of the plain convolutions: Conv2d keeps channels last, the others do not.
        keeps_last = input.ndim == 4 and len(self.stride) == 2 and not input.is_contiguous()
        keeps_last = keeps_last and input.is_contiguous(memory_format=torch.channels_last)
        if any(step > 1 for step in self.stride):
            input = input[(..., *(slice(None, None, step) for step in self.stride))]
        output = self.multiplied(input.movedim(channels, -1)).movedim(-1, channels)
        return output if keeps_last else output.contiguous()


class PackedConv1d(_PackedConv, nn.Conv1d):  # type: ignore[override]  # its weight is a property
    """A Conv1d of kernel size 1 with a packed weight."""

    plain = nn.Conv1d


class PackedConv2d(_PackedConv, nn.Conv2d):  # type: ignore[override]  # its weight is a property
    """A Conv2d of kernel size 1 with a packed weight."""

    plain = nn.Conv2d


class PackedConv3d(_PackedConv, nn.Conv3d):  # type: ignore[override]  # its weight is a property
    """A Conv3d of kernel size 1 with a packed weight."""

    plain = nn.Conv3d


PACKED_CONVOLUTIONS: dict[type[nn.Module], type[_PackedConv]] = {
    one.plain: one for one in (PackedConv1d, PackedConv2d, PackedConv3d)
}
