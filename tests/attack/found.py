"""What a case found, and how an outcome is judged: right, an error of the domain, or a finding."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CATEGORIES", "Found", "attempt", "bits", "is_domain_error", "run_command", "tree"]

CATEGORIES = ("wrong", "half-changed", "crash", "hang", "foreign")
"""Wrong results, half-changed models, deaths by signal, timeouts, and exceptions that are none of ours."""
EXIT_CODES = {0, 1, 2, 130, 143}


@dataclass
class Found:
    """The calls that a case made, and its findings as (category, text)."""

    calls: int = 0
    findings: list[tuple[str, str]] = field(default_factory=list)

    def add(self, category: str, text: str) -> None:
        assert category in CATEGORIES
        self.findings.append((category, text))


def is_domain_error(error: BaseException, *, types_too: bool = False) -> bool:
    """Whether an error is one that callers are promised: a ValueError, a type of bisparse's own, or a missing extra or file.

    `types_too`: an argument was of a wrong Python type, which may be Python's own TypeError or AttributeError.
    """
    if types_too and isinstance(error, TypeError | AttributeError):
        return True
    if isinstance(error, UnicodeError):
        return False
    if isinstance(error, ImportError):
        return "pip install" in str(error)
    return isinstance(error, ValueError | FileNotFoundError) or type(error).__module__.split(".")[0] == "bisparse"


def where(error: BaseException) -> str:
    """The error in one line, with the innermost place in bisparse."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "/bisparse/" in one.filename]
    place = f" at {'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}{place}"


def attempt(found: Found, what: str, call: Callable[[], Any], *, types_too: bool = False) -> tuple[bool, Any]:
    """Make a call: (True, result), or (False, error) with a finding if the error is none of ours."""
    found.calls += 1
    try:
        return True, call()
    except Exception as error:  # noqa: BLE001
        if not is_domain_error(error, types_too=types_too):
            found.add("foreign", f"{what}: {where(error)}")
        return False, error


def run_command(found: Found, arguments: list[str]) -> int:
    """Run the command line in this process; its exit code, with a finding if it ended in anything but a message."""
    from typer.testing import CliRunner

    from bisparse.cli import app

    found.calls += 1
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        found.add("foreign", f"bisparse {arguments}: {where(result.exception)}")
    elif result.exit_code not in EXIT_CODES:
        found.add("foreign", f"bisparse {arguments}: exit code {result.exit_code}")
    elif "\x1b]" in result.output or "\x1b[2J" in result.output:
        found.add("wrong", f"bisparse {arguments}: an escape sequence of a file was printed")
    return result.exit_code


def tree(folder: Path) -> dict[str, bytes]:
    """Every regular file at or below a path, with its bytes."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()}


def bits(tensor: Any) -> tuple[Any, ...]:
    """A tensor's dtype, shape and bytes."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
