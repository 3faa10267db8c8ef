"""A real Ray cluster of three nodes on this machine; one carries the label of the device.

Each node has a cache of its own. What a node gets, it gets from the driver through the storage.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.cluster_nodes import TARGET, Nodes, trained, wait_for

from equipoise import extras, pipeline
from equipoise.cluster import launch
from equipoise.cluster.connection import label_of, live_nodes
from equipoise.cluster.device import detect_device
from equipoise.cluster.runner import open_runner
from equipoise.content import tree_sha256
from equipoise.errors import BackendError, DataError, IncompatibleError, ResourceError
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.launch import Ran
from equipoise.pipeline import Pipeline
from equipoise.quantize.schemes import DynamicInt8, StaticInt8
from equipoise.recipe import Recipe
from equipoise.stages import Observer, Stage, StageRunner
from equipoise.targets.machine import detect_machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not extras.installed("ray"), reason="needs the extra cluster"),
]

FUNCTIONS = """
import dataclasses, os, sys, time
from pathlib import Path

from equipoise import progress
from equipoise.errors import DataError
import cluster_helper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    log: str
    source: Path
    number: int = 0
    fate: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    number: int
    cache: str


def work(config: Config, *, output: Path) -> Result:
    with open(config.log, "a") as log:
        log.write(f"{os.getpid()}\\n")
    (output / "half").write_text("written before the end")
    match config.fate:
        case "refuse":
            raise DataError("sample 3 is bad", hint="Mend it.")
        case "sleep":
            time.sleep(600)
        case "busy":
            time.sleep(0.7)
        case "slow":
            time.sleep(8)
        case "die":
            print("last words", file=sys.stderr, flush=True)
            os.abort()
    for step in progress.track(range(4), total=4):
        time.sleep(0.3 if config.fate == "steps" else 0)
        (output / f"{step}.txt").write_text(str(config.number * step))
    size = len(config.source.read_bytes())
    return Result(number=cluster_helper.double(config.number) + size,
                  cache=os.environ["EQUIPOISE_CACHE_DIR"])
"""
HELPER = "def double(number): return 2 * number"


@dataclasses.dataclass
class Bench:
    """The driver's folder: code, a file, a cache and the storage."""

    folder: Path
    functions: Any

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def stage(self, **changes: Any) -> Stage[Any]:
        record = self.functions.Result
        return Stage(
            **{"name": "work", "function": "cluster_work:work", "record": record, **changes}
        )

    def config(self, **changes: Any) -> Any:
        log = str(self.folder / "log")
        return self.functions.Config(log=log, source=self.folder / "source.bin", **changes)

    @property
    def runs(self) -> list[int]:
        """Process identifiers of the calls of the function."""
        log = self.folder / "log"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def opened(self, cluster: str, **changes: Any) -> Any:
        settings = {
            "workers": None,
            "storage": str(self.folder / "storage"),
            "target": TARGET,
            "cache": self.cache,
        }
        return open_runner(cluster, **{**settings, **changes})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "cluster_work.py").write_text(FUNCTIONS)
    (driver / "cluster_helper.py").write_text(HELPER)
    (tmp_path / "source.bin").write_bytes(b"12345")
    monkeypatch.chdir(driver)
    monkeypatch.syspath_prepend(driver)
    yield Bench(folder=tmp_path, functions=importlib.import_module("cluster_work"))
    for name in ("cluster_work", "cluster_helper"):
        sys.modules.pop(name, None)


def found_first(folder: Path) -> str:
    """``PYTHONPATH`` with ``folder`` before what is there."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Heard(Observer):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def advanced(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_stages_go_where_they_belong_and_results_stay(nodes: Nodes, bench: Bench) -> None:
    """What computes avoids the device, what measures goes there; the cache works without them."""
    heard = Heard()
    with bench.opened(nodes.address, observer=heard) as runner:
        assert runner.slots == 2
        computed = runner.run(bench.stage(), bench.config(number=3, fate="steps"))
        measured = runner.run(bench.stage(measures=True), bench.config(number=4))
        assert detect_device(runner, target=TARGET) == detect_machine()
    assert (computed.record.number, measured.record.number) == (11, 13)
    assert (computed.files / "3.txt").read_text() == "9"
    assert computed.ran.node in {nodes.id_of("head"), nodes.id_of("worker")}
    assert measured.ran.node == nodes.id_of("device")
    assert measured.record.cache == str(nodes.folder / "device")
    assert heard.steps
    assert set(heard.steps) <= {(done, 4) for done in range(5)}
    assert (4, 4) in heard.steps
    for result, config in ((computed, {"number": 3, "fate": "steps"}), (measured, {"number": 4})):
        again = StageRunner(bench.cache).run(bench.stage(), bench.config(**config))
        assert again.cached
        assert (again.record, again.ran) == (result.record, result.ran)
    assert len(bench.runs) == 2


def test_an_error_of_ours_arrives_as_itself_and_is_not_tried_again(
    nodes: Nodes, bench: Bench
) -> None:
    """Nothing is kept of it; a child that dies is told with its last words."""
    with bench.opened(nodes.address) as runner:
        with pytest.raises(DataError) as caught:
            runner.run(bench.stage(), bench.config(fate="refuse"))
        assert (caught.value.message, caught.value.hint) == ("sample 3 is bad", "Mend it.")
        assert len(bench.runs) == 1
        with pytest.raises(BackendError, match="was killed by SIGABRT") as died:
            runner.run(bench.stage(), bench.config(fate="die"))
        assert "last words" in died.value.message
        assert len(bench.runs) == 2
        assert runner.run(bench.stage(), bench.config()).record.number == 5
    assert len([p for p in (bench.cache / "work").iterdir() if p.is_dir()]) == 1


def test_measurements_take_turns_on_the_device(nodes: Nodes, bench: Bench) -> None:
    """However many threads ask at once."""
    with bench.opened(nodes.address) as runner, ThreadPoolExecutor(6) as pool:
        measuring = bench.stage(measures=True)
        jobs = [
            pool.submit(runner.run, measuring, bench.config(number=n, fate="busy"))
            for n in range(3)
        ]
        results = [job.result() for job in jobs]
    assert {result.ran.node for result in results} == {nodes.id_of("device")}
    assert not overlapping([result.ran for result in results])


def overlapping(rans: list[Any]) -> bool:
    ordered = sorted(rans, key=lambda ran: ran.began_s)
    return any(b.began_s < a.ended_s for a, b in itertools.pairwise(ordered))


def test_a_node_that_is_lost_loses_nothing(
    nodes: Nodes, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it computed is computed elsewhere, and nothing half-written is to be seen."""
    with bench.opened(nodes.address) as runner, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(runner.run, bench.stage(), bench.config(number=n, fate="slow"))
            for n in (1, 2)
        ]
        wait_for(lambda: len(bench.runs) == 2)
        lost = nodes.id_of("worker")
        nodes.kill("worker")
        results = [job.result() for job in jobs]
        assert any(lost[:8] in text for text in runner._launch.lost)
        time.sleep(2)
    assert capfd.readouterr() == ("", ""), "Ray tells of it in its own logs"
    assert [result.record.number for result in results] == [7, 9]
    assert {result.ran.node for result in results} == {nodes.id_of("head")}
    assert len(bench.runs) == 3
    assert all(
        sorted(p.name for p in r.files.iterdir()) == ["0.txt", "1.txt", "2.txt", "3.txt", "half"]
        for r in results
    )


def test_a_device_that_leaves_and_comes_back_is_waited_for(nodes: Nodes, bench: Bench) -> None:
    """As long as it takes to start it again."""
    measuring = bench.stage(measures=True)
    with bench.opened(nodes.address) as runner, ThreadPoolExecutor(1) as pool:
        job = pool.submit(runner.run, measuring, bench.config(fate="slow"))
        wait_for(lambda: len(bench.runs) == 1)
        nodes.kill("device")
        nodes.add("device", resources={label_of(TARGET): 1})
        assert job.result().ran.node == nodes.id_of("device")


def test_a_device_that_does_not_come_back_is_told(
    nodes: Nodes, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the label and how to start such a node."""
    monkeypatch.setattr(launch, "_DEVICE_BACK_S", 2.0)
    with bench.opened(nodes.address) as runner:
        nodes.kill("device")
        wait_for(
            lambda: not any(n.labelled for n in live_nodes(runner._launch._ray, target=TARGET))
        )
        with pytest.raises(IncompatibleError, match="equipoise-target-cpu") as caught:
            runner.run(bench.stage(measures=True), bench.config())
        assert "ray start" in caught.value.hint


def test_a_cluster_without_the_device_is_told_at_once(nodes: Nodes, bench: Bench) -> None:
    """Before anything is computed."""
    begin = time.monotonic()
    with (
        pytest.raises(IncompatibleError, match="'equipoise-target-jetson'") as caught,
        bench.opened(nodes.address, target="jetson"),
    ):
        pytest.fail("it opened")
    assert """--resources='{"equipoise-target-jetson": 1}'""" in caught.value.hint
    assert time.monotonic() - begin < 15


def test_a_node_with_another_version_of_a_package_is_named(
    nodes: Nodes, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions, and which node."""
    monkeypatch.syspath_prepend(bench.folder / "installed")
    for place, version in ((bench.folder / "installed", "2.0"), (nodes.folder / "other", "1.0")):
        info = place / f"cluster_probe-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: cluster-probe\nVersion: {version}\n"
        )
    nodes.kill("worker")
    nodes.kill("device")
    environment = {"PYTHONPATH": found_first(nodes.folder / "other")}
    nodes.add("device", resources={label_of(TARGET): 1}, environment=environment)
    stage = bench.stage(packages=("cluster-probe",), measures=True)
    with bench.opened(nodes.address) as runner:
        with pytest.raises(IncompatibleError, match=r"cluster-probe 1\.0 \(here: 2\.0\)") as caught:
            runner.run(stage, bench.config())
        assert nodes.id_of("device")[:8] in caught.value.message
    assert bench.runs == []


def test_the_deadline_and_the_limits_hold_on_a_cluster(nodes: Nodes, bench: Bench) -> None:
    """What runs is ended there, and the node takes the next stage."""
    with bench.opened(nodes.address, time_limit_s=3) as runner:
        with pytest.raises(ResourceError, match="within 3 s"):
            runner.run(bench.stage(), bench.config(fate="sleep"))
        runner.stop_at(time.monotonic() + 2)
        with pytest.raises(ResourceError, match="the time of this run was over"):
            runner.run(bench.stage(), bench.config(fate="sleep", number=1))
        wait_for(lambda: not any(alive(pid) for pid in bench.runs))
        runner.stop_at(None)
        assert runner.run(bench.stage(), bench.config()).record.number == 5
    with (
        bench.opened(nodes.address, memory_limit_bytes=1_000_000) as runner,
        pytest.raises(ResourceError, match="its limit is 1,000,000"),
    ):
        runner.run(bench.stage(), bench.config(fate="sleep"))


def test_files_go_through_a_server_where_machines_share_none(
    nodes: Nodes, bench: Bench, ftp_url: str
) -> None:
    """Over a real FTP server, by a driver that is itself no node: through Ray's client."""
    address = f"ray://127.0.0.1:{nodes.client_port}"
    with bench.opened(address, storage=f"{ftp_url}/cluster") as runner:
        result = runner.run(bench.stage(), bench.config(number=7))
        measured = runner.run(bench.stage(measures=True), bench.config(number=8))
        with pytest.raises(DataError, match="sample 3"):
            runner.run(bench.stage(), bench.config(fate="refuse"))
    assert (result.record.number, measured.record.number) == (19, 21)
    assert (result.files / "3.txt").read_text() == "21"
    assert measured.ran.node == nodes.id_of("device")


RECIPES = (
    Recipe(name="float", summary="As it is."),
    Recipe(name="static", summary="Static integers.", quantization=StaticInt8()),
    Recipe(name="dynamic", summary="Dynamic integers.", quantization=DynamicInt8()),
)


def went(line: Pipeline, recipe: Recipe, *, baseline: Path) -> dict[str, Any]:
    """Everything that comes of a recipe, without what is a matter of time."""
    made = line.make(recipe)
    built = line.build(made.model, label=recipe.name)
    engine = built.files / built.record.file
    evaluated = line.evaluate(engine, label=recipe.name)
    timed = line.latency(engine, baseline=baseline, label=recipe.name)
    assert timed.rounds > 0
    return {
        "notes": made.notes,
        "model": tree_sha256(made.model.parent),
        "engine": tree_sha256(engine.parent),
        "built": dataclasses.asdict(dataclasses.replace(built.record, build_s=0.0)),
        "evaluated": dataclasses.asdict(evaluated.record),
        "statistics": tree_sha256(evaluated.files),
    }


def all_of(line: Pipeline, *, threads: int) -> dict[str, Any]:
    """What comes of all recipes, so many at once."""
    baseline = line.build(line.float_model, label="float")
    file = baseline.files / baseline.record.file
    with ThreadPoolExecutor(threads) as pool:
        jobs = {r.name: pool.submit(went, line, r, baseline=file) for r in RECIPES}
        return {name: job.result() for name, job in jobs.items()}


def kept(cache: Path) -> dict[str, Any]:
    """Stage and key -> where and when it ran, of everything in a cache."""
    found = {}
    for file in cache.glob("*/*/record.json"):
        ran = json.loads(file.read_text())["ran"]
        found[f"{file.parent.parent.name}/{file.parent.name}"] = Ran(**ran)
    return found


def test_a_pipeline_gives_the_same_as_on_one_machine_while_a_node_dies(
    nodes: Nodes, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record and every byte but times; where each stage ran is in the cache."""
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(repository)
    timing = dataclasses.replace(pipeline.LATENCY, measures=True)
    monkeypatch.setattr(pipeline, "LATENCY", timing)
    config = JobConfig(
        source="module:examples.digits.model:build",
        data="digits",
        weights=trained(tmp_path, monkeypatch),
        metric="accuracy",
        samples=200,
        calibration_samples=32,
        threads=1,
        rounds=12,
        cache=tmp_path / "local",
    )
    here = make_pipeline(config)
    alone = all_of(here, threads=1)
    with open_runner(
        nodes.address, workers=None, storage=str(tmp_path / "storage"), target=TARGET,
        cache=tmp_path / "driver",
    ) as runner:  # fmt: skip
        killer = threading.Thread(target=kill_while_busy, args=(nodes, runner))
        killer.start()
        spread = all_of(Pipeline(here.job, runner=runner), threads=3)
        killer.join(60)
        assert "worker" not in nodes.by_name
        assert runner._launch.lost, "the node died with a stage on it"
    assert spread == alone
    check_places(nodes, kept(tmp_path / "driver"))
    assert set(kept(tmp_path / "driver")) == set(kept(tmp_path / "local"))


def kill_while_busy(nodes: Nodes, runner: StageRunner) -> None:
    """End the worker while a child of its own works there, after it has done something."""
    worker = nodes.id_of("worker")
    wait_for(lambda: list((nodes.folder / "worker").glob("inputs/*")), seconds=300)
    wait_for(lambda: runner._launch._running[worker], seconds=300)
    time.sleep(1)
    wait_for(lambda: runner._launch._running[worker], seconds=300)
    nodes.kill("worker")


def check_places(nodes: Nodes, found: dict[str, Any]) -> None:
    """Only measurements ran on the device, one at a time, and nothing else ever did."""
    device = nodes.id_of("device")
    measured = {key for key in found if key.startswith("latency/")}
    assert len(measured) == len(RECIPES)
    assert {key for key, ran in found.items() if ran.node == device} == measured
    assert not overlapping([found[key] for key in measured])


WORKERS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import cluster_work
from equipoise.cluster.runner import open_runner
from equipoise.stages import Stage

stage = Stage(name="work", function="cluster_work:work", record=cluster_work.Result)
measuring = replace(stage, name="measure", measures=True)
source = Path("../source.bin")
config = lambda n: cluster_work.Config(log="log", source=source, number=n, fate="busy")
with open_runner("", workers=3, storage="", target="cpu", cache=Path("cache")) as runner:
    assert runner.slots == 3
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(runner.run, s, config(n)) for n in range(2) for s in (measuring, stage)]
        results = [job.result() for job in jobs]
rans = [result.ran for result in results]
measured = rans[::2]
for one in measured:
    assert not any(
        one is not other and one.began_s < other.ended_s and other.began_s < one.ended_s
        for other in rans
    )
print([result.record.number for result in results])
"""


def test_workers_on_this_machine_are_quiet_and_measure_alone(bench: Bench) -> None:
    """Nothing of Ray's reaches the terminal, and nothing of it is left running."""
    environment = {**os.environ, "PYTHONPATH": found_first(bench.folder / "driver")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKERS)],
        cwd=bench.folder / "driver",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[5, 5, 7, 7]\n"
