"""Which positions of a batch are real tokens, where layers, blocks and outputs store them.

A mask is of (samples, positions). Hidden states have these positions in several shapes, and in a model of encoder and decoder
each of the two has a mask of its own. Pictures next to text have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

__all__ = ["TokenMasks", "fitted"]

DECODER = re.compile(r"(^|[._])decoder(\.|$)")
VISION = re.compile(r"(^|[._])(vision|visual|image)[^.]*\.")
CROSS_ATTENTION = re.compile(r"(cross|enc)\w*att\w*\.(\w+\.)*(k|v|kv|key|value)(_\w+)?$", re.IGNORECASE)
"""Keys and values of the decoder's attention to the encoder: T5's EncDecAttention.k, BART's encoder_attn.k_proj."""


@dataclass(frozen=True)
class TokenMasks:
    """The 2-D masks of a batch (bool); None: all positions are real tokens."""

    own: Bool[Tensor, "B S"] | None = None
    """``attention_mask``: that of the encoder where there are two."""
    decoder: Bool[Tensor, "B S"] | None = None
    """``decoder_attention_mask``."""
    has_decoder: bool = False
    """Whether encoder and decoder read different sequences."""
    has_pictures: bool = False
    """Whether the batch has pictures besides tokens."""

    @classmethod
    def of_batch(cls, model: nn.Module, batch: Any) -> TokenMasks:
        """The masks of a batch that is passed by keyword; of other batches none is known."""
        if not isinstance(batch, Mapping):
            return cls()
        two = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
        two = two or any(isinstance(key, str) and key.startswith("decoder_") for key in batch)
        own, decoder = (_two_dimensional(batch.get(name)) for name in ("attention_mask", "decoder_attention_mask"))
        return cls(own, decoder, two, "pixel_values" in batch)

    def of(self, name: str) -> Bool[Tensor, "B S"] | None:
        """The mask of the positions that a layer reads or a block returns, by its name; "" is the model itself."""
        if self.has_decoder and (not name or DECODER.search(name)) and not CROSS_ATTENTION.search(name):
            return self.decoder
        return None if self.has_pictures and VISION.search(name) else self.own


def fitted(mask: Bool[Tensor, "B S"] | None, leading: Sequence[int]) -> Bool[Tensor, "..."] | None:
    """A mask in the shape of a tensor's leading dimensions; None if these are not the mask's positions.

    They may be flattened, have dimensions of size 1 in addition, or the sequence first.

    >>> import torch
    >>> mask = torch.tensor([[True, False, True], [True, True, False]])
    >>> fitted(mask, (6,)).tolist(), fitted(mask, (2, 1, 3)).shape, fitted(mask, (4, 3))
    ([True, False, True, True, True, False], torch.Size([2, 1, 3]), None)
    """
    if mask is None:
        return None
    leading, own = tuple(leading), tuple(mask.shape)
    sizes = [size for size in leading if size != 1]
    if leading == own or sizes == [size for size in own if size != 1] or sizes == [mask.numel()]:
        return mask.reshape(leading)
    return mask.t() if leading == own[::-1] else None


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
