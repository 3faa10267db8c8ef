"""The highest serial of each bundle that a device has run, in a file of the device.

A signature stays valid for ever, so an old bundle with a known fault would be accepted again
without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.bundle.signature import check_serial
from equipoise.errors import IntegrityError

_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SeenSerials:
    """The content of the file.

    Attributes:
        highest: Name of a bundle -> the highest serial that was run.
    """

    highest: dict[str, int] = field(default_factory=dict)


def read_serials(path: Path) -> SeenSerials:
    """What the device has seen; nothing where there is no file.

    Raises:
        IntegrityError: The file is no such record: what it held is lost, so nothing is accepted.
    """
    if not path.exists() and not path.is_symlink():
        return SeenSerials()
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise IntegrityError(f"{path} is no record of serials: it is larger than {_MOST_BYTES:,}")
    text = fs.read_text(path, error=IntegrityError)
    return record.loads(SeenSerials, text, where=str(path), error=IntegrityError)


def check_seen(path: Path, *, name: str, serial: int) -> None:
    """Refuse a bundle that is older than one of its name that was run here.

    Raises:
        SignatureError: It is.
        IntegrityError: The file cannot be read.
    """
    check_serial(serial, seen=read_serials(path).highest.get(name, 0))


def keep_seen(path: Path, *, name: str, serial: int) -> None:
    """Check again, and keep the serial where it is the highest; one process at a time.

    Raises:
        As :func:`check_seen`, and OutputError where the file cannot be written.
    """
    fs.make_directory(path.parent)
    with fs.locked(path.parent):
        seen = read_serials(path)
        check_serial(serial, seen=seen.highest.get(name, 0))
        if seen.highest.get(name) != serial:
            fs.write_json(path, SeenSerials(highest={**seen.highest, name: serial}))
