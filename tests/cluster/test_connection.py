"""Joining a cluster: what is wrong is said within seconds, and by name."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise import extras
from equipoise.cluster import connection
from equipoise.cluster.connection import joined, label_of, no_device, start_line
from equipoise.cluster.runner import open_runner
from equipoise.errors import IncompatibleError, MissingExtraError, ResourceError, UsageError
from equipoise.stages import StageRunner

needs_ray = pytest.mark.skipif(not extras.installed("ray"), reason="needs the extra cluster")


def opened(tmp_path: Path, cluster: str = "", **changes: object):
    settings: dict[str, object] = {"workers": None, "storage": "", "target": "cpu"}
    return open_runner(cluster, cache=tmp_path / "cache", **{**settings, **changes})  # type: ignore[arg-type]


def test_without_cluster_and_workers_it_is_the_ordinary_runner(tmp_path: Path) -> None:
    """Ray is not even imported."""
    before = "ray" in sys.modules
    for workers in (None, 1):
        with opened(tmp_path, workers=workers) as runner:
            assert type(runner) is StageRunner
            assert runner.slots == 1
    assert ("ray" in sys.modules) == before


@pytest.mark.parametrize("workers", [0, -3])
def test_workers_are_at_least_one(tmp_path: Path, workers: int) -> None:
    with (
        pytest.raises(UsageError, match=f"--workers is {workers}"),
        opened(tmp_path, workers=workers),
    ):
        pytest.fail("it opened")


def test_a_cluster_needs_a_storage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--storage"), opened(tmp_path, "ray://head:10001"):
        pytest.fail("it opened")


@pytest.mark.parametrize(("cluster", "workers"), [("ray://127.0.0.1:1", None), ("", 2)])
def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, workers: int | None
) -> None:
    """For a cluster and for workers on this machine."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingExtraError, match="'ray'"),
        opened(tmp_path, cluster, workers=workers, storage=str(tmp_path)),
    ):
        pytest.fail("it opened")


@needs_ray
@pytest.mark.parametrize(
    "address",
    ["head", "http://head:10001", "ray://head", "head:port", "head:0", "head:99999", ":1"],
)
def test_what_is_no_address_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match="no address") as caught, joined(address):
        pytest.fail("it joined")
    assert "ray://HOST:10001" in caught.value.hint


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port on which somebody takes connections and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()
    for one in taken:
        one.close()


@needs_ray
@pytest.mark.parametrize("form", ["ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_a_port_that_nobody_listens_on_is_told_at_once(closed_port: int, form: str) -> None:
    """Not after minutes."""
    begin = time.monotonic()
    with (
        pytest.raises(ResourceError, match="cannot be reached") as caught,
        joined(form.format(closed_port)),
    ):
        pytest.fail("it joined")
    assert time.monotonic() - begin < 10
    assert str(closed_port) in caught.value.message
    assert "ray start --head" in caught.value.hint


@needs_ray
@pytest.mark.parametrize("form", ["ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_somebody_who_is_no_ray_is_told_soon(
    silent_port: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would end the process, or try again for half a minute."""
    monkeypatch.setattr(connection, "_PROBE_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(ResourceError, match="cannot be reached"), joined(form.format(silent_port)):
        pytest.fail("it joined")
    assert time.monotonic() - begin < 15


@needs_ray
def test_no_cluster_on_this_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    """``auto`` with an address of the environment at which nobody is."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    begin = time.monotonic()
    with (
        pytest.raises(ResourceError, match="cannot be reached"),
        opened(tmp_path, "auto", storage=str(tmp_path)),
    ):
        pytest.fail("it joined")
    assert time.monotonic() - begin < 20


def test_other_versions_of_ray_are_incompatible() -> None:
    """In the words of Ray, which names both."""
    found = connection._translated(
        RuntimeError("Version mismatch: The cluster was started with: Ray: 1.0"), address="h:1"
    )
    assert isinstance(found, IncompatibleError)
    assert "Ray: 1.0" in found.message


def test_a_missing_device_says_how_to_start_one() -> None:
    """A line to copy."""
    assert label_of("cpu") == "equipoise-target-cpu"
    assert """--resources='{"equipoise-target-cpu": 1}'""" in start_line("cpu")
    assert start_line("cpu") in no_device("cpu").hint
    assert "equipoise-target-cpu" in no_device("cpu").message
