"""How long to measure: until an interval is narrow enough, or rounds or time are used up.

Where engines lie in memory moves their ratio for as long as both are open. So they are opened anew
again and again, in turned order, and an opening is the unit of noise: more rounds in one make an
interval no narrower than more openings would.

Whether it is enough is asked at openings fixed beforehand, by the width alone and never by the
value; :func:`~equipoise.measure.interval.clustered_interval` makes up for the asking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from equipoise import progress
from equipoise.measure.glimpse import Glimpse, look
from equipoise.measure.interval import Interval, Values, clustered_interval
from equipoise.measure.steadiness import Steadiness, judge

MORE_OPENINGS: Final = 4
"""Between one look at the interval and the next."""

Stopped = Literal["narrow enough", "most rounds", "budget"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        rounds: Interleaved rounds of each opening.
        first: Openings before it is first asked whether that is enough; it is asked again after
            every four more.
        most: Openings at most.
        relative_width: Of the interval that is narrow enough.
        budget_s: Seconds for all of it.
        threads: That the engines use at most.
    """

    rounds: int
    first: int
    most: int
    relative_width: float
    budget_s: float
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was timed under a plan.

    Attributes:
        openings: ``[rounds, 2]`` of each: the float engine and the engine.
        speedup: Float latency / engine latency.
        drift: Whether the machine was steady.
        stopped: Why it ended.
        seconds: How long it took.
    """

    openings: tuple[Values, ...]
    speedup: Interval
    drift: Steadiness
    stopped: Stopped
    seconds: float


def measure_until_narrow(
    openings: Iterable[Values], plan: Plan, *, glimpse: Callable[[], Glimpse] = look
) -> Measured:
    """Take openings until the interval of the ratio is as narrow as ``plan`` wants.

    Args:
        openings: ``[rounds, 2]`` of each, as many as the plan has at most.
        plan: How much.
        glimpse: Looks at the machine.
    """
    begin, taken, seen = time.perf_counter(), list[Values](), [glimpse()]
    stopped: Stopped | None = None
    for times in openings:
        taken.append(times)
        seen.append(glimpse())
        progress.report(len(taken), plan.most)
        stopped = _enough(taken, plan, seconds=time.perf_counter() - begin)
        if stopped:
            break
    return Measured(
        openings=tuple(taken),
        speedup=_speedup(taken, plan),
        drift=judge(
            seen,
            medians(taken, 0),
            threads=plan.threads,
            tolerance=plan.relative_width,
        ),
        stopped=stopped or "most rounds",
        seconds=time.perf_counter() - begin,
    )


def _enough(taken: Sequence[Values], plan: Plan, *, seconds: float) -> Stopped | None:
    """Why to stop after these openings; None to go on."""
    count = len(taken)
    if count < plan.first or (count - plan.first) % MORE_OPENINGS:
        return None
    found = _speedup(taken, plan)
    if found.high - found.low <= plan.relative_width * found.value:
        return "narrow enough"
    if count >= plan.most:
        return "most rounds"
    return "budget" if seconds * (1 + MORE_OPENINGS / count) > plan.budget_s else None


def _speedup(taken: Sequence[Values], plan: Plan) -> Interval:
    ratios = np.array([np.median(times[:, 0] / times[:, 1]) for times in taken])
    return clustered_interval(ratios, first=plan.first)


def medians(openings: Sequence[Values], index: int) -> Values:
    """``[openings]``: the median of one engine in each."""
    return np.array([np.median(times[:, index]) for times in openings], dtype=np.float64)
