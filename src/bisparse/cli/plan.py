"""The plan of `prune --dry-run`: the layers that would be pruned, those that would not and why, and the files to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bisparse.cli.console import print_json, to_stdout
from bisparse.cli.tables import grouped, print_left_dense, print_table

if TYPE_CHECKING:
    from bisparse.layers import Skipped
    from bisparse.pattern import Structure
    from bisparse.tiles import Layout

__all__ = ["Plan", "PlannedLayer", "show_plan"]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that would be pruned."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    pattern: Structure


@dataclass(frozen=True)
class Plan:
    """The layers that a job would prune or leave dense, and the files it would write."""

    pattern: Structure
    method: str
    layers: Sequence[PlannedLayer]
    left_dense: Sequence[Skipped]
    notes: Sequence[str]
    weights: int
    """Number of weights of the whole model."""
    output_bytes: int
    files: Sequence[str]
    """Names of the files that would be written."""
    calibration: Mapping[str, Any] | None = field(default=None)
    """The calibration data, as described in the sidecar."""


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        print_json(_as_dict(plan))
        return
    console = to_stdout()
    groups = grouped(plan.layers, lambda one: one.name, lambda one: (one.shape, one.dtype, one.layout, one.pattern))
    rows = [
        (
            name,
            str(len(group)),
            " x ".join(map(str, group[0].shape)),
            group[0].dtype,
            str(group[0].layout),
            str(group[0].pattern),
        )
        for name, group in groups
    ]
    print_table(console, ("would be pruned", " n", " shape", "dtype", "stored as", "to"), rows)
    print_left_dense(console, plan.left_dense)
    console.print()
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False)
    if plan.calibration is not None:
        console.print(f"Calibration: {_said(plan.calibration)}", markup=False, soft_wrap=True)
    weights = sum(_size(one.shape) for one in plan.layers)
    console.print(
        f"{len(plan.layers)} layers by {plan.method}, {weights:,} of {plan.weights:,} weights "
        f"({weights / max(plan.weights, 1):.0%}); {plan.output_bytes / 1e6:,.1f} MB would be written: "
        f"{', '.join(plan.files)}. Nothing was written.",
        markup=False,
        soft_wrap=True,
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _said(data: Mapping[str, Any]) -> str:
    if "function" in data:
        return f"{data['batches']} batches of {data['function']}"
    files = ", ".join(f"{one['name']} ({one['bytes'] / 1e6:,.1f} MB, {one['sequences']} sequences)" for one in data["files"])
    return (
        f"{data['sequences']} sequences, {data['tokens']:,} tokens in {data['batches']} batches, at most {data['length']} tokens "
        f"each, from {files}"
    )


def _as_dict(plan: Plan) -> dict[str, Any]:
    layers = [
        {
            **{key: getattr(one, key) for key in ("name", "parameter", "shape", "dtype")},
            "layout": {"kind": one.layout.kind.value, "groups": one.layout.groups, "parts": one.layout.parts},
            "pattern": str(one.pattern),
        }
        for one in plan.layers
    ]
    return {
        "ok": True,
        "dry_run": True,
        "pattern": str(plan.pattern),
        "method": plan.method,
        "layers": layers,
        "left_dense": [{"name": one.name, "reason": one.reason} for one in plan.left_dense],
        "notes": list(plan.notes),
        "calibration": plan.calibration,
        "output_bytes": plan.output_bytes,
        "files": list(plan.files),
    }
