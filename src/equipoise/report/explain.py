"""Why a search ended as it did: facts, and a few sentences made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.report.figures import baseline, chosen, figures, relative
from equipoise.report.nodes import Blocked, blocked
from equipoise.report.rivals import Rival, cheapest_refused, runner_up
from equipoise.report.rows import duration, fine, interval, size
from equipoise.report.words import limit_words, plain, price_words, sentence
from equipoise.search.goal import Limit, Quantity
from equipoise.search.result import Candidate, Measurement, Price, Repeat, TuneResult

_BLOCKS_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine at the sweet spot in figures.

    Attributes:
        name: Of its recipe.
        metric: With its interval.
        drop: Against the reference; its upper bound holds for all candidates together.
        latency_ms: Of one inference.
        ratio: Its latency over that of float.
        size_bytes: On disk.
        memory_bytes: Peak of a fresh process.
        relative: Cost -> its value over that of float.
    """

    name: str
    metric: Interval
    drop: Interval
    latency_ms: Interval
    ratio: Interval | None
    size_bytes: int
    memory_bytes: int
    relative: dict[Quantity, float]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a search ended as it did.

    Attributes:
        source: The model as the user named it.
        data: The evaluation data.
        target: Name of the target profile.
        choice: None when no engine keeps all limits.
        reason: Why this one, in words.
        evaluation_samples: What the metric was measured on.
        confidence: Of the bound of the drop, for all candidates together.
        runner_up: The best of the others that keep all limits.
        refused: The cheapest candidate that costs less and breaks a limit.
        binding: The limits that the nearest candidate breaks, when nothing is chosen.
        prices: What relaxing each limit would buy.
        blocked: The nodes left in float; None where the engine was not quantised node by node.
        verdicts: Verdict -> number of candidates.
        points: Number of recipes in the space that was searched.
        stopped: Why the search ended.
        seconds: How long it took.
        repeats: The same search again; empty when it was not repeated.
        warnings: What the user should know about data or model.
        sentences: Topic -> the same in words.
    """

    source: str
    data: str
    target: str
    choice: Choice | None
    reason: str
    evaluation_samples: int
    confidence: float
    runner_up: Rival | None
    refused: Rival | None
    binding: tuple[Limit, ...]
    prices: tuple[Price, ...]
    blocked: Blocked | None
    verdicts: dict[str, int]
    points: int
    stopped: str
    seconds: float
    repeats: tuple[Repeat, ...]
    warnings: tuple[str, ...]
    sentences: dict[str, str]


def explain(result: TuneResult) -> Explanation:
    """The facts of ``result`` and what they come to."""
    return Explanation(
        source=result.source,
        data=result.data,
        target=result.target,
        choice=_choice(result),
        reason=result.chosen_reason,
        evaluation_samples=result.evaluation_samples,
        confidence=result.goal.confidence,
        runner_up=runner_up(result),
        refused=cheapest_refused(result),
        binding=result.binding,
        prices=result.prices,
        blocked=blocked(result),
        verdicts=dict(Counter(c.verdict for c in result.candidates)),
        points=result.points,
        stopped=result.stopped,
        seconds=result.seconds,
        repeats=result.repeats,
        warnings=result.warnings,
        sentences=dict(_sentences(result)),
    )


def summary(result: TuneResult) -> str:
    """The outcome in a few sentences."""
    told = dict(_outcome(result))
    return " ".join(told.values())


def _choice(result: TuneResult) -> Choice | None:
    candidate = chosen(result)
    if candidate is None or candidate.measurement is None:
        return None
    found = candidate.measurement
    return Choice(
        name=candidate.recipe.name,
        metric=found.metric,
        drop=found.drop,
        latency_ms=found.latency_ms,
        ratio=figures(candidate).ratio,
        size_bytes=found.size_bytes,
        memory_bytes=found.peak_memory_bytes,
        relative=relative(candidate, result),
    )


def _sentences(result: TuneResult) -> Iterator[tuple[str, str]]:
    """Topic and words, in the order in which people read them."""
    yield from _outcome(result)
    yield from _rivals(result)
    if result.prices:
        yield "relaxing", " ".join(price_words(price, result) for price in result.prices)
    found = blocked(result)
    if found is not None:
        yield "blocks", _blocked_words(found)
    yield "search", _search_words(result)


def _outcome(result: TuneResult) -> Iterator[tuple[str, str]]:
    """The choice, what it costs, how sure that is, and how stable where that was tried."""
    yield from _found(result)
    if result.repeats:
        yield "stability", _stability(result)


def _found(result: TuneResult) -> Iterator[tuple[str, str]]:
    candidate = chosen(result)
    if candidate is None:
        yield "choice", f"No engine keeps all limits. {sentence(result.chosen_reason)}".strip()
        if result.binding:
            words = [plain(limit_words(x, metric=result.metric)) for x in result.binding]
            yield "binding", sentence(f"What binds is {'; '.join(words)}")
        return
    yield "choice", sentence(result.chosen_reason)
    if candidate.measurement is not None:
        yield "cost", _cost_words(candidate, candidate.measurement, result)
        yield "certainty", _certainty(candidate.measurement, result)


def _cost_words(candidate: Candidate, found: Measurement, result: TuneResult) -> str:
    ratio, base = figures(candidate).ratio, baseline(result)
    beside = base.measurement if base is not candidate and base is not None else None
    over = f", {interval(ratio, digits=2)} of float" if ratio and beside else ""
    disk = _share(found.size_bytes, beside.size_bytes) if beside else ""
    memory = _share(found.peak_memory_bytes, beside.peak_memory_bytes) if beside else ""
    latency = interval(found.latency_ms, digits=fine(found.latency_ms.value), unit=" ms")
    return (
        f"It takes {latency} per inference{over}; {size(found.size_bytes)} on disk{disk} and"
        f" {size(found.peak_memory_bytes)} of memory{memory}."
    )


def _share(value: float, base: float) -> str:
    return f" ({value / base:.2f} of float)" if base > 0 else ""


def _certainty(found: Measurement, result: TuneResult) -> str:
    """The metric beside the reference, and the bound of its drop."""
    metric, goal = plain(result.metric), result.goal
    allowed = f" (allowed {goal.max_drop:g})" if goal.max_drop is not None else ""
    return (
        f"Its {metric} is {interval(found.metric, digits=4)}; {plain(result.reference_name)} has"
        f" {result.reference_metric.value:.4f} on the same {result.evaluation_samples} samples."
        f" The drop is {found.drop.value:+.4f}, and at most {found.drop.high:.4f} at"
        f" {100 * goal.confidence:g} % confidence for all candidates together{allowed}."
    )


def _stability(result: TuneResult) -> str:
    """How often the same search chose the same, and how far apart the choices are in speed."""
    again, counts = result.repeats, Counter(r.chosen for r in result.repeats)
    same = counts.pop(result.chosen, 0)
    others = ", ".join(f"{plain(name) or 'no engine'} ({n})" for name, n in counts.items())
    speeds = [r.speedup.value for r in again if r.speedup is not None]
    apart = f" The speeds over float are {min(speeds):.2f} to {max(speeds):.2f}." if speeds else ""
    times = f"{len(again)} more time{'s' if len(again) > 1 else ''}"
    rest = f"; the others chose {others}" if others else ""
    return (
        f"Searched {times} with every measurement made anew: {same} of {len(again)} chose the"
        f" same{rest}.{apart}"
    )


def _rivals(result: TuneResult) -> Iterator[tuple[str, str]]:
    second, refused = runner_up(result), cheapest_refused(result)
    if second is not None:
        yield "runner-up", sentence(f"{second.name} is next: {second.why_not}")
    if refused is not None:
        than = "would cost less" if result.chosen else "costs least"
        yield "refused", sentence(f"{refused.name} {than}, but is refused: {refused.why_not}")


def _blocked_words(found: Blocked) -> str:
    if not found.nodes:
        return f"All {found.total} nodes of the chosen model compute in integers."
    first = "; ".join(f"{node.name} ({node.words})" for node in found.nodes[:_BLOCKS_NAMED])
    more = len(found.nodes) - _BLOCKS_NAMED
    return sentence(f"{found.head}: {first}{f'; and {more} more' if more > 0 else ''}")


def _search_words(result: TuneResult) -> str:
    counts = Counter(c.verdict for c in result.candidates if c.verdict != "baseline")
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    space = f", of {result.points} in the space," if result.points else ""
    took = f" in {duration(result.seconds)}" if result.seconds else ""
    ended = f" The search ended: {plain(result.stopped)}." if result.stopped else ""
    words = f"Tried {len(result.candidates)} recipes{space}{took}"
    return sentence(f"{words}{f': {verdicts}' if verdicts else ''}") + ended
