"""What the machinery of a search takes besides its trials, and what several workers bring."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.cluster.runner import open_runner
from equipoise.launch import Computed, LaunchHere, Order, lock_of_machine
from equipoise.stages import Stage, StageRunner

NODES: Final = 4
TARGET: Final = "cpu"


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """A real search, and where its time went.

    Attributes:
        trials: Number of recipes tried.
        seconds: Of the whole search.
        in_children: Of that, in child processes that make and measure engines.
        share: The rest: proposals, judgement, journal, hashes, locks, over the whole.
    """

    trials: int
    seconds: float
    in_children: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Recorded trial times slept through on a cluster of nodes on one machine.

    Attributes:
        nodes: Of one CPU each.
        stages: Number of stages.
        slept_s: Sum of their times.
        alone_s: One after the other, without a cluster.
        cluster_s: On all nodes.
        speedup: Of the cluster.
    """

    nodes: int
    stages: int
    slept_s: float
    alone_s: float
    cluster_s: float
    speedup: float


class TimedLaunch:
    """Computes stages here and adds up what their children take."""

    def __init__(self, cache: Path) -> None:
        self._launch = LaunchHere(lock_of_machine(cache))
        self.seconds = 0.0

    def __call__(self, order: Order) -> Computed:
        """See Launch."""
        began = time.monotonic()
        try:
            return self._launch(order)
        finally:
            self.seconds += time.monotonic() - began


@dataclass(frozen=True, kw_only=True)
class Sleep:
    """A stage that takes so long."""

    index: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Slept:
    """What it leaves."""

    index: int


def sleep(config: Sleep, *, output: Path) -> Slept:
    """Take the time, and leave a small file as stages do."""
    time.sleep(config.seconds)
    (output / "slept.txt").write_text(str(config.seconds))
    return Slept(index=config.index)


SLEEP: Final = Stage(name="sleep", function="_machinery:sleep", record=Slept)


def scaling(seconds: Sequence[float]) -> Scaling:
    """Run stages that take ``seconds`` one after the other, and then on four nodes."""
    alone = _timed_alone(seconds)
    with tempfile.TemporaryDirectory() as folder, _nodes() as address:
        place = Path(folder)
        with open_runner(
            address,
            workers=NODES,
            storage=str(place / "storage"),
            target=TARGET,
            cache=place / "cache",
        ) as runner:
            _run([0.1] * NODES, runner, first=1000)  # workers have started then
            began = time.monotonic()
            _run(seconds, runner)
            together = time.monotonic() - began
    return Scaling(
        nodes=NODES,
        stages=len(seconds),
        slept_s=sum(seconds),
        alone_s=alone,
        cluster_s=together,
        speedup=alone / together,
    )


def _timed_alone(seconds: Sequence[float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        runner = StageRunner(Path(folder))
        began = time.monotonic()
        _run(seconds, runner)
        return time.monotonic() - began


def _run(seconds: Sequence[float], runner: StageRunner, *, first: int = 0) -> None:
    """The longest first, as a list schedule wants it."""
    configs = [Sleep(index=first + i, seconds=s) for i, s in enumerate(sorted(seconds)[::-1])]
    with ThreadPoolExecutor(runner.slots) as pool:
        list(pool.map(lambda config: runner.run(SLEEP, config), configs))


@contextmanager
def _nodes() -> Iterator[str]:
    """A local cluster: the device, and four nodes that compute."""
    utilities: Any = extras.require("ray.cluster_utils")
    head = {"num_cpus": 1, "resources": {f"equipoise-target-{TARGET}": 1}}
    cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()
