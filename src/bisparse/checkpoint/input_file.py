"""Input files: regular files that are refused if they change after they were first opened."""

from __future__ import annotations

import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bisparse.checkpoint.schemas import check_depth, check_text
from bisparse.errors import CheckpointError

__all__ = ["FilePart", "InputFile", "open_input", "read_json"]


@dataclass(frozen=True)
class InputFile:
    """A file that is opened several times and must be the same file with the same content each time.

    A file has changed if its device, inode, size, or time of modification or status change differs. A write that keeps the size
    within the same tick of the file system's clock as the first opening (milliseconds) is not noticed.
    """

    path: Path
    state: tuple[int, ...]
    """The result of `_state` at the first opening."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.state[2]

    @property
    def base(self) -> int:
        """Where it begins in the file at its path."""
        return 0

    def open(self) -> io.BufferedReader:
        """Open the file for reading.

        Raises:
            CheckpointError: the file has changed, was removed, or cannot be read.
        """
        self.check_unchanged()
        handle, state = _open(self.path)
        if state != self.state:
            handle.close()
            raise self._changed()
        return handle

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        """Read `length` bytes from `offset`; errors name `tensor`.

        Raises:
            CheckpointError: the file has changed, cannot be read, or is too short.
        """
        data = bytearray(length)
        with self.open() as file:
            try:
                file.seek(offset)
                count = file.readinto(data)
            except OSError as error:
                raise CheckpointError(
                    self.path, f"cannot be read ({error.strerror or error})", "check the disk", tensor=tensor
                ) from error
        if count < length:
            raise CheckpointError(self.path, "ends before its last byte", "fetch the file again", tensor=tensor)
        return data

    def check_unchanged(self) -> None:
        """Raise if the file has changed since it was first opened. Call it after the last read.

        Raises:
            CheckpointError: the file has changed or was removed.
        """
        try:
            state = _state(os.stat(self.path))
        except OSError as error:
            raise self._changed() from error
        if state != self.state:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            self.path,
            "was changed, replaced or removed while it was read",
            "wait until nothing writes to it, then start again; nothing was written",
        )


@dataclass(frozen=True)
class FilePart(InputFile):
    """A part of a file that holds a file of its own, such as an archive between others."""

    start: int
    length: int

    @property
    def size(self) -> int:
        return self.length

    @property
    def base(self) -> int:
        return self.start

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(_Part(super().open(), self.start, self.length))

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        if not 0 <= offset <= offset + length <= self.length:
            raise CheckpointError(self.path, "is truncated or corrupt", "fetch or save it again", tensor=tensor)
        data = bytearray(length)
        with self.open() as file:
            file.seek(offset)
            file.readinto(data)
        return data


class _Part(io.RawIOBase):
    """Bytes `start` to ``start + length`` of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_input(path: Path) -> InputFile:
    """The file at a path, in its current state. Only regular files are opened, since a pipe could block forever.

    Raises:
        CheckpointError: not a regular file, or one that cannot be read.
    """
    handle, state = _open(path)
    handle.close()
    return InputFile(path, state)


def read_json(path: Path) -> tuple[InputFile, dict[str, Any]]:
    """(the file, the object of a JSON file).

    Raises:
        CheckpointError: it cannot be read, is not JSON, is nested too deeply, or is not an object.
    """
    file = open_input(path)
    try:
        content = json.loads(file.read(0, file.size).decode("utf-8"))
        check_depth(content)
        check_text(content)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(path, "cannot be read as JSON (nested too deeply)", "fetch it again") from error
    except ValueError as error:
        raise CheckpointError(path, f"cannot be read as JSON ({error})", "fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"holds a {type(content).__name__}, not an object", "fetch it again")
    return file, content


def _open(path: Path) -> tuple[io.BufferedReader, tuple[int, ...]]:
    try:
        # Checked before opening, which has effects on some devices, and again afterwards, when it can no longer change.
        if stat.S_ISREG(os.stat(path).st_mode):
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            handle = os.fdopen(os.open(path, flags), "rb")
            status = os.fstat(handle.fileno())
            if stat.S_ISREG(status.st_mode):
                return handle, _state(status)
            handle.close()
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except ValueError as error:  # a null byte, in a name that a file gave
        raise CheckpointError(Path(repr(str(path))), f"is no path ({error})", "fetch the model again") from error
    raise CheckpointError(
        path, "is not a regular file, but a folder, pipe, socket or device", "copy its content to a file and pass that"
    )


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
