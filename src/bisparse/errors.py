"""Errors that several packages raise: of files, and of an extra that is not installed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CheckpointError", "install_extra"]


def install_extra(extra: str) -> str:
    """The command that installs one of the extras in pyproject.toml, for error messages. bisparse is installed from a clone."""
    return f"install it with: pip install '.[{extra}]' in your clone of bisparse"


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
