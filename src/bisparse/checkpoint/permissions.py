"""Restricts the permissions of written files to those of their sources."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["copy_permissions"]


def copy_permissions(written: Path, sources: Iterable[Path]) -> None:
    """Set the permissions of a file or folder to those that all of its sources have, for user, group and others.

    A folder does not get permissions that the umask excludes, and stays writable by its owner. If its group differs from a
    source's, the group gets no more permissions than others have on that source.
    """
    if sys.platform == "win32":
        return
    own = written.stat()
    mode = 0o777
    for source in sources:
        found = source.stat()
        allowed = stat.S_IMODE(found.st_mode) & 0o777
        if found.st_gid != own.st_gid:
            allowed &= 0o707 | (allowed & 0o007) << 3
        mode &= allowed
    if stat.S_ISDIR(own.st_mode):
        mode = mode & own.st_mode | 0o700
    written.chmod(stat.S_IMODE(mode))
