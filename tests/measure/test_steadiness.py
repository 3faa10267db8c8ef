"""Drift is found, noise is not taken for it, and every disturbance is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise import record
from equipoise.measure.glimpse import Glimpse
from equipoise.measure.steadiness import Steadiness, find_drift, judge

QUIET = Glimpse(
    wall_s=100.0,
    own_s=10.0,
    clock_mhz=3000.0,
    throttled=7,
    waited_s=0.25,
    quota_s=0.5,
    hottest_c=50.0,
    load=0.5,
    cores=4,
    busy_s=1000.0,
    stolen_s=3.0,
)
LATER = replace(
    QUIET, wall_s=110.0, own_s=19.5, waited_s=0.3, busy_s=1010.0, hottest_c=61.0, load=1.0
)
CALM = [1.0, 1.01, 0.99, 1.02, 0.98, 1.005, 0.995, 1.0]


def judged(
    *, first: Glimpse = QUIET, last: Glimpse = LATER, times: list[float] = CALM, threads: int = 1
) -> Steadiness:
    seen = [first, *[last] * len(times)]
    return judge(seen, times, threads=threads, tolerance=0.02)


def test_a_quiet_machine_is_steady() -> None:
    """And what was seen of it is in the record, which survives as JSON."""
    found = judged()
    assert (found.steady, found.notes, found.unknown) == (True, (), ())
    assert found.clock_mhz == (3000.0, 3000.0)
    assert (found.throttled, found.quota_s) == (0, 0.0)
    assert (found.hottest_c, found.load) == ((50.0, 61.0), (0.5, 1.0))
    assert (found.waited, found.others) == (pytest.approx(0.005), pytest.approx(0.05))
    assert found.stolen == 0.0
    assert record.loads(Steadiness, record.dumps(found), where="here") == found


def test_what_cannot_be_read_is_named_and_not_made_up() -> None:
    """Nothing known, on a machine without /proc: steady as far as its own times tell."""
    bare = Glimpse(wall_s=0.0, own_s=0.0)
    found = judged(first=bare, last=replace(bare, wall_s=9.0, own_s=9.0))
    assert found.steady
    assert found.unknown == ("clock", "throttling", "temperature", "load", "other processes")
    assert [found.clock_mhz, found.throttled, found.hottest_c, found.others, found.stolen] == (
        [None] * 5
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"throttled": 8}, "throttled itself because of heat"),
        ({"quota_s": 1.75}, "quota of its container stopped it for 1.25 s"),
        ({"waited_s": 1.45}, "12% of the time other processes had the core"),
        ({"waited_s": 1.45, "busy_s": 1047.5}, "12% of the time other processes had the core"),
        ({"busy_s": 1047.5}, "other processes kept 3.8 of 4 cores busy"),
        ({"stolen_s": 4.0}, "hypervisor gave 10% of a core"),
    ],
)
def test_a_disturbance_is_named(changed: dict, said: str) -> None:
    """Each alone makes the measurement unsteady."""
    found = judged(last=replace(LATER, **changed))
    assert not found.steady
    (note,) = found.notes
    assert said in note


@pytest.mark.parametrize("changed", [{"busy_s": 1030.0}, {"stolen_s": 3.4}, {"hottest_c": 95.0}])
def test_what_leaves_room_disturbs_nothing(changed: dict) -> None:
    """Two cores of others beside one thread on four; 4 % stolen; heat without effect."""
    assert judged(last=replace(LATER, **changed)).steady


def test_one_core_and_more_threads_than_cores() -> None:
    """A machine of one core has none to spare; threads beyond the cores are no neighbours."""
    first, last = replace(QUIET, cores=1), replace(LATER, cores=1)
    assert judged(first=first, last=last).steady
    assert judged(first=first, last=last, threads=8).steady
    assert not judged(first=first, last=replace(last, busy_s=1014.0)).steady


def test_no_time_passed_is_no_division_by_zero() -> None:
    """Two glimpses of the same moment tell nothing of the time between."""
    found = judged(last=QUIET)
    assert (found.others, found.stolen) == (None, None)


def test_drift_of_the_baseline_is_told_in_words() -> None:
    """A tenth slower from the first opening to the last, and as much faster."""
    ramp = [1 + 0.1 * i / 11 for i in range(12)]
    found = judged(times=ramp)
    assert not found.steady
    assert found.change == pytest.approx(0.1, abs=0.01)
    assert "became 10.0% slower" in found.notes[0]
    assert "faster" in judged(times=ramp[::-1]).notes[0]


def test_a_drift_too_small_to_matter_is_in_the_record_alone() -> None:
    """One per cent, as clear as can be, where two would matter."""
    found = judged(times=[1 + 0.01 * i / 11 for i in range(12)])
    assert found.steady
    assert found.change == pytest.approx(0.01, abs=0.001)
    assert found.chance < 0.01


def test_a_clock_that_falls_is_told() -> None:
    """From 3000 to 2400 MHz; the first glimpse, before anything ran, does not count."""
    clocks = [3000.0] * 4 + [2400.0] * 5
    seen = [replace(QUIET, clock_mhz=800.0), *(replace(LATER, clock_mhz=mhz) for mhz in clocks)]
    found = judge(seen, [*CALM, 1.0], threads=1, tolerance=0.02)
    (note,) = found.notes
    assert note.startswith("the clock fell by 20%, between 2400 and 3000 MHz")
    assert found.clock_mhz == (2400.0, 3000.0)


@pytest.mark.parametrize("openings", [8, 16])
@pytest.mark.parametrize("noise", ["normal", "heavy tails", "in turn"])
def test_noise_is_rarely_taken_for_drift(openings: int, noise: str) -> None:
    """At most about 5 of 100 steady runs, whatever the noise and the order of opening do."""
    random = np.random.default_rng(openings)
    alarms = 0
    for _ in range(200):
        values = random.normal(0, 0.01, openings)
        if noise == "heavy tails":
            values = 0.01 * random.standard_t(1.5, openings)
        if noise == "in turn":
            values[::2] += 0.02
        alarms += find_drift(np.exp(values)).chance < 0.05
    assert alarms <= 18  # the 99 % quantile of 200 at 5 %


@pytest.mark.parametrize(
    "shift",
    [
        np.linspace(0, 0.08, 12),
        np.r_[np.zeros(6), np.full(6, 0.05)],
        np.r_[np.full(9, 0.06), np.zeros(3)],
    ],
    ids=["slope", "jump", "late jump down"],
)
def test_drift_of_several_times_the_noise_is_found(shift: np.ndarray) -> None:
    """In at least 95 of 100, with its size and sign."""
    random = np.random.default_rng(1)
    found = [find_drift(np.exp(shift + random.normal(0, 0.012, 12))) for _ in range(100)]
    assert sum(one.chance < 0.05 for one in found) >= 95
    size = np.median([one.change for one in found])
    assert size == pytest.approx(np.expm1(shift[-1] - shift[0]), abs=0.02)


def test_one_spoilt_opening_is_no_drift() -> None:
    """Wherever it is: even at either end."""
    for at in range(len(CALM)):
        values = list(CALM)
        values[at] = 3.0
        assert find_drift(values).chance > 0.05


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_few_openings_tell_nothing(values: list[float]) -> None:
    """Fewer than 6 could come in any order by chance."""
    assert (find_drift(values).change, find_drift(values).chance) == (0.0, 1.0)


def test_equal_times_are_steady() -> None:
    """Ties are no order."""
    assert find_drift([2.0] * 10).chance == 1.0
