"""The frozen dense teacher model: a copy of the student, a module, or a model read from a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bisparse.apart import check_path
from bisparse.layers import find_layers, not_written
from bisparse.static_mask import static_masks
from bisparse.training.parametrizations import masked_parameters
from bisparse.wrappers import unwrapped_model

__all__ = ["frozen_teacher"]

MAX_ZEROS = 0.2
"""Maximum fraction of zeros in the layers of a model that counts as dense; patterns keep at most 75 % of the weights."""


def frozen_teacher(
    student: nn.Module, teacher: nn.Module | str | Path | None, dtype: torch.dtype | None
) -> tuple[nn.Module, bool]:
    """(the teacher, frozen, in eval mode and in `dtype`; whether it is a new copy).

    Args:
        student: without wrappers.
        teacher: None: a copy of the student; a module; or a folder.

    Raises:
        ValueError: a copy is needed but the student is already sparse or sharded; a module that shares parameters with the
            student; a folder without safetensors, or of a different architecture.
    """
    own = True
    if teacher is None:
        _check_dense(student)
        made = _copied(student)
    elif isinstance(teacher, nn.Module):
        shared = {id(one) for one in student.parameters()}
        if teacher is student or any(id(one) in shared for one in teacher.parameters()):
            raise ValueError(
                "the teacher shares parameters with the student and would change with it: pass a copy, or None to make one"
            )
        made, own = teacher, False
        if dtype is not None and any(one.dtype != dtype for one in teacher.parameters() if one.is_floating_point()):
            made, own = _copied(unwrapped_model(teacher)), True
    elif isinstance(teacher, str | Path):
        check_path(teacher)
        made = _read(student, Path(teacher))
    else:
        raise ValueError(f"teacher={type(teacher).__name__}: expected a module, a folder, or None for a copy of the student")
    if not any(True for _ in made.parameters()):
        raise ValueError("the teacher has no parameters")
    if dtype is not None and own:
        made.to(dtype)
    return made.eval().requires_grad_(False), own


def _check_dense(student: nn.Module) -> None:
    sparse = [name for name, *_ in masked_parameters(student)]
    sparse += [name for name, module in student.named_modules() if static_masks(module)]
    if not sparse:
        sparse = _with_zeros(student)
    if sparse:
        raise ValueError(
            f"the model is already sparse (at {sparse[0]!r}), so a copy is not a dense teacher: create the Distillation before "
            "prune_ and sparsify_, or pass the dense model, or its folder, as teacher="
        )


def _with_zeros(student: nn.Module) -> list[str]:
    """Names of the sparse layers, if the model as a whole is sparse."""
    layers, _ = find_layers(student)
    held = {layer.name: layer.weight.detach() for layer in layers if not layer.weight.is_meta}
    zeros = {name: int((weight == 0).sum()) for name, weight in held.items() if not isinstance(weight, DTensor)}
    if not zeros or sum(zeros.values()) <= MAX_ZEROS * sum(held[name].numel() for name in zeros):
        return []
    return [name for name, count in zeros.items() if count > MAX_ZEROS * held[name].numel()]


def _copied(model: nn.Module) -> nn.Module:
    if any(isinstance(one, DTensor) for one in model.parameters()):
        raise ValueError("the model is sharded: create the Distillation before fully_shard, or pass a separate teacher")
    gradients = [(one, one.grad) for one in model.parameters()]
    for one, _ in gradients:
        one.grad = None  # copying would copy them
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # such as a tensor that was computed, or a lock
        raise ValueError(f"the student cannot be copied ({str(error).splitlines()[0]}): pass a teacher") from error
    finally:
        for one, gradient in gradients:
            one.grad = gradient


def _read(student: nn.Module, folder: Path) -> nn.Module:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors to read a teacher from")
    kind: Any = type(student)
    if hasattr(kind, "from_pretrained"):
        read: nn.Module = kind.from_pretrained(folder)
        return read
    if any(True for _ in masked_parameters(student)):
        raise ValueError("create the Distillation before sparsify_ to read its teacher from a folder, or pass a module")
    made = _copied(student)
    state = {name: value for file in files for name, value in load_file(file).items()}
    own = {name: value for name, value in made.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    try:
        result = made.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder} has a different architecture than the student: {error}") from error
    # Entries that are no tensors are in no safetensors file, and the copy has them from the student.
    if missing := sorted(set(result.missing_keys) & set(not_written(own, state.keys()))):
        raise ValueError(f"{folder} lacks {missing[:3]} of the student's weights")
    if result.unexpected_keys:
        raise ValueError(f"{folder} has {sorted(result.unexpected_keys)[:3]}, which the student does not have")
    return made
