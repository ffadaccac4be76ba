"""A lock on a folder, which the system drops when the process that holds it dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["lock_folder"]


def lock_folder(folder: Path) -> int | None:
    """The handle that holds a folder for this process until it is closed; None where the file system has no such locks.

    Raises:
        BlockingIOError: another process, or another part of this one, holds it.
        FileNotFoundError: the folder has vanished.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle
