"""Sentence similarity: rank correlation of cosines between mean-pooled sentence embeddings with human scores.

An embedding is the mean of the last hidden state over a sentence's tokens without padding, as in sentence-transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bisparse.errors import install_extra
from bisparse.evaluation.model_outputs import device_of, evaluating, fitting_length, tensor_of, text_of
from bisparse.wrappers import check_module

__all__ = ["Pair", "Similarity", "read_pairs", "similarity"]

Pair = tuple[float, str, str]
"""A human score and two sentences."""
STS_COLUMNS = 7
LENGTH = 128
"""Maximum tokens per sentence by default, for models with as many positions."""
"""Columns of STS-B: score and sentences are columns 5, 6 and 7; some rows have their sources after those."""


@dataclass(frozen=True)
class Similarity:
    """A rank correlation with its protocol."""

    spearman: float
    pairs: int
    length: int
    """Maximum number of tokens per sentence."""
    corpus: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "kind": "similarity",
            "corpus": self.corpus,
            "pairs": self.pairs,
            "pooling": "mean",
            "length": self.length,
            "spearman": self.spearman,
        }

    @property
    def protocol(self) -> str:
        """Corpus and pooling, as text."""
        return f"{f'{self.corpus}, ' if self.corpus else ''}{self.pairs:,} pairs, mean pooling, at most {self.length} tokens"

    def __str__(self) -> str:
        return f"Spearman correlation {self.spearman:.4f} on {self.protocol}"


def read_pairs(path: str | Path) -> list[Pair]:
    """Read scores and sentence pairs from a tab-separated file of three columns, or of STS-B (score in the fifth).

    Raises:
        ValueError: a line with other columns or without a finite number, which is named; or the file is empty.
    """
    text = text_of(path)
    pairs: list[Pair] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 3 and len(cells) < STS_COLUMNS:
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns; expected score, sentence, sentence, or those of STS-B"
            )
        score, first, second = cells if len(cells) == 3 else cells[4:7]
        try:
            value = float(score)
        except ValueError:
            if number == 1:
                continue  # names of the columns
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{path}, line {number}: {score!r:.40} is not a score")
        pairs.append((value, first, second))
    if not pairs:
        raise ValueError(f"{path} holds no pairs of sentences")
    return pairs


def similarity(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], *, length: int | None = None, batch_size: int = 64, corpus: str = ""
) -> Similarity:
    """Spearman's correlation between human scores and cosines of a model's mean-pooled sentence embeddings.

    Args:
        model: an encoder, called with the tokenizer's output; its output has ``last_hidden_state`` of shape (B, T, D).
        length: maximum tokens per sentence; longer sentences are truncated. By default 128, or as many as the model has
            positions if these are fewer.

    Raises:
        ValueError: fewer than three pairs, embeddings or scores that are not finite, or cosines or scores that are all equal.
    """
    check_module(model)
    length = fitting_length(model, length, LENGTH, "length")
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise ImportError(f"rank correlations need scipy; {install_extra('calibration')}") from error
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs of sentences: expected at least 3")
    if not all(math.isfinite(score) for score, _, _ in pairs):
        raise ValueError("a score of the pairs is not finite")
    first = _embed(model, tokenizer, [one for _, one, _ in pairs], length, batch_size)
    second = _embed(model, tokenizer, [one for _, _, one in pairs], length, batch_size)
    cosines = functional.cosine_similarity(first, second)
    if not bool(torch.isfinite(cosines).all()):
        raise ValueError("the model's embeddings are not finite")
    scores = [score for score, _, _ in pairs]
    if len(set(scores)) < 2 or float(cosines.min()) == float(cosines.max()):
        raise ValueError("all cosines or all scores are equal: there is no rank correlation")
    return Similarity(float(spearmanr(cosines.numpy(), scores).statistic), len(pairs), length, corpus)


def _embed(model: nn.Module, tokenizer: Any, sentences: list[str], length: int, batch_size: int) -> Float[Tensor, "N D"]:
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))  # little padding
    device = device_of(model)
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = tokenizer(
                [sentences[number] for number in numbers], padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            batch = {name: value.to(device) for name, value in dict(batch).items()}
            hidden = tensor_of(model(**batch), "last_hidden_state").double()
            keep = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            means = (hidden * keep).sum(1) / keep.sum(1).clamp(min=1)
            found.update(zip(numbers, means.cpu(), strict=True))
    return torch.stack([found[number] for number in range(len(sentences))])
