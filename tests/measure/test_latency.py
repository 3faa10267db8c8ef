"""Interleaved timing, on a clock that the test winds by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from equipoise.data.store import Rows, write_rows
from equipoise.errors import InputError, UsageError
from equipoise.measure import latency
from equipoise.measure.bench import bench
from equipoise.measure.glimpse import Glimpse
from equipoise.measure.latency import (
    LatencyConfig,
    LatencyRecord,
    interleave,
    measure_latency,
    plan_of,
    spread,
    time_engines,
    timed_openings,
)
from equipoise.measure.stopping import measure_until_narrow
from equipoise.record import dumps as to_text
from equipoise.record import loads
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings


class Clock:
    """Seconds that pass only while a session runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Session:
    """Takes ``cost(seconds so far)`` seconds of the clock, and notes whom it ran after."""

    def __init__(self, name: str, clock: Clock, log: list, cost: Callable[[float], float]) -> None:
        self._name, self._clock, self._log, self._cost = name, clock, log, cost

    def run(self, feeds: dict) -> dict:
        self._log.append((self._name, int(feeds["x"])))
        self._clock.now += self._cost(self._clock.now)
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


SAMPLES = [{"x": np.array(i)} for i in range(3)]


def test_times_are_milliseconds_per_inference(clock: Clock) -> None:
    """Whatever number of runs fills a block."""
    log: list = []
    sessions = [Session("a", clock, log, lambda _: 0.002), Session("b", clock, log, lambda _: 3e-4)]
    times = interleave(sessions, SAMPLES, rounds=5)
    assert times.shape == (5, 2)
    np.testing.assert_allclose(times, [[2.0, 0.3]] * 5)


def test_ratio_stands_while_the_machine_slows_down(clock: Clock) -> None:
    """A clock rate that falls to a third during the rounds leaves twice as fast twice as fast."""
    log: list = []
    slower = [
        Session("float", clock, log, lambda now: 0.010 * (1 + 2 * now)),
        Session("int8", clock, log, lambda now: 0.005 * (1 + 2 * now)),
    ]
    times = interleave(slower, SAMPLES, rounds=60)
    assert times[-1, 0] > 3 * times[0, 0]
    assert np.median(times[:, 0] / times[:, 1]) == pytest.approx(2, rel=0.02)


def test_samples_and_order_take_turns(clock: Clock) -> None:
    """Each round has the next sample and the opposite order; each session runs each sample."""
    log: list = []
    sessions = [Session(n, clock, log, lambda _: 0.01) for n in "ab"]
    interleave(sessions, SAMPLES, rounds=4)
    assert [turn for turn, _ in itertools.groupby(log)][-8:] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0)
    ]  # fmt: skip


def test_what_another_engine_left_in_the_caches_is_nobodys_time(clock: Clock) -> None:
    """The first two runs after the other engine's are slow, those that are timed are not."""
    log: list = []

    def cold_or_warm(_: float) -> float:
        alike = [name for name, _ in log[-3:]]
        return 0.002 if len(set(alike)) == 1 and len(alike) == 3 else 0.005

    times = interleave([Session(n, clock, log, cold_or_warm) for n in "ab"], SAMPLES, rounds=6)
    np.testing.assert_allclose(times, 2.0)


def test_who_comes_first_is_turned_with_every_opening(clock: Clock) -> None:
    """What is opened, or warmed up, first is a tenth slower: no opening favours one for long."""
    opened: list[str] = []

    def engine(name: str) -> Any:
        @contextmanager
        def session(_: SessionSettings) -> Iterator[Session]:
            opened.append(name)
            slow = 1.1 if len(opened) % 2 else 1.0
            yield Session(name, clock, [], lambda _: 0.01 * slow)

        return SimpleNamespace(session=session)

    found = timed_openings([engine("a"), engine("b")], SAMPLES, threads=[1, 1], rounds=[2] * 4)
    ratios = [float(np.median(times[:, 0] / times[:, 1])) for times in found]
    assert opened == ["a", "b", "b", "a"] * 2
    assert ratios == pytest.approx([1.1, 1 / 1.1] * 2)


def rows_of(folder: Path, *, lengths: list[int]) -> Path:
    """Samples of these batch sizes."""
    write_rows(folder / "rows", [{"x": np.ones((length, 4), np.float32)} for length in lengths])
    return folder / "rows"


@dataclass
class Asked:
    """What was asked of the fake below."""

    files: list[Path]
    runtimes: list[str]
    samples: int
    threads: tuple[int, ...]
    rounds: list[int]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Asked]]:
    """Puts openings in the place of real ones: each attempt yields its own, again and again."""

    def put(*attempts: list[list[float]]) -> list[Asked]:
        asked: list[Asked] = []

        def fake(engines, samples, *, threads, rounds, settle_s):
            assert settle_s > 0
            files, runtimes = [e.file for e in engines], [e.runtime for e in engines]
            asked.append(Asked(files, runtimes, len(samples), tuple(threads), list(rounds)))
            for opening, count in enumerate(rounds):
                mine = attempts[len(asked) - 1]
                yield np.array([mine[opening % len(mine)]] * count)

        monkeypatch.setattr(latency, "timed_openings", fake)
        blind = partial(measure_until_narrow, glimpse=lambda: Glimpse(wall_s=0.0, own_s=0.0))
        monkeypatch.setattr(latency, "measure_until_narrow", blind)
        return asked

    return put


@pytest.fixture
def config(tmp_path: Path, linear_onnx: Path) -> LatencyConfig:
    return LatencyConfig(
        engine=tmp_path / "engine.onnx",
        baseline=linear_onnx,
        samples=rows_of(tmp_path, lengths=[1] * 70),
        machine="m",
    )


STEADY = [[4.0, 2.0]]
RAMP = [[4.0 + i / 4, 2.0 + i / 8] for i in range(8)]


def test_speedup_is_float_over_engine(timed, config: LatencyConfig, tmp_path: Path) -> None:
    """An engine that takes half the time is twice as fast; the engine's own figures are its own."""
    asked = timed([[4.0, 2.0]] * 6 + [[8.0, 4.0]] * 2)
    found = measure_latency(config, output=tmp_path)
    assert asked[0].files == [config.baseline, config.engine]
    assert (asked[0].runtimes, asked[0].threads) == (["onnxruntime"] * 2, (1, 1))
    assert (found.rounds, found.openings, found.stopped) == (64, 8, "narrow enough")
    assert (found.engine_p95_ms, found.baseline_ms) == (4.0, 4.0)
    assert found.speedup.low == pytest.approx(2.0) == pytest.approx(found.speedup.high)
    assert found.engine_ms.low < 2.0 < found.engine_ms.value < found.engine_ms.high < 4.0
    assert not found.repeated


def test_threads_and_runtimes_of_both_may_differ(timed, config, tmp_path: Path) -> None:
    """The baseline comes first."""
    asked = timed(STEADY)
    config = replace(config, threads=2, baseline_threads=1, baseline_runtime="reference")
    measure_latency(config, output=tmp_path)
    assert (asked[0].threads, asked[0].runtimes) == ((1, 2), ["reference", "onnxruntime"])


def test_unsteady_machine_is_measured_once_more(timed, config, tmp_path: Path) -> None:
    """The second measurement counts, with what it says of the machine."""
    asked = timed(RAMP, STEADY)
    found = measure_latency(config, output=tmp_path)
    assert (len(asked), found.repeated, found.baseline_ms) == (2, True, 4.0)
    assert found.drift.steady


def test_machine_that_stays_unsteady_is_marked(timed, config, tmp_path: Path) -> None:
    """It is not measured a third time."""
    asked = timed(RAMP, RAMP)
    found = measure_latency(config, output=tmp_path)
    assert (len(asked), found.repeated, found.drift.steady) == (2, True, False)
    assert "the baseline itself became" in found.drift.notes[0]


def test_no_budget_no_second_measurement(timed, config, tmp_path: Path) -> None:
    """The first one is marked."""
    asked = timed(RAMP)
    found = measure_latency(replace(config, budget_s=0.0), output=tmp_path)
    assert (len(asked), found.repeated, found.drift.steady) == (1, False, False)


@pytest.mark.parametrize(
    ("numbers", "rounds", "first", "most"),
    [
        ({}, 8, 8, 28),
        ({"rounds": 4}, 1, 4, 16),
        ({"rounds": 10}, 3, 4, 12),
        ({"rounds": 16, "most_rounds": 16}, 2, 8, 8),
        ({"rounds": 60, "most_rounds": 60}, 8, 8, 8),
        ({"rounds": 64, "most_rounds": 320}, 8, 8, 40),
    ],
)
def test_rounds_are_shared_among_openings(
    config: LatencyConfig, numbers: dict, rounds: int, first: int, most: int
) -> None:
    """At least as many as asked for; openings in both orders equally often."""
    plan = plan_of(replace(config, **numbers))
    assert (plan.rounds, plan.first, plan.most) == (rounds, first, most)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"rounds": 3}, "3 rounds of a latency; it must be at least 4"),
        ({"most_rounds": 59}, "most_rounds of a latency is 59; it must be at least 60"),
        ({"threads": 0}, "threads of a latency is 0; it must be at least 1"),
        ({"baseline_threads": 0}, "baseline_threads of a latency is 0"),
        ({"budget_s": -1.0}, "budget_s of a latency is -1"),
        ({"budget_s": float("nan")}, "budget_s of a latency is nan"),
        ({"relative_width": 0.0}, "relative_width of a latency is 0; it must be above 0"),
        ({"relative_width": float("inf")}, "relative_width of a latency is inf"),
    ],
)
def test_numbers_out_of_range_are_refused(config, numbers: dict, words: str) -> None:
    """Before anything is measured."""
    with pytest.raises(UsageError, match=words):
        plan_of(replace(config, **numbers))


def test_samples_of_every_size_take_turns(tmp_path: Path) -> None:
    """Each part of the order of sizes gives one; those beyond the first 64 are not read."""
    random = np.random.default_rng(0)
    lengths = [int(n) for n in random.permutation(np.arange(1, 65))] + [1000] * 6
    rows = Rows(rows_of(tmp_path, lengths=lengths))
    assert [len(row["x"]) for row in spread(rows, count=4)] == [9, 25, 41, 57]
    assert [len(row["x"]) for row in spread(rows, count=500)] == list(range(1, 65))


def test_real_engines_are_timed_in_as_many_rounds_as_asked(linear_onnx, conv_onnx) -> None:
    """The rounds are shared among four openings; the first engine is compared with none."""
    feeds = [{"x": np.ones((1, 4), np.float32)}]
    engines = [EngineFile(file=linear_onnx), EngineFile(file=linear_onnx, runtime="reference")]
    times = time_engines(engines, feeds, threads=1, rounds=10)
    assert times.shape == (10, 2)
    assert (times > 0).all()
    image = [{"x": np.ones((1, 1, 8, 8), np.float32)}]
    (record,) = bench([EngineFile(file=conv_onnx)], image, threads=1, rounds=4)
    assert (record.engine, record.rounds, record.speedup) == (str(conv_onnx), 4, None)
    assert 0 < record.latency_ms.low <= record.latency_ms.value <= record.latency_ms.high


def test_bench_compares_with_the_first_and_says_how_the_machine_was(linear_onnx: Path) -> None:
    """The reference runtime takes many times as long; all share what was seen of the machine."""
    feeds = [{"x": np.ones((1, 4), np.float32)}]
    engines = [EngineFile(file=linear_onnx), EngineFile(file=linear_onnx, runtime="reference")]
    first, second = bench(engines, feeds, threads=1, rounds=16)
    assert (first.speedup, second.rounds) == (None, 16)
    assert second.speedup is not None
    assert second.speedup.high < 0.5
    assert second.speedup.value == pytest.approx(
        first.latency_ms.value / second.latency_ms.value, rel=0.5
    )
    assert first.drift == second.drift
    assert first.drift.steady == (not first.drift.notes)
    assert json.loads(to_text(first))["drift"]["chance"] <= 1
    with pytest.raises(UsageError, match="3 rounds"):
        bench(engines, feeds, threads=1, rounds=3)


def test_real_engine_is_measured_with_its_own_threads(
    monkeypatch: pytest.MonkeyPatch, linear_onnx: Path, tmp_path: Path
) -> None:
    """Both are opened as often as the record says, in turned order, with their own threads."""
    opened: list[tuple[str, int]] = []
    real = EngineFile.session

    def session(engine: EngineFile, settings: SessionSettings) -> Any:
        opened.append((engine.runtime, settings.threads))
        return real(engine, settings)

    monkeypatch.setattr(EngineFile, "session", session)
    config = LatencyConfig(
        engine=linear_onnx,
        baseline=linear_onnx,
        baseline_runtime="reference",
        samples=rows_of(tmp_path, lengths=[1, 2]),
        machine="m",
        rounds=4,
        most_rounds=8,
        threads=2,
        baseline_threads=1,
        budget_s=0.0,
    )
    found = measure_latency(config, output=tmp_path)
    assert (found.rounds, found.openings, found.stopped in {"budget", "narrow enough"}) == (
        4, 4, True
    )  # fmt: skip
    turn = [("reference", 1), ("onnxruntime", 2)]
    assert opened == [*turn, *turn[::-1]] * 2
    assert found.speedup.low > 1
    assert loads(LatencyRecord, to_text(found), where="latency") == found


def test_samples_that_do_not_fit_are_an_input_error(config, linear_onnx, tmp_path: Path) -> None:
    """As the session says."""
    write_rows(tmp_path / "wrong", [{"x": np.ones((1, 7), np.float32)}])
    wrong = replace(config, engine=linear_onnx, samples=tmp_path / "wrong")
    with pytest.raises(InputError, match="x"):
        measure_latency(wrong, output=tmp_path)
