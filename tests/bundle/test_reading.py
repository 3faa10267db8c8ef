"""A bundle on disk is what its manifest says, directory or archive, or nothing of it is used."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.bundle.making import FILE, make_bundle

from equipoise import fs
from equipoise.bundle.archive import ArchiveFiles, Entry, end_record
from equipoise.bundle.files import DirectoryFiles, pread_chunks, pread_exactly
from equipoise.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE
from equipoise.bundle.names import MOST_FILES, check_names, name_problem
from equipoise.bundle.reading import Bundle, is_bundle, open_bundle, read_manifest
from equipoise.bundle.writer import check_replaceable, write_bundle
from equipoise.errors import InputError, IntegrityError, OutputError, UsageError

FORMS = ("bundle", "bundle.zip")


@pytest.fixture(params=FORMS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path, linear_onnx: Path) -> Path:
    """A real bundle in either form."""
    return make_bundle(tmp_path / request.param, linear_onnx, documents={"notes.txt": b"kept"})


@pytest.fixture
def directory(tmp_path: Path, linear_onnx: Path) -> Path:
    """A bundle as a directory."""
    return make_bundle(tmp_path / "bundle", linear_onnx, documents={"notes.txt": b"kept"})


def test_both_forms_hold_the_same(tmp_path: Path, linear_onnx: Path) -> None:
    """Every file, byte for byte; and the archive is what it is for other readers too."""
    folder, archive = (make_bundle(tmp_path / form, linear_onnx) for form in FORMS)
    with open_bundle(folder) as one, open_bundle(archive) as other:
        assert one.manifest == other.manifest
        assert one.hashes() == other.hashes()
        assert all(one.read(n) == other.read(n) for n in (MANIFEST_FILE, *one.manifest.files))
        one.verify()
        other.verify()
    with zipfile.ZipFile(archive) as found:
        assert found.testzip() is None
        assert found.namelist() == [MANIFEST_FILE, *sorted(read_manifest(folder).files)]
        assert found.read(FILE) == linear_onnx.read_bytes()
        found.extractall(tmp_path / "out")
    read_manifest(tmp_path / "out")


def test_an_archive_is_the_same_bytes_every_time(tmp_path: Path, linear_onnx: Path) -> None:
    """Whenever, and under whatever name it is written."""
    first, second = (make_bundle(tmp_path / f"{n}.zip", linear_onnx) for n in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_hashes_are_of_the_bytes(bundle: Path) -> None:
    """The manifest's own included; the signature is not among them."""
    with open_bundle(bundle) as opened:
        hashes = opened.hashes()
        assert set(hashes) == {MANIFEST_FILE, FILE, "golden.npz", "notes.txt"}
        assert opened.signature is None
    if bundle.is_dir():
        assert hashes == {name: fs.sha256_file(bundle / name) for name in hashes}


def test_a_document_is_read_and_checked(bundle: Path) -> None:
    """What is not there is named, with what is."""
    with open_bundle(bundle) as opened:
        assert opened.read("notes.txt") == b"kept"
        with pytest.raises(IntegrityError, match=r"no file 'other.txt'; it has .*notes\.txt"):
            opened.read("other.txt")
    with pytest.raises(UsageError, match="closed"):
        opened.read("notes.txt")
    opened.close()


@pytest.mark.parametrize("name", [FILE, "golden.npz", "notes.txt"])
def test_a_changed_file_is_named(directory: Path, name: str) -> None:
    """One byte is enough, where it is read and where all are verified."""
    (directory / name).write_bytes((directory / name).read_bytes()[:-1] + b"!")
    with open_bundle(directory) as opened:
        for attempt in (opened.verify, lambda: opened.read(name)):
            with pytest.raises(IntegrityError, match=f"{name} is not what its hash says") as caught:
                attempt()
            assert caught.value.exit_code == 4
            assert caught.value.hint
        opened.verify(but=[name])
        assert opened.read(name, check=False).endswith(b"!")


LARGE = bytes(range(256)) * 8192


@pytest.fixture(params=FORMS)
def large(request: pytest.FixtureRequest, tmp_path: Path, linear_onnx: Path) -> Path:
    """A bundle with a file that is large enough to be given out as a path."""
    return make_bundle(tmp_path / request.param, linear_onnx, documents={"large.bin": LARGE})


@contextlib.contextmanager
def _no_lease(_descriptor: int) -> Iterator[None]:
    yield None


@pytest.mark.parametrize("lacks", ["nothing", "leases", "memory files", "both"])
def test_content_for_a_library_is_what_was_hashed(
    large: Path, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path to it, or the bytes themselves, by what the system has; a small file is bytes."""
    if lacks in {"leases", "both"}:
        monkeypatch.setattr(fs, "lease", _no_lease)
    if lacks in {"memory files", "both"}:
        monkeypatch.setattr(fs, "has_memory_files", lambda: False)
    with open_bundle(large) as opened:
        for check in (True, False):
            with opened.content("large.bin", check=check) as content:
                given = content if isinstance(content, bytes) else content.read_bytes()
            assert given == LARGE
            assert isinstance(content, bytes) or not content.exists()
        with opened.content(FILE) as content:
            assert isinstance(content, bytes)
    data = bytearray((large / "large.bin").read_bytes() if large.is_dir() else large.read_bytes())
    data[len(data) // 2] ^= 1
    (large / "large.bin" if large.is_dir() else large).write_bytes(data)
    with (
        open_bundle(large) as opened,
        pytest.raises(IntegrityError, match=r"large\.bin is not what its"),
        opened.content("large.bin"),
    ):
        pytest.fail("content was given out that is not what its hash says")


def test_nobody_writes_a_file_that_a_library_reads(large: Path) -> None:
    """A writer waits; a sealed copy takes no byte."""
    done = threading.Event()

    def write() -> None:
        with (large / "large.bin").open("r+b") as file:
            file.write(b"evil")
        done.set()

    with open_bundle(large) as opened, contextlib.ExitStack() as stack:
        content = stack.enter_context(opened.content("large.bin"))
        assert isinstance(content, Path)
        if large.is_dir():
            writer = threading.Thread(target=write)
            writer.start()
            assert not done.wait(0.2)
            assert content.read_bytes() == LARGE
            with pytest.raises(IntegrityError, match=r"large\.bin changed while it was read"):
                stack.close()
            assert done.wait(10)
        else:
            with pytest.raises(OSError), content.open("r+b") as file:  # noqa: PT011
                file.write(b"evil")
            assert content.read_bytes() == LARGE


def _socket(path: Path) -> None:
    # A path of a socket is short; its directory may not be.
    held = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(held)


def _linked(folder: Path) -> None:
    shutil.move(folder / "notes.txt", folder.parent / "notes.txt")
    (folder / "notes.txt").symlink_to(folder.parent / "notes.txt")


def _linked_folder(folder: Path) -> None:
    shutil.move(folder / "engines", folder.parent / "engines")
    (folder / "engines").symlink_to(folder.parent / "engines")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "notes.txt").unlink(), r"notes\.txt is missing"),
        (lambda d: (d / "extra").write_text(""), "extra is not listed"),
        (lambda d: (d / ".hidden").write_text(""), r"'\.hidden' is refused"),
        (lambda d: (d / "engines/float/.x").write_text(""), r"\.x' is refused"),
        (lambda d: (d / "notes.txt").write_text("longer"), r"notes\.txt has 6 bytes.*says 4"),
        (lambda d: (d / "empty").mkdir(), "'empty/' is empty"),
        (lambda d: (d / "notes.txt").chmod(0) if os.getuid() else _linked(d), r"notes\.txt"),
        (_linked, "is a symbolic link"),
        (_linked_folder, "'engines' is a symbolic link"),
        (lambda d: os.link(d / "notes.txt", d.parent / "other"), "is a hard link"),
        (lambda d: os.mkfifo(d / "pipe"), "'pipe' is a pipe"),
        (lambda d: _socket(d / "socket"), "'socket' is a socket"),
        (lambda d: (d / "a\nb").write_text(""), "control"),
        (lambda d: (d / "NOTES.txt").write_text("kept"), "one file on some systems"),
        (lambda d: (d / "x").symlink_to("nowhere"), "'x' is a symbolic link"),
    ],
)
def test_a_directory_with_anything_else_is_refused(
    directory: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    """Missing, extra, hidden, empty, links of both kinds, pipes, sockets, names."""
    spoil(directory)
    with pytest.raises(IntegrityError, match=message), open_bundle(directory) as opened:
        opened.verify()


def test_a_directory_may_be_reached_through_a_link(directory: Path) -> None:
    """As where a release is switched by one."""
    link = directory.parent / "current"
    link.symlink_to(directory)
    with open_bundle(link) as opened:
        opened.verify()
        link.unlink()
        link.symlink_to(directory.parent)
        assert opened.read("notes.txt") == b"kept"


@pytest.mark.parametrize(
    "swap",
    [
        lambda f: (f.unlink(), f.symlink_to(f.parent / "golden.npz")),
        lambda f: (f.unlink(), os.mkfifo(f)),
        lambda f: (f.unlink(), f.write_bytes(b"evil")),
        lambda f: f.write_bytes(b"grown"),
        lambda f: os.truncate(f, 1),
        lambda f: f.unlink(),
        lambda f: os.link(f, f.parent.parent / "other"),
    ],
)
def test_a_file_that_is_swapped_while_the_bundle_is_open_is_refused(
    directory: Path, swap: Callable[[Path], Any]
) -> None:
    """Between the look at the directory and the read, whatever takes its place."""
    with open_bundle(directory) as opened:
        swap(directory / "notes.txt")
        with pytest.raises(IntegrityError, match=r"notes\.txt"):
            opened.read("notes.txt")


def test_a_folder_that_becomes_a_link_is_refused(directory: Path) -> None:
    """Each directory on the way is opened as one."""
    with open_bundle(directory) as opened:
        _linked_folder(directory)
        with pytest.raises(IntegrityError, match="became a link"):
            opened.read(FILE)


def test_what_is_no_bundle_is_named(tmp_path: Path) -> None:
    """Missing, empty, another file; the hint says what to give."""
    (tmp_path / "file").write_bytes(b"PK\x05\x06 and nothing")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(IntegrityError, match=str(path)) as caught:
            read_manifest(path)
        assert caught.value.hint
        assert not is_bundle(path)


def test_a_signature_is_given_out_and_not_listed(directory: Path) -> None:
    """It may be there; one that is too large is not read."""
    (directory / SIGNATURE_FILE).write_bytes(b"signed")
    with open_bundle(directory) as opened:
        assert opened.signature == b"signed"
        assert SIGNATURE_FILE not in opened.hashes()
    (directory / SIGNATURE_FILE).write_bytes(bytes((4 << 20) + 1))
    with pytest.raises(IntegrityError, match=r"model\.sig has 4,194,305 bytes; at most"):
        open_bundle(directory)


def test_a_manifest_that_is_too_large_is_not_read(directory: Path) -> None:
    """Eight megabytes are enough for anything."""
    os.truncate(directory / MANIFEST_FILE, (8 << 20) + 1)
    with pytest.raises(IntegrityError, match=r"manifest\.json has 8,388,609 bytes; at most"):
        open_bundle(directory)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty part"),
        ("/etc/passwd", "absolute"),
        ("a//b", "empty part"),
        ("../a", "dot or space"),
        ("a/./b", "dot or space"),
        (".hidden", "dot or space"),
        ("a.", "dot or space"),
        ("a ", "dot or space"),
        (" a", "dot or space"),
        ("a\\b", "has one of"),
        ("c:", "has one of"),
        ("a*", "has one of"),
        ("a\x00b", "control"),
        ("a\x7f", "control"),
        ("a\u202eb", "control, format"),
        ("a\u200db", "control, format"),
        ("\udc80", "control, format"),
        ("e\u0301", "normal form C"),
        ("nul", "device"),
        ("AUX.txt", "device"),
        ("a/com1.tar.gz", "device"),
        ("LPT\u00b9", "device"),
        ("x" * 129, "longer than 128"),
        ("/".join(["x" * 100] * 6), "longer than 512"),
        ("/".join("abcdefghi"), "deeper than 8"),
    ],
)
def test_names_that_some_system_reads_otherwise_are_refused(name: str, why: str) -> None:
    """Says why."""
    assert why in name_problem(name)
    with pytest.raises(IntegrityError, match="is refused"):
        check_names([name], where="bundle")


@pytest.mark.parametrize(
    "name", ["a", "a/b.c", "é.txt", "模型/engine.onnx", "console", "com10", "a b"]
)
def test_other_names_are_taken(name: str) -> None:
    """Spaces and letters of any language inside."""
    assert name_problem(name) == ""
    check_names([name], where="bundle")


@pytest.mark.parametrize(
    "names",
    [
        ("a", "A"),
        ("a/b", "A/c"),
        ("a", "a/b"),
        ("A", "a/b"),
        ("straße", "STRASSE"),
        ("ﬁle", "file"),
        tuple(f"f{i}" for i in range(MOST_FILES + 1)),
    ],
    ids=range(7),
)
def test_names_that_collide_somewhere_are_refused(names: tuple[str, ...]) -> None:
    """Letter case, ligatures, a file and a directory of one name; and too many."""
    with pytest.raises(IntegrityError):
        check_names(names, where="bundle")


def test_large_reads_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system gives fewer bytes than were asked for."""
    content = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(content)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda d, size, start: real(d, min(size, 1000), start))
    with (tmp_path / "file").open("rb") as file:
        assert pread_exactly(file.fileno(), start=10, size=10_000) == content[10:10_010]
        assert b"".join(pread_chunks(file.fileno(), start=5, size=9_000)) == content[5:9_005]
        assert pread_exactly(file.fileno(), start=0, size=99_999) == content


def test_a_bundle_replaces_a_bundle_whole(bundle: Path, linear_onnx: Path) -> None:
    """No file of the old one stays."""
    make_bundle(bundle, linear_onnx, name="new")
    with open_bundle(bundle) as opened:
        assert opened.manifest.name == "new"
        assert "notes.txt" not in opened.manifest.files
        opened.verify()


def test_something_else_is_never_replaced(tmp_path: Path, linear_onnx: Path) -> None:
    """A directory that is no bundle, or a file, stays as it is."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    file = tmp_path / "file.zip"
    file.write_text("kept")
    for place in (home, file):
        with pytest.raises(OutputError, match=f"{place} exists and is no bundle"):
            check_replaceable(place)
        with pytest.raises(OutputError, match=f"{place} exists and is no bundle"):
            make_bundle(place, linear_onnx)
    assert (home / "thesis.txt").read_text() == "years of work"
    assert file.read_text() == "kept"


def test_one_form_does_not_replace_the_other(tmp_path: Path, linear_onnx: Path) -> None:
    """A directory that is called like an archive, and the other way round."""
    folder, archive = (make_bundle(tmp_path / form, linear_onnx) for form in FORMS)
    folder.rename(tmp_path / "other.zip")
    archive.rename(tmp_path / "other")
    for place in (tmp_path / "other.zip", tmp_path / "other"):
        with pytest.raises(OutputError, match="does not replace it"):
            make_bundle(place, linear_onnx)


def test_a_copy_that_fails_keeps_the_old_bundle(bundle: Path, tmp_path: Path) -> None:
    """A file to copy that is not there leaves the old bundle whole and nothing beside it."""
    manifest = read_manifest(bundle)
    with pytest.raises(InputError, match="missing"):
        write_bundle(bundle, manifest, copies={FILE: tmp_path / "missing"}, documents={})
    with open_bundle(bundle) as opened:
        opened.verify()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_file_that_changes_while_it_is_packed_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was hashed."""
    from equipoise.bundle import writer

    manifest, source = read_manifest(bundle), tmp_path / "engine.onnx"
    source.write_bytes(b"x" * manifest.files[FILE].size_bytes)
    real = writer.check_manifest

    def later(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        source.write_bytes(b"y" * manifest.files[FILE].size_bytes)

    monkeypatch.setattr(writer, "check_manifest", later)
    with pytest.raises(InputError, match="changed while it was packed"):
        write_bundle(bundle, manifest, copies={FILE: source}, documents={})
    with open_bundle(bundle) as opened:
        opened.verify()


def test_a_document_can_be_made_from_the_manifest(bundle: Path, linear_onnx: Path) -> None:
    """It sees every file but itself, and is listed like any other."""
    manifest = read_manifest(bundle)
    write_bundle(
        bundle,
        manifest,
        copies={FILE: linear_onnx},
        documents={"a.txt": b"a"},
        derived={"list.txt": lambda known: "\n".join(known.files).encode()},
    )
    with open_bundle(bundle) as opened:
        assert opened.read("list.txt").decode().splitlines() == ["a.txt", FILE]
        opened.verify()


def test_an_archive_has_room_for_32_bits(
    tmp_path: Path, linear_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger bundle is a directory; the size that is reckoned is the one that is written."""
    from equipoise.bundle import writer

    path = make_bundle(tmp_path / "a.zip", linear_onnx)
    size = path.stat().st_size
    monkeypatch.setattr(writer, "MOST_BYTES", size)
    make_bundle(path, linear_onnx)
    monkeypatch.setattr(writer, "MOST_BYTES", size - 1)
    with pytest.raises(OutputError, match="does not fit an archive"):
        make_bundle(path, linear_onnx)


def test_records_of_an_archive_are_those_of_the_standard_library(tmp_path: Path) -> None:
    """Names in ASCII and not; modes, dates and the end record."""
    entry = Entry(name="é.txt", crc=0xE8B7BE43, size=1, offset=0)
    path = tmp_path / "one.zip"
    path.write_bytes(entry.local + b"a" + entry.central + end_record((entry,)))
    with zipfile.ZipFile(path) as archive:
        (found,) = archive.infolist()
        assert found.filename == "é.txt"
        assert found.date_time == (1980, 1, 1, 0, 0, 0)
        assert stat.S_ISREG(found.external_attr >> 16)
        assert archive.read(found) == b"a"


def test_another_writer_writes_the_same_archive(tmp_path: Path, linear_onnx: Path) -> None:
    """One made from the tables of docs/bundle-format.md alone."""
    made = make_bundle(tmp_path / "a.zip", linear_onnx, documents={"é.txt": b"kept"})
    with zipfile.ZipFile(made) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    body, central = b"", b""
    for name in ["manifest.json", *sorted(files.keys() - {"manifest.json"})]:
        data, raw = files[name], name.encode()
        shared = struct.pack(
            "<HHHHHLLLH", 20, 0 if name.isascii() else 2048, 0, 0, 33, zlib.crc32(data), len(data),
            len(data), len(raw),
        )  # fmt: skip
        central += b"PK\x01\x02" + struct.pack("<H", 788) + shared
        central += struct.pack("<HHHHLL", 0, 0, 0, 0, 0x81A40000, len(body)) + raw
        body += b"PK\x03\x04" + shared + struct.pack("<H", 0) + raw + data
    counts = (0, 0, len(files), len(files), len(central), len(body), 0)
    written = body + central + b"PK\x05\x06" + struct.pack("<HHHHLLH", *counts)
    assert written == made.read_bytes()


def test_files_are_closed(bundle: Path) -> None:
    """No descriptor stays behind, whether opening goes well or not."""
    before = _descriptors()
    for _ in range(5):
        open_bundle(bundle).close()
        (DirectoryFiles if bundle.is_dir() else ArchiveFiles)(bundle).close()
        with pytest.raises(IntegrityError):
            Bundle(_Empty())
    target = bundle / "x" if bundle.is_dir() else bundle
    with target.open("ab") as file:
        file.write(b"x")
    for _ in range(5):
        with pytest.raises(IntegrityError):
            open_bundle(bundle)
    assert _descriptors() == before


def _descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


class _Empty(DirectoryFiles):
    """A directory that has nothing."""

    def __init__(self) -> None:
        self.where = "nothing"

    def sizes(self) -> dict[str, int]:
        return {}
