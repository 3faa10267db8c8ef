"""M8: archives that mean two things, and archives with what no bundle has; all are refused."""

from __future__ import annotations

import io
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.bundle.making import FILE, make_bundle
from tests.malformed.counting import Campaign, Case, Outcome
from tests.malformed.worker import Guard

import equipoise
from equipoise.bundle.archive import Entry, end_record
from equipoise.bundle.manifest import MANIFEST_FILE
from equipoise.bundle.reading import open_bundle
from equipoise.errors import EquipoiseError, IntegrityError

LOCAL, CENTRAL, END = 30, 46, 22
Change = Callable[["Parts"], bytes]


class Watch(Guard):
    """Names without a path are opened below a directory that is held open."""

    def _opened(self, path: object, flags: int) -> None:
        if not isinstance(path, str) or "/" in path or path in {".", ".."}:
            super()._opened(path, flags)


class Parts:
    """A good archive, taken apart: entries with their contents, in order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            self.contents = {info.filename: archive.read(info) for info in infos}
            self.offsets = [info.header_offset for info in infos]
        self.names = list(self.contents)
        self.central = struct.unpack("<L", data[-6:-2])[0]

    def entries(self, contents: dict[str, bytes]) -> list[Entry]:
        """Entries for contents as the writer would place them."""
        found: list[Entry] = []
        for name, content in contents.items():
            offset = found[-1].end if found else 0
            crc = zipfile.crc32(content)  # type: ignore[attr-defined]
            found.append(Entry(name=name, crc=crc, size=len(content), offset=offset))
        return found

    def joined(
        self,
        contents: dict[str, bytes] | None = None,
        *,
        local: Callable[[int, bytes], bytes] = lambda _i, b: b,
        central: Callable[[int, bytes], bytes] = lambda _i, b: b,
        end: Callable[[bytes], bytes] = lambda b: b,
        order: list[int] | None = None,
    ) -> bytes:
        """The archive again, with records changed on the way."""
        held = self.contents if contents is None else contents
        entries = self.entries(held)
        body = b"".join(local(i, e.local) + held[e.name] for i, e in enumerate(entries))
        listed = [central(i, entries[i].central) for i in (order or range(len(entries)))]
        return body + b"".join(listed) + end(end_record(tuple(entries)))

    def put(self, at: int, fmt: str, value: int) -> bytes:
        """The archive with a number replaced."""
        data = bytearray(self.data)
        struct.pack_into(fmt, data, at, value)
        return bytes(data)

    def central_at(self, index: int) -> int:
        """Where the central record of an entry begins."""
        names = self.names[:index]
        return self.central + sum(CENTRAL + len(name.encode()) for name in names)

    def fields(self, offset: int, fmt: str, value: int, *, both: int | None = None) -> bytes:
        """Change a field of the last entry's central record, and of its local header."""
        index = len(self.names) - 1
        data = bytearray(self.put(self.central_at(index) + offset, fmt, value))
        if both is not None:
            struct.pack_into(fmt, data, self.offsets[index] + both, value)
        return bytes(data)

    def with_files(self, **more: bytes) -> bytes:
        """With files that the manifest does not list."""
        held = {**self.contents, **more}
        return self.joined(
            {n: held[n] for n in (MANIFEST_FILE, *sorted(set(held) - {MANIFEST_FILE}))}
        )

    def renamed(self, old: str, new: str) -> bytes:
        """One file under another name."""
        named = {new if n == old else n: c for n, c in self.contents.items()}
        return self.joined(
            {n: named[n] for n in (MANIFEST_FILE, *sorted(set(named) - {MANIFEST_FILE}))}
        )

    def replaced(self, name: str, content: bytes) -> bytes:
        """One file with another content."""
        return self.joined({**self.contents, name: content})


def _stdlib(parts: Parts, **fields: object) -> bytes:
    """Written by the standard library, as any tool would."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **fields) as archive:  # type: ignore[arg-type]
        for name, content in parts.contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _doubled(parts: Parts, *, first: bytes) -> bytes:
    """Two entries of one name; readers disagree on which of them counts."""
    entries = parts.entries(parts.contents)
    engine = next(e for e in entries if e.name == FILE)
    extra = Entry(
        name=FILE,
        crc=zipfile.crc32(first),  # type: ignore[attr-defined]
        size=len(first),
        offset=entries[-1].end,
    )
    body = b"".join(e.local + parts.contents[e.name] for e in entries)
    listed = [*entries, extra]
    assert engine.name == extra.name
    return (
        body + extra.local + first + b"".join(e.central for e in listed) + end_record(tuple(listed))
    )


def _overlapping(parts: Parts) -> bytes:
    """The content of one entry lies within another: a bomb of ever the same bytes."""
    return parts.put(parts.central_at(2) + 42, "<L", parts.offsets[1])


def _hidden(parts: Parts) -> bytes:
    """A whole entry between two others that no central record names."""
    contents = {**parts.contents}
    ghost = Entry(name="ghost", crc=0, size=0, offset=0).local
    entries = parts.entries(contents)
    body = b"".join(
        (ghost if i == 1 else b"") + e.local + contents[e.name] for i, e in enumerate(entries)
    )
    moved = [
        Entry(name=e.name, crc=e.crc, size=e.size, offset=e.offset + (len(ghost) if i else 0))
        for i, e in enumerate(entries)
    ]
    return body + b"".join(e.central for e in moved) + end_record(tuple(moved))


def _gap(parts: Parts) -> bytes:
    """Bytes before the central directory that belong to nothing."""
    data = parts.data[: parts.central] + b"gap!" + parts.data[parts.central :]
    return data[:-6] + struct.pack("<L", parts.central + 4) + data[-2:]


def _prefixed(parts: Parts, *, shift: bool) -> bytes:
    """A program before the archive, as self-extracting ones have it."""
    prefix = b"#!/bin/sh\nexit 0\n"
    if not shift:
        return prefix + parts.data
    return prefix + parts.joined(
        central=lambda i, b: b[:42] + struct.pack("<L", parts.offsets[i] + len(prefix)) + b[46:],
        end=lambda b: b[:16] + struct.pack("<L", parts.central + len(prefix)) + b[20:],
    )


def _extra(parts: Parts, *, local: bool, field: bytes) -> bytes:
    """An extra field, in the local header or the central record of the first entry."""
    at = 28 if local else 30

    def with_field(index: int, record: bytes) -> bytes:
        if index:
            return record
        return record[:at] + struct.pack("<H", len(field)) + record[at + 2 :] + field

    if not local:
        data = parts.joined(central=with_field)
        size = struct.unpack("<L", data[-10:-6])[0] + len(field)
        return data[:-10] + struct.pack("<L", size) + data[-6:]
    return parts.joined(local=with_field)


ZIP64 = struct.pack("<HHQQ", 1, 16, 5, 5)
UNICODE_PATH = struct.pack("<HHBL", 0x7075, 9, 1, 0) + b"evil"

CASES: dict[str, Change] = {
    "empty": lambda _p: b"",
    "one byte": lambda p: p.data[:1],
    "an end record alone": lambda p: p.data[-END:],
    "no entries": lambda _p: end_record(()),
    "cut in the end record": lambda p: p.data[:-1],
    "cut in the central directory": lambda p: p.data[: p.central + 60],
    "cut in a content": lambda p: p.data[: p.offsets[1] + 100],
    "without its first byte": lambda p: p.data[1:],
    "a byte after the end": lambda p: p.data + b"\x00",
    "another archive after the end": lambda p: p.data + p.data,
    "a program before it": lambda p: _prefixed(p, shift=False),
    "a program before it, offsets moved": lambda p: _prefixed(p, shift=True),
    "a gap before the central directory": _gap,
    "an entry that nothing names": _hidden,
    "a comment of the archive": lambda p: p.data[:-2] + struct.pack("<H", 4) + b"note",
    "a comment length without comment": lambda p: p.data[:-2] + struct.pack("<H", 4),
    "a comment of an entry": lambda p: p.fields(32, "<H", 4),
    "an extra field in a local header": lambda p: _extra(p, local=True, field=UNICODE_PATH),
    "an extra field in a central record": lambda p: _extra(p, local=False, field=UNICODE_PATH),
    "a ZIP64 field": lambda p: _extra(p, local=False, field=ZIP64),
    "a ZIP64 size": lambda p: p.fields(24, "<L", 0xFFFFFFFF, both=22),
    "deflated": lambda p: _stdlib(p, compression=zipfile.ZIP_DEFLATED),
    "written by another tool": _stdlib,
    "said to be deflated in both": lambda p: p.fields(10, "<H", 8, both=8),
    "said to be deflated in one": lambda p: p.fields(10, "<H", 8),
    "encrypted": lambda p: p.fields(8, "<H", 1, both=6),
    "strongly encrypted": lambda p: p.fields(8, "<H", 0x41, both=6),
    "a data descriptor": lambda p: p.fields(8, "<H", 8, both=6),
    "patched data": lambda p: p.fields(8, "<H", 0x20, both=6),
    "said to be UTF-8, and ASCII": lambda p: p.fields(8, "<H", 0x800, both=6),
    "another version needed": lambda p: p.fields(6, "<H", 45, both=4),
    "made by another system": lambda p: p.fields(4, "<H", 20),
    "another date": lambda p: p.fields(14, "<H", 0x5A21, both=12),
    "another time": lambda p: p.fields(12, "<H", 1, both=10),
    "a CRC that differs in one": lambda p: p.fields(16, "<L", 1),
    "a CRC that is wrong in both": lambda p: p.fields(16, "<L", 1, both=14),
    "a size that differs in one": lambda p: p.fields(24, "<L", 5),
    "sizes that differ from each other": lambda p: p.fields(20, "<L", 5, both=18),
    "a size too large by one": lambda p: p.fields(24, "<L", len(p.contents[p.names[-1]]) + 1),
    "a size of four gigabytes": lambda p: p.fields(24, "<L", 0xFFFFFFF0, both=22),
    "an entry on another disk": lambda p: p.fields(34, "<H", 1),
    "marked as text": lambda p: p.fields(36, "<H", 1),
    "a symbolic link": lambda p: p.fields(38, "<L", (stat.S_IFLNK | 0o777) << 16),
    "a directory by its mode": lambda p: p.fields(38, "<L", (stat.S_IFDIR | 0o755) << 16),
    "set-user-id": lambda p: p.fields(38, "<L", (stat.S_IFREG | 0o4755) << 16),
    "a device": lambda p: p.fields(38, "<L", (stat.S_IFCHR | 0o644) << 16),
    "a name that differs in the local header": lambda p: (
        p.data.replace(b"golden.npz", b"g0lden.npz", 1)
    ),
    "a name that differs in the central record": lambda p: (
        p.data[: p.central] + p.data[p.central :].replace(b"golden.npz", b"g0lden.npz")
    ),
    "a name longer than it is": lambda p: p.fields(28, "<H", 60, both=26),
    "a name that is not UTF-8": lambda p: p.data.replace(b"notes.txt", b"n\xfftes.txt"),
    "a directory entry": lambda p: p.with_files(**{"engines/": b""}),
    "up and out": lambda p: p.with_files(**{"../../evil": b"x"}),
    "an absolute name": lambda p: p.with_files(**{"/tmp/evil": b"x"}),
    "a name of Windows": lambda p: p.with_files(**{"c:\\evil": b"x"}),
    "a device of Windows": lambda p: p.with_files(**{"nul.txt": b"x"}),
    "two names that differ in case": lambda p: p.with_files(**{"NOTES.txt": b"kept"}),
    "a name with a zero": lambda p: p.with_files(**{"notes.txt\x00.png": b"x"}),
    "a file that is not listed": lambda p: p.with_files(extra=b"x"),
    "a hidden file": lambda p: p.with_files(**{".hidden": b"x"}),
    "a file that is missing": lambda p: p.joined(
        {n: c for n, c in p.contents.items() if n != "notes.txt"}
    ),
    "no manifest": lambda p: p.joined({n: c for n, c in p.contents.items() if n != MANIFEST_FILE}),
    "a file under another name": lambda p: p.renamed("notes.txt", "other.txt"),
    "two engines of one name, the good one last": lambda p: _doubled(p, first=b"evil"),
    "two engines of one name, equal": lambda p: _doubled(p, first=p.contents[FILE]),
    "entries that overlap": _overlapping,
    "the manifest not first": lambda p: p.joined(dict(sorted(p.contents.items()))),
    "central records in another order": lambda p: p.joined(
        order=[0, *reversed(range(1, len(p.names)))]
    ),
    "a central record twice": lambda p: p.joined(order=[0, 1, 1, 2, 3]),
    "one central record less": lambda p: p.joined(order=[0, 1, 2]),
    "counts that differ": lambda p: p.put(len(p.data) - 14, "<H", 3),
    "a count of 65,535": lambda p: p.put(len(p.data) - 12, "<H", 0xFFFF),
    "a split archive": lambda p: p.put(len(p.data) - 18, "<H", 1),
    "a central directory elsewhere": lambda p: p.put(len(p.data) - 6, "<L", p.offsets[1]),
    "a central directory of another size": lambda p: p.put(len(p.data) - 10, "<L", 46),
    "an engine with a bit turned over": lambda p: p.replaced(
        FILE, p.contents[FILE][:-5] + bytes([p.contents[FILE][-5] ^ 1]) + p.contents[FILE][-4:]
    ),
    "golden vectors of another bundle": lambda p: p.replaced(
        "golden.npz", b"PK\x05\x06" + bytes(18)
    ),
    "a longer document": lambda p: p.replaced("notes.txt", b"longer"),
    "a manifest that is another": lambda p: p.replaced(MANIFEST_FILE, b"{}\n"),
    "an empty manifest": lambda p: p.replaced(MANIFEST_FILE, b""),
    "four thousand files too many": lambda p: p.with_files(
        **{f"f{i:04}": b"" for i in range(4097)}
    ),
    "a tar archive": lambda _p: b"manifest.json".ljust(512, b"\x00") + bytes(1024),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path) -> Path:
    """An archive that is right."""
    place = tmp_path_factory.mktemp("archive") / "bundle.zip"
    return make_bundle(place, linear_onnx, documents={"notes.txt": b"kept"})


class Tally:
    """Run archives, and tell what became of them."""

    def __init__(self, good: Path) -> None:
        self.guard, self.outcome, self.folder = Watch(), Outcome(), good.parent
        self.expected = self.answer(good)

    def answer(self, path: Path) -> np.ndarray:
        """What the engine in an archive says, every file of it verified."""
        with equipoise.load(path) as session:
            session.read("notes.txt")
            assert session.selftest().passed
            return session.run({"x": np.arange(8, dtype=np.float32).reshape(2, 4)})["y"]

    def run(self, name: str, path: Path) -> None:
        """One archive."""
        case = Case(name=name, subject="", folder=self.folder, file=path.name, target=path.name)
        self.guard.root, self.guard.seen, self.guard.on = str(self.folder.resolve()), [], True
        try:
            same = np.array_equal(self.answer(path), self.expected)
            verdict, said = ("harmless" if same else "silent"), "accepted"
        except EquipoiseError as error:
            fits = error.exit_code == 4 and path.name in error.message
            verdict, said = ("typed" if fits else "crashed"), f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - what must not be, counted
            verdict, said = "crashed", repr(error)
        finally:
            self.guard.on = False
        if self.guard.seen:
            verdict, said = "escaped", self.guard.seen[0]
        self.outcome.add(case, verdict, said)


@pytest.fixture(scope="module")
def tally(good: Path) -> Iterator[Tally]:
    return Tally(good)


def test_every_archive_that_is_otherwise_is_refused(
    good: Path, tally: Tally, campaign: Campaign
) -> None:
    """None is run, none crashes, none is unpacked; what is wrong is said with the file's name."""
    parts, before = Parts(good.read_bytes()), sys.getrecursionlimit()
    assert parts.joined() == parts.data
    for number, (name, change) in enumerate(CASES.items()):
        path = good.with_name(f"case{number}.zip")
        data = change(parts)
        assert data != parts.data, name
        path.write_bytes(data)
        tally.run(name, path)
        path.unlink()
    campaign.lines.append(tally.outcome.line("M8 archive"))
    tally.outcome.check(least=60)
    assert tally.outcome.counts["typed"] == len(CASES)
    assert sorted(p.name for p in good.parent.iterdir()) == [good.name]
    assert before == sys.getrecursionlimit()


def test_every_bit_of_the_records_counts(good: Path) -> None:
    """No bit outside the contents can be turned over without notice, nor one inside."""
    data, path = good.read_bytes(), good.with_name("flipped.zip")
    parts = Parts(data)
    places = [at for o in parts.offsets for at in range(o, o + LOCAL)]
    places += range(parts.central, len(data))
    random = np.random.default_rng(0)
    places += random.integers(0, parts.central, 200).tolist()
    accepted = []
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            with open_bundle(path) as bundle:
                bundle.verify()
            accepted.append(at)
        except IntegrityError:
            continue
    path.unlink()
    assert accepted == []
