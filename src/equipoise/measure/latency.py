"""Latency of an engine against the float engine: interleaved rounds in one process.

Shared machines drift by more than the differences that matter. So both engines run in turn in one
process, each round gives one ratio, and the claim is about the ratios.

Both are opened anew again and again, until the interval of the ratio is narrow enough; see
``stopping.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise import progress
from equipoise.data.store import Rows
from equipoise.errors import UsageError
from equipoise.measure.interval import Interval, clustered_interval
from equipoise.measure.steadiness import Steadiness
from equipoise.measure.stopping import (
    MORE_OPENINGS,
    Measured,
    Plan,
    Stopped,
    measure_until_narrow,
    medians,
)
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.spec import Array

_BLOCK_S: Final = 0.004
"""A timed block lasts at least as long, so that the clock and the loop cost nothing beside it."""

SETTLE_S: Final = 0.02
"""A session runs for so long before each block, so that its weights are where they stay."""

_SETTLE_RUNS: Final = 16
"""Or so often, if that takes less: a last cache keeps what is read again and again."""

_WARM_UP_S: Final = 0.15
_WARM_AGAIN_S: Final = 0.05
"""From the second opening on, when the clock of the CPU is up already."""

_OPENINGS: Final = 4
_FIRST_OPENINGS: Final = 8
_MANY_ROUNDS: Final = 16
_MORE_ROUNDS: Final = 4
_MOST_SAMPLES: Final = 64


Times = NDArray[np.float64]
"""[rounds, engines]: milliseconds per inference."""

Clock = Callable[[], float]
"""Seconds since some moment."""


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """What to measure.

    Attributes:
        engine: Engine file.
        baseline: Float engine file.
        samples: Directory of inputs; of the first 64, some of every size take turns.
        machine: Description of the machine, so that a result is never taken for another's.
        runtime: Runtime of the engine.
        baseline_runtime: Runtime of the float engine; None for the same.
        rounds: Interleaved rounds at least, shared among 8 openings; among 4 if fewer than 16.
        most_rounds: Rounds at most; None for four times the least.
        relative_width: Stop when the 95 % interval of the speed-up is at most so wide, relative to
            its value.
        budget_s: Stop when no more openings fit in so many seconds. The least is always measured.
        threads: Threads per operator of the engine.
        baseline_threads: Of the float engine; None for the same.
        take: Which of several measurements of the same; it tells their kept results apart.
        settle_s: Each engine runs for so long before it is timed, or 16 times if that takes less.
    """

    engine: Path
    baseline: Path
    samples: Path
    machine: str
    runtime: str = "onnxruntime"
    baseline_runtime: str | None = None
    rounds: int = 60
    most_rounds: int | None = None
    relative_width: float = 0.02
    budget_s: float = 60.0
    threads: int = 1
    baseline_threads: int | None = None
    take: int = 0
    settle_s: float = SETTLE_S


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """What was measured, in milliseconds per inference.

    Attributes:
        engine_ms: Of the engine, with its 95 % interval over openings: the median of each opening,
            and of those the trimmed mean.
        engine_p95_ms: 95th percentile over rounds.
        baseline_ms: Median of the float engine in the same rounds.
        speedup: Float latency / engine latency, as ``engine_ms``.
        rounds: Number of rounds.
        openings: How often both were opened.
        drift: Whether the machine was steady meanwhile.
        repeated: Whether it is the second measurement, since the machine was not steady in the
            first; it may not have been in the second either.
        stopped: Why no more was measured.
    """

    engine_ms: Interval
    engine_p95_ms: float
    baseline_ms: float
    speedup: Interval
    rounds: int
    openings: int
    drift: Steadiness
    repeated: bool
    stopped: Stopped


def measure_latency(config: LatencyConfig, *, output: Path) -> LatencyRecord:  # noqa: ARG001
    """Measure ``config.engine`` against ``config.baseline``.

    Where the machine was not steady meanwhile, it is measured once more from the beginning, if the
    budget has room for it. The second measurement counts, whatever it says: choosing would favour
    one answer.

    Raises:
        InputError: The samples do not fit an engine.
        UsageError: A number of the config is out of range.
    """
    plan = plan_of(config)
    found = _measured(config, plan)
    left = plan.budget_s - found.seconds
    again = not found.drift.steady and left >= found.seconds * plan.first / len(found.openings)
    if again:
        found = _measured(config, replace(plan, budget_s=left))
    return _record(found, plan, repeated=again)


def plan_of(config: LatencyConfig) -> Plan:
    """How much ``config`` asks for. Raises UsageError for a number out of range."""
    most_rounds = _MORE_ROUNDS * config.rounds if config.most_rounds is None else config.most_rounds
    first = openings_of(config.rounds)
    _check(config, most_rounds=most_rounds)
    rounds = math.ceil(config.rounds / first)
    more = max(0, most_rounds - first * rounds) // (rounds * MORE_OPENINGS)
    return Plan(
        rounds=rounds,
        first=first,
        most=first + MORE_OPENINGS * more,
        relative_width=config.relative_width,
        budget_s=config.budget_s,
        threads=max(_threads(config)),
    )


def openings_of(rounds: int) -> int:
    """Among how many openings so many rounds are shared. Raises UsageError for fewer than 4."""
    if rounds < _OPENINGS:
        raise UsageError(f"{rounds} rounds of a latency; it must be at least {_OPENINGS}")
    return _FIRST_OPENINGS if rounds >= _MANY_ROUNDS else _OPENINGS


def _check(config: LatencyConfig, *, most_rounds: int) -> None:
    for name, value, least in (
        ("most_rounds", most_rounds, config.rounds),
        ("threads", config.threads, 1),
        ("baseline_threads", min(_threads(config)), 1),
        ("budget_s", config.budget_s, 0),
    ):
        if not least <= value < math.inf:
            raise UsageError(f"{name} of a latency is {value:g}; it must be at least {least}")
    if not 0 < config.relative_width < math.inf:
        raise UsageError(
            f"relative_width of a latency is {config.relative_width:g}; it must be above 0"
        )


def _threads(config: LatencyConfig) -> tuple[int, int]:
    """Of the float engine and of the engine."""
    own = config.threads
    return own if config.baseline_threads is None else config.baseline_threads, own


def _measured(config: LatencyConfig, plan: Plan) -> Measured:
    files = (
        EngineFile(file=config.baseline, runtime=config.baseline_runtime or config.runtime),
        EngineFile(file=config.engine, runtime=config.runtime),
    )
    openings = timed_openings(
        files,
        spread(Rows(config.samples), count=plan.rounds),
        threads=_threads(config),
        rounds=[plan.rounds] * plan.most,
        settle_s=config.settle_s,
    )
    return measure_until_narrow(openings, plan)


def spread(rows: Rows, *, count: int) -> list[dict[str, Array]]:
    """At most ``count`` of the first 64 samples, of every size: one from each part of the order."""
    samples = [rows[i] for i in range(min(len(rows), _MOST_SAMPLES))]
    samples.sort(key=lambda row: sum(array.nbytes for array in row.values()))
    kept = min(count, len(samples))
    return [samples[int((part + 0.5) * len(samples) / kept)] for part in range(kept)]


def _record(found: Measured, plan: Plan, *, repeated: bool) -> LatencyRecord:
    times = np.concatenate(found.openings)
    return LatencyRecord(
        engine_ms=clustered_interval(medians(found.openings, 1), first=plan.first),
        engine_p95_ms=float(np.quantile(times[:, 1], 0.95)),
        baseline_ms=float(np.median(times[:, 0])),
        speedup=found.speedup,
        rounds=len(times),
        openings=len(found.openings),
        drift=found.drift,
        repeated=repeated,
        stopped=found.stopped,
    )


def time_engines(
    engines: Sequence[EngineFile],
    samples: Sequence[dict[str, Array]],
    *,
    threads: int,
    rounds: int,
) -> Times:
    """Time engines in interleaved rounds, opened anew four times, each time in another order.

    Where an engine lies in memory favours one of two equal engines by several per cent for as long
    as both are open; opening them again in turned order takes that out of the ratio.

    Args:
        engines: What to time.
        samples: Inputs that take turns.
        threads: Threads per operator.
        rounds: Number of rounds in all, at least four.

    Returns:
        float64 [rounds, engines]: milliseconds per inference.
    """
    shares = shared(rounds, _OPENINGS)
    openings = timed_openings(engines, samples, threads=[threads] * len(engines), rounds=shares)
    return np.concatenate(list(progress.track(openings, total=len(shares))))


def shared(rounds: int, openings: int) -> list[int]:
    """``rounds`` shared among ``openings``; those that get none are left out."""
    shares = (rounds // openings + (index < rounds % openings) for index in range(openings))
    return [share for share in shares if share]


def timed_openings(
    engines: Sequence[EngineFile],
    samples: Sequence[dict[str, Array]],
    *,
    threads: Sequence[int],
    rounds: Iterable[int],
    settle_s: float = SETTLE_S,
) -> Iterator[Times]:
    """Open the engines and time them in interleaved rounds, again and again in turned order.

    Who is opened first, warmed up first and timed first differs from one opening to the next: each
    of these favours one of two equal engines by some per cent.

    Args:
        engines: What to time.
        samples: Inputs that take turns.
        threads: Threads per operator of each.
        rounds: Of each opening.
        settle_s: As of :func:`interleave`.

    Yields:
        float64 [rounds, engines] of an opening: milliseconds per inference. All are closed then.
    """
    settings = [SessionSettings(threads=count) for count in threads]
    for opening, count in enumerate(rounds):
        order = list(range(len(engines)))[:: -1 if opening % 2 else 1]
        with ExitStack() as stack:
            sessions = [stack.enter_context(engines[i].session(settings[i])) for i in order]
            warm_up_s = _WARM_AGAIN_S if opening else _WARM_UP_S
            times = interleave(
                sessions, samples, rounds=count, settle_s=settle_s, warm_up_s=warm_up_s
            )
        yield times[:, np.argsort(order)]


def interleave(  # noqa: PLR0913  what is timed, how much of it, and by which clock
    sessions: Sequence[Session],
    samples: Sequence[dict[str, Array]],
    *,
    rounds: int,
    block_s: float = _BLOCK_S,
    settle_s: float = SETTLE_S,
    warm_up_s: float = _WARM_UP_S,
    clock: Clock | None = None,
) -> Times:
    """Time the sessions in turn on the same samples.

    Each round takes the next sample and runs every session on it, in an order that is turned round
    from one round to the next. Before its time is taken a session runs for ``settle_s``: it finds
    caches that another engine has filled, and what that costs is not its own. Without it, a MiniLM
    whose int8 weights fit into the last cache would seem a third slower beside its float engine
    than it is by itself.

    Args:
        sessions: What to time.
        samples: Inputs that take turns.
        rounds: Number of rounds.
        block_s: A timed block lasts at least as long.
        settle_s: A session runs for so long before each block, or 16 times if that takes less.
        warm_up_s: Each runs at least as long before, and every sample once.
        clock: Reads the time; that on the wall when None.

    Returns:
        float64 [rounds, sessions]: milliseconds per inference.
    """
    clock = clock or time.perf_counter
    repeats = max(
        _warm_up(session, samples, block_s=block_s, least_s=warm_up_s) for session in sessions
    )
    times = np.empty((rounds, len(sessions)))
    order = list(range(len(sessions)))
    for index in range(rounds):
        feeds = samples[index % len(samples)]
        for position in order:
            session = sessions[position]
            _settle(session, feeds, most_s=settle_s)
            times[index, position] = _block_ms(session, feeds, repeats=repeats, clock=clock)
        order.reverse()
    return times


def _warm_up(
    session: Session, samples: Sequence[dict[str, Array]], *, block_s: float, least_s: float
) -> int:
    """Run for a while; return how many runs make a block of useful length."""
    begin, runs = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < least_s or runs < len(samples):
        session.run(samples[runs % len(samples)])
        runs += 1
    return max(1, round(block_s * runs / passed))


def _settle(session: Session, feeds: dict[str, Array], *, most_s: float) -> None:
    """Run untimed until the caches hold what they will hold: a few times, or for a while."""
    end = time.perf_counter() + most_s
    for _ in range(_SETTLE_RUNS):
        if time.perf_counter() >= end:
            return
        session.run(feeds)


def _block_ms(session: Session, feeds: dict[str, Array], *, repeats: int, clock: Clock) -> float:
    begin = clock()
    for _ in range(repeats):
        session.run(feeds)
    return (clock() - begin) * 1000 / repeats
