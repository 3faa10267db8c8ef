"""The test of slow-downs: its formulas against others' code, its errors, and real engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from equipoise.data.store import write_rows
from equipoise.errors import InputError, UsageError
from equipoise.measure import regression
from equipoise.measure.regression import (
    Openings,
    OpeningsConfig,
    change,
    clock_for,
    estimate,
    in_children,
    settle,
    student_t,
    time_openings,
    watch,
)
from equipoise.runtimes.engine import EngineFile


def each_twice(values: np.ndarray) -> list[float]:
    """Openings whose pairs have these means."""
    return [float(v) for value in values for v in (value - 0.01, value + 0.01)]


def noisy(generator: np.random.Generator, *, shift: float, sd: float) -> Callable[[int], Openings]:
    """Openings as they are measured: an effect of the order, noise, at times a neighbour."""

    def measure(pairs: int) -> Openings:
        ordered = np.array([-0.508, -0.492]) + shift
        values = generator.normal(ordered, sd * math.sqrt(2), (pairs, 2))
        values += (generator.random((pairs, 2)) < 0.02) * generator.normal(0, 0.3, (pairs, 2))
        return Openings(log_ratios=tuple(values.ravel().tolist()))

    return measure


@pytest.mark.parametrize("degrees", [3, 4.5, 7, 12, 30, 200])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.99, 0.995])
def test_quantiles_of_t_are_those_of_scipy(degrees: float, probability: float) -> None:
    """To within what its docstring says."""
    exact = stats.t.ppf(probability, degrees)
    assert student_t(probability, degrees=degrees) == pytest.approx(exact, rel=0.01)


def test_the_comparison_is_yuens() -> None:
    """Difference, standard error and degrees of freedom as SciPy's trimmed t-test."""
    generator = np.random.default_rng(0)
    locked, now = generator.normal(0, 0.02, 21), generator.normal(0.03, 0.04, 13)
    theirs = stats.ttest_ind(now, locked, equal_var=False, trim=0.2)
    ours = change(each_twice(locked), each_twice(now))
    moved = stats.trim_mean(now, 0.2) - stats.trim_mean(locked, 0.2)
    assert math.log1p(ours.value) == pytest.approx(moved)
    interval = theirs.confidence_interval(confidence_level=0.99)
    assert math.log1p(ours.low) == pytest.approx(interval.low, abs=2e-4)
    assert math.log1p(ours.high) == pytest.approx(interval.high, abs=2e-4)


def test_the_order_of_opening_is_no_noise() -> None:
    """An engine that is 5 % faster when opened second: pairs take it out to the last bit."""
    values = [-0.025 - 0.5, 0.025 - 0.5] * 10
    assert estimate(values).variance == pytest.approx(0.0, abs=1e-30)
    assert estimate(values).mean == pytest.approx(-0.5)


def test_one_opening_beside_a_busy_neighbour_moves_nothing() -> None:
    """An opening that took twice as long is trimmed."""
    values = list(np.random.default_rng(1).normal(0, 0.01, 32))
    spoilt = [math.log(2), *values[1:]]
    assert abs(estimate(spoilt).mean - estimate(values).mean) < 0.003


@pytest.mark.parametrize("sd", [0.01, 0.03])
def test_no_change_fails_in_at_most_one_of_a_hundred(sd: float) -> None:
    """400 locks, each with a check of the same engine: at most 4, by simulation."""
    generator = np.random.default_rng(2)
    measure = noisy(generator, shift=0.0, sd=sd)
    states = [watch(settle(measure).log_ratios, measure)[0].state for _ in range(400)]
    assert states.count("slower") <= 4
    assert "undecided" not in states


@pytest.mark.parametrize("sd", [0.01, 0.03])
def test_five_per_cent_are_seen_in_95_of_a_hundred(sd: float) -> None:
    """As above, with an engine that has become 5 % slower."""
    generator = np.random.default_rng(3)
    before = noisy(generator, shift=0.0, sd=sd)
    after = noisy(generator, shift=math.log(1.05), sd=sd)
    states = [watch(settle(before).log_ratios, after)[0].state for _ in range(400)]
    assert states.count("slower") >= 380


def test_a_machine_too_noisy_to_see_does_not_cry_wolf_and_says_what_it_sees() -> None:
    """With 15 % of noise between openings a few per cent are not to be seen."""
    generator = np.random.default_rng(4)
    measure = noisy(generator, shift=0.0, sd=0.15)
    found = [watch(settle(measure).log_ratios, measure)[0] for _ in range(200)]
    assert sum(c.state == "slower" for c in found) <= 4
    assert all(c.sees > 0.05 for c in found)
    quiet = watch([0.0] * 32, lambda pairs: Openings(log_ratios=(0.0,) * 2 * pairs))[0]
    assert 0.02 < quiet.sees < 0.03


def test_measuring_stops_when_the_interval_decides() -> None:
    """Clear cases cost the least; what lies at the threshold costs all."""
    asked: list[int] = []

    def at(shift: float, spread: float) -> Callable[[int], Openings]:
        def measure(pairs: int) -> Openings:
            asked.append(pairs)
            pair = (shift - spread, shift - spread, shift + spread, shift + spread)
            return Openings(log_ratios=(pair * pairs)[: 2 * pairs])

        return measure

    for shift, spread, state, pairs in (
        (0.0, 0.01, "same", 8),
        (0.3, 0.01, "slower", 8),
        (-0.3, 0.01, "same", 8),
        (math.log1p(0.05) / 2 + 1e-3, 0.03, "slower", 32),
        (math.log1p(0.05) / 2 - 1e-3, 0.03, "same", 32),
    ):
        asked.clear()
        verdict, found = watch(at(0.0, 0.01)(32).log_ratios, at(shift, spread))
        assert (verdict.state, sum(asked[1:])) == (state, pairs)
        assert verdict.openings == len(found.log_ratios) == 2 * pairs


def test_a_lock_is_measured_until_its_own_error_is_small() -> None:
    """And no longer than the cap."""
    generator = np.random.default_rng(5)
    lengths = [
        len(settle(noisy(generator, shift=0, sd=sd)).log_ratios) // 2 for sd in (0.004, 0.03, 0.3)
    ]
    assert lengths[0] == 16 < lengths[1] <= lengths[2] == 48


@pytest.mark.parametrize(
    "values", [[], [0.0] * 6, [0.0] * 9, [0.0] * 7 + [math.nan], [math.inf] * 8]
)
def test_openings_that_are_too_few_odd_or_not_finite_are_refused(values: list[float]) -> None:
    """A lock that was written by hand."""
    with pytest.raises(UsageError, match=f"{len(values)} openings"):
        change(values, [0.0] * 8)


@pytest.mark.parametrize("slowdown", [0.0, -0.1, math.nan, math.inf])
def test_a_slowdown_that_is_none_is_refused(slowdown: float) -> None:
    """It must be above 0."""
    with pytest.raises(UsageError, match="above 0"):
        change([0.0] * 8, [0.0] * 8, slowdown=slowdown)


def test_real_engines_are_opened_in_both_orders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear_onnx: Path
) -> None:
    """The float engine first, then the other; ratios are engine over float engine."""
    opened: list[Path] = []
    session = EngineFile.session

    def noted(self, settings):
        opened.append(self.file)
        return session(self, settings)

    monkeypatch.setattr(EngineFile, "session", noted)
    monkeypatch.setattr("equipoise.measure.latency._WARM_UP_S", 0.01)
    write_rows(tmp_path / "rows", [{"x": np.ones((n, 4), np.float32)} for n in range(1, 20)])
    other = tmp_path / "other.onnx"
    other.write_bytes(linear_onnx.read_bytes())
    config = OpeningsConfig(
        engine=EngineFile(file=other),
        baseline=EngineFile(file=linear_onnx),
        samples=tmp_path / "rows",
        pairs=2,
        rounds=2,
    )
    found = time_openings(config, output=tmp_path)
    assert opened == [linear_onnx, other, other, linear_onnx] * 2
    assert len(found.log_ratios) == len(found.engine_ms) == len(found.baseline_ms) == 4
    for ratio, engine, baseline in zip(
        found.log_ratios, found.engine_ms, found.baseline_ms, strict=True
    ):
        assert ratio == pytest.approx(math.log(engine / baseline), abs=0.7)


def test_the_least_of_every_sample_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear_onnx: Path
) -> None:
    """What disturbs most blocks moves nothing; an engine slower on one sample alone is slower."""
    write_rows(tmp_path / "rows", [{"x": np.ones((n, 4), np.float32)} for n in (1, 2)])
    disturbed = [[1.0, 2.0], [3.0, 8.0], [7.0, 2.5], [3.5, 6.0], [9.0, 9.0], [4.0, 6.5]]
    monkeypatch.setattr(regression, "interleave", lambda *_, **_options: np.array(disturbed))
    engine = EngineFile(file=linear_onnx)
    config = OpeningsConfig(engine=engine, baseline=engine, samples=tmp_path / "rows", pairs=1)
    found = time_openings(config, output=tmp_path)
    assert (found.baseline_ms, found.engine_ms) == ((2.0, 2.0), (4.0, 4.0))
    assert found.log_ratios == (round(math.log(2), 6),) * 2


@pytest.mark.parametrize(
    ("runtime", "providers", "threads", "clock"),
    [
        ("onnxruntime", (), 1, "cpu"),
        ("onnxruntime", ("CPUExecutionProvider",), 1, "cpu"),
        ("onnxruntime", (), 2, "wall"),
        ("onnxruntime", ("CUDAExecutionProvider",), 1, "wall"),
        ("openvino", ("GPU",), 1, "wall"),
        ("tensorrt", (), 1, "wall"),
    ],
)
def test_cpu_time_is_read_where_one_thread_of_the_cpu_does_it_all(
    linear_onnx: Path, runtime: str, providers: tuple[str, ...], threads: int, clock: str
) -> None:
    """It says nothing of waiting for a device or for other threads."""
    engine = EngineFile(file=linear_onnx, runtime=runtime, providers=providers)
    assert clock_for(engine, threads=threads) == clock


def test_samples_are_spread_over_all_rows(tmp_path: Path) -> None:
    """Data may be sorted by length; the first and the last row are both there."""
    from equipoise.data.store import Rows

    write_rows(tmp_path / "rows", [{"x": np.full(1, n)} for n in range(50)])
    chosen = [int(row["x"][0]) for row in regression._samples(Rows(tmp_path / "rows"))]
    assert (len(chosen), chosen[0], chosen[-1]) == (4, 0, 49)


def test_every_few_pairs_have_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear_onnx: Path
) -> None:
    """Three pairs, two to a process, are two children; what a child raises comes back."""
    write_rows(tmp_path / "rows", [{"x": np.ones((1, 4), np.float32)}])
    engine = EngineFile(file=linear_onnx)
    config = OpeningsConfig(engine=engine, baseline=engine, samples=tmp_path / "rows", rounds=1)
    monkeypatch.setattr(regression, "_PAIRS_OF_A_PROCESS", 2)
    calls: list[int] = []
    run = regression.run_isolated

    def counted(function, own, *, output, on_progress, time_limit_s):
        calls.append(own.pairs)
        return run(function, own, output=output, on_progress=on_progress, time_limit_s=time_limit_s)

    monkeypatch.setattr(regression, "run_isolated", counted)
    found = in_children(config)(3)
    assert (calls, len(found.log_ratios)) == ([2, 1], 6)
    write_rows(tmp_path / "wrong", [{"y": np.ones((1, 4), np.float32)}])
    wrong = OpeningsConfig(engine=engine, baseline=engine, samples=tmp_path / "wrong")
    with pytest.raises(InputError, match="y"):
        in_children(wrong)(1)
