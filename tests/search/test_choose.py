"""Verdicts and the choice: what may ship, and what wins among it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.measure.interval import Interval
from equipoise.parity.compare import OutputParity
from equipoise.quantize.schemes import DynamicInt8
from equipoise.recipe import Recipe
from equipoise.search.choose import choose as choose_for
from equipoise.search.choose import pareto_front
from equipoise.search.goal import Goal
from equipoise.search.result import Candidate, Measurement, Verdict
from equipoise.search.space import BASELINE
from equipoise.search.verdict import judge


def measurement(
    *, speed: float, size: int = 100, memory: int = 1000, metric: float = 0.9, drop: float = 0.0,
    open_drop: float = 0.005, cosine: float = 1.0,
) -> Measurement:  # fmt: skip
    parity = OutputParity(
        name="y",
        max_abs=0.1,
        max_rel=0.1,
        excess=0.1,
        scale=1.0,
        sqnr_db=30.0,
        cosine=cosine,
        least_cosine=cosine,
        top1_agreement=None,
    )
    return Measurement(
        metric=Interval(value=metric, low=metric - 0.01, high=metric + 0.01),
        drop=Interval(value=drop, low=drop - open_drop, high=drop + open_drop),
        metric_bound=metric - 0.01,
        latency_ms=Interval(value=1 / speed, low=0.97 / speed, high=1.03 / speed),
        speedup=Interval(value=speed, low=speed * 0.97, high=speed * 1.03),
        size_bytes=size,
        peak_memory_bytes=memory,
        load_ms=1.0,
        first_ms=2.0,
        build_s=0.5,
        parity=(parity,),
        kernels={},
    )


def candidate(name: str, measured: Measurement, verdict: Verdict = "accepted") -> Candidate:
    return Candidate(
        recipe=Recipe(name=name, summary=""), verdict=verdict, reason="", measurement=measured
    )


def choose(candidates: list[Candidate]) -> tuple[Candidate, str]:
    found = choose_for(candidates, goal=Goal())
    assert found is not None
    return found


FLOAT = candidate(BASELINE, measurement(speed=1.0, size=400), "baseline")


def test_fastest_accepted_candidate_wins() -> None:
    """Refused ones are out of the race however fast."""
    fast = candidate("fast", measurement(speed=2.0))
    faster = candidate("refused", measurement(speed=4.0), "refused")
    chosen, reason = choose([FLOAT, fast, faster])
    assert chosen is fast
    assert "2.00x" in reason


def test_int8_that_is_slower_than_float_is_not_chosen() -> None:
    """Smaller does not make up for slower."""
    slow = candidate("slow", measurement(speed=0.5, size=1))
    chosen, reason = choose([FLOAT, slow])
    assert chosen is FLOAT
    assert "better than plain float32" in reason


def test_noise_in_the_baselines_own_ratio_decides_nothing() -> None:
    """Float against itself is 1, though the measured interval may lie wholly on either side."""
    for ratio in (0.8, 1.3):
        noisy = candidate(BASELINE, measurement(speed=ratio, size=400), "baseline")
        slow = candidate("slow", measurement(speed=0.9, size=1))
        fast = candidate("fast", measurement(speed=1.2, size=100))
        assert choose([noisy, slow])[0] is noisy
        assert choose([noisy, slow, fast])[0] is fast
        assert pareto_front([noisy, fast]) == {"fast"}


def test_ties_in_speed_go_to_the_smaller_then_the_leaner_then_the_truer() -> None:
    """Intervals that overlap are ties; a hundredth of size and a twentieth of memory are none."""
    big = candidate("big", measurement(speed=2.02, size=300))
    small = candidate("small", measurement(speed=2.0, size=100, memory=2000))
    lean = candidate("lean", measurement(speed=1.99, size=100, memory=1000, cosine=0.98))
    true = candidate("true", measurement(speed=1.98, size=100, memory=1020, cosine=0.99))
    assert choose([FLOAT, big, small])[0] is small
    assert choose([FLOAT, big, small, lean])[0] is lean
    chosen, reason = choose([FLOAT, big, small, lean, true])
    assert chosen is true
    assert "big" in reason


def test_what_is_hardly_known_is_no_tie() -> None:
    """A wide interval overlaps with anything; a slower candidate is not chosen for its size so."""
    vague = measurement(speed=0.9, size=1)
    vague = replace(vague, speedup=Interval(value=0.9, low=0.6, high=1.3))
    assert choose([FLOAT, candidate("vague", vague)])[0] is FLOAT


def test_smaller_engine_at_the_speed_of_float_is_chosen_for_size() -> None:
    """Nothing is faster, and a quarter of the bytes is worth having."""
    stored = candidate("stored", measurement(speed=1.01, size=100))
    assert choose([FLOAT, stored])[0] is stored


def test_front_holds_what_nothing_beats_in_every_respect() -> None:
    """Latency, size and metric; refused ones are not on it."""
    fast = candidate("fast", measurement(speed=2.0, size=100, metric=0.89))
    small = candidate("small", measurement(speed=1.5, size=50, metric=0.88))
    beaten = candidate("beaten", measurement(speed=1.4, size=120, metric=0.87))
    refused = candidate("refused", measurement(speed=9.0, size=1), "refused")
    assert pareto_front([FLOAT, fast, small, beaten, refused]) == {BASELINE, "fast", "small"}


@pytest.mark.parametrize(
    ("measured", "verdict", "words"),
    [
        (measurement(speed=2.0), "accepted", "2.00x as fast as float"),
        (measurement(speed=0.5), "accepted", "slower than float (0.50x): not chosen for speed"),
        (measurement(speed=1.0), "accepted", "as fast as float"),
        (measurement(speed=2.0, drop=0.03), "refused", "drops by 0.0300; allowed 0.01"),
        (measurement(speed=2.0, drop=0.008), "refused", "cannot be ruled out at 95 %"),
        (measurement(speed=2.0, metric=0.1, drop=0.8), "refused", "collapsed"),
    ],
)
def test_verdict_says_why(measured: Measurement, verdict: str, words: str) -> None:
    """Accepted only when the bound of the drop is within what is allowed."""
    recipe = Recipe(name="int8", summary="", quantization=DynamicInt8())
    found, reason = judge(measured, recipe=recipe, goal=Goal(max_drop=0.01))
    assert found == verdict
    assert words in reason
