"""Two results side by side: what changed, and what is within the noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Final, Literal

from equipoise import record
from equipoise.measure.interval import Interval
from equipoise.report.figures import chosen, exactly, figures, overlap
from equipoise.search.result import Candidate, TuneResult

Outcome = Literal["better", "worse", "within the noise", "the same", "not comparable"]
Quantity = Literal["metric", "latency", "size", "memory"]

_MEMORY_REPEATS: Final = 0.05
"""Peak memory of a process repeats to a few per cent; it is measured once."""

_MACHINE: Final = ("cpu", "architecture", "cores", "flags")
"""What makes another machine; a new kernel or limit of memory does not."""

_DATA: Final = (
    "source", "data", "target", "metric", "threads", "evaluation_samples", "calibration_samples",
)  # fmt: skip
_SAME_METRIC: Final = {"data", "metric", "evaluation_samples"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure before and after.

    Attributes:
        quantity: ``latency`` is over that of the float engine; sizes are in bytes.
        before: With its interval.
        after: The same, now.
        outcome: ``better`` and ``worse`` are beyond both intervals.
        note: What stands against comparing them, in words.
    """

    quantity: Quantity
    before: Interval
    after: Interval
    outcome: Outcome
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A candidate of both runs that is not what it was.

    Attributes:
        name: Of the recipe.
        before: Verdict.
        after: Verdict now.
        reason: Of the verdict now.
        changes: Figures that changed beyond both intervals.
    """

    name: str
    before: str
    after: str
    reason: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that was set or found otherwise."""

    what: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changed from one result to another.

    Attributes:
        chosen_before: Name of the choice; empty for none.
        chosen_after: The same, now.
        figures: Of the two choices; empty when there is none on a side.
        moved: Candidates of both runs with another verdict or with figures that changed.
        only_before: Candidates that are not there any more.
        only_after: New ones.
        goal: What was asked for otherwise.
        data: Model, data, target, metric, threads and samples that differ.
        machine: What of the machine differs.
        versions: Packages of another version.
        same_machine: Whether both were measured on machines of one kind.
    """

    chosen_before: str
    chosen_after: str
    figures: tuple[Change, ...]
    moved: tuple[Moved, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    goal: tuple[Difference, ...]
    data: tuple[Difference, ...]
    machine: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    same_machine: bool


def compare(before: TuneResult, after: TuneResult) -> Comparison:
    """What changed from ``before`` to ``after``."""
    first, second = ({c.recipe.name: c for c in r.candidates} for r in (before, after))
    noted = _Notes(before, after)
    return Comparison(
        chosen_before=before.chosen,
        chosen_after=after.chosen,
        figures=_figures(chosen(before), chosen(after), notes=noted),
        moved=tuple(_moved(first, second, notes=noted)),
        only_before=tuple(name for name in first if name not in second),
        only_after=tuple(name for name in second if name not in first),
        goal=_differences(before.goal, after.goal, names=_names(before.goal)),
        data=_differences(before, after, names=_DATA),
        machine=_differences(before.machine, after.machine, names=_names(before.machine)),
        versions=_versions(before.versions, after.versions),
        same_machine=noted.same_machine,
    )


class _Notes:
    """What stands against comparing the figures of two runs."""

    def __init__(self, before: TuneResult, after: TuneResult) -> None:
        self.same_machine = all(
            getattr(before.machine, name) == getattr(after.machine, name) for name in _MACHINE
        )
        other = [n for n in _SAME_METRIC if getattr(before, n) != getattr(after, n)]
        self.metric = f"other {' and '.join(sorted(other)).replace('_', ' ')}" if other else ""
        self.machine = "" if self.same_machine else "measured on another machine"


def _figures(
    before: Candidate | None, after: Candidate | None, *, notes: _Notes
) -> tuple[Change, ...]:
    """The figures that both have; none where one was not measured whole."""
    if before is None or after is None or not (before.measurement and after.measurement):
        return ()
    old, new = _intervals(before), _intervals(after)
    return tuple(_change(name, old[name], new[name], notes=notes) for name in old if name in new)


def _intervals(candidate: Candidate) -> dict[Quantity, Interval]:
    known = figures(candidate)
    found: dict[Quantity, Interval | None] = {
        "metric": known.metric,
        "latency": known.ratio,
        "size": None if known.size_bytes is None else exactly(known.size_bytes),
        "memory": None if known.memory_bytes is None else _roughly(known.memory_bytes),
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def _roughly(count: float) -> Interval:
    low, high = (count * (1 + sign * _MEMORY_REPEATS) for sign in (-1, 1))
    return Interval(value=count, low=low, high=high)


def _change(quantity: Quantity, before: Interval, after: Interval, *, notes: _Notes) -> Change:
    outcome: Outcome
    if quantity == "metric" and notes.metric:
        outcome = "not comparable"
    elif before.value == after.value:
        outcome = "the same"
    elif overlap(before, after):
        outcome = "within the noise"
    else:
        rises = after.value > before.value
        outcome = "better" if rises == (quantity == "metric") else "worse"
    note = {"metric": notes.metric, "size": ""}.get(quantity, notes.machine)
    return Change(quantity=quantity, before=before, after=after, outcome=outcome, note=note)


def _moved(
    before: Mapping[str, Candidate], after: Mapping[str, Candidate], *, notes: _Notes
) -> Iterator[Moved]:
    for name, new in after.items():
        if name not in before:
            continue
        old = before[name]
        found = _figures(old, new, notes=notes)
        changes = tuple(c for c in found if c.outcome in {"better", "worse"})
        if changes or old.verdict != new.verdict:
            yield Moved(
                name=name,
                before=old.verdict,
                after=new.verdict,
                reason=new.reason,
                changes=changes,
            )


def _names(settings: object) -> tuple[str, ...]:
    return tuple(field.name for field in fields(settings))  # type: ignore[arg-type]


def _differences(
    before: object, after: object, *, names: tuple[str, ...]
) -> tuple[Difference, ...]:
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in names)
    return tuple(
        Difference(what=name.replace("_", " "), before=_text(old), after=_text(new))
        for name, old, new in pairs
        if old != new
    )


def _text(value: record.Json | tuple[object, ...]) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _versions(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(what=name, before=before.get(name, "none"), after=after.get(name, "none"))
        for name in sorted({**before, **after})
        if before.get(name) != after.get(name)
    )
