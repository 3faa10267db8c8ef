"""Stages and their cache: nothing runs twice, nothing stale or broken is used."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from equipoise import stages
from equipoise.errors import BackendError, DataError, ResourceError
from equipoise.stages import Observer, Stage, StageResult, StageRunner, stage_key

FUNCTIONS = """
import dataclasses, os, signal, time
from pathlib import Path

from equipoise import progress
from equipoise.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    source: Path
    log: str
    factor: int = 2
    fate: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    total: int
    note: str


def count(config: Config, *, output: Path) -> Result:
    with open(config.log, "a") as log:
        log.write(f"{os.getpid()}\\n")
    (output / "half").write_text("written before the end")
    match config.fate:
        case "refuse":
            raise DataError("sample 3 is bad", hint="Mend it.")
        case "sleep":
            time.sleep(600)
        case "eat":
            eaten = b"x" * 300_000_000
            time.sleep(600)
        case "busy":
            time.sleep(0.4)
        case fate if fate.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fate))
    total = config.factor * len(config.source.read_bytes())
    (output / "deep").mkdir()
    for step in progress.track(range(3), total=3):
        (output / "deep" / f"{step}.txt").write_text(str(total))
    return Result(total=total, note="made")
"""


class Heard(Observer):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def started(self, label: str) -> None:
        self.events.append(("started", label))

    def advanced(self, done: int, total: int) -> None:
        self.events.append(("advanced", done, total))

    def ended(self, label: str, *, cached: bool) -> None:
        self.events.append(("ended", label, cached))


@dataclasses.dataclass
class Bench:
    """A stage that logs its runs, a source file for it and a cache."""

    folder: Path
    functions: ModuleType
    stage: Stage[Any]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def source(self) -> Path:
        return self.folder / "source.bin"

    @property
    def runs(self) -> int:
        """How often the function has run."""
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def config(self, **changes: Any) -> Any:
        settings = {"source": self.source, "log": str(self.folder / "log"), **changes}
        return self.functions.Config(**settings)

    def measuring(self) -> Stage[Any]:
        """The same stage as one that measures."""
        return dataclasses.replace(self.stage, name="measure", measures=True)

    def run(self, *, observer: Observer | None = None, **changes: Any) -> StageResult[Any]:
        """Run the stage as a new command would."""
        return StageRunner(self.cache, observer=observer).run(self.stage, self.config(**changes))

    def kept(self) -> list[str]:
        """Directories in the cache of the stage."""
        folder = self.cache / self.stage.name
        return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """See Bench; the functions lie in the current directory, where the child finds them too."""
    (tmp_path / "stage_functions.py").write_text(FUNCTIONS)
    (tmp_path / "source.bin").write_bytes(b"12345")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    functions = importlib.import_module("stage_functions")
    stage = Stage(name="count", function="stage_functions:count", record=functions.Result)
    yield Bench(folder=tmp_path, functions=functions, stage=stage)
    del sys.modules["stage_functions"]


def test_the_second_run_is_cached(bench: Bench) -> None:
    """Same record, same files, no second call."""
    first, second = bench.run(), bench.run()
    assert (first.cached, second.cached) == (False, True)
    assert first.record == second.record == bench.functions.Result(total=10, note="made")
    assert first.files == second.files
    assert (second.files / "deep" / "2.txt").read_text() == "10"
    assert bench.runs == 1


def test_a_changed_config_runs_again(bench: Bench) -> None:
    """And the old result stays for when it is asked for again."""
    bench.run()
    assert bench.run(factor=3).record.total == 15
    assert bench.run().cached
    assert bench.runs == 2


def test_changed_content_of_an_input_file_runs_again(bench: Bench) -> None:
    """Under the same name; and the old content finds the old result."""
    bench.run()
    bench.source.write_bytes(b"123456789")
    assert bench.run().record.total == 18
    bench.source.write_bytes(b"12345")
    assert bench.run().cached


def test_an_input_of_the_same_content_elsewhere_is_the_same_input(bench: Bench) -> None:
    """A key is of contents, not of names."""
    bench.run()
    other = bench.folder / "other.bin"
    other.write_bytes(b"12345")
    assert bench.run(source=other).cached


def test_a_directory_as_input_counts_with_its_names_and_contents(tmp_path: Path) -> None:
    """Adding, renaming and changing a file below it each change the key."""
    folder = tmp_path / "data"
    folder.mkdir()
    seen = set()
    for change in (
        lambda: None,
        lambda: (folder / "a").write_text("1"),
        lambda: (folder / "a").write_text("22"),
        lambda: (folder / "a").rename(folder / "b"),
        (folder / "deep").mkdir,
        lambda: (folder / "b").rename(folder / "deep" / "b"),
    ):
        change()
        seen.add(stages.content_sha256(folder))
    assert len(seen) == 5, "an empty directory alone changes nothing"


def test_a_missing_input_has_a_key_of_its_own(bench: Bench) -> None:
    """A stage that failed for want of a file runs when the file is there."""
    missing = bench.config(source=bench.folder / "none.bin")
    assert stage_key(bench.stage, missing) != stage_key(bench.stage, bench.config())
    assert stages.content_sha256(bench.folder / "a") != stages.content_sha256(bench.folder / "b")


def test_a_field_that_changes_no_result_is_not_in_the_key(bench: Bench) -> None:
    """``NOT_IN_KEY`` leaves one field out, in a nested config too, and no other."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inner:
        kept: int
        place: str = dataclasses.field(default="", metadata=stages.NOT_IN_KEY)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer:
        inner: Inner
        threads: int = dataclasses.field(default=1, metadata=stages.NOT_IN_KEY)

    keys = [
        stage_key(bench.stage, Outer(inner=inner, threads=threads))
        for inner, threads in (
            (Inner(kept=1), 1),
            (Inner(kept=1, place="elsewhere"), 2),
            (Inner(kept=2), 1),
        )
    ]
    assert keys[0] == keys[1] != keys[2]


def test_each_process_of_a_distributed_run_has_a_cache_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first process made, the second makes too: they have to run a stage together."""
    bench.run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert bench.run().cached
    monkeypatch.setenv("RANK", "1")
    assert not bench.run().cached
    assert bench.run().cached


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"function": "a:b"}, {"packages": ("numpy",)}]
)
def test_stage_name_function_and_packages_are_in_the_key(
    bench: Bench, change: dict[str, Any]
) -> None:
    """Two stages never share a result."""
    other = dataclasses.replace(bench.stage, **change)
    assert stage_key(other, bench.config()) != stage_key(bench.stage, bench.config())


def test_versions_are_those_installed() -> None:
    """An absent package is part of the key too."""
    found = stages.versions_of(("numpy", "no-such-package"))
    assert found == {
        "numpy": importlib.import_module("numpy").__version__,
        "no-such-package": "missing",
    }


def _one(files: Path) -> Path:
    return files / "deep" / "1.txt"


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda r: _one(r.files).write_text("99"), id="changed"),
        pytest.param(lambda r: _one(r.files).unlink(), id="removed"),
        pytest.param(lambda r: (r.files / "extra").write_text(""), id="added"),
        pytest.param(lambda r: _record(r).write_text("{"), id="record-cut"),
        pytest.param(lambda r: _record(r).unlink(), id="record-removed"),
        pytest.param(lambda r: _record(r).write_bytes(b"\xff\xfe"), id="record-noise"),
        pytest.param(lambda r: _replace(_record(r), "made", "mode"), id="record-value"),
        pytest.param(lambda r: _replace(_record(r), "total", "tital"), id="record-key"),
    ],
)
def test_a_corrupted_result_is_made_again(bench: Bench, corrupt: Any) -> None:
    """Whatever byte of it changed, it is as if it were not there."""
    corrupt(bench.run())
    again = bench.run()
    assert not again.cached
    assert again.record == bench.functions.Result(total=10, note="made")
    assert _one(again.files).read_text() == "10"
    assert bench.run().cached


def _record(result: StageResult[Any]) -> Path:
    return result.files.parent / "record.json"


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_fresh_runs_again_and_replaces(bench: Bench) -> None:
    """``fresh`` trusts nothing that is kept."""
    bench.run()
    again = StageRunner(bench.cache, fresh=True).run(bench.stage, bench.config())
    assert not again.cached
    assert bench.runs == 2
    assert len(bench.kept()) == 1


def test_an_error_crosses_and_nothing_is_kept(bench: Bench) -> None:
    """Class, message and hint; the next run runs."""
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            bench.run(fate="refuse")
        assert (caught.value.message, caught.value.hint) == ("sample 3 is bad", "Mend it.")
    assert bench.kept() == []
    assert bench.runs == 2


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_killed_child_leaves_no_directory_in_the_cache(bench: Bench, name: str) -> None:
    """The error names the signal; what was half-written is gone; another config still runs."""
    with pytest.raises(BackendError, match=f"was killed by {name}"):
        bench.run(fate=name)
    assert bench.kept() == []
    assert bench.run().record.total == 10


def test_a_stage_over_its_time_limit_leaves_nothing(bench: Bench) -> None:
    """ResourceError, and no directory."""
    runner = StageRunner(bench.cache, time_limit_s=2)
    with pytest.raises(ResourceError, match="within 2 s"):
        runner.run(bench.stage, bench.config(fate="sleep"))
    assert bench.kept() == []


def test_a_failed_rerun_keeps_the_old_result_of_another_key(bench: Bench) -> None:
    """Failure of one config does not cost the result of another."""
    bench.run()
    with pytest.raises(DataError):
        bench.run(fate="refuse")
    assert bench.run().cached


def test_an_observer_hears_start_progress_and_end(bench: Bench) -> None:
    """In this order; a cached stage has no progress."""
    first, second = Heard(), Heard()
    bench.run(observer=first)
    bench.run(observer=second)
    assert first.events[0] == ("started", "count")
    assert first.events[-2:] == [("advanced", 3, 3), ("ended", "count", False)]
    assert second.events == [("started", "count"), ("ended", "count", True)]


def test_a_label_tells_a_person_what_it_does(bench: Bench) -> None:
    """It is heard in the place of the stage's name and is not in the key."""
    heard = Heard()
    bench.run()
    runner = StageRunner(bench.cache, observer=heard)
    assert runner.run(bench.stage, bench.config(), label="int8: count").cached
    assert heard.events[0] == ("started", "int8: count")


COMMAND = """
import sys
from pathlib import Path
import stage_functions
from equipoise.stages import Stage, StageRunner

stage = Stage(name="count", function="stage_functions:count", record=stage_functions.Result)
config = stage_functions.Config(source=Path("source.bin"), log=sys.argv[1], fate=sys.argv[2])
print(StageRunner(Path("cache")).run(stage, config).cached)
"""


def command(bench: Bench, fate: str = "") -> subprocess.Popen[str]:
    """The stage in a process of its own, as from a command line."""
    arguments = [sys.executable, "-c", COMMAND, str(bench.folder / "log"), fate]
    return subprocess.Popen(arguments, cwd=bench.folder, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_goes_on_where_it_was(bench: Bench, number: signal.Signals) -> None:
    """Finished stages are kept, the unfinished one is not seen, and no lock is left."""
    bench.run()
    stopped = command(bench, "sleep")
    end = time.monotonic() + 20
    while bench.runs < 2 and time.monotonic() < end:
        time.sleep(0.02)
    stopped.send_signal(number)
    stopped.communicate(timeout=20)
    assert bench.runs == 2
    assert bench.run().cached
    key = stage_key(bench.stage, bench.config(fate="sleep"))
    assert not (bench.cache / "count" / key).exists()
    with pytest.raises(ResourceError):
        StageRunner(bench.cache, time_limit_s=1).run(bench.stage, bench.config(fate="sleep"))


def test_two_commands_at_once_run_a_stage_once(bench: Bench) -> None:
    """One waits for the other and takes its result."""
    both = [command(bench), command(bench)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert said == ["False", "True"]
    assert bench.runs == 1


def together(runner: StageRunner, *work: tuple[Stage[Any], Any]) -> list[StageResult[Any]]:
    """Run stages in a thread each; the results in the same order."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [f.result() for f in [pool.submit(runner.run, *one) for one in work]]


def overlap(one: StageResult[Any], other: StageResult[Any]) -> bool:
    """Whether two stages were computed at the same time."""
    assert one.ran is not None
    assert other.ran is not None
    return one.ran.began_s < other.ran.ended_s and other.ran.began_s < one.ran.ended_s


def test_threads_that_want_the_same_compute_it_once(bench: Bench) -> None:
    """One computes, the others wait for it and take what is kept."""
    runner = StageRunner(bench.cache)
    results = together(runner, *[(bench.stage, bench.config(fate="busy"))] * 4)
    assert sorted(result.cached for result in results) == [False, True, True, True]
    assert bench.runs == 1
    assert len({result.record for result in results}) == 1


def test_what_computes_runs_side_by_side(bench: Bench) -> None:
    """Stages of different threads do not wait for each other."""
    runner = StageRunner(bench.cache)
    configs = [bench.config(fate="busy", factor=factor) for factor in (2, 3)]
    first, second = together(runner, *((bench.stage, config) for config in configs))
    assert (first.record.total, second.record.total) == (10, 15)
    assert overlap(first, second)


def test_what_measures_has_the_machine_to_itself(bench: Bench) -> None:
    """Neither another measurement nor anything that computes runs meanwhile."""
    work = [(bench.measuring(), bench.config(fate="busy", factor=n)) for n in (2, 3)]
    work += [(bench.stage, bench.config(fate="busy", factor=n)) for n in (4, 5)]
    results = together(StageRunner(bench.cache), *work)
    for index, measured in enumerate(results[:2]):
        assert not any(overlap(measured, r) for i, r in enumerate(results) if i != index)


def test_two_commands_do_not_disturb_each_others_measurements(bench: Bench) -> None:
    """Each has a runner of its own, as two processes have; the lock lies in the cache."""
    runners = [StageRunner(bench.cache), StageRunner(bench.cache)]
    stages_and_factors = ((bench.measuring(), 2), (bench.stage, 3))
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(runner.run, stage, bench.config(fate="busy", factor=factor))
            for runner, (stage, factor) in zip(runners, stages_and_factors, strict=True)
        ]
        first, second = (job.result() for job in jobs)
    assert not overlap(first, second)


def test_a_result_says_where_and_when_it_was_computed(bench: Bench) -> None:
    """Also when it is found again."""
    before = time.time()
    first, second = bench.run(), bench.run()
    assert first.ran == second.ran
    assert first.ran is not None
    assert first.ran.host == platform.node()
    assert before <= first.ran.began_s < first.ran.ended_s <= time.time()


def test_a_result_that_does_not_say_where_it_ran_is_still_found(bench: Bench) -> None:
    """Earlier versions did not keep that."""
    place = bench.run().files.parent / "record.json"
    entry = json.loads(place.read_text())
    del entry["ran"]
    place.write_text(json.dumps(entry))
    again = bench.run()
    assert again.cached
    assert again.ran is None


def test_the_deadline_ends_a_stage_that_runs(bench: Bench) -> None:
    """With an error that says that the run is over, not that the stage is too slow."""
    runner = StageRunner(bench.cache)
    runner.stop_at(time.monotonic() + 2)
    begin = time.monotonic()
    with pytest.raises(
        ResourceError, match="the time of this run was over before the stage 'count'"
    ):
        runner.run(bench.stage, bench.config(fate="sleep"))
    assert time.monotonic() - begin < 20
    assert bench.kept() == []


def test_after_the_deadline_what_is_kept_is_found_and_nothing_starts(bench: Bench) -> None:
    """Until it is lifted."""
    runner = StageRunner(bench.cache)
    runner.run(bench.stage, bench.config())
    runner.stop_at(time.monotonic() - 1)
    assert runner.run(bench.stage, bench.config()).cached
    with pytest.raises(ResourceError, match="was over"):
        runner.run(bench.stage, bench.config(factor=3))
    assert bench.runs == 1
    runner.stop_at(None)
    assert runner.run(bench.stage, bench.config(factor=3)).record.total == 15


def test_the_deadline_holds_while_waiting_for_another(bench: Bench) -> None:
    """For a machine that somebody measures on, and for a key that somebody computes."""
    busy, late = StageRunner(bench.cache), StageRunner(bench.cache)
    with ThreadPoolExecutor(1) as pool:
        busy.stop_at(time.monotonic() + 3)
        work = pool.submit(busy.run, bench.measuring(), bench.config(fate="sleep"))
        wait_until(lambda: bench.runs == 1)
        for stage, fate in ((bench.stage, ""), (bench.measuring(), "sleep")):
            late.stop_at(time.monotonic() + 0.3)
            with pytest.raises(ResourceError, match="was over"):
                late.run(stage, bench.config(fate=fate))
        assert not work.done()
        with pytest.raises(ResourceError):
            work.result()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds, for twenty seconds at most."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stage_over_its_memory_limit_leaves_nothing(bench: Bench) -> None:
    """ResourceError, and no directory."""
    runner = StageRunner(bench.cache, memory_limit_bytes=200_000_000)
    with pytest.raises(ResourceError, match="its limit is 200,000,000"):
        runner.run(bench.stage, bench.config(fate="eat"))
    assert bench.kept() == []


def test_an_observer_hears_of_failure(bench: Bench) -> None:
    """Also when the stage never began."""
    heard = Failed()
    runner = StageRunner(bench.cache, observer=heard)
    runner.stop_at(time.monotonic() - 1)
    with pytest.raises(ResourceError):
        runner.run(bench.stage, bench.config(), label="count them")
    assert heard.labels == ["count them"]


class Failed(Observer):
    """Keeps what failed."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def failed(self, label: str) -> None:
        self.labels.append(label)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """``EQUIPOISE_CACHE_DIR``, and a directory of the user without it."""
    monkeypatch.setenv("EQUIPOISE_CACHE_DIR", "/somewhere/else")
    assert stages.default_cache() == Path("/somewhere/else")
    monkeypatch.delenv("EQUIPOISE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user/cache")
    assert "equipoise" in stages.default_cache().parts


def test_these_tests_have_a_cache_of_their_own() -> None:
    """No test touches the user's cache."""
    assert "equipoise-tests-" in os.environ["EQUIPOISE_CACHE_DIR"]
