"""fs: what is written appears whole or not at all, and a bad place is an OutputError."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise import fs
from equipoise.errors import DataError, OutputError


def leftovers(directory: Path) -> list[str]:
    """Temporary names that a write should have taken away."""
    return [path.name for path in directory.iterdir() if path.name.startswith(".equipoise")]


def names(directory: Path) -> list[str]:
    """What is in ``directory``."""
    return sorted(path.name for path in directory.iterdir())


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a new interpreter."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@given(data=st.binary(max_size=4096))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
def test_bytes_come_back_as_written(tmp_path: Path, data: bytes) -> None:
    """Over an older file too."""
    path = tmp_path / "deep" / "file.bin"
    fs.write_bytes(path, data)
    assert path.read_bytes() == data
    assert leftovers(path.parent) == []


@given(text=st.text())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
def test_text_comes_back_as_written(tmp_path: Path, text: str) -> None:
    """UTF-8, with line ends as they were."""
    path = tmp_path / "file.txt"
    fs.write_text(path, text)
    assert path.read_bytes().decode() == text


def test_json_is_canonical(tmp_path: Path) -> None:
    """Sorted keys and a last line end, so equal values are equal bytes."""
    fs.write_json(tmp_path / "a.json", {"b": 1, "a": (2, None)})
    fs.write_json(tmp_path / "b.json", {"a": [2, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_a_copy_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Copies are never links, even of a link."""
    original, link, copy = tmp_path / "a", tmp_path / "link", tmp_path / "b"
    original.write_bytes(b"weights")
    link.symlink_to(original)
    fs.copy_file(link, copy)
    assert not copy.is_symlink()
    assert copy.stat().st_ino != original.stat().st_ino
    original.write_bytes(b"changed")
    assert copy.read_bytes() == b"weights"


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    """Nothing of the new content is seen and no temporary name stays."""
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def fail() -> None:
        with fs.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise ValueError("the exporter failed")

    with pytest.raises(ValueError, match="the exporter failed"):
        fail()
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_output_error(tmp_path: Path) -> None:
    """A library that silently wrote elsewhere is noticed; the old file stays."""
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def forget() -> None:
        with fs.replacing(path):
            pass

    with pytest.raises(OutputError, match=r"model\.onnx"):
        forget()
    assert path.read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from equipoise import fs

path = Path(sys.argv[1])
if sys.argv[2] == "file":
    with fs.replacing(path) as temporary:
        temporary.write_text("half of the n")
        os.kill(os.getpid(), signal.SIGKILL)
with fs.staged_directory(path) as staging:
    (staging / "a").write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    """The old content stands until the rename."""
    path = tmp_path / "model.onnx"
    path.write_text("old")
    assert run_python(KILLED, path, "file").returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_kill_in_the_middle_keeps_the_old_directory(tmp_path: Path) -> None:
    """The old bundle stands until the rename."""
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "a").write_text("old")
    assert run_python(KILLED, path, "directory").returncode == -signal.SIGKILL
    assert (path / "a").read_text() == "old"


FULL = """
import resource, sys
from pathlib import Path
from equipoise import fs
from equipoise.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1])
try:
    if sys.argv[2] == "copy":
        fs.copy_file(Path(sys.argv[3]), path)
    elif sys.argv[2] == "append":
        with fs.staged_directory(path.parent / "staged") as staging:
            with fs.appending(staging / "values.bin") as file:
                for _ in range(100):
                    file.write(b"x" * 1000)
    else:
        fs.write_bytes(path, b"x" * 100_000)
except OutputError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("way", ["write", "copy", "append"])
def test_no_space_keeps_the_old_file(tmp_path: Path, way: str) -> None:
    """A file that cannot grow is an OutputError that names it; the old one is whole."""
    large, path = tmp_path / "large", tmp_path / "out" / "model.onnx"
    large.write_bytes(b"x" * 100_000)
    path.parent.mkdir()
    path.write_text("old")
    child = run_python(FULL, path, way, large)
    assert child.stdout.startswith("7 no space left to write"), child.stderr
    assert ("values.bin" if way == "append" else str(path)) in child.stdout
    assert path.read_text() == "old"
    assert names(path.parent) == ["model.onnx"]


def mounted(place: Path, options: str) -> Iterator[Path]:
    """A file system in memory at ``place``; skips where this process may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    yield from mounted(tmp_path / "small", "size=64k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that this user cannot write; root needs a file system of that kind."""
    if os.geteuid() == 0:
        yield from mounted(tmp_path / "disk", "ro")
        return
    tmp_path.chmod(0o555)
    yield tmp_path
    tmp_path.chmod(0o755)


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    """ENOSPC is an OutputError that says so, and leaves nothing half-written."""
    path = small_disk / "model.onnx"
    fs.write_bytes(path, b"old")
    with pytest.raises(OutputError, match="no space left"):
        fs.write_bytes(path, b"x" * 200_000)
    assert path.read_bytes() == b"old"
    assert names(small_disk) == ["model.onnx"]


def _write(path: Path) -> None:
    fs.write_bytes(path, b"x")


def _copy(path: Path) -> None:
    fs.copy_file(Path(__file__), path)


def _stage(path: Path) -> None:
    with fs.staged_directory(path):
        pass


WAYS: list[Callable[[Path], object]] = [_write, _copy, _stage, fs.make_directory, fs.check_writable]


@pytest.mark.parametrize("way", WAYS)
def test_a_place_below_a_file_is_an_output_error(
    tmp_path: Path, way: Callable[[Path], object]
) -> None:
    """Permission or not, a directory cannot be made below a file."""
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    with pytest.raises(OutputError, match=str(blocker)) as caught:
        way(blocker / "below" / "out")
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert blocker.read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("way", WAYS)
def test_a_place_that_nobody_can_write_is_an_output_error(way: Callable[[Path], object]) -> None:
    """Not even root makes files in /proc."""
    with pytest.raises(OutputError, match="/proc/equipoise"):
        way(Path("/proc/equipoise/out"))


@pytest.mark.parametrize("way", WAYS)
def test_a_read_only_directory_is_an_output_error(
    read_only: Path, way: Callable[[Path], object]
) -> None:
    """The error names the place."""
    with pytest.raises(OutputError, match=r"cannot write .*out"):
        way(read_only / "out")


def test_a_directory_in_the_place_of_a_file_is_an_output_error(tmp_path: Path) -> None:
    """And stays as it is."""
    place = tmp_path / "results.json"
    place.mkdir()
    (place / "kept").write_text("kept")
    with pytest.raises(OutputError, match=r"results\.json"):
        fs.write_text(place, "{}")
    assert (place / "kept").read_text() == "kept"
    assert leftovers(tmp_path) == []


def test_too_little_space_is_said_with_both_numbers(tmp_path: Path) -> None:
    """Before hours of work."""
    with pytest.raises(
        OutputError, match=r"bytes free; about 1,000,000,000,000,000,000 are needed"
    ):
        fs.check_writable(tmp_path, needed_bytes=10**18)
    fs.check_writable(tmp_path / "new", needed_bytes=1)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_staged_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    """No file of the old one stays, and others may read it."""
    path = tmp_path / "bundle"
    for name in ("old", "new"):
        with fs.staged_directory(path) as staging:
            (staging / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert names(tmp_path) == ["bundle"]


def test_an_error_while_staging_keeps_the_old_directory(tmp_path: Path) -> None:
    """And leaves nothing beside it."""
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").write_text("old")

    def fail() -> None:
        with fs.staged_directory(path) as staging:
            (staging / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path: Path) -> None:
    """Here the staged directory disappears before its rename."""
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").write_text("old")

    def vanish() -> None:
        with fs.staged_directory(path) as staging:
            staging.rmdir()

    with pytest.raises(OutputError, match="bundle"):
        vanish()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_move_into_place_replaces_files_and_directories(tmp_path: Path) -> None:
    """A finished file or directory takes the place of the old one."""
    for name in ("old", "new"):
        (tmp_path / "from").mkdir()
        (tmp_path / "from" / "bundle").mkdir()
        (tmp_path / "from" / "bundle" / name).write_text(name)
        (tmp_path / "from" / "report").write_text(name)
        fs.move_into_place(tmp_path / "from" / "bundle", tmp_path / "bundle")
        fs.move_into_place(tmp_path / "from" / "report", tmp_path / "report")
        (tmp_path / "from").rmdir()
    assert names(tmp_path / "bundle") == ["new"]
    assert (tmp_path / "report").read_text() == "new"
    assert names(tmp_path) == ["bundle", "report"]


def test_move_of_nothing_is_an_output_error(tmp_path: Path) -> None:
    """The place stays as it was."""
    (tmp_path / "report").write_text("old")
    with pytest.raises(OutputError, match="report"):
        fs.move_into_place(tmp_path / "missing", tmp_path / "report")
    assert (tmp_path / "report").read_text() == "old"


def test_remove_takes_what_is_there_and_no_more(tmp_path: Path) -> None:
    """A tree, a file, nothing, and a link without what it points to."""
    tree, link = tmp_path / "tree", tmp_path / "link"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("kept")
    link.symlink_to(tree)
    fs.remove(link)
    assert (tree / "deep" / "file").exists()
    fs.remove(tree / "deep" / "file")
    fs.remove(tree)
    fs.remove(tree)
    assert list(tmp_path.iterdir()) == []


def test_tree_size_counts_every_file_below(tmp_path: Path) -> None:
    """Of a directory and of a file."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep" / "b").write_bytes(b"678")
    assert fs.tree_size_bytes(tmp_path) == 8
    assert fs.tree_size_bytes(tmp_path / "a") == 5


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    """The example of FIPS 180-2."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert fs.sha256_file(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.exists, "no such file"),
        (Path.mkdir, "cannot read"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot read"),
    ],
)
def test_text_that_cannot_be_read_is_the_error_asked_for(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    """Missing, a directory, not UTF-8; each names the file."""
    path = tmp_path / "labels.txt"
    make(path)
    with pytest.raises(DataError, match=rf"{message}.*labels\.txt"):
        fs.read_text(path, error=DataError)
