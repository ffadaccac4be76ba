"""How well a sentence encoder agrees with people: 50 news documents and the human similarity of every pair.

Source: Lee, Pincombe, Welsh, "An empirical evaluation of models of text document similarity", CogSci 2005.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

__all__ = ["agreement", "embed", "read_documents", "read_similarities"]


def read_documents(folder: Path) -> list[str]:
    return (folder / "lee.cor").read_text(encoding="latin-1").splitlines()


def read_similarities(folder: Path) -> np.ndarray:
    """(50, 50), the upper triangle; between 0 and 1, the mean of several people's judgements."""
    return np.loadtxt(folder / "similarities0-1.txt")


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer, documents: list[str], batch_size: int = 25) -> torch.Tensor:
    """(documents, features): the mean of the last hidden states, of length 1, as all-MiniLM-L6-v2 is meant to be used."""
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
