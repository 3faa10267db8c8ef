"""The report page: one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.report.compare import Comparison
from equipoise.report.comparing import difference_rows, figure_rows, moved_rows, verdict_lines
from equipoise.report.explain import Explanation, explain
from equipoise.report.figures import baseline, chosen, figures
from equipoise.report.nodes import node_map, precisions
from equipoise.report.plot import pareto_views
from equipoise.report.rows import columns, duration, fine, interval, rows, size
from equipoise.report.timeline import timeline_views
from equipoise.report.views import View
from equipoise.report.words import (
    allowance,
    amount,
    goal_words,
    limit_words,
    limited,
    minimised,
    price_words,
    sentence,
)
from equipoise.search.goal import Limit
from equipoise.search.result import Candidate, Measurement, Repeat, TuneResult

_FOLDER: Final = Path(__file__).parent
_IN_SCRIPTS: Final = str.maketrans(
    {c: f"\\u{ord(c):04x}" for c in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"}
)


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """A figure in large digits.

    Attributes:
        title: What it is.
        value: The digits.
        interval: Its uncertainty, in words.
        beside: What to hold it against.
    """

    title: str
    value: str
    interval: str
    beside: str


def render_html(result: TuneResult, *, compared: Comparison | None = None) -> str:
    """The page for ``result``, self-contained.

    Args:
        result: What ``tune`` found.
        compared: What changed since another result, which becomes a section of its own.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    plotly: Any = extras.require("plotly.offline")
    told, nodes = explain(result), node_map(result)
    values = {
        "result": result,
        "told": told,
        "keys": tuple(_key_figures(result)),
        "goal": goal_words(result.goal, metric=result.metric),
        "columns": columns(result),
        "rows": rows(result),
        "fronts": pareto_views(result),
        "timeline": timeline_views(result),
        "nodes": nodes,
        "precisions": precisions(nodes),
        "minimised": minimised(result.goal),
        "limits": _limits(result, told),
        "prices": [price_words(price, result) for price in result.prices],
        "repeats": tuple(map(_repeat, range(2, len(result.repeats) + 2), result.repeats)),
        "compared": _compared(compared),
        "plotly": plotly.get_plotlyjs(),
        "page_style": _read("page.css"),
    }
    return render("page.html.j2", values)


def render(template: str, values: Mapping[str, object]) -> str:
    """A page from a template of this folder, with the style that all pages share.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2: Any = extras.require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size, "interval": interval, "duration": duration, "sentence": sentence,
        "views": _views,
    }  # fmt: skip
    page: str = environment.get_template(template).render(**values, style=_read("style.css"))
    return page


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _views(views: tuple[View, ...]) -> str:
    """Plots as JSON that may stand inside a script element."""
    plain = [{"key": view.key, "note": view.note, **view.figure} for view in views]
    return json.dumps(plain, allow_nan=False).translate(_IN_SCRIPTS)


def _limits(result: TuneResult, told: Explanation) -> tuple[str, ...]:
    """The limits that bind, in words: those that are broken, or whose relaxing would pay."""
    if not told.choice:
        return tuple(limit_words(limit, metric=result.metric) for limit in result.binding)
    kinds = dict.fromkeys(price.limit.quantity for price in result.prices)
    return tuple(limited(kind, metric=result.metric) for kind in kinds)


def _key_figures(result: TuneResult) -> Iterator[KeyFigure]:
    """Of the choice; where there is none, what the nearest engine breaks."""
    candidate = chosen(result)
    if candidate is None:
        yield from (_broken(limit, metric=result.metric) for limit in result.binding)
    elif candidate.measurement is not None:
        yield _key_metric(candidate.measurement, result)
        yield from _key_costs(candidate, candidate.measurement, result)


def _broken(limit: Limit, *, metric: str) -> KeyFigure:
    side = "at least" if limit.quantity == "metric" else "at most"
    return KeyFigure(
        title=limited(limit.quantity, metric=metric),
        value=amount(limit.quantity, limit.found),
        interval="of the nearest engine",
        beside=f"{side} {allowance(limit.quantity, limit.allowed)} allowed",
    )


def _key_metric(found: Measurement, result: TuneResult) -> KeyFigure:
    reference = f"{result.reference_name} {result.reference_metric.value:.4f}"
    return KeyFigure(
        title=result.metric,
        value=f"{found.metric.value:.4f}",
        interval=f"{found.metric.low:.4f} to {found.metric.high:.4f}",
        beside=f"{reference}; drop at most {found.drop.high:.4f}",
    )


def _key_costs(candidate: Candidate, found: Measurement, result: TuneResult) -> Iterator[KeyFigure]:
    ratio, base = figures(candidate).ratio, baseline(result)
    plain = base.measurement if base is not None else None
    if ratio is not None:
        yield KeyFigure(
            title="latency / float",
            value=f"{ratio.value:.2f}×",
            interval=f"{ratio.low:.2f} to {ratio.high:.2f}",
            beside=f"{interval(found.latency_ms, digits=fine(found.latency_ms.value))} ms",
        )
    yield KeyFigure(
        title="size on disk",
        value=size(found.size_bytes),
        interval="exact",
        beside=_beside(found.size_bytes, plain.size_bytes if plain else 0),
    )
    yield KeyFigure(
        title="peak memory",
        value=size(found.peak_memory_bytes),
        interval="one fresh process",
        beside=_beside(found.peak_memory_bytes, plain.peak_memory_bytes if plain else 0),
    )


def _beside(value: int, base: int) -> str:
    return f"{value / base:.2f}× of float ({size(base)})" if base > 0 else "float not measured"


def _repeat(number: int, again: Repeat) -> tuple[str, ...]:
    """The cells of a search that was made again; the first one is the result itself."""
    speed = "–" if again.speedup is None else interval(again.speedup, digits=2)
    disk = "–" if again.size_bytes is None else size(again.size_bytes)
    return str(number), again.chosen or "no engine", speed, disk, str(again.trials)


def _compared(found: Comparison | None) -> dict[str, object] | None:
    if found is None:
        return None
    return {
        "lines": verdict_lines(found),
        "figures": figure_rows(found),
        "moved": moved_rows(found),
        "differences": difference_rows(found),
    }
