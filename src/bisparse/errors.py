"""The error of files: checkpoints, pages, journals."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, pruned or written. The message names the file, the problem and what to do."""

    def __init__(self, path: str | Path, problem: str, remedy: str, *, tensor: str = "") -> None:
        self.path, self.problem, self.remedy, self.tensor = Path(path), problem, remedy, tensor
        where = f"{path}: tensor {tensor}" if tensor else f"{path}"
        super().__init__(f"{where} {problem}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.path, self.problem, self.remedy, self.tensor)


def _rebuild(path: Path, problem: str, remedy: str, tensor: str) -> CheckpointError:
    return CheckpointError(path, problem, remedy, tensor=tensor)
