"""The check of a mask, a weight or a model against a structure, as the GEMMs see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from bisparse.kernels.figures.cpu import broken_groups
from bisparse.layers import BY_NAME, Filter, Skipped, find_layers
from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.tiles import Layout, default_layout, to_matrices

__all__ = ["PatternError", "Verification", "Violation", "verify"]


class PatternError(ValueError):
    """A mask breaks its structure."""


@dataclass(frozen=True)
class Violation:
    """One group that keeps too many weights."""

    side: str
    """"W" or "W^T"."""
    matrix: int
    """Which of the layer's GEMM matrices (kernel position, group, part or expert); 0 where there is one."""
    row: int
    """Row of that side's matrix."""
    group: int
    """Group along the row: entries ``group * M`` to ``group * M + M - 1``."""
    kept: int
    """How many weights the group keeps."""
    layer: str = ""

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        matrix = f"matrix {self.matrix}, " if self.matrix else ""
        return f"{where}{self.side}, {matrix}row {self.row}, group {self.group} keeps {self.kept}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found: true in an ``if`` or ``assert`` if the mask, weight or model obeys its pattern.

    `message` says it in a sentence, with the first group that breaks the pattern and the layers that were left out because they
    were not included by name; `check` raises an error instead.
    """

    pattern: Structure
    groups: int
    """Groups looked at, W and W^T together."""
    violations: int
    """How many of them break the structure."""
    first: Violation | None
    """The first one, in the order W before W^T, matrix, row, group."""
    density: float
    """Fraction of non-zero weights."""
    layer: str = ""
    layers: tuple[Verification, ...] = field(default=(), repr=False)
    """For a model or a checkpoint, one entry per layer that was checked."""
    unchecked: tuple[Skipped, ...] = field(default=(), repr=False)
    """For a checkpoint, the layers whose zeros could not be seen or are not constrained, and why."""
    left_out: tuple[Skipped, ...] = field(default=(), repr=False)
    """For a model or a checkpoint, the matrices that are no layers to prune by default, or that the caller left out, and why."""
    contradicted: tuple[str, ...] = field(default=(), repr=False)
    """For a checkpoint, what its sidecar says of the weights that is not so, such as another density; each in a sentence."""

    def __bool__(self) -> bool:
        return self.violations == 0 and not (self.unchecked and not self.layers)

    def __str__(self) -> str:
        return self.message

    @property
    def message(self) -> str:
        """One sentence: holds, or how many groups break it and where the first one is; and what was not checked."""
        subject = f"{self.layer}: " if self.layer else ""
        patterns = ", ".join(dict.fromkeys(str(one.pattern) for one in self.layers)) or str(self.pattern)
        if self.unchecked and not self.layers:
            return f"no layer was checked; {self._not_checked}"
        if self.first is not None:
            found = f"{self.violations} of {self.groups} groups break {patterns}; the first: {self.first}"
        elif self.unchecked:
            count = len(self.layers)
            found = f"{patterns} holds on {count} of {count + len(self.unchecked)} layers, {self.groups} groups"
        else:
            found = f"{patterns} holds on {self.groups} groups"
        found = f"{subject}{found}; {self._not_checked}" if self.unchecked else f"{subject}{found}"
        by_default = [one for one in self.left_out if one.reason.endswith(BY_NAME)]
        found = f"{found}; {len(by_default)} left out: {_listed(by_default)}" if by_default else found
        return f"{found}; bisparse.json is wrong: {'; '.join(self.contradicted[:4])}" if self.contradicted else found

    @property
    def _not_checked(self) -> str:
        return f"{len(self.unchecked)} {'was' if len(self.unchecked) == 1 else 'were'} not checked: {_listed(self.unchecked)}"

    def check(self) -> Verification:
        """Raise `PatternError` unless the structure holds; returns itself."""
        if not self:
            raise PatternError(self.message)
        return self


def _listed(layers: Sequence[Skipped]) -> str:
    """The first layers with their reasons, and how many more there are."""
    more = f"; and {len(layers) - 4} more" if len(layers) > 4 else ""
    return "; ".join(f"{one.name} ({one.reason})" for one in layers[:4]) + more


def verify(
    target: Shaped[Tensor, "..."] | nn.Module,
    pattern: str | Structure,
    *,
    layout: Layout | None = None,
    name: str = "",
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> Verification:
    """Check that a mask, a weight or every prunable layer of a model obeys a structure as the GEMMs see it.

    A weight counts as kept where it is not zero (NaN included). Transposable patterns are checked on W and on W^T.

    Args:
        target: bool mask or weight: 2-D (O, I), 3-D a batch of matrices, 4-D and 5-D a convolution; or a module.
        pattern: the structure or its text.
        layout: how a bare tensor stores its matrices, where the default above does not fit.
        name: the layer's name for messages.
        include, exclude: of a module, its layers, as passed to `prune_`; by default those that `find_layers` chooses,
            without output heads and the first convolution, which `left_out` and the message name.
        layouts: of a module, how single layers store their matrices, as passed to `prune_`.
    """
    pattern = parse_pattern(pattern)
    if isinstance(target, nn.Module):
        found, left = find_layers(target, include, exclude, layouts=layouts)
        results = tuple(verify(layer.weight, pattern, layout=layer.layout, name=layer.name) for layer in found)
        if not results:
            raise ValueError(
                "the model has no layer that a pattern applies to by default: nothing was verified; name output heads and first "
                "convolutions by include=, as in pruning"
            )
        weights = sum(layer.weight.numel() for layer in found)
        return Verification(
            pattern,
            sum(result.groups for result in results),
            sum(result.violations for result in results),
            next((result.first for result in results if result.first), None),
            sum(result.density * layer.weight.numel() for result, layer in zip(results, found, strict=True)) / max(weights, 1),
            layers=results,
            left_out=tuple(left),
        )
    if not isinstance(target, Tensor):
        raise ValueError(f"verify needs a tensor or a module, not {type(target).__name__}")
    if include is not None or exclude is not None or layouts is not None:
        raise ValueError("include, exclude and layouts are about layers of a module, and this is a tensor")
    if target.is_meta:
        raise ValueError(f"{name or 'the tensor'} is on the meta device and holds no numbers to verify; load the model first")
    if target.layout != torch.strided:
        raise ValueError(f"{name or 'the tensor'} is stored as {target.layout}: verify its dense form, tensor.to_dense()")
    target = target.detach()
    both = isinstance(pattern, Pattern) and pattern.transposable
    layout = default_layout(target.ndim) if layout is None else layout
    if isinstance(pattern, Pattern) and (counted := broken_groups(to_matrices(target, layout), pattern.n, pattern.m)):
        by_row, by_column, kept = counted
        if by_row == 0 and not (both and by_column):
            groups = target.numel() // pattern.m * (2 if both else 1)
            return Verification(pattern, groups, 0, None, kept / target.numel(), layer=name)
    mask = target if target.dtype == torch.bool else target != 0
    matrices = to_matrices(mask, layout)
    sides = [("W", matrices)]
    if both:
        sides.append(("W^T", matrices.transpose(1, 2)))
    groups, violations, first = 0, 0, None
    for side, matrix in sides:
        broken = pattern.row_violations(matrix)
        groups += broken.numel()
        violations += int(broken.sum())
        if first is None and bool(broken.any()):
            index, row, group = broken.nonzero()[0].tolist()
            span = getattr(pattern, "m", None)
            entries = matrix[index, row, group * span : (group + 1) * span] if span else matrix[index]
            first = Violation(side, index, row, group, int(entries.sum()), name)
    density = int(torch.count_nonzero(mask)) / max(mask.numel(), 1)
    return Verification(pattern, groups, violations, first, density, layer=name)
