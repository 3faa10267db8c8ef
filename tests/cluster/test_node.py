"""The node's part of a stage, called as Ray calls it; what crosses is text."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest

from equipoise import record
from equipoise.cluster import node
from equipoise.cluster.code import code_of, send_code
from equipoise.cluster.mailbox import Mailbox, teller
from equipoise.cluster.messages import Outcome, Request, Versions
from equipoise.cluster.parcels import pack
from equipoise.cluster.storage import Storage
from equipoise.cluster.versions import check_versions, versions_here
from equipoise.errors import DataError, IncompatibleError, IntegrityError, ResourceError

FUNCTIONS = """
import dataclasses, os, time
from pathlib import Path

from equipoise import progress
from equipoise.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    source: Path
    fate: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    size: int
    source: str
    threads: str


def measure(config: Config, *, output: Path) -> Result:
    match config.fate:
        case "refuse":
            raise DataError("sample 3 is bad", hint="Mend it.")
        case "sleep":
            time.sleep(600)
    (output / "deep").mkdir()
    for step in progress.track(range(3), total=3):
        (output / "deep" / f"{step}.bin").write_bytes(config.source.read_bytes() * step)
    size = len(config.source.read_bytes())
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return Result(size=size, source=str(config.source), threads=threads)
"""


class Post:
    """The mailbox as a node sees it: an actor whose methods have ``remote``."""

    def __init__(self) -> None:
        self.box = Mailbox()
        self.tell = self

    def remote(self, key: str, done: int, total: int) -> None:
        self.box.tell(key, done, total)


@dataclasses.dataclass
class Bench:
    folder: Path
    functions: Any

    @property
    def storage(self) -> Storage:
        return Storage(str(self.folder / "storage"))

    def request(self, **changes: Any) -> Request:
        fate = changes.pop("fate", "")
        config = self.functions.Config(source=self.folder / "source.bin", fate=fate)
        code = code_of("node_functions:measure", record.dumps(config))
        settings = {
            "stage": "measure",
            "function": "node_functions:measure",
            "measures": False,
            "config": record.dumps(config),
            "parcels": pack(config, storage=self.storage),
            "code": send_code(code.folders, storage=self.storage),
            "storage": self.storage.url,
            "cache": str(self.folder / "node"),
            "time_limit_s": 60.0,
            "memory_limit_bytes": None,
        }
        return Request(**{**settings, **changes})

    def perform(
        self, request: Request, *, versions: Versions | None = None, post: Post | None = None
    ) -> Outcome:
        text = node.perform(
            record.dumps(request),
            versions=record.dumps(versions or versions_here(("numpy",))),
            node="0123456789abcdef",
            key="key",
            mailbox=post or Post(),
        )
        return record.loads(Outcome, text, where="outcome")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A driver's folder with code and a file; the node runs somewhere else."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "node_functions.py").write_text(FUNCTIONS)
    (tmp_path / "source.bin").write_bytes(b"12345")
    monkeypatch.chdir(tmp_path / "driver")
    monkeypatch.syspath_prepend(tmp_path / "driver")
    return Bench(folder=tmp_path, functions=importlib.import_module("node_functions"))


def test_a_node_computes_with_copies_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """Without the driver's files; record, outputs and where it ran come back."""
    request = bench.request()
    for file in (tmp_path / "source.bin", tmp_path / "driver" / "node_functions.py"):
        file.unlink()
    begin = time.time()
    outcome = bench.perform(request)
    assert outcome.failure is None
    assert '"size": 5' in outcome.record
    assert str(tmp_path / "node" / "inputs") in outcome.record
    assert sorted(outcome.files) == ["deep/0.bin", "deep/1.bin", "deep/2.bin"]
    bench.storage.get_tree(outcome.files, to=tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "2.bin").read_bytes() == b"1234512345"
    ran = outcome.ran
    assert (ran.node, ran.host) == ("0123456789abcdef", platform.node())
    assert begin <= ran.began_s < ran.ended_s <= time.time()


def test_progress_reaches_the_mailbox(bench: Bench) -> None:
    """Its last step in any case."""
    post = Post()
    bench.perform(bench.request(), post=post)
    assert post.box.read("key") == (3, 3)
    post.box.forget("key")
    assert post.box.read("key") is None


def test_progress_is_told_now_and_then() -> None:
    """A stage with thousands of steps does not flood the cluster."""
    heard: list[int] = []
    post = Post()
    post.remote = lambda _key, done, _total: heard.append(done)  # type: ignore[method-assign]
    tell = teller(post, key="key")
    for done in range(1001):
        tell(done, 1000)
    assert heard[-1] == 1000
    assert len(heard) < 20


def test_an_error_of_ours_comes_back_as_itself(bench: Bench) -> None:
    """Class, message and hint; no record, no files."""
    outcome = bench.perform(bench.request(fate="refuse"))
    assert outcome.failure is not None
    error = outcome.failure.raised()
    assert type(error) is DataError
    assert (error.message, error.hint) == ("sample 3 is bad", "Mend it.")
    assert (outcome.record, outcome.files) == ("", {})


def test_limits_hold_on_the_node(bench: Bench) -> None:
    """Time and memory."""
    late = bench.perform(bench.request(fate="sleep", time_limit_s=1.0)).failure
    assert late is not None
    assert isinstance(late.raised(), ResourceError)
    assert "within 1 s" in late.message
    large = bench.perform(bench.request(fate="sleep", memory_limit_bytes=1_000_000)).failure
    assert large is not None
    assert "its limit is 1,000,000" in large.message


def test_a_damaged_input_is_an_integrity_error(bench: Bench) -> None:
    """The function is not called."""
    request = bench.request()
    (sha256,) = request.parcels[0].files.values()
    (Path(request.storage) / sha256).write_bytes(b"54321")
    failure = bench.perform(request).failure
    assert failure is not None
    assert isinstance(failure.raised(), IntegrityError)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"packages": {"numpy": "0.1"}}, r"numpy \d.*\(here: 0\.1\)"),
        ({"packages": {"no-such-package": "3"}}, r"no-such-package missing \(here: 3\)"),
        ({"python": "2.7.18"}, rf"Python 3\.{platform.python_version_tuple()[1]} \(here: 2\.7\)"),
        ({"code_sha256": "f" * 64}, "equipoise .* with code .*here: .* with code ffffffffffff"),
        ({"equipoise": "99.0"}, r"equipoise .*\(here: 99\.0 with code"),
    ],
)
def test_other_versions_on_a_node_are_named_on_both_sides(
    bench: Bench, change: dict[str, Any], found: str
) -> None:
    """Before anything of the request is looked at."""
    versions = dataclasses.replace(versions_here(("numpy",)), **change)
    failure = bench.perform(bench.request(), versions=versions).failure
    assert failure is not None
    error = failure.raised()
    assert isinstance(error, IncompatibleError)
    import re

    assert re.search(found, error.message)
    assert error.message.startswith("node 01234567 (")
    assert not (bench.folder / "node").exists()


def test_a_driver_with_other_messages_is_incompatible(bench: Bench) -> None:
    """Another version of equipoise may send what this one cannot read."""
    text = node.perform("{}", versions='{"release": 7}', node="0" * 16, key="key", mailbox=Post())
    failure = record.loads(Outcome, text, where="outcome").failure
    assert failure is not None
    assert isinstance(failure.raised(), IncompatibleError)
    assert "another equipoise" in failure.message
    assert bench.folder.exists()


def test_the_last_part_of_pythons_version_may_differ() -> None:
    """3.11.2 computes what 3.11.9 does."""
    here = versions_here(())
    major, minor, _ = platform.python_version_tuple()
    check_versions(dataclasses.replace(here, python=f"{major}.{minor}.99"), node="node")


def test_what_ray_sets_for_its_tasks_does_not_reach_a_stage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make the number of threads, and so the last bits, a matter of who started it."""
    parent = Path(f"/proc/{os.getppid()}/environ")
    if not parent.exists():
        pytest.skip("no /proc")
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outcome = bench.perform(bench.request())
    assert '"threads": "17"' not in outcome.record


def test_a_node_without_a_named_cache_takes_its_own(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that its environment names."""
    monkeypatch.setenv("EQUIPOISE_CACHE_DIR", str(tmp_path / "own"))
    assert bench.perform(bench.request(cache="")).failure is None
    assert (tmp_path / "own" / "inputs").is_dir()
