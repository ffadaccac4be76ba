"""Distillation for sparse training: adds distances to the dense model's logits and hidden states to the loss, in one line.

`Distillation` records the student's inputs by hooks, and runs the teacher on them when `loss` is called, in eval mode and without
gradients. Hooks and teacher are not part of the student, so its state_dict, copies and saved files do not change.
Source of the recipe: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bisparse.arguments import check_function, is_number
from bisparse.distances import HIDDEN_LOSSES, HiddenLoss, hidden_distance, logit_divergence
from bisparse.layers import Filter, matches
from bisparse.results import checksum_of
from bisparse.token_masks import TokenMasks, fitted
from bisparse.training.distill_outputs import check_logits, device_of, hidden_state, logits_of
from bisparse.training.distill_teacher import frozen_teacher
from bisparse.wrappers import plain_names, unwrapped_model

__all__ = ["Distillation"]

MAX_WEIGHT = 1e300
PEFT = "base_model.model."
"""Parts that peft adds to the names of the modules it wraps."""


@dataclass
class _Hidden:
    """A hidden state, as a module has returned it."""

    state: Tensor
    versions: list[int]

    @property
    def changed(self) -> bool:
        """Whether something has worked on it in place since."""
        return bool(self.versions) and self.versions != _versions_of(self.state)


@dataclass
class _Pass:
    """A training forward pass of the student."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    hidden: dict[str, list[_Hidden]]
    autocast: torch.dtype | None
    intact: bool
    """Whether the arguments are as they were before the pass."""


class _Hook:
    """A hook that records what it is called with. In copies and pickles of the module it does nothing and has no teacher."""

    def __init__(self, record: Callable[..., None]) -> None:
        self.record: Callable[..., None] | None = record

    def __getstate__(self) -> dict[str, Any]:
        return {"record": None}

    def __call__(self, *call: Any) -> None:
        if self.record is not None:
            self.record(*call)


class Distillation:
    """A frozen teacher, and a loss for a student to match it. Create it before the model is pruned or sparsified.

    ::

        teacher = Distillation(model, hidden=1.0)  # a frozen copy of the dense model
        sparsity = sparsify_(model, "4:8-T", mode="static").attach(optimizer)
        for inputs, labels in data:
            loss = teacher.loss(cross_entropy(model(inputs), labels))  # the only change in the loop
            loss.backward()

    The cost is the teacher's memory (2 bytes per weight with ``dtype=torch.bfloat16``), one forward pass of the teacher per call
    of `loss` and, if hidden states are compared, the teacher's hidden states at the chosen layers.

    Args:
        student: the model to train, or its submodule whose output is the logits. Wrap (DDP, FSDP2) and compile it afterwards.
        teacher: None: a frozen copy of the student as it is now; a module, used directly, frozen and in eval mode; or a
            folder with safetensors of the student's architecture, read by its ``from_pretrained`` if it has one.
        logits: weight of the divergence of the class probabilities, ``T^2 * KL(teacher || student)``.
        hidden: weight of the distance of hidden states, a mean over layers.
        task: weight of the loss given to `loss`.
        temperature: T, which divides the logits of both.
        layers: the modules whose hidden states are compared: names, globs, ``re:`` patterns or functions; of nested modules that
            match, the outermost. By default the repeated blocks (the items of the outermost ModuleLists).
        hidden_loss: "mse", relative to the teacher's mean square, or "cosine".
        dtype: dtype of the teacher, such as ``torch.bfloat16``; None: unchanged.
        output: function from an output of student or teacher to logits, classes last; by default the output itself if it is a
            tensor, otherwise its ``logits``.
        where: function from (args, kwargs) of the forward pass to a bool tensor of the positions that count; by default
            ``attention_mask``, or a decoder's ``decoder_attention_mask``, if it has the shape of the positions.

    Raises:
        ValueError: weights or options without a loss, layers that are not in both models, a student that is already sparse if
            no teacher is given, or a teacher that shares parameters with the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | Path | None = None,
        *,
        logits: float = 1.0,
        hidden: float = 0.0,
        task: float = 1.0,
        temperature: float = 1.0,
        layers: Filter | None = None,
        hidden_loss: HiddenLoss = "mse",
        dtype: torch.dtype | None = None,
        output: Callable[[Any], Tensor] | None = None,
        where: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] | None = None,
    ) -> None:
        _check_options(logits, hidden, task, temperature, layers, hidden_loss, dtype)
        for name, function in (("output", output), ("where", where)):
            check_function(name, function)
        self.student = unwrapped_model(student)
        names = _chosen(self.student, layers) if hidden else {}
        self.teacher, self._own = frozen_teacher(self.student, teacher, dtype)
        self.weights = {"logits": float(logits), "hidden": float(hidden), "task": float(task)}
        self.temperature, self.hidden_loss, self.dtype = float(temperature), hidden_loss, dtype
        self._output, self._where = output or logits_of, where
        self.terms: dict[str, Tensor] = {}
        """The parts of the last loss, before their weights, detached."""
        self._passes: list[_Pass] = []
        self._hidden: dict[str, list[_Hidden]] = {}
        self._given: dict[str, list[_Hidden]] = {}
        self._teaching = False
        self._handles: list[Any] = []
        self._hooks: list[_Hook] = []
        theirs = {_plain(name): module for name, module in _named(unwrapped_model(self.teacher))}
        if missing := [name for name in names if name not in theirs]:
            raise ValueError(f"the teacher has no module {missing[0]!r}, whose hidden state is to be compared; choose layers=")
        for name, module in names.items():
            self._hook(module, lambda own, *rest, name=name: self._keep(self._hidden, name, rest[-1], keep=_trains(own)))
            self._hook(theirs[name], lambda *call, name=name: self._keep(self._given, name, call[-1], keep=self._teaching))
        self._versions: list[int] = []
        self._hooks.append(_Hook(self._before))
        self._handles.append(self.student.register_forward_pre_hook(self._hooks[-1], with_kwargs=True))
        self._hook(self.student, self._record)
        self._checksum: int | None = None

    def _hook(self, module: nn.Module, record: Callable[..., None]) -> None:
        self._hooks.append(_Hook(record))
        self._handles.append(module.register_forward_hook(self._hooks[-1], with_kwargs=True))

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"Distillation({type(self.teacher).__name__}, {parts}, temperature={self.temperature:g})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        raise TypeError("a Distillation belongs to one student: create another one for a copy")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Distillation cannot be pickled: create it again from the same teacher, which state_dict() identifies")

    def _keep(self, held: dict[str, list[_Hidden]], name: str, output: Any, *, keep: bool) -> None:
        if keep:
            state = hidden_state(output, name)
            held.setdefault(name, []).append(_Hidden(state, _versions_of(state)))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _trains(module):
            self._versions = _versions_of((args, kwargs))

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not _trains(module):
            return
        kind = "cpu" if (device := device_of(output)) is None else device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        intact = self._versions == _versions_of((args, kwargs))
        self._passes.append(_Pass(args, kwargs, output, self._hidden, dtype, intact))
        self._hidden = {}

    def reset(self) -> None:
        """Discard recorded forward passes for which `loss` was not called."""
        self._passes, self._hidden, self._given = [], {}, {}

    def loss(self, task: Tensor | None = None) -> Tensor:
        """The weighted sum of the task loss and the distances to the teacher, for the student's last training forward pass.

        Runs the teacher. Call it once after each training forward pass of the student.

        Args:
            task: the loss without a teacher, a mean over examples; None: only the distances.

        Raises:
            ValueError: no training forward pass since the last call, or several (see `reset`); outputs of different shapes;
                inputs or hidden states that were changed in place.
        """
        if len(self._passes) != 1:
            many = "no training forward pass" if not self._passes else f"{len(self._passes)} training forward passes"
            raise ValueError(
                f"the student ({type(self.student).__name__}) had {many} since the last Distillation.loss: call loss once "
                "after each (reset() discards earlier ones), and give Distillation the module that is called, in training mode"
            )
        (done,) = self._passes
        self.reset()
        if not done.intact:
            raise ValueError(
                f"the student ({type(self.student).__name__}) works on its inputs in place, so the teacher would get other ones: "
                "let its forward begin with a copy, such as x = x - mean instead of x.sub_(mean)"
            )
        given = self._teach(done)
        masks = TokenMasks.of_batch(self.student, done.kwargs)
        if self._where is not None:
            masks = TokenMasks(self._where(done.args, done.kwargs))
        parts: dict[str, Tensor] = {}
        if self.weights["logits"]:
            own, theirs = self._output(done.output), self._output(given)
            check_logits(own, theirs)
            parts["logits"] = logit_divergence(own, theirs, self.temperature, fitted(masks.of(""), own.shape[:-1]))
        if self.weights["hidden"]:
            parts["hidden"] = self._compare(done.hidden, masks)
        self._given = {}
        if task is not None:
            parts["task"] = task
        self.terms = {name: part.detach() for name, part in parts.items()}
        total: Tensor = sum(self.weights[name] * part for name, part in parts.items())  # type: ignore[assignment]
        return total

    def _teach(self, done: _Pass) -> Any:
        """The teacher's output for the inputs of a forward pass."""
        device = device_of(done.output) or torch.device("cpu")
        if self._own and next(iter(self.teacher.parameters())).device != device:
            self.teacher.to(device)
        self.teacher.eval()
        args, kwargs = (
            done.args,
            {name: value for name, value in done.kwargs.items() if name not in ("labels", "num_items_in_batch")},
        )
        if self.dtype is not None:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        on = done.autocast is not None and self.dtype is None
        self._teaching = True
        try:
            with torch.no_grad(), torch.autocast(device.type, done.autocast, enabled=True) if on else contextlib.nullcontext():
                return self.teacher(*args, **kwargs)
        finally:
            self._teaching = False

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _compare(self, hidden: Mapping[str, list[_Hidden]], masks: TokenMasks) -> Tensor:
        distances = []
        for name, given in self._given.items():
            kept = hidden.get(name, [])
            if any(one.changed for one in (*kept, *given)):
                raise ValueError(
                    f"{name}: another module works on its output in place, such as ReLU(inplace=True) or x += y, so the hidden "
                    "state is lost: let that make a copy, such as x = x + y, or choose other layers="
                )
            own, theirs = [one.state for one in kept], [one.state for one in given]
            if not own or any(not one.requires_grad for one in own):
                raise ValueError(
                    f"{name}: the student's hidden state has no gradient; the layer may be frozen, in eval mode or "
                    "under reentrant activation checkpointing (then pass use_reentrant=False)"
                )
            if len(own) != len(theirs) or any(one.shape != other.shape for one, other in zip(own, theirs, strict=True)):
                raise ValueError(
                    f"{name}: the student has hidden states of shapes {[tuple(one.shape) for one in own]}, the teacher "
                    f"{[tuple(one.shape) for one in theirs]}; they must agree (choose others by layers=)"
                )
            for one, other in zip(own, theirs, strict=True):
                distances.append(hidden_distance(one, other, self.hidden_loss, fitted(masks.of(name), one.shape[:-1])))
        if not distances:
            raise ValueError("the teacher ran none of the layers whose hidden states are to be compared")
        return torch.stack(distances).mean()

    def metrics(self) -> dict[str, float]:
        """The parts of the last loss, before their weights: ``distill/logits``, ``distill/hidden``, ``distill/task``."""
        return {f"distill/{name}": float(part) for name, part in self.terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """A checksum that identifies the teacher, without its weights; the checksum is None if they are sharded."""
        if self._checksum is None and not any(hasattr(one, "full_tensor") for one in self.teacher.parameters()):
            held = {name: value for name, value in self.teacher.state_dict().items() if isinstance(value, Tensor)}
            self._checksum = zlib.crc32(repr([(name, checksum_of(value)) for name, value in held.items()]).encode())
        return {"teacher": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that this teacher is the same as in the saved run.

        Raises:
            ValueError: it is a different one.
        """
        own = self.state_dict()["teacher"]
        if "teacher" not in state:
            raise ValueError("the checkpoint comes from a run without a teacher: resume it without distill=")
        if state["teacher"] is not None and own is not None and state["teacher"] != own:
            raise ValueError(
                "the teacher differs from that of the run to resume: create the Distillation from the same dense weights, in the "
                "same dtype"
            )

    def detach(self) -> None:
        """Remove the hooks from student and teacher."""
        for hook in self._hooks:
            hook.record = None
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], []
        self.reset()


def _check_options(
    logits: float,
    hidden: float,
    task: float,
    temperature: float,
    layers: Filter | None,
    hidden_loss: str,
    dtype: torch.dtype | None,
) -> None:
    for name, number in {"logits": logits, "hidden": hidden, "task": task}.items():
        if not is_number(number) or not 0 <= number < MAX_WEIGHT:
            raise ValueError(f"{name}={number!r:.40}: expected a weight that is 0 or more")
    if not logits and not hidden:
        raise ValueError("logits=0 and hidden=0: at least one must be positive")
    if not is_number(temperature) or not 0 < temperature < MAX_WEIGHT:
        raise ValueError(f"temperature={temperature!r:.40}: expected a positive number")
    if layers is not None and not hidden:
        raise ValueError("layers= has no effect with hidden=0: give hidden a weight")
    if hidden_loss not in HIDDEN_LOSSES:
        raise ValueError(f"hidden_loss={hidden_loss!r}: expected one of {', '.join(map(repr, HIDDEN_LOSSES))}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a floating-point dtype of torch, or None")


def _plain(name: str) -> str:
    return name.removeprefix(PEFT)


def _named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    plain = plain_names(model)
    return [(plain(name), module) for name, module in model.named_modules() if name]


def _chosen(student: nn.Module, layers: Filter | None) -> dict[str, nn.Module]:
    """The modules whose hidden states are compared, by names without wrappers."""
    if layers is None:
        lists = [(name, module) for name, module in _named(student) if isinstance(module, nn.ModuleList) and len(module) > 0]
        outer = [one for one in lists if not any(one[0].startswith(f"{name}.") for name, _ in lists)]
        found = {f"{name}.{number}": item for name, module in outer for number, item in enumerate(module)}
        if not found:
            raise ValueError(
                "the model has no ModuleList of blocks whose hidden states could be compared: choose modules by layers="
            )
        return {_plain(name): module for name, module in found.items()}
    chosen: dict[str, nn.Module] = {}
    filters: list[Any] = [layers] if isinstance(layers, str) or callable(layers) else list(layers)
    for one in filters:
        matched = {name: module for name, module in _named(student) if matches(one, _plain(name), module)}
        if not matched:
            raise ValueError(f"layers: {one!r} matches no module of the student")
        chosen |= {
            _plain(name): module for name, module in matched.items() if not any(name.startswith(f"{outer}.") for outer in matched)
        }
    return chosen


def _trains(module: nn.Module) -> bool:
    """Whether this is a training forward pass, neither evaluation nor a repetition by activation checkpointing."""
    if not module.training or not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1


def _versions_of(inputs: Any) -> list[int]:
    """How often each tensor was written to in place; compiled code does not know it."""
    if torch.compiler.is_compiling():
        return []
    return [one._version for one in tree_leaves(inputs) if isinstance(one, Tensor) and not one.is_inference()]
