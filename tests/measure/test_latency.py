"""Interleaved timing, on a clock that the test winds by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from equipoise.data.store import write_rows
from equipoise.measure import latency
from equipoise.measure.bench import bench
from equipoise.measure.latency import LatencyConfig, interleave, measure_latency, time_engines
from equipoise.runtimes.engine import EngineFile


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
    assert log[-8:] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0)
    ]  # fmt: skip


def test_speedup_is_float_over_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear_onnx: Path
) -> None:
    """An engine that takes half the time is twice as fast; the engine's own figures are its own."""
    seen: list = []

    def timed(engines, samples, *, threads, rounds):  # noqa: ARG001
        seen.append(([engine.file for engine in engines], len(samples)))
        return np.array([[4.0, 2.0]] * 30 + [[8.0, 4.0]] * 10)

    monkeypatch.setattr(latency, "time_engines", timed)
    write_rows(tmp_path / "rows", [{"x": np.ones((1, 4), np.float32)}] * 70)
    other = tmp_path / "engine.onnx"
    config = LatencyConfig(
        engine=other, baseline=linear_onnx, samples=tmp_path / "rows", machine="m"
    )
    found = measure_latency(config, output=tmp_path)
    assert seen == [([linear_onnx, other], 64)]
    assert (found.engine_ms, found.baseline_ms, found.rounds) == (2.0, 4.0, 40)
    assert found.engine_p95_ms == 4.0
    assert (found.speedup.low, found.speedup.value, found.speedup.high) == (2.0, 2.0, 2.0)


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
