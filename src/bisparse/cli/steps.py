"""The steps of `bisparse prune`: prune, measure, quantise, export. A resumed job skips those whose outputs are complete.

Each output contains the name of the step that made it, a digest of everything that the step depends on. An output only appears
once it is complete, so one that names the step needs no other record; an output of another job is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bisparse.cli.before_after import Measurement
from bisparse.cli.calibrated import group_of_ranks, on_first_rank
from bisparse.cli.calibration_options import TextFiles
from bisparse.cli.console import is_function, note_complete, to_stdout
from bisparse.cli.deploy import export_folder, places, quantize_folder, show_export, show_quantization

__all__ = ["Steps"]


@dataclass(frozen=True)
class Steps:
    """What `bisparse prune` does to its target, and what it is called with."""

    source: Path
    target: Path
    texts: TextFiles
    quantize: str | None
    export: str | None
    measurement: Measurement | None
    overwrite: bool
    resume: Path | None
    job: Mapping[str, Any]
    """Everything that the pruned weights depend on apart from files, as JSON values or values with a stable `repr`."""

    @property
    def several(self) -> bool:
        """Whether anything follows the pruning."""
        return self.quantize is not None or self.export is not None or self.measurement is not None

    def pruning_name(self) -> str:
        """The name of the pruning step."""
        from bisparse.cli.model_source import place_of

        read = [place_of(str(self.source)), *(self.texts.paths or ())]
        texts = (self.texts.field, self.texts.sequences, self.texts.length)
        return _digest({"files": [_files(one) for one in read if one is not None], "texts": texts, "job": self.job})

    def run(self, prune: Callable[[str], None]) -> None:
        """Run the steps that are not complete.

        Args:
            prune: prunes and writes the target, which is to contain this name of the step.
        """
        with group_of_ranks():
            self._run(prune)

    def _run(self, prune: Callable[[str], None]) -> None:
        name = self.pruning_name()
        complete = self.resume is not None and on_first_rank(lambda: self._check(name))
        first = os.environ.get("RANK", "0") == "0"
        before = None
        if complete:
            to_stdout().print(f"{self.target} is complete: continuing after the pruning.", markup=False, soft_wrap=True)
        else:
            if self.measurement is not None and first:
                before = self.measurement.of(self.source)
            prune(name)
        if not self.several:
            return
        if first:
            note_complete(self.target)
        on_first_rank(lambda: self._then(name, before))

    def _check(self, name: str) -> bool:
        """Whether the target is complete; refuses one of another job, before anything is computed."""

        if is_function(self.source):
            return False  # what a function returns is not known without calling it
        made = _name_in_folder(self.target)
        complete = made == name
        if made is not None and not complete and not self.overwrite:
            from bisparse.errors import CheckpointError

            raise CheckpointError(
                self.target,
                "exists already, and --resume finds that another job wrote it: the model, a text or an option has changed",
                "repeat the command as it was, choose another name, or pass --overwrite",
            )
        return complete

    def _then(self, name: str, before: Mapping[str, Any] | None) -> None:
        """Measure, quantise and export the pruned target."""
        measurement = self.measurement
        if measurement is not None:
            measurement.record(self.target, "before", self.source, before)
            measurement.record(self.target, "after", self.target)
        folder, file = places(self.target, self.quantize, self.export)
        calibration = None if self.texts.paths is None else list(self.texts.paths)
        options: dict[str, Any] = {
            "method": "gptq" if calibration is not None else "rtn",
            "calibration": calibration,
            "sequences": self.texts.sequences,
            "overwrite": self.overwrite,
        }
        data = [_files(one) for one in calibration or ()], self.texts.sequences, self.texts.length
        if folder is not None and self.quantize is not None:
            step = _digest({"after": name, "quantize": self.quantize, "data": data})
            if not self._is_complete(folder, _name_in_folder(folder), step):
                report = quantize_folder(str(self.target), folder, self.quantize, length=self.texts.length, step=step, **options)
                show_quantization(report, folder)
            note_complete(folder)
            if measurement is not None:
                measurement.record(folder, "before", self.target, measurement.recorded(self.target, "before"))
                measurement.record(folder, "after", folder)
        if file is not None:
            scheme = self.quantize if self.quantize == "int8" else None
            step = _digest({"after": name, "export": self.export, "quantize": scheme, "data": data if scheme else None})
            if not self._is_complete(file, _name_in_onnx(file), step):
                made = export_folder(
                    str(self.target), file, quantize=scheme, calibration_length=self.texts.length, step=step, **options
                )
                show_export(made)
            note_complete(file)
        if measurement is not None:
            measurement.show(self.target, folder)

    def _is_complete(self, place: Path, found: str | None, step: str) -> bool:
        complete = self.resume is not None and found == step
        if complete:
            to_stdout().print(f"{place} is complete.", markup=False, soft_wrap=True)
        return complete


def _digest(described: Mapping[str, Any]) -> str:
    from bisparse import __version__

    text = json.dumps({"bisparse": __version__, **described}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _files(place: Path) -> list[tuple[str, int, int]]:
    """The files of a folder, or a file: name, size and time of the last change."""
    found = sorted(one for one in place.rglob("*") if one.is_file()) if place.is_dir() else [place]
    stats = [(one, one.stat()) for one in found]
    return [(one.relative_to(place).as_posix() or one.name, stat.st_size, stat.st_mtime_ns) for one, stat in stats]


def _name_in_folder(folder: Path) -> str | None:
    """The name of the step that wrote a folder; "" if it has none, None if there is no folder."""
    from bisparse.checkpoint.sidecar import SIDECAR
    from bisparse.export import QUANTIZATION

    if not os.path.lexists(folder):
        return None
    # A quantised folder has both: the sidecar is that of the pruning.
    for name in (QUANTIZATION, SIDECAR):
        if (folder / name).is_file():
            return _step_of(folder / name)
    return ""


def _step_of(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    said = content.get("provenance") if isinstance(content, dict) else None
    return str(said.get("step", "")) if isinstance(said, dict) else ""


def _name_in_onnx(file: Path) -> str | None:
    """The name of the step that wrote an ONNX file; "" if it has none, None if there is no file."""
    from bisparse.export import onnx_metadata

    if not os.path.lexists(file):
        return None
    return onnx_metadata(file).get("bisparse.step", "")
