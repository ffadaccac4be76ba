"""What stands beside the weights: `bisparse.json` (what was done) and `bisparse-masks.safetensors` (the masks, a bit a weight).

The weights themselves are plain and dense, with zeros: nothing needs these two files to load a model.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.checkpoint.stored_tensor import StoredTensor, build_header, read_header
from bisparse.errors import CheckpointError
from bisparse.layers import Skipped
from bisparse.pattern import Structure
from bisparse.results import LayerResult, PruneReport
from bisparse.tiles import Layout, LayoutKind

__all__ = ["MASKS", "SCHEMA_VERSION", "SIDECAR", "SampleTile", "Sidecar", "load_masks", "masks_header", "read_sidecar"]

SIDECAR = "bisparse.json"
MASKS = "bisparse-masks.safetensors"
SCHEMA_VERSION = 1
SAMPLE_SIDE = 16
"""Least side of a sample tile."""


@dataclass(frozen=True)
class SampleTile:
    """A square of real weights and their mask, for pictures: the smallest multiple of M from 16 on, cropped to the layer."""

    layer: str
    matrix: int
    """Which of the layer's GEMM matrices."""
    row: int
    column: int
    """Where its upper left corner stands in that matrix."""
    weights: tuple[tuple[float, ...], ...]
    """The dense weights, to 4 digits."""
    kept: tuple[tuple[int, ...], ...]
    """1 = kept."""

    @classmethod
    def middle(
        cls,
        layer: str,
        weights: Float[Tensor, "R C"],
        mask: Bool[Tensor, "R C"],
        pattern: Structure,
        place: tuple[int, int, int] = (0, 0, 0),
    ) -> SampleTile:
        """The square in the middle of a matrix, or of a part of it that stands at `place` = (matrix, row, column)."""
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
    samples: tuple[SampleTile, ...] = ()
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=_versions)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How a job was called and on what data, as JSON knows values: command line, calibration file, sequences, length, order."""

    def to_json(self) -> str:
        """As text; `from_json` is the inverse."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "convention": "N:M keeps at most N of every M weights along the inputs; -T along the outputs too",
            "source": self.source,
            "created": self.created,
            "versions": dict(self.versions),
            "provenance": dict(self.provenance),
            "remainder": self.remainder,
            **self.report.as_dict(),
            "samples": [asdict(sample) for sample in self.samples],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Sidecar:
        """Read it back.

        Raises:
            CheckpointError: no sidecar of ours, or one of a newer version.
        """
        try:
            document = json.loads(text)
            schema = document["schema_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(path, f"is not a bisparse sidecar ({error!r})", "delete it, or prune again") from error
        if schema != SCHEMA_VERSION:
            raise CheckpointError(
                path,
                f"has schema version {schema}, this bisparse reads {SCHEMA_VERSION}",
                "use the bisparse that wrote it, or newer",
            )
        try:
            report = PruneReport(
                document["pattern"],
                document["method"],
                document["solver"],
                tuple(_layer(entry) for entry in document["layers"]),
                tuple(Skipped(entry["name"], entry["reason"]) for entry in document["left_dense"]),
                dict(document["patterns"]),
                tuple(document["notes"]),
                int(document.get("parameters", 0)),
            )
            return cls(
                report,
                document["remainder"],
                document["source"],
                tuple(_sample(entry) for entry in document["samples"]),
                document["created"],
                document["versions"],
                dict(document.get("provenance", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, f"lacks or garbles a field ({error!r})", "prune again") from error


def _layer(entry: Mapping[str, Any]) -> LayerResult:
    layout = entry["layout"]
    if any(type(layout[key]) is not int or layout[key] < 1 for key in ("groups", "parts")):
        raise ValueError(f"{entry['name']}: layout {layout}")
    return LayerResult(
        **{
            **entry,
            "shape": tuple(entry["shape"]),
            "layout": Layout(LayoutKind(layout["kind"]), layout["groups"], layout["parts"]),
        }
    )


def _sample(entry: Mapping[str, Any]) -> SampleTile:
    tiles = {name: tuple(map(tuple, entry[name])) for name in ("weights", "kept")}
    return SampleTile(**{**entry, **tiles})


def read_sidecar(folder: str | Path) -> Sidecar | None:
    """The sidecar of a folder, None where there is none."""
    path = Path(folder) / SIDECAR
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"cannot be read ({error})", "check the file and its permissions") from error
    return Sidecar.from_json(text, path)


def read_own_sidecar(path: Path, tensors: Mapping[str, StoredTensor], *, needed: bool = True) -> Sidecar | None:
    """What the sidecar says of a checkpoint: of a folder all of it, of a single file what is about this file's tensors.

    A file's neighbours do not count: entries for tensors of other names or shapes are left out, and with none left there is
    no sidecar.

    Args:
        needed: of a single file, whether a damaged sidecar next to it is an error.
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


def masks_header(parameters: Mapping[str, tuple[int, ...]]) -> bytes:
    """Header of a masks file for parameters of these shapes, whose masks are written in this order."""
    tensors = ((name, "U8", (packed_size(shape),), packed_size(shape)) for name, shape in parameters.items())
    shapes = {name: list(shape) for name, shape in parameters.items()}
    return build_header(tensors, {"format": "bisparse-masks", "version": "1", "shapes": json.dumps(shapes)})


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes of a packed mask."""
    return -(-math.prod(shape) // 8)


def load_masks(folder: str | Path) -> dict[str, Bool[Tensor, "..."]]:
    """The masks of a checkpoint that bisparse wrote, by parameter name; `True` = kept.

    Raises:
        CheckpointError: no masks file, or a corrupt one.
    """
    path = Path(folder) / MASKS if Path(folder).is_dir() else Path(folder)
    _, header, tensors = read_header(path)
    try:
        shapes = json.loads(json.loads(header[8:])["__metadata__"]["shapes"])
        masks = {}
        for name, tensor in tensors.items():
            shape = tuple(shapes[name])
            if tensor.dtype != "U8" or tensor.nbytes != packed_size(shape):
                raise ValueError(f"{name}: {tensor.nbytes} bytes for shape {shape}")
            bits = np.unpackbits(tensor.read().numpy(), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits).view(torch.bool).view(shape)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            path, f"is no masks file of bisparse ({error!r})", "prune again, or read the zeros of the weights"
        ) from error
    return masks
