"""Python code of the user: found where it lies, sent, and imported from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.cluster import code
from equipoise.cluster.code import code_of, fetch_code, send_code
from equipoise.cluster.storage import Storage
from equipoise.errors import InputError, IntegrityError


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a package and a module."""
    folder = tmp_path / "here"
    write(folder / "nets" / "small.py", "def build(): ...")
    write(folder / "helper.py", "VALUE = 1")
    monkeypatch.chdir(folder)
    return folder


def config(**values: object) -> str:
    return json.dumps(values)


@pytest.mark.parametrize(
    "text", ["nets.small:build", "module:nets.small:build", "python:helper:VALUE"]
)
def test_a_module_of_the_working_directory_is_sent(here: Path, text: str) -> None:
    """Whatever field names it, in whatever depth."""
    found = code_of("equipoise.data.prepare:prepare_data", config(a=[{"b": text}]))
    assert found.folders == (here,)
    assert found.packages == ()


def test_the_function_of_a_stage_counts_too(here: Path) -> None:
    """A stage from outside."""
    assert code_of("helper:VALUE", config()).folders == (here,)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "text", ["digits", "npz:/data/x.npz", "conll:train", "no.such.module:build", "a:b:c:d", ""]
)
def test_a_text_that_names_no_module_sends_nothing(text: str) -> None:
    """Forms of data look alike."""
    assert code_of("equipoise.data.prepare:prepare_data", config(text=text)) == code.Code()


def test_an_installed_package_is_named_and_not_sent() -> None:
    """The nodes have to have the same version of it."""
    found = code_of("equipoise.x:y", config(factory="hypothesis.strategies:text"))
    assert (found.folders, found.packages) == ((), ("hypothesis",))


def test_code_arrives_as_it_was(here: Path, tmp_path: Path) -> None:
    """Python files alone; a second node and a second time give the same place."""
    write(here / "data.bin", "not code")
    write(here / ".venv" / "lib" / "hidden.py")
    write(here / "env" / "pyvenv.cfg")
    write(here / "env" / "lib" / "library.py")
    storage = Storage(str(tmp_path / "storage"))
    sent = send_code((here,), storage=storage)
    assert send_code((here,), storage=storage) == sent, "equal files make an equal archive"
    place = fetch_code(sent, storage=Storage(storage.url), inputs=tmp_path / "inputs")
    files = sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file())
    assert files == ["helper.py", "nets/small.py"]
    assert (place / "helper.py").read_text() == "VALUE = 1"
    assert fetch_code(sent, storage=storage, inputs=tmp_path / "inputs") == place
    write(here / "helper.py", "VALUE = 2")
    assert send_code((here,), storage=storage) != sent


def test_no_code_is_no_archive(tmp_path: Path) -> None:
    """Most stages name none."""
    assert send_code((), storage=Storage(str(tmp_path / "storage"))) == ""
    assert not (tmp_path / "storage").exists()


def test_a_damaged_archive_is_an_integrity_error(here: Path, tmp_path: Path) -> None:
    """No code runs that is not what was sent."""
    storage = Storage(str(tmp_path / "storage"))
    sent = send_code((here,), storage=storage)
    (tmp_path / "storage" / sent).write_bytes(b"PK other")
    with pytest.raises(IntegrityError, match="damaged"):
        fetch_code(sent, storage=storage, inputs=tmp_path / "inputs")


@pytest.mark.parametrize("name", ["_MOST_FILES", "_MOST_BYTES"])
def test_too_much_code_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Somebody ran from the home directory."""
    monkeypatch.setattr(code, name, 1)
    with pytest.raises(InputError, match=str(here)) as caught:
        send_code((here,), storage=Storage(str(tmp_path / "storage")))
    assert "directory of its own" in caught.value.hint
