"""Classification: top-1 accuracy against labels, and top-1 agreement of two models on the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from bisparse.arguments import check_count, check_dense
from bisparse.evaluation.model_outputs import device_of, evaluating, naming_input, tensor_of
from bisparse.wrappers import check_module

__all__ = ["Agreement", "Classification", "agreement", "classification"]


def _error(share: float, samples: int) -> float:
    """Standard error of a fraction of independent samples."""
    return math.sqrt(share * (1 - share) / samples)


@dataclass(frozen=True)
class Classification:
    """A top-1 accuracy."""

    accuracy: float
    """Fraction of samples whose label has the largest logit."""
    samples: int
    corpus: str = ""

    @property
    def error(self) -> float:
        """Standard error of the accuracy over samples."""
        return _error(self.accuracy, self.samples)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "kind": "classification",
            "corpus": self.corpus,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "accuracy_error": self.error,
        }

    @property
    def protocol(self) -> str:
        """Corpus and number of samples, as text."""
        return f"{f'{self.corpus}, ' if self.corpus else ''}{self.samples:,} samples"

    def __str__(self) -> str:
        return f"top-1 accuracy {self.accuracy:.4f} +- {self.error:.2g} on {self.protocol}"


@dataclass(frozen=True)
class Agreement:
    """How often two models give the same class."""

    agreement: float
    """Fraction of samples with the same largest logit."""
    samples: int
    against: str = ""
    """The other model."""
    corpus: str = ""

    @property
    def error(self) -> float:
        """Standard error of the agreement over samples."""
        return _error(self.agreement, self.samples)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "kind": "agreement",
            "corpus": self.corpus,
            "samples": self.samples,
            "against": self.against,
            "agreement": self.agreement,
            "agreement_error": self.error,
        }

    @property
    def protocol(self) -> str:
        """Corpus, number of samples and the other model, as text."""
        other = f" against {self.against}" if self.against else ""
        return f"{f'{self.corpus}, ' if self.corpus else ''}{self.samples:,} samples{other}"

    def __str__(self) -> str:
        return f"top-1 agreement {self.agreement:.4f} +- {self.error:.2g} on {self.protocol}"


def classification(
    model: nn.Module, inputs: Shaped[Tensor, "N ..."], labels: Int[Tensor, " N"], *, batch_size: int = 64, corpus: str = ""
) -> Classification:
    """The top-1 accuracy of a classifier.

    Args:
        model: called as ``model(inputs)``; returns logits of shape (B, C), or an output that holds them.
        labels: the correct classes, 0 to C - 1.

    Raises:
        ValueError: no samples, labels that do not match, or logits that are NaN or have another shape.
    """
    check_module(model)
    check_dense("inputs", inputs)
    check_dense("labels", labels)
    if labels.ndim != 1 or inputs.ndim == 0 or len(labels) != len(inputs) or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for {len(inputs)} inputs: expected a class per input"
        )
    labels = labels.long()  # torch cannot compare all unsigned numbers
    found, classes = _classes(model, inputs, batch_size)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())}: the model has the classes 0 to {classes - 1}")
    return Classification(float((found == labels.cpu()).double().mean()), len(labels), corpus)


def agreement(
    model: nn.Module,
    other: nn.Module,
    inputs: Shaped[Tensor, "N ..."],
    *,
    batch_size: int = 64,
    against: str = "",
    corpus: str = "",
) -> Agreement:
    """How often two classifiers give the same class.

    Raises:
        ValueError: no samples, different numbers of classes, or logits that are NaN or have another shape.
    """
    (first, classes), (second, others) = (_classes(one, inputs, batch_size) for one in (model, other))
    if classes != others:
        raise ValueError(f"the models have {classes} and {others} classes: expected the same")
    return Agreement(float((first == second).double().mean()), len(first), against, corpus)


def _classes(model: nn.Module, inputs: Tensor, batch_size: int) -> tuple[Int[Tensor, " N"], int]:
    """The class of each sample, and how many classes there are."""
    check_module(model)
    check_dense("inputs", inputs)
    check_count("batch_size", batch_size)
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError("no samples to classify")
    device = device_of(model)
    parts, classes = [], 0
    with evaluating(model):
        for part in inputs.split(batch_size):
            with naming_input(part):
                logits = tensor_of(model(part.to(device)), "logits")
            if logits.ndim != 2 or len(logits) != len(part):
                raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(part)} samples: expected (samples, classes)")
            if bool(torch.isnan(logits).any()):
                raise ValueError("the model's logits are NaN")
            classes = logits.shape[1]
            parts.append(logits.argmax(1).cpu())
    return torch.cat(parts), classes
