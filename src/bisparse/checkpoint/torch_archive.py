"""Reads the zip archives of `torch.save`, with records located by the zip directory, even if a tool has rewritten the archive.

torch computes the offset of a record from the sizes of those before it, which is wrong for rewritten archives, and does not check
sizes and checksums. Here a record is located by its own header, or refused.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass, field

from bisparse.checkpoint.input_file import InputFile
from bisparse.errors import CheckpointError

__all__ = ["Archive", "StorageRecord", "is_archive", "open_archive"]

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""Signature, version, flags, method, time, date, CRC, two sizes, lengths of name and extra field."""
ENCRYPTED = 0x1
UTF8_NAME = 0x800
SAVE_AGAIN = "save `model.state_dict()` with torch.save, or use safetensors"
PIECE = 1 << 22
"""Bytes that are read at a time to compute a checksum."""


@dataclass
class StorageRecord:
    """The bytes of one storage, which are checked against the record's checksum before any are returned."""

    file: InputFile
    name: str
    offset: int
    size: int
    crc: int | None
    """The checksum; None if the archive was written without checksums."""
    _checked: bool = field(default=False, init=False)

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        """Read `length` bytes of the record from `offset`; errors name `tensor`.

        Raises:
            CheckpointError: the record breaks its checksum, or the file has changed.
        """
        if self.crc is not None and not self._checked:
            found = 0
            for start in range(0, self.size, PIECE):
                found = zlib.crc32(self.file.read(self.offset + start, min(PIECE, self.size - start), tensor), found)
            if found != self.crc:
                raise CheckpointError(
                    self.file.path, f"is corrupt: {self.name} breaks its checksum", "fetch or save it again", tensor=tensor
                )
        self._checked = True
        return self.file.read(self.offset + offset, length, tensor)


@dataclass(frozen=True)
class Archive:
    """The directory of an archive; records are checked when they are used."""

    file: InputFile
    root: str
    """The folder inside the archive that holds everything."""
    entries: dict[str, zipfile.ZipInfo]
    """Entries by name, without the root folder."""
    directory: int
    """Offset at which the zip directory begins; all records end before it."""
    has_checksums: bool

    def record(self, name: str, tensor: str = "") -> StorageRecord:
        """Locate a record by its own header.

        Raises:
            CheckpointError: the record is missing, compressed, encrypted, or not where the directory says.
        """

        def refuse(problem: str, remedy: str) -> CheckpointError:
            return CheckpointError(self.file.path, problem, remedy, tensor=tensor)

        again = "load it with torch.load(path, weights_only=True) and write it again with torch.save"
        entry = self.entries.get(name)
        if entry is None:
            raise refuse(f"is corrupt: it lacks the record {name}", "fetch or save it again")
        if entry.flag_bits & ENCRYPTED:
            raise refuse(f"has an encrypted record, {name}", again)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise refuse(f"has a compressed record, {name}", again)
        header = LOCAL_HEADER.unpack(self.file.read(entry.header_offset, LOCAL_HEADER.size, tensor))
        signature, _, flags, method, *_, name_length, extra_length = header
        name_start = entry.header_offset + LOCAL_HEADER.size
        start = name_start + name_length + extra_length
        if (
            signature != b"PK\x03\x04"
            or flags & ENCRYPTED
            or method != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
            or start + entry.file_size > self.directory
            or self._decoded(self.file.read(name_start, name_length, tensor), flags) != entry.orig_filename
        ):
            raise refuse(f"is corrupt: {name} is not where the zip directory says", "fetch or save it again")
        return StorageRecord(self.file, name, start, entry.file_size, entry.CRC if self.has_checksums else None)

    @staticmethod
    def _decoded(name: bytearray, flags: int) -> str:
        return name.decode("utf-8" if flags & UTF8_NAME else "cp437", "replace")

    def content(self, name: str) -> bytes:
        """All bytes of a record."""
        record = self.record(name)
        return bytes(record.read(0, record.size))


def is_archive(file: InputFile) -> bool:
    """Whether torch treats a file as a zip archive, by its first bytes."""
    return file.size >= 4 and file.read(0, 4) == b"PK\x03\x04"


def open_archive(file: InputFile) -> Archive:
    """Read an archive's zip directory.

    Raises:
        CheckpointError: no zip directory, names that occur twice, not written by `torch.save` or `torch.jit.save`, or written on
            a big-endian machine.
    """
    path = file.path
    with file.open() as handle:
        try:
            with zipfile.ZipFile(handle) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error, OverflowError, ValueError) as error:
            raise CheckpointError(path, f"is truncated or corrupt ({error})", "fetch or save it again") from error
    if not infos or "/" not in infos[0].filename or min(info.header_offset for info in infos) != 0:
        raise CheckpointError(path, "is a zip archive that torch.save did not write", SAVE_AGAIN)
    root = infos[0].filename.partition("/")[0] + "/"
    # torch looks up records case-insensitively.
    names = [info.filename.casefold() for info in infos]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(path, f"is corrupt: it has two records named {twice!r}", "fetch or save it again")
    entries = {
        info.filename.removeprefix(root): info
        for info in infos
        if info.filename.startswith(root) and not info.filename.endswith("/")
    }
    if "data.pkl" not in entries:
        raise CheckpointError(path, "is a zip archive that torch.save did not write (it lacks data.pkl)", SAVE_AGAIN)
    opened = Archive(file, root, entries, directory, any(info.CRC for info in infos))
    if "byteorder" in entries and (order := opened.content("byteorder")) != b"little":
        raise CheckpointError(
            path,
            f"has byte order {order[:16].decode('ascii', 'replace')!r}; only 'little' is read",
            "load it with torch.load(path, weights_only=True) and write it again with torch.save on a little-endian machine",
        )
    return opened
