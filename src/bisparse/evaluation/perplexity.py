"""Perplexity of a causal language model on a text, with its standard error over windows.

The tokens are split into windows of `context` tokens, one starting every `stride` tokens. A window scores the tokens that no
earlier window has scored, each given all tokens before it in the window; the first token of a window has none and is not scored.
With ``stride=context`` windows do not overlap, which is fast; a smaller stride gives tokens more context and lowers the
perplexity. Only full windows are used, so up to ``stride - 1`` tokens at the end are not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from bisparse.arguments import check_count
from bisparse.evaluation.model_outputs import (
    as_json,
    device_of,
    evaluating,
    fitting_length,
    has_decoder,
    naming_input,
    tensor_of,
    text_of,
)
from bisparse.wrappers import check_module

__all__ = ["Perplexity", "perplexity", "text_perplexity"]

CONTEXT = 512
"""Tokens per window by default, for models with as many positions."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its protocol."""

    nats: float
    """Mean cross-entropy in nats per scored token."""
    nats_error: float | None
    """Standard error over the windows, assumed independent; None for a single window."""
    windows: int
    scored: int
    """Tokens that were predicted."""
    tokens: int
    """Tokens that were read."""
    context: int
    stride: int
    corpus: str = ""

    @property
    def perplexity(self) -> float:
        """``exp(nats)``."""
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of `perplexity`, to first order in `nats_error`."""
        return None if self.nats_error is None else self.perplexity * self.nats_error

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "kind": "perplexity",
            "corpus": self.corpus,
            "context": self.context,
            "stride": self.stride,
            "tokens": self.tokens,
            "scored": self.scored,
            "windows": self.windows,
            "nats_per_token": self.nats,
            "nats_per_token_error": self.nats_error,
            "perplexity": as_json(self.perplexity),
            "perplexity_error": as_json(self.perplexity_error),
        }

    def __str__(self) -> str:
        error = "" if self.perplexity_error is None else f" +- {self.perplexity_error:.2g}"
        return f"perplexity {self.perplexity:.4g}{error} ({self.nats:.4f} nats per token) on {self.protocol}"

    @property
    def protocol(self) -> str:
        """Corpus, tokens, context and stride, as text."""
        corpus = f"{self.corpus}, " if self.corpus else ""
        return f"{corpus}first {self.tokens:,} tokens, context {self.context}, stride {self.stride}"


def perplexity(
    model: nn.Module,
    ids: Int[Tensor, " T"],
    *,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 4,
    corpus: str = "",
) -> Perplexity:
    """Measure the perplexity of a causal language model on a text of token ids, in windows of `context` tokens.

    A window scores the tokens that no earlier one has scored, given the tokens before them in it.

    Args:
        ids: the token ids of the whole text, T of them.
        model: called as ``model(input_ids=...)``; returns logits of shape (B, context, V), or an output that holds them.
        context: tokens per window; by default 512, or as many as the model has positions if these are fewer.
        stride: tokens between the starts of two windows; by default `context`, without overlap.
        tokens: read only this many; by default all.
        batch_size: windows per forward pass.
        corpus: name of the text, for the record.

    Raises:
        ValueError: fewer tokens than one window, settings without a window, logits that are not finite or of another shape, more
            context than the model has positions, or a model that fails on the tokens.
    """
    check_module(model)
    context = fitting_length(model, context, CONTEXT, "context")
    stride = context if stride is None else stride
    _check(ids, context, stride, tokens, batch_size)
    if callable(generates := getattr(model, "can_generate", None)) and not generates():
        raise ValueError(f"{type(model).__name__} is not a causal language model: its outputs depend on the tokens to predict")
    if has_decoder(model):
        raise ValueError(f"{type(model).__name__} is not a causal language model: its encoder reads the tokens to predict")
    ids = ids[:tokens].long()
    rows = ids.unfold(0, context, stride)
    sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    counts = torch.full((len(rows),), min(stride, context - 1), dtype=torch.float64, device="cpu")
    counts[0] = context - 1
    device = device_of(model)
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size].to(device)
            with naming_input(part):
                logits = tensor_of(model(input_ids=part), "logits")
            if logits.ndim != 3 or len(logits) != len(part) or logits.shape[1] < context or logits.shape[2] <= int(part.max()):
                expected = f"({len(part)}, {context}, V) with V above the largest token id, {int(part.max())}"
                raise ValueError(f"the model's logits have shape {tuple(logits.shape)}: expected {expected}")
            for offset, (scores, row) in enumerate(zip(logits, part, strict=True)):
                number = start + offset
                scored = int(counts[number])
                loss = functional.cross_entropy(scores[-1 - scored : -1].float(), row[-scored:], reduction="sum")
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the model's logits in window {number} (from token {number * stride}) are not finite")
                sums[number] = loss.double()
    nats = float(sums.sum() / counts.sum())
    read = (len(rows) - 1) * stride + context
    return Perplexity(nats, _error(sums, counts, nats), len(rows), int(counts.sum()), read, context, stride, corpus)


def text_perplexity(model: nn.Module, tokenizer: Any, path: str | Path, **settings: Any) -> Perplexity:
    """Measure the `perplexity` of a causal language model on a text file, which is tokenised as one text.

    Args:
        model: as for `perplexity`.
        tokenizer: the model's, such as from ``AutoTokenizer.from_pretrained(folder)``.
        path: a UTF-8 text file; its name is recorded as the corpus.
        settings: further arguments of `perplexity`, such as ``context=512`` and ``tokens=4096``.

    Raises:
        ValueError: the file is not UTF-8 text, or too short.
    """
    check_module(model)
    text = text_of(path)
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    try:
        return perplexity(model, ids, **{"corpus": Path(path).name, **settings})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check(ids: Tensor, context: int, stride: int, tokens: int | None, batch_size: int) -> None:
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids of shape {tuple(ids.shape)} and type {ids.dtype}: expected whole numbers in one dimension")
    given = {"context": context, "stride": stride, "batch_size": batch_size, "tokens": 1 if tokens is None else tokens}
    for name, value in given.items():
        check_count(name, value)
    if context < 2:
        raise ValueError(f"context={context}: expected at least 2 tokens, since the first of a window is not scored")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride}: expected 1 to context={context}, so that no token is left out")
    if tokens is not None and tokens < context:
        raise ValueError(f"tokens={tokens}: fewer than one window of context={context}")
    if len(ids) < context:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {context}: use more text or less context")


def _error(sums: Tensor, counts: Tensor, mean: float) -> float | None:
    """Standard error of the ratio of two sums over independent windows."""
    number = len(sums)
    if number < 2:
        return None
    squares = float((sums - mean * counts).square().sum())
    return math.sqrt(squares * number / (number - 1)) / float(counts.sum())
