"""Permissions of what is written: never wider than those of what it was made from."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["copy_permissions"]


def copy_permissions(written: Path, sources: Iterable[Path]) -> None:
    """Give a file or folder the permissions that all of its sources have, for user, group and others.

    A folder keeps no permission that the process's umask took from it, and its owner may always write it. Where the group is
    another one than a source's, it may do no more than others may with that source.
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
