"""The file of a lock, and what it holds against what is found later.

A lock is a small JSON file that is committed beside the model: the metric and its paired drop, the
parity of every output, the latency as a ratio to the float engine with all its openings, the size,
the kernels that run, and where and on what all of that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.errors import InputError, UsageError
from equipoise.measure.interval import Interval
from equipoise.measure.kernels import lost
from equipoise.measure.regression import Change, ClockName, Openings, estimate
from equipoise.parity.compare import OutputParity
from equipoise.report.gates import Gate
from equipoise.targets.machine import Machine
from equipoise.vouching import check_format

LOCK_FILE: Final = "equipoise.lock.json"
FORMAT: Final = 1
GROUP: Final = "lock"
_METRIC_NOISE: Final = 1e-6
"""Sums of thousands of float64 terms differ by less when they are added in another order."""

_SQNR_NOISE_DB: Final = 0.5
"""An eighth more noise. Kernels of another version round otherwise; quantisation that was lost or
applied elsewhere costs whole decibels."""

_FLIP_NOISE: Final = 1e-3
_SIZE_GROWTH: Final = 0.01
_CLOCKS: Final = {"cpu": "CPU time", "wall": "time on the wall"}
_RELOCK: Final = "If that is wanted, lock anew with `equipoise lock` and commit the file."


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What was compared, and on what.

    Attributes:
        source: The trained model.
        data: The evaluation data, as it was named.
        samples: Number of evaluation samples.
        fingerprint: SHA-256 of the samples as the engine gets them.
        metric: Name of the metric.
        labelled: Whether the data had to have labels; else the metric needs none.
        target: Name of the target.
        runtime: Runtime of the engine.
        threads: Threads per operator.
    """

    source: str
    data: str
    samples: int
    fingerprint: str
    metric: str
    labelled: bool
    target: str
    runtime: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What does not depend on the clock.

    Attributes:
        reference_metric: Metric of the source.
        metric: Metric of the engine.
        drop: Of the metric against the source, paired over the same samples; one-sided 95 % bounds.
        parity: How every output compares with the source's.
        size_bytes: Bytes on disk of everything that the engine loads.
        kernels: Operator type -> count in the graph as the runtime rewrote it.
    """

    reference_metric: float
    metric: float
    drop: Interval
    parity: tuple[OutputParity, ...]
    size_bytes: int
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class LockedLatency:
    """The latency against the float ONNX engine.

    Attributes:
        ratio: Latency of the engine / latency of the float engine, over all openings.
        rounds: Interleaved rounds of each opening.
        clock: What was read: the time on the wall, or the CPU time of the process.
        openings: All of them.
    """

    ratio: float
    rounds: int
    clock: ClockName
    openings: Openings


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What an engine was accepted with.

    Attributes:
        format: Version of this form.
        compared: What was compared, and on what.
        figures: What was found.
        latency: How fast it was.
        machine: Where.
        versions: Package -> version.
    """

    format: int = FORMAT
    compared: Compared
    figures: Figures
    latency: LockedLatency
    machine: Machine
    versions: dict[str, str]


def read_lock(path: Path) -> Lock:
    """Read a lock.

    Raises:
        InputError: There is none, or it is not what ``equipoise lock`` writes.
        IncompatibleError: A later version of equipoise wrote it.
    """
    text = fs.read_text(path, error=InputError)
    try:
        record.parse(text)
    except ValueError as error:
        raise InputError(
            f"{path} is no lock: {error}", hint="Write it with `equipoise lock`."
        ) from error
    check_format(text, path, newest=FORMAT)
    found = record.loads(Lock, text, where=str(path), error=InputError)
    try:
        estimate(found.latency.openings.log_ratios)
    except UsageError as error:
        raise InputError(f"{path}: latency.openings: {error.message}") from error
    return found


def not_compared(name: str, reason: str) -> Gate:
    """A gate that lets through what cannot be compared, and says so."""
    measured = f"not compared: {reason}"
    return Gate(name=name, group=GROUP, passed=True, measured=measured, allowed="–")


def compare(was: Lock, now: Lock, *, limits: Mapping[str, float]) -> Iterator[Gate]:
    """Gates for what was compared, the metric, each output, size and kernels.

    Args:
        was: The lock.
        now: What was found now; its latency is not looked at.
        limits: Output -> difference from the source that is no more than float arithmetic.
    """
    yield _same_comparison(was.compared, now.compared)
    if was.compared.metric == now.compared.metric:
        yield _metric_gate(was, now)
    else:
        yield not_compared("metric", f"locked was {was.compared.metric}")
    yield from _parity_gates(was, now, limits=limits)
    yield _size_gate(was.figures.size_bytes, now.figures.size_bytes)
    yield _kernel_gate(was, now)


def _same_comparison(was: Compared, now: Compared) -> Gate:
    """Whether the figures are of the same samples and metric; else they say nothing."""
    alike = (was.fingerprint, was.metric) == (now.fingerprint, now.metric)
    return Gate(
        name="same comparison",
        group=GROUP,
        passed=alike,
        measured=_comparison_words(now),
        allowed=_comparison_words(was),
        advice=f"The lock was made on other samples or with another metric. {_RELOCK}",
    )


def _comparison_words(compared: Compared) -> str:
    digest = compared.fingerprint[:12]
    return f"{compared.metric} on {compared.samples} samples of {compared.data} (SHA-256 {digest})"


def _metric_gate(was: Lock, now: Lock) -> Gate:
    """The drop on the same samples against the bound that was accepted.

    Engines are deterministic, so an engine that is unchanged has the drop that was locked. One that
    is not may move within what the lock could not rule out then: the upper bound of its drop.
    """
    before, after = was.figures, now.figures
    more = after.drop.value - before.drop.value
    moved = "" if abs(more) <= _METRIC_NOISE else f", {more:+.4f} since"
    return Gate(
        name=f"drop of {now.compared.metric}",
        group=GROUP,
        passed=after.drop.value <= max(before.drop.high, before.drop.value) + _METRIC_NOISE,
        measured=f"{after.drop.value:+.4f}, to {after.metric:.4f}{moved}",
        allowed=f"at most {before.drop.high:.4f}, the bound of a locked {before.drop.value:+.4f}",
        advice=_advice("The engine decides worse on the same samples.", was, now),
    )


def _parity_gates(was: Lock, now: Lock, *, limits: Mapping[str, float]) -> Iterator[Gate]:
    found = {output.name: output for output in now.figures.parity}
    for before in was.figures.parity:
        after = found.pop(before.name, None)
        if after is None:
            yield Gate(
                name=f"{before.name}: output",
                group=GROUP,
                passed=False,
                measured="not there",
                allowed="there, as locked",
                advice=f"The source has other outputs than it had. {_RELOCK}",
            )
            continue
        equal = after.max_abs <= limits.get(after.name, 0.0)
        yield _sqnr_gate(before, after, equal=equal, advice=_advice("", was, now))
        if before.flips is not None and after.flips is not None:
            yield _flips_gate(before, after, equal=equal, advice=_advice("", was, now))


def _sqnr_gate(before: OutputParity, after: OutputParity, *, equal: bool, advice: str) -> Gate:
    """A difference within the noise of float arithmetic is none, whatever was locked."""
    locked = math.inf if before.sqnr_db is None else before.sqnr_db
    found = math.inf if after.sqnr_db is None else after.sqnr_db
    return Gate(
        name=f"{after.name}: SQNR",
        group=GROUP,
        passed=equal or found >= locked - _SQNR_NOISE_DB,
        measured="equal to the last bit" if math.isinf(found) else f"{found:.2f} dB",
        allowed=f"at least {locked - _SQNR_NOISE_DB:.2f} dB, locked {locked:.2f}"
        if math.isfinite(locked)
        else "equal up to the noise of float arithmetic",
        advice=advice,
    )


def _flips_gate(before: OutputParity, after: OutputParity, *, equal: bool, advice: str) -> Gate:
    locked, found = before.flips or 0.0, after.flips or 0.0
    return Gate(
        name=f"{after.name}: decisions that differ",
        group=GROUP,
        passed=equal or found <= locked + _FLIP_NOISE,
        measured=f"{found:.3%}",
        allowed=f"at most {locked + _FLIP_NOISE:.3%}, locked {locked:.3%}",
        advice=advice,
    )


def _size_gate(locked: int, found: int) -> Gate:
    most = int(locked * (1 + _SIZE_GROWTH))
    return Gate(
        name="size",
        group=GROUP,
        passed=found <= most,
        measured=f"{found:,} bytes, {found / max(locked, 1) - 1:+.1%}",
        allowed=f"at most {most:,} bytes, 1 % above the locked {locked:,}",
        advice=f"Weights may no longer be stored in few bits. {_RELOCK}",
    )


def _kernel_gate(was: Lock, now: Lock) -> Gate:
    before, after = was.figures.kernels, now.figures.kernels
    if not before or not after:
        return not_compared("kernels", f"{now.compared.runtime} does not name its kernels here")
    if was.machine.flags != now.machine.flags:
        return not_compared("kernels", f"locked on {was.machine.cpu}, which has others")
    fallen = lost(before, after)
    return Gate(
        name="kernels",
        group=GROUP,
        passed=not fallen,
        measured="; ".join(fallen) or f"{sum(after.values())} operators, none lost",
        allowed="no integer or fused kernel less than locked",
        advice=_advice("The runtime no longer finds what it ran in one or in integers.", was, now),
    )


def incomparable(was: Lock, now: Lock, *, any_machine: bool) -> str:
    """Why latencies cannot be compared; empty where they can.

    Args:
        was: The lock.
        now: What was found now.
        any_machine: Whether another CPU and another number of threads do not matter.
    """
    for what, before, after in (
        ("runtime", was.compared.runtime, now.compared.runtime),
        ("samples", was.compared.fingerprint[:12], now.compared.fingerprint[:12]),
    ):
        if before != after:
            return f"locked with {what} {before}, now {after}"
    if any_machine:
        return ""
    locked, here = was.machine, now.machine
    if (locked.cpu, locked.flags) != (here.cpu, here.flags):
        return f"locked on {_machine_words(locked)}, now on {_machine_words(here)}"
    if was.compared.threads != now.compared.threads:
        return f"locked with {was.compared.threads} threads, now {now.compared.threads}"
    return ""


def _machine_words(machine: Machine) -> str:
    """The CPU with its features: a virtual machine may give all models one name."""
    return f"{machine.cpu} ({' '.join(machine.flags) or machine.architecture})"


def latency_gate(was: Lock, now: Lock, *, found: Change, slowdown: float) -> Gate:
    """The gate of the latency.

    Args:
        was: The lock.
        now: What was found now, for its versions and its machine.
        found: How the ratio has changed.
        slowdown: The slow-down that had to be seen.
    """
    ratio = was.latency.ratio
    advice = _advice("It is slower against the float engine than it was.", was, now)
    if found.state == "same":
        advice = f"Slow-downs from {found.sees:.1%} on are seen in 95 of 100 runs as noisy as this."
    return Gate(
        name="latency",
        group=GROUP,
        passed=found.state == "same",
        measured=f"{found.value:+.1%} ({found.low:+.1%} to {found.high:+.1%} at 99 %):"
        f" {ratio * (1 + found.value):.3f} of the float engine's {_CLOCKS[was.latency.clock]},"
        f" {found.openings} openings",
        allowed=f"less than {slowdown:.1%} slower than the locked {ratio:.3f}",
        advice=advice,
    )


def _advice(words: str, was: Lock, now: Lock) -> str:
    """What may have done it: versions and machines that changed."""
    names = sorted({*was.versions, *now.versions})
    changed = [
        f"{name} {was.versions.get(name, '–')} to {now.versions.get(name, '–')}"
        for name in names
        if was.versions.get(name) != now.versions.get(name)
    ]
    if was.machine.cpu != now.machine.cpu:
        changed.append(f"{was.machine.cpu} to {now.machine.cpu}")
    since = f"Changed since: {', '.join(changed)}." if changed else ""
    return " ".join(part for part in (words, since, _RELOCK) if part)
