"""Measure a sentence encoder's speed, and its agreement with human similarities of all pairs of 50 news documents.

Source: Lee, Pincombe, Welsh, "An empirical evaluation of models of text document similarity", CogSci 2005.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import normalize

__all__ = ["AGREEMENT", "COSINE", "agreement", "embed", "load", "read_documents", "read_similarities", "speed"]

AGREEMENT = "Pearson correlation of the model's cosines with people's similarities, 50 news documents (Lee50)."
COSINE = "Mean cosine of the 50 embeddings to those of the dense model."


def load(folder: Path) -> torch.nn.Module:
    """Load the model, and check that no tensor is missing or unexpected."""
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"{folder} does not load strictly: {info}"
    return model.eval()


def read_documents(folder: Path, name: str = "lee.cor") -> list[str]:
    """The 50 judged documents; ``lee_background.cor`` has 300 others of the same kind."""
    return (folder / name).read_text(encoding="latin-1").splitlines()


def read_similarities(folder: Path) -> np.ndarray:
    """(50, 50), the upper triangle: means of several people's judgements, between 0 and 1."""
    return np.loadtxt(folder / "similarities0-1.txt")


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer, documents: list[str], batch_size: int = 25) -> torch.Tensor:
    """(documents, features): the normalised mean of the last hidden states, as intended for all-MiniLM-L6-v2."""
    parts = []
    for start in range(0, len(documents), batch_size):
        batch = tokenizer(
            documents[start : start + batch_size], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        states, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        parts.append(normalize((states * real).sum(1) / real.sum(1), dim=1))
    return torch.cat(parts)


def agreement(embeddings: torch.Tensor, similarities: np.ndarray) -> float:
    """Pearson correlation of the cosines with the human similarities, over all pairs of two documents."""
    pairs = np.triu_indices(len(similarities), 1)
    return float(np.corrcoef((embeddings @ embeddings.T).numpy()[pairs], similarities[pairs])[0, 1])


@torch.inference_mode()
def speed(models: Sequence[torch.nn.Module], tokenizer, documents: list[str], rounds: int = 3) -> list[float]:
    """Sentences per second of each model, one short sentence at a time: the median over rounds that alternate between models."""
    sentences = [dict(tokenizer(" ".join(text.split()[:8]), return_tensors="pt")) for text in documents]
    rates: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, own in zip(models, rates, strict=True):
            started = time.perf_counter()
            for sentence in sentences:
                model(**sentence)
            own.append(len(sentences) / (time.perf_counter() - started))
    return [statistics.median(own) for own in rates]
