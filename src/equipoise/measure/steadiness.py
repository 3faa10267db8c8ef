"""Is the machine steady while it is measured?

Two kinds of evidence. What the kernel says: the clock, throttling, what other processes and other
virtual machines took. And the times of the baseline itself, which ought not to depend on when it
was measured: one value per opening, whose order is held against all other orders (a permutation
test: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, ch. 3). So whatever the
noise is, of 100 steady runs about 5 look unsteady.

A fact that cannot be read here is None and named in ``unknown``; none is made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.measure.glimpse import Glimpse
from equipoise.measure.interval import Values

_FEWEST: Final = 6
_DRAWS: Final = 2000
_CHANCE: Final = 0.05
_OFTEN_ENOUGH: Final = 2
"""Openings on either side of a jump: one alone that is out of line is noise."""

_WAITED: Final = 0.02
_CROWDED: Final = 0.1
"""Of a core that is wanting before it counts: there is always something that runs for a moment."""

_STOLEN: Final = 0.05
_CLOCK_MOVED: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How values changed in the order in which they were taken.

    Attributes:
        change: From the first to the last, by the line or jump that fits best: 0.05 is 5 % more.
        chance: How often values in random order seem to change as clearly; 1 when there are too
            few values to tell.
    """

    change: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """What was seen of the machine while it was measured; None for what cannot be read here.

    Attributes:
        steady: Whether nothing was seen that moves a measurement.
        change: Of the baseline's own times from first to last: 0.05 is 5 % slower.
        chance: How often a steady machine seems to change as clearly; 1 for too few openings.
        clock_mhz: Lowest and highest clock of the fastest core.
        throttled: How often the CPU throttled itself.
        quota_s: How long this process was kept from running by the quota of its control group.
        hottest_c: The hottest thermal zone before and after, degrees Celsius.
        load: Processes that ran or wanted to, mean of a minute, before and after.
        waited: Share of the time in which the measuring thread was ready to run while others had
            its core.
        others: Cores that other processes kept busy.
        stolen: Cores that the hypervisor gave to others.
        notes: What moves a measurement, one sentence each; empty when steady.
        unknown: What cannot be read here.
    """

    steady: bool
    change: float
    chance: float
    clock_mhz: tuple[float, float] | None
    throttled: int | None
    quota_s: float | None
    hottest_c: tuple[float, float] | None
    load: tuple[float, float] | None
    waited: float | None
    others: float | None
    stolen: float | None
    notes: tuple[str, ...]
    unknown: tuple[str, ...]


def find_drift(values: Sequence[float] | Values) -> Drift:
    """Did ``values`` rise, fall or jump in the order in which they were taken?

    The statistic is the largest correlation of their ranks with a line or with one of the possible
    jumps; its distribution is that over orders drawn at random.

    Args:
        values: Positive, one per opening. Fewer than 6 tell nothing.
    """
    if len(values) < _FEWEST:
        return Drift(change=0.0, chance=1.0)
    shapes = _shapes(len(values))
    ranks = _ranks(np.asarray(values, dtype=np.float64))
    found = np.abs(shapes @ ranks)
    drawn = np.random.default_rng(0).permuted(np.tile(ranks, (_DRAWS, 1)), axis=1)
    as_clear = np.abs(drawn @ shapes.T).max(axis=1) >= found.max() - 1e-9
    shape = shapes[int(found.argmax())]
    moved = float(shape @ np.log(values)) * float(shape[-1] - shape[0])
    return Drift(change=float(np.expm1(moved)), chance=float(1 + as_clear.sum()) / (1 + _DRAWS))


def _shapes(count: int) -> Values:
    """``[shapes, count]``: a line and every jump, each with mean 0 and length 1."""
    places = np.arange(count)
    jumps = [places >= at for at in range(_OFTEN_ENOUGH, count - _OFTEN_ENOUGH + 1)]
    shapes = np.array([places, *jumps], dtype=np.float64)
    shapes -= shapes.mean(axis=1, keepdims=True)
    made: Values = shapes / np.linalg.norm(shapes, axis=1, keepdims=True)
    return made


def _ranks(values: Values) -> Values:
    """Ranks with mean 0; equal values share one."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    ranks: Values = below + (equal - 1) / 2
    ranks -= ranks.mean()
    return ranks


def judge(
    seen: Sequence[Glimpse],
    baseline_ms: Sequence[float] | Values,
    *,
    threads: int,
    tolerance: float,
) -> Steadiness:
    """What ``seen`` and the baseline's own times say.

    Args:
        seen: The machine before the first opening and after each one.
        baseline_ms: Of the baseline, one value per opening.
        threads: That the measured engines use.
        tolerance: The smallest relative change of the baseline that matters: no machine is steady
            to the last bit, and ratios of interleaved rounds stand a drift of both.
    """
    first, last = seen[0], seen[-1]
    drift, clocks = find_drift(baseline_ms), _known(glimpse.clock_mhz for glimpse in seen[1:])
    others, stolen = _others(first, last), _rate(first.stolen_s, last.stolen_s, first, last)
    waited = _rate(first.waited_s, last.waited_s, first, last)
    throttled = _risen(first.throttled, last.throttled)
    quota_s = _risen(first.quota_s, last.quota_s)
    said = (
        _drift_said(drift, tolerance),
        _clock_said(clocks),
        "the CPU throttled itself because of heat; let it cool down" if throttled else "",
        f"the CPU quota of its container stopped it for {quota_s:.2f} s" if quota_s else "",
        _wait_said(waited) or _crowd_said(others, cores=last.cores, threads=threads),
        _stolen_said(stolen),
    )
    notes = tuple(text for text in said if text)
    return Steadiness(
        steady=not notes,
        change=drift.change,
        chance=drift.chance,
        clock_mhz=(min(clocks), max(clocks)) if clocks else None,
        throttled=None if throttled is None else int(throttled),
        quota_s=quota_s,
        hottest_c=_both(first.hottest_c, last.hottest_c),
        load=_both(first.load, last.load),
        waited=waited,
        others=others,
        stolen=stolen,
        notes=notes,
        unknown=_unknown(last),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _both(first: float | None, last: float | None) -> tuple[float, float] | None:
    return None if first is None or last is None else (first, last)


def _risen(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else max(0.0, last - first)


def _rate(a: float | None, b: float | None, first: Glimpse, last: Glimpse) -> float | None:
    """Seconds of a counter per second on the wall."""
    risen, passed = _risen(a, b), last.wall_s - first.wall_s
    return None if risen is None or passed <= 0 else risen / passed


def _others(first: Glimpse, last: Glimpse) -> float | None:
    busy = _rate(first.busy_s, last.busy_s, first, last)
    own = _rate(first.own_s, last.own_s, first, last)
    return None if busy is None or own is None else max(0.0, busy - own)


def _drift_said(drift: Drift, tolerance: float) -> str:
    if drift.chance >= _CHANCE or abs(drift.change) < tolerance:
        return ""
    became = "slower" if drift.change > 0 else "faster"
    return (
        f"the baseline itself became {abs(drift.change):.1%} {became} while it was measured; a"
        f" steady machine seems to do so in {drift.chance:.1%} of runs"
    )


def _clock_said(clocks: Sequence[float]) -> str:
    drift = find_drift(clocks)
    if drift.chance >= _CHANCE or abs(drift.change) < _CLOCK_MOVED:
        return ""
    verb = "rose" if drift.change > 0 else "fell"
    return (
        f"the clock {verb} by {abs(drift.change):.0%}, between {min(clocks):.0f} and"
        f" {max(clocks):.0f} MHz; fix it, or wait until the machine has warmed up"
    )


def _wait_said(waited: float | None) -> str:
    if waited is None or waited <= _WAITED:
        return ""
    return f"{waited:.0%} of the time other processes had the core that was measured on; stop them"


def _crowd_said(others: float | None, *, cores: int | None, threads: int) -> str:
    if others is None or cores is None or others + min(threads, cores) <= cores + _CROWDED:
        return ""
    return (
        f"other processes kept {others:.1f} of {cores} cores busy, so that they took turns with"
        f" {threads} measured threads; stop them"
    )


def _stolen_said(stolen: float | None) -> str:
    if stolen is None or stolen <= _STOLEN:
        return ""
    return f"the hypervisor gave {stolen:.0%} of a core to other virtual machines"


def _unknown(glimpse: Glimpse) -> tuple[str, ...]:
    facts = {
        "clock": glimpse.clock_mhz,
        "throttling": glimpse.throttled,
        "temperature": glimpse.hottest_c,
        "load": glimpse.load,
        "other processes": glimpse.busy_s,
    }
    return tuple(name for name, value in facts.items() if value is None)
