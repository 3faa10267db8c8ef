"""A bundle in one file: a ZIP archive whose entries are stored, read in place.

ZIP lets one archive mean different things to different readers: a central directory beside local
headers, gaps, comments, extra fields, bytes before and after. Here every byte of the archive has
one meaning: local headers and contents follow each other from byte 0, the central directory repeats
them, and the end record is the last 22 bytes. Layout of the records: PKWARE APPNOTE 6.3, sections
4.3.7, 4.3.12 and 4.3.16.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from equipoise import fs
from equipoise.bundle.files import BundleFiles, pread_chunks, pread_exactly
from equipoise.bundle.manifest import MANIFEST_FILE
from equipoise.bundle.names import MOST_FILES, check_names
from equipoise.errors import IntegrityError, UsageError

SUFFIX: Final = ".zip"
FIRST: Final = MANIFEST_FILE
"""What a reader needs first lies first."""
MOST_BYTES: Final = 0xFFFF_FFFE
"""Sizes and offsets have 32 bits; larger ones need extra fields, which are refused."""

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCAL_MAGIC: Final = b"PK\x03\x04"
_CENTRAL_MAGIC: Final = b"PK\x01\x02"
_END_MAGIC: Final = b"PK\x05\x06"
_VERSION: Final = 20
_MADE_BY: Final = (3 << 8) | _VERSION
"""On a system with the modes of Unix."""
_UTF8: Final = 1 << 11
_STORED: Final = 0
_TIME: Final = 0
_DATE: Final = (1 << 5) | 1
"""1 January 1980, the first day that the format knows."""
_MODE: Final = (stat.S_IFREG | 0o644) << 16
_MOST_NAME_BYTES: Final = 512
_MOST_CENTRAL_BYTES: Final = MOST_FILES * (_CENTRAL.size + _MOST_NAME_BYTES)
_HINT: Final = "Copy the bundle again, or make it anew with `equipoise pack --zip`; do not run it."


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file in an archive.

    Attributes:
        name: Its name.
        crc: CRC-32 of its bytes.
        size: Its bytes.
        offset: Where its local header begins.
    """

    name: str
    crc: int
    size: int
    offset: int

    @property
    def local(self) -> bytes:
        """The local header, the only one that says this."""
        name, flags = self._named()
        fields = (_VERSION, flags, _STORED, _TIME, _DATE, self.crc, self.size, self.size)
        return _LOCAL.pack(_LOCAL_MAGIC, *fields, len(name), 0) + name

    @property
    def central(self) -> bytes:
        """The record of the central directory, the only one that says this."""
        name, flags = self._named()
        fields = (_VERSION, flags, _STORED, _TIME, _DATE, self.crc, self.size, self.size)
        rest = (len(name), 0, 0, 0, 0, _MODE, self.offset)
        return _CENTRAL.pack(_CENTRAL_MAGIC, _MADE_BY, *fields, *rest) + name

    @property
    def start(self) -> int:
        """Where its bytes begin."""
        return self.offset + _LOCAL.size + len(self.name.encode())

    @property
    def end(self) -> int:
        """Where the next local header begins."""
        return self.start + self.size

    def _named(self) -> tuple[bytes, int]:
        return self.name.encode(), 0 if self.name.isascii() else _UTF8


def end_record(entries: tuple[Entry, ...]) -> bytes:
    """The last bytes of an archive of ``entries``."""
    size = sum(len(entry.central) for entry in entries)
    start = entries[-1].end if entries else 0
    return _END.pack(_END_MAGIC, 0, 0, len(entries), len(entries), size, start, 0)


def write_archive(
    file: BinaryIO, contents: Iterable[tuple[str, int, int, Iterator[bytes]]]
) -> None:
    """Write an archive. The same contents give the same bytes.

    Args:
        file: Where.
        contents: Name, size, CRC-32 and bytes of each file, in order.
    """
    entries: list[Entry] = []
    for name, size, crc, chunks in contents:
        entry = Entry(name=name, size=size, crc=crc, offset=entries[-1].end if entries else 0)
        file.write(entry.local)
        for chunk in chunks:
            file.write(chunk)
        entries.append(entry)
    for entry in entries:
        file.write(entry.central)
    file.write(end_record(tuple(entries)))


class ArchiveFiles(BundleFiles):
    """The files in an archive, which is held open and never unpacked.

    Args:
        archive: The file.

    Raises:
        IntegrityError: It is no such archive: says which byte or entry is otherwise than allowed.
    """

    def __init__(self, archive: Path) -> None:
        self.where = str(archive)
        self._file = -1
        try:
            self._file = fs.open_to_read(archive, follow=True)
            self._stat = os.fstat(self._file)
            self._entries = {entry.name: entry for entry in self._checked()}
        except OSError as error:
            self.close()
            raise IntegrityError(f"cannot read the bundle {archive}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file."""
        return {name: entry.size for name, entry in self._entries.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece."""
        entry, crc, left = self._entry(name), 0, self._entry(name).size
        for chunk in pread_chunks(self._file, start=entry.start, size=entry.size):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            yield chunk
        self._check_content(entry, crc=crc, missing=left)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        entry = self._entry(name)
        data = pread_exactly(self._file, start=entry.start, size=entry.size)
        self._check_content(entry, crc=zlib.crc32(data), missing=entry.size - len(data))
        return data

    def still(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing: a part of an archive has no path of its own."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Let go of the archive."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _entry(self, name: str) -> Entry:
        if self._file < 0:
            raise UsageError(f"the bundle {self.where} is closed", hint="Open it again.")
        if name not in self._entries:
            raise IntegrityError(f"{self.where}: {name} is missing", hint=_HINT)
        return self._entries[name]

    def _check_content(self, entry: Entry, *, crc: int, missing: int) -> None:
        if missing or os.fstat(self._file).st_size != self._stat.st_size:
            raise self._refused(f"it changed while {entry.name} was read")
        if crc != entry.crc:
            raise self._refused(f"{entry.name} is not what its CRC-32 says")

    def _refused(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self.where} is no bundle archive: {why}", hint=_HINT)

    def _checked(self) -> tuple[Entry, ...]:
        """The entries, once every byte that is not content is seen to be what it must be."""
        if not stat.S_ISREG(self._stat.st_mode):
            raise self._refused("it is no plain file")
        count, central, start = self._end()
        entries = tuple(self._parsed(central, count=count))
        names = [entry.name for entry in entries]
        check_names(names, where=self.where)
        if names[:1] != [FIRST] or names[1:] != sorted(set(names[1:])):
            raise self._refused(f"its entries are not {FIRST} and then the others by name")
        self._check_layout(entries, central=central, start=start)
        return entries

    def _end(self) -> tuple[int, bytes, int]:
        """Number of entries, the central directory, and where it begins."""
        size = self._stat.st_size
        if size < _END.size or size > MOST_BYTES:
            raise self._refused(f"it has {size:,} bytes; {_END.size} to {MOST_BYTES:,} are allowed")
        record = pread_exactly(self._file, start=size - _END.size, size=_END.size)
        if len(record) != _END.size or not record.startswith(_END_MAGIC):
            raise self._refused(f"its last {_END.size} bytes are no end record without a comment")
        *_, count, length, start, _comment = _END.unpack(record)
        if count > MOST_FILES or length > _MOST_CENTRAL_BYTES:
            raise self._refused(f"it has {count} entries; at most {MOST_FILES} are allowed")
        if start + length + _END.size != size:
            raise self._refused("its central directory does not end where the end record begins")
        return count, pread_exactly(self._file, start=start, size=length), start

    def _parsed(self, central: bytes, *, count: int) -> Iterator[Entry]:
        at = 0
        for number in range(count):
            entry = self._entry_at(central, at, number=number)
            at += len(entry.central)
            yield entry
        if at != len(central):
            raise self._refused(f"its central directory has {len(central) - at} bytes too many")

    def _entry_at(self, central: bytes, at: int, *, number: int) -> Entry:
        """The entry in ``central`` from byte ``at``, if it is written as we would write it."""
        if at + _CENTRAL.size > len(central):
            raise self._refused(f"its central directory ends within entry {number}")
        fields = _CENTRAL.unpack_from(central, at)
        crc, size, length, offset = fields[7], fields[8], fields[10], fields[-1]
        raw = central[at + _CENTRAL.size : at + _CENTRAL.size + min(length, _MOST_NAME_BYTES)]
        try:
            entry = Entry(name=raw.decode("utf-8"), crc=crc, size=size, offset=offset)
        except UnicodeDecodeError as error:
            raise self._refused(f"the name of entry {number} is not UTF-8") from error
        written = entry.central
        found = central[at : at + len(written)]
        if found != written:
            raise self._refused(
                f"entry {number}, {entry.name!r:.80}: {_difference(found, written)}"
            )
        return entry

    def _check_layout(self, entries: tuple[Entry, ...], *, central: bytes, start: int) -> None:
        """Local headers and contents fill the archive up to the central directory."""
        at = 0
        for entry in entries:
            if entry.offset != at:
                raise self._refused(f"{entry.name!r} begins at {entry.offset:,}, not at {at:,}")
            local = pread_exactly(self._file, start=at, size=len(entry.local))
            if local != entry.local:
                why = "its local header and the central directory differ"
                raise self._refused(f"{entry.name!r}: {why}")
            at = entry.end
        if at != start:
            raise self._refused(f"{start - at:,} bytes before its central directory are no entry")
        end = pread_exactly(self._file, start=start + len(central), size=_END.size)
        if end != end_record(entries):
            raise self._refused("its end record says other numbers than its entries")


_CENTRAL_FIELDS: Final = (
    ("its record begins with other letters", 0, 4),
    ("it was made by another version, or with the modes of another system", 4, 6),
    ("it needs another version of ZIP", 6, 8),
    ("it is encrypted, has a data descriptor, or other flags", 8, 10),
    ("it is compressed", 10, 12),
    ("its date is not the fixed one", 12, 16),
    ("its stored and its compressed size differ", 16, 28),
    ("its name is too long", 28, 30),
    ("it has extra fields", 30, 32),
    ("it has a comment", 32, 34),
    ("it lies on another disk", 34, 36),
    ("it is marked as text, or has other attributes", 36, 38),
    ("it is a link, a directory, or has other modes", 38, 42),
)
"""What it means where the bytes of a central record are not those that we would write."""


def _difference(found: bytes, written: bytes) -> str:
    """What is otherwise, in words."""
    for words, begin, end in _CENTRAL_FIELDS:
        if found[begin:end] != written[begin:end]:
            return words
    return "its name is cut off or not as it would be written"
