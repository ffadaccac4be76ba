"""Distances between a network's outputs and another's: divergence of class probabilities, and distance of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["HIDDEN_LOSSES", "HiddenLoss", "hidden_distance", "logit_divergence"]

HiddenLoss = Literal["mse", "cosine"]
CHUNK = {"cpu": 1 << 18, "other": 1 << 22}
"""Maximum number of logits converted to float32 probabilities at a time: on a CPU so few that they stay in its cache."""


def logit_divergence(
    student: Float[Tensor, "*B C"],
    teacher: Float[Tensor, "*B C"],
    temperature: float = 1.0,
    where: Bool[Tensor, "*B"] | None = None,
) -> Float[Tensor, ""]:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over positions (Hinton et al. 2015).

    Computed in float32 for all dtypes. Saves one tensor of the logits' size and dtype for the backward pass. Has no second
    derivative.

    Args:
        where: positions that count; by default all.
    """
    mask = None if where is None else where.flatten()
    result: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2), temperature, mask)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, where: Tensor | None) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        total = torch.zeros((), dtype=wide, device=student.device)
        rows = max(1, CHUNK.get(student.device.type, CHUNK["other"]) // student.shape[1])
        weights = torch.ones(len(student), dtype=wide, device=student.device) if where is None else where.to(wide)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            own = _log_probabilities(student[part], temperature, wide)
            given = _log_probabilities(teacher[part], temperature, wide)
            target = given.exp()
            kept = weights[part]
            terms = given.sub_(own).mul_(target)
            sums = terms.sum(-1)
            if student.device.type != "cpu" or bool(sums.isnan().any()):
                # A class that the teacher excludes, by a logit of -inf, adds nothing, whatever the student's logit.
                sums = torch.where(target == 0, 0, terms).sum(-1)
            total += torch.where(kept > 0, sums, 0).sum()
            difference = own.exp_().sub_(target)
            gradient[part] = difference if where is None else torch.where(kept[:, None] > 0, difference, 0)
        count = weights.sum().clamp(min=1)
        ctx.save_for_backward(gradient, temperature / count)
        return total * (temperature * temperature) / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, factor = ctx.saved_tensors
        return gradient * (grad * factor).to(gradient.dtype), None, None, None


def _log_probabilities(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """New tensor of the logarithms of the class probabilities."""
    if temperature == 1:
        return logits.log_softmax(-1, dtype=dtype)
    return (logits.to(dtype) / temperature).log_softmax(-1)


def _relative_mse(student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
    """Squared error over the teacher's mean square (SquareHead, Kurtic et al. 2023), so that layers of any scale count alike."""
    if where is not None:
        student, teacher = student[where], teacher[where]
    power = teacher.square().mean().clamp(min=torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().mean() / power


def _cosine(student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
    """One minus the cosine along the last dimension, the mean over positions."""
    if where is not None:
        student, teacher = student[where], teacher[where]
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"mse": _relative_mse, "cosine": _cosine}


def hidden_distance(
    student: Float[Tensor, "..."],
    teacher: Float[Tensor, "..."],
    kind: HiddenLoss = "mse",
    where: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Distance of hidden states, in float32: "mse" relative to the teacher's mean square, or "cosine" along the last dimension.

    Args:
        where: positions that count, of the shape of all dimensions but the last; ignored if the hidden state has others.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    fits = where is not None and where.shape == student.shape[:-1]
    return HIDDEN_LOSSES[kind](student.to(wide), teacher.to(wide), where if fits else None)
