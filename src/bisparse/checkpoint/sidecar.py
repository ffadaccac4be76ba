"""The files next to the weights: `bisparse.json` (what was done) and `bisparse-masks.safetensors` (masks, one bit per weight).

The weights are plain and dense, with zeros, so a model loads without these two files.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.apart import check_path
from bisparse.checkpoint.atomic_folder import PLAIN, QUANTIZATION, SIDECAR
from bisparse.checkpoint.hub import find_source
from bisparse.checkpoint.input_file import open_input
from bisparse.checkpoint.schemas import MaskShapes, decode, validate
from bisparse.checkpoint.stored_tensor import StoredTensor, build_header, read_header
from bisparse.errors import CheckpointError
from bisparse.layers import Skipped, layer_name
from bisparse.pattern import Structure, parse_pattern
from bisparse.results import MAX_HISTORY, LayerResult, MaskPoint, PruneReport, check_history
from bisparse.tiles import to_matrices
from bisparse.verification import verify

__all__ = [
    "MASKS", "OURS", "QUANTIZATION", "SCHEMA_VERSION", "SIDECAR", "SampleTile", "Sidecar", "load_masks", "masks_header",
    "plain_mark", "read_sidecar",
]  # fmt: skip

MASKS = "bisparse-masks.safetensors"
SCHEMA_VERSION = 1
OURS = frozenset({SIDECAR, MASKS, PLAIN, QUANTIZATION})
"""Names of the files that bisparse writes next to weights, and overwrites."""
SAMPLE_SIDE = 16
"""Minimum side of a sample tile."""
MAX_SAMPLE_SIDE = 4096
MAX_WEIGHTS = 1 << 48
"""Maximum number of weights per layer."""
MAX_FIGURE = 1e40
"""Maximum of errors, seconds and sample weights, which are plotted; sums of scores may be larger."""
FRACTIONS = ("density", "retained", "gap")
ROUNDING = 1e-6
"""Tolerance by which a fraction may exceed 1."""


@dataclass(frozen=True)
class SampleTile:
    """A square of weights and their mask, for pictures; its side is the smallest multiple of M from 16, cropped to the layer."""

    layer: str
    matrix: int
    """Index of the GEMM matrix in the layer."""
    row: int
    column: int
    """Position of its upper left corner in that matrix."""
    weights: tuple[tuple[float, ...], ...]
    """The dense weights, to 4 digits."""
    kept: tuple[tuple[int, ...], ...]
    """1 = kept."""

    @property
    def can_be_drawn(self) -> bool:
        """Whether its weights are finite and not too large; other samples are not written."""
        return all(abs(weight) <= MAX_FIGURE for row in self.weights for weight in row)

    @classmethod
    def middle(
        cls,
        layer: str,
        weights: Float[Tensor, "R C"],
        mask: Bool[Tensor, "R C"],
        pattern: Structure,
        place: tuple[int, int, int] = (0, 0, 0),
    ) -> SampleTile:
        """The square in the middle of a matrix, or of a part of it at `place` = (matrix, row, column)."""
        m = getattr(pattern, "m", SAMPLE_SIDE)
        side = -(-SAMPLE_SIDE // m) * m
        row, column = (max(0, (length - side) // 2 // m * m) for length in weights.shape)
        square = slice(row, row + side), slice(column, column + side)
        return cls(
            layer,
            place[0],
            place[1] + row,
            place[2] + column,
            tuple(tuple(float(f"{weight:.4g}") for weight in line) for line in weights[square].double().tolist()),
            tuple(tuple(line) for line in mask[square].int().tolist()),
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("bisparse", "torch", "numpy", "numba", "safetensors")}
    return {**packages, "python": platform.python_version()}


@dataclass(frozen=True)
class Sidecar:
    """The content of `bisparse.json`."""

    report: PruneReport
    remainder: str = "pad"
    source: str = ""
    """Name of the folder, file or class that was pruned."""
    samples: tuple[SampleTile, ...] = field(default=(), repr=False)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=_versions)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How a job was called and on what data, as JSON values: command line, calibration files, sequences, length, order."""
    evaluation: tuple[Mapping[str, Any], ...] = ()
    """Figures measured before and after; see `record_evaluation`."""

    def to_json(self) -> str:
        """The sidecar as JSON text; `from_json` is the inverse."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "convention": "N:M keeps at most N of every M weights along the inputs; -T along the outputs too",
            "source": self.source,
            "created": self.created,
            "versions": dict(self.versions),
            "provenance": dict(self.provenance),
            "remainder": self.remainder,
            **self.report.as_dict(),
            "evaluation": [dict(one) for one in self.evaluation],
            "samples": [asdict(sample) for sample in self.samples if sample.can_be_drawn],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Sidecar:
        """Parse the text of a sidecar.

        Raises:
            CheckpointError: not a valid sidecar, or one of a newer version.
        """
        document = decode(text, path, "delete it, or prune again")
        schema = document.get("schema_version") if isinstance(document, dict) else None
        if schema is None:
            raise CheckpointError(path, "is not a bisparse sidecar", "delete it, or prune again")
        if schema != SCHEMA_VERSION:
            raise CheckpointError(
                path,
                f"has schema version {schema}, this bisparse reads {SCHEMA_VERSION}",
                "use the bisparse that wrote it, or newer",
            )
        read = validate(document, _Document, path, "prune again")
        try:
            for result in read.layers:
                _check_layer(result)
            if len({result.parameter for result in read.layers}) < len(read.layers):
                raise ValueError("duplicate parameter")
            if read.parameters < 0:
                raise ValueError(f"parameters {read.parameters}")
            check_history(read.history)
            for sample in read.samples:
                _check_sample(sample)
            for pattern in read.patterns.values():
                parse_pattern(pattern)
        except ValueError as error:
            raise CheckpointError(path, f"is not valid ({error})", "prune again") from error
        report = PruneReport(
            read.pattern,
            read.method,
            read.solver,
            tuple(read.layers),
            tuple(read.left_dense),
            read.patterns,
            tuple(read.notes),
            read.parameters,
            tuple(read.history),
        )
        found = tuple(read.evaluation)
        return cls(report, read.remainder, read.source, tuple(read.samples), read.created, read.versions, read.provenance, found)


class _Document(msgspec.Struct):
    """The JSON schema of a sidecar."""

    pattern: str
    method: str
    solver: str
    layers: list[LayerResult]
    left_dense: list[Skipped]
    patterns: dict[str, str]
    notes: list[str]
    remainder: str
    source: str
    samples: list[SampleTile]
    created: str
    versions: dict[str, str]
    provenance: dict[str, Any] = {}
    evaluation: list[dict[str, Any]] = []
    parameters: int = 0
    history: Annotated[list[MaskPoint], msgspec.Meta(max_length=MAX_HISTORY)] = []


def _check_layer(result: LayerResult) -> None:
    """Raise ValueError unless the layout fits the shape, the pattern is valid, and the figures are possible."""
    shape, layout = result.shape, result.layout
    if min(layout.groups, layout.parts) < 1 or any(side < 0 for side in shape) or math.prod(shape) >= MAX_WEIGHTS:
        raise ValueError(f"layer {result.name!r}: shape {shape}, {layout}")
    to_matrices(torch.empty(shape, device="meta"), layout)
    parse_pattern(result.pattern)
    of_the_model = result.parameter == "weight" and not result.name  # of a model that is one layer
    if result.name != layer_name(result.parameter) and not of_the_model:
        raise ValueError(f"layer {result.name!r}: its parameter is {result.parameter!r}")
    for name, value in asdict(result).items():
        most = 1 + ROUNDING if name in FRACTIONS else math.inf if name == "value" else MAX_FIGURE
        if isinstance(value, float | int) and not 0 <= value <= most:
            raise ValueError(f"layer {result.name!r}: {name} {value}")


def _check_sample(sample: SampleTile) -> None:
    sides = {len(row) for row in (*sample.weights, *sample.kept)}
    values = {value for row in sample.kept for value in row}
    if len(sides) > 1 or len(sample.weights) != len(sample.kept) or values - {0, 1} or not sample.can_be_drawn:
        raise ValueError(f"sample of layer {sample.layer!r}")
    if min(sample.matrix, sample.row, sample.column) < 0 or max(*sides, len(sample.kept), 0) > MAX_SAMPLE_SIDE:
        raise ValueError(f"sample of layer {sample.layer!r}")


def read_sidecar(folder: str | Path) -> Sidecar | None:
    """The sidecar of a folder, None where it has none.

    Raises:
        CheckpointError: there is no such folder, or the sidecar is none of ours or damaged.
    """
    path = _place(Path(folder), SIDECAR)
    if not os.path.lexists(path):
        return None
    file = open_input(path)
    try:
        text = file.read(0, file.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"cannot be read ({error})", "check the file and its permissions") from error
    return Sidecar.from_json(text, path)


def _place(folder: Path, name: str) -> Path:
    """The path of a file in a checkpoint, which may be in the local Hugging Face cache."""
    return (folder if os.path.lexists(folder) else find_source(folder)) / name


def read_own_sidecar(path: Path, tensors: Mapping[str, StoredTensor], *, needed: bool = True) -> Sidecar | None:
    """The sidecar of a checkpoint; for a single file, only the entries about this file's tensors.

    For a single file, entries for tensors of other names or shapes are left out; None if no entry is left.

    Args:
        needed: whether a damaged sidecar next to a single file is an error.
    """
    if path.is_dir():
        return read_sidecar(path)
    try:
        sidecar = read_sidecar(path.parent)
    except CheckpointError:
        if needed:
            raise
        return None
    if sidecar is None:
        return None
    own = tuple(one for one in sidecar.report if one.parameter in tensors and tensors[one.parameter].shape == one.shape)
    return replace(sidecar, report=replace(sidecar.report, layers=own)) if own else None


def plain_mark(source: str, notes: Iterable[str]) -> str:
    """The content of the file `PLAIN`: source and notes of a folder that bisparse wrote."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "written_by": "bisparse.checkpoint.to_dense",
        "source": source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "notes": list(notes),
    }
    return json.dumps(content, indent=1) + "\n"


def masks_header(parameters: Mapping[str, tuple[int, ...]]) -> bytes:
    """The header of a masks file for parameters of these shapes, in the order in which their masks are written."""
    tensors = ((name, "U8", (packed_size(shape),), packed_size(shape)) for name, shape in parameters.items())
    shapes = {name: list(shape) for name, shape in parameters.items()}
    return build_header(tensors, {"format": "bisparse-masks", "version": "1", "shapes": json.dumps(shapes)})


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes of a packed mask."""
    return -(-math.prod(shape) // 8)


def load_masks(folder: str | Path) -> dict[str, Bool[Tensor, "..."]]:
    """The masks of a checkpoint that bisparse wrote, by parameter name; `True` = kept.

    Raises:
        CheckpointError: no masks file, a corrupt one, or a mask that breaks the pattern which the sidecar next to it states, or
            keeps nothing where something is said to be kept.
    """
    check_path(folder)
    path = Path(folder) if Path(folder).is_file() else _place(Path(folder), MASKS)
    header, tensors = read_header(open_input(path))
    sidecar = read_sidecar(path.parent)
    results = {} if sidecar is None else {one.parameter: one for one in sidecar.report}
    try:
        text = json.loads(header[8:])["__metadata__"]["shapes"]
        shapes = validate(decode(text, path, "prune again"), MaskShapes, path, "prune again")
        masks = {}
        for name, tensor in tensors.items():
            shape = tuple(shapes[name])
            if tensor.dtype != "U8" or tensor.nbytes != packed_size(shape):
                raise ValueError(f"{name}: {tensor.nbytes} bytes for shape {shape}")
            bits = np.unpackbits(tensor.read().numpy(), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits).view(torch.bool).view(shape)
            result = results.get(name)
            if masks[name].numel() and not masks[name].any() and (result is None or result.density > 0):
                raise ValueError(f"{name}: a mask that keeps nothing")
            if result is not None and result.shape == shape:
                verify(masks[name], result.pattern, layout=result.layout, name=f"{name}: a mask that breaks its pattern").check()
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            path, f"is not a masks file of bisparse ({error!r})", "prune again, or read the zeros of the weights"
        ) from error
    return masks
