"""What changed between two results, in words for terminal and page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.report.compare import Change, Comparison, Difference, Quantity
from equipoise.report.rows import interval, size
from equipoise.report.words import percent, plain

_TITLES: Final[dict[Quantity, str]] = {
    "metric": "metric", "latency": "latency / float", "size": "size", "memory": "peak memory"
}  # fmt: skip
_FEW: Final = 8


def verdict_lines(found: Comparison) -> tuple[str, ...]:
    """The outcome in a few sentences."""
    return tuple(_verdict(found))


def _verdict(found: Comparison) -> Iterator[str]:
    yield _choice(found)
    if not found.same_machine:
        yield (
            "The two were measured on different machines: latency is compared as a ratio to the"
            " float engine there, and says little of either machine."
        )
    changed = [c for c in found.figures if c.outcome in {"better", "worse"}]
    if found.figures and not changed:
        yield "Nothing in its figures changed beyond the noise."
    verdicts = [moved for moved in found.moved if moved.before != moved.after]
    if verdicts:
        yield f"{len(verdicts)} candidate{'s' * (len(verdicts) > 1)} changed the verdict."
    yield from _only("not tried any more", found.only_before)
    yield from _only("new", found.only_after)


def _choice(found: Comparison) -> str:
    before, after = (plain(name) for name in (found.chosen_before, found.chosen_after))
    if before == after:
        return f"The choice is the same: {after}." if after else "Neither run found an engine."
    if not before:
        return f"Before, no engine kept all limits; now it is {after}."
    if not after:
        return f"The choice was {before}; now no engine keeps all limits."
    return f"The choice changed from {before} to {after}."


def _only(what: str, names: tuple[str, ...]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        yield f"Candidates that are {what}: {', '.join(map(plain, names[:_FEW]))}{more}."


def figure_rows(found: Comparison) -> tuple[tuple[str, str, str, str], ...]:
    """Figure, before, after and outcome of the two choices."""
    return tuple(_figure(change) for change in found.figures)


def _figure(change: Change) -> tuple[str, str, str, str]:
    note = f" ({change.note})" if change.note else ""
    before, after = (_value(change.quantity, v) for v in (change.before, change.after))
    return _TITLES[change.quantity], before, after, f"{_outcome(change)}{note}"


def _value(quantity: Quantity, value: Interval) -> str:
    if quantity in {"size", "memory"}:
        return size(value.value)
    return interval(value, digits=4 if quantity == "metric" else 3)


def _outcome(change: Change) -> str:
    """``better by 12.0 %``; of a metric in its own unit."""
    if change.outcome not in {"better", "worse"}:
        return change.outcome
    gap = abs(change.after.value - change.before.value)
    if change.quantity == "metric" or not change.before.value:
        return f"{change.outcome} by {gap:.4f}"
    return f"{change.outcome} by {percent(gap / abs(change.before.value), digits=1)}"


def moved_rows(found: Comparison) -> tuple[tuple[str, str, str, str], ...]:
    """Candidate, verdicts, figures that changed, reason of the verdict now."""
    return tuple(
        (
            plain(moved.name),
            moved.after if moved.before == moved.after else f"{moved.before} → {moved.after}",
            "; ".join(map(_short, moved.changes)) or "–",
            plain(moved.reason),
        )
        for moved in found.moved
    )


def _short(change: Change) -> str:
    before, after = (_value(change.quantity, v) for v in (change.before, change.after))
    note = f" ({change.note})" if change.note else ""
    return f"{_TITLES[change.quantity]} {before} → {after}{note}"


def difference_rows(found: Comparison) -> tuple[tuple[str, str, str, str], ...]:
    """Kind, name, before and after of what was set or found otherwise."""
    kinds = {
        "goal": found.goal,
        "run": found.data,
        "machine": found.machine,
        "version": found.versions,
    }
    return tuple(_difference(kind, entry) for kind, group in kinds.items() for entry in group)


def _difference(kind: str, entry: Difference) -> tuple[str, str, str, str]:
    return kind, plain(entry.what), plain(entry.before), plain(entry.after)
