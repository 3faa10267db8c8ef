"""Files by content: what was put comes back, and what was damaged does not."""

from __future__ import annotations

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.cluster.storage import Storage, absolute_url, checked_name
from equipoise.content import tree_sha256
from equipoise.errors import IncompatibleError, IntegrityError, OutputError, UsageError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(storage: Storage, folder: Path, data: bytes) -> str:
    """Put ``data``; its name."""
    file = folder / uuid.uuid4().hex
    file.write_bytes(data)
    storage.put(file, sha256=sha256(data))
    return sha256(data)


def only_file(storage: Storage) -> Path:
    """The one file that a storage on a path has."""
    (file,) = Path(storage.url).iterdir()
    return file


def test_what_was_put_comes_back(storage_url: str, tmp_path: Path) -> None:
    """Empty, small and large files, read by another connection, as another machine has one."""
    contents = [b"", b"a", bytes(range(256)) * 5000]
    names = [put(Storage(storage_url), tmp_path, data) for data in contents]
    for name, data in zip(names, contents, strict=True):
        Storage(storage_url).get(name, to=tmp_path / "out" / name)
        assert (tmp_path / "out" / name).read_bytes() == data


def test_a_file_is_sent_once(tmp_path: Path) -> None:
    """A second storage finds it there by name and size."""
    storage = Storage(str(tmp_path / "storage"))
    put(storage, tmp_path, b"content")
    before = only_file(storage).stat()
    put(Storage(storage.url), tmp_path, b"content")
    assert only_file(storage).stat().st_mtime_ns == before.st_mtime_ns
    assert only_file(storage).stat().st_ino == before.st_ino


def test_a_file_that_was_cut_off_is_sent_again(tmp_path: Path) -> None:
    """Whatever cut it."""
    storage = Storage(str(tmp_path / "storage"))
    name = put(storage, tmp_path, b"content")
    only_file(storage).write_bytes(b"cont")
    put(Storage(storage.url), tmp_path, b"content")
    Storage(storage.url).get(name, to=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"content"


@pytest.mark.parametrize("damage", [b"", b"Content", b"content and more"])
def test_a_damaged_file_is_an_integrity_error(tmp_path: Path, damage: bytes) -> None:
    """Nothing appears where it was to go, and what stood there stays."""
    storage = Storage(str(tmp_path / "storage"))
    name = put(storage, tmp_path, b"content")
    only_file(storage).write_bytes(damage)
    (tmp_path / "out").write_bytes(b"before")
    for place in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(IntegrityError, match="is damaged") as caught:
            storage.get(name, to=place)
        assert "Remove that file" in caught.value.hint
    assert (tmp_path / "out").read_bytes() == b"before"
    assert not (tmp_path / "new").exists()


def test_a_damaged_file_is_found_behind_a_url_too(ftp_url: str, tmp_path: Path) -> None:
    """The check is of what arrives."""
    url = f"{ftp_url}/{uuid.uuid4().hex}"
    name = put(Storage(url), tmp_path, b"content")
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"Content")
    Storage(url)._place.put(wrong, name)
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        Storage(url).get(name, to=tmp_path / "out")
    assert "secret" not in caught.value.message


def test_a_missing_file_is_an_integrity_error(storage_url: str, tmp_path: Path) -> None:
    """It says that all machines need the same storage."""
    with pytest.raises(IntegrityError, match=f"no file {'0' * 64}") as caught:
        Storage(storage_url).get("0" * 64, to=tmp_path / "out")
    assert "same storage" in caught.value.hint


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "0" * 63, "G" * 64])
def test_what_is_no_hash_is_not_fetched(tmp_path: Path, name: str) -> None:
    """A name from elsewhere does not lead out of the storage."""
    with pytest.raises(IntegrityError, match="is no SHA-256"):
        Storage(str(tmp_path)).get(name, to=tmp_path / "out")


NAMES = st.text(st.sampled_from("abcxyz._- é"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."}
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=200), max_size=6
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=TREES, remote=st.booleans())
def test_any_tree_comes_back(tmp_path: Path, *, tree: dict[str, bytes], remote: bool) -> None:
    """Every name and every byte, whether the storage is a path or a URL."""
    folder = tmp_path / uuid.uuid4().hex
    source, back = folder / "source", folder / "back"
    source.mkdir(parents=True)
    for name, data in tree.items():
        file = source / name
        if any(parent.is_file() for parent in file.parents) or file.is_dir():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    files = tree_sha256(source)
    storage = Storage(f"memory://{folder.name}" if remote else str(folder / "storage"))
    storage.put_tree(source, files=files)
    Storage(storage.url).get_tree(files, to=back)
    assert tree_sha256(back) == files
    assert all((back / name).read_bytes() == (source / name).read_bytes() for name in files)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b", "a//b", ".", "a\\b"])
def test_names_that_lead_out_of_a_tree_are_refused(tmp_path: Path, name: str) -> None:
    """A node cannot make the driver write anywhere else, nor the other way round."""
    with pytest.raises(IntegrityError, match="no name of a file"):
        checked_name(name)
    storage = Storage(str(tmp_path / "storage"))
    content = put(storage, tmp_path, b"content")
    with pytest.raises(IntegrityError, match="no name of a file"):
        storage.get_tree({name: content}, to=tmp_path / "out")


def test_threads_share_a_storage(storage_url: str, tmp_path: Path) -> None:
    """Each has a connection of its own; equal files do not get into each other's way."""
    storage = Storage(storage_url)
    contents = [bytes([n % 3]) * 1000 * (n % 3 + 1) for n in range(12)]

    def there_and_back(data: bytes) -> bytes:
        name = put(storage, tmp_path, data)
        out = tmp_path / uuid.uuid4().hex
        storage.get(name, to=out)
        return out.read_bytes()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(there_and_back, contents)) == contents


def test_a_connection_that_broke_is_made_again(ftp_url: str, tmp_path: Path) -> None:
    """A server that closes what was idle costs nothing but the time to connect."""
    storage = Storage(f"{ftp_url}/{uuid.uuid4().hex}")
    name = put(storage, tmp_path, b"content")
    storage._place._of_thread.connection[0].ftp.close()
    storage.get(name, to=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"content"


def test_a_storage_that_cannot_be_reached_is_an_output_error() -> None:
    """Without the password in the message."""
    with pytest.raises(OutputError, match="cannot be used") as caught:
        Storage("ftp://user:secret@127.0.0.1:1/folder")
    assert "127.0.0.1" in caught.value.message
    assert "secret" not in caught.value.message


def test_a_storage_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "storage").write_text("in the way")
    with pytest.raises(OutputError):
        put(Storage(str(tmp_path / "storage")), tmp_path, b"content")


def test_an_unknown_kind_of_url_is_a_usage_error() -> None:
    """With what there is instead."""
    with pytest.raises(UsageError, match="nowhere") as caught:
        Storage("nowhere://bucket")
    assert "s3://" in caught.value.hint


def test_a_kind_whose_package_is_missing_is_incompatible(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec knows more kinds than it has packages for."""
    import fsspec.core

    def refuse(*_args: object, **_options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(IncompatibleError, match="Install s3fs"):
        Storage("s3://bucket/folder")


def test_a_path_means_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made absolute before it is sent."""
    monkeypatch.chdir(tmp_path)
    assert absolute_url("shared") == str(tmp_path / "shared")
    assert absolute_url("file:///a/b") == "/a/b"
    assert absolute_url("s3://bucket/a") == "s3://bucket/a"
    with pytest.raises(UsageError, match="empty"):
        absolute_url("")
