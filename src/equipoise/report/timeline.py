"""The search over time: a bar for each candidate, and the best so far."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import Any, Final

from equipoise.report.figures import guiding_cost, usable
from equipoise.report.rows import duration
from equipoise.report.views import COLOURS, GOLD, GRID, View, frame
from equipoise.search.result import Candidate, TuneResult

_ORIGINS: Final = ("#7d8590", "#3b82c4", "#c2701c", "#7a5bb5", "#1f9d6b", "#b3477d")
_NAMED: Final = 30
"""So many candidates have their names beside the bars."""

_LEAST: Final = 0.004
"""Least length of a bar over that of the search, so that a stage done before still shows."""


def timeline_views(result: TuneResult) -> tuple[View, ...]:
    """The timeline coloured by verdict and by who proposed; nothing where no time was recorded."""
    if not any(c.seconds > 0 for c in result.candidates):
        return ()
    origins = list(dict.fromkeys(c.origin for c in result.candidates))
    colours = {name: _ORIGINS[i % len(_ORIGINS)] for i, name in enumerate(origins)}
    verdicts = {str(name): colour for name, colour in COLOURS.items()}
    return (
        _view(result, key="verdict", group=lambda c: c.verdict, colours=verdicts),
        _view(result, key="origin", group=lambda c: c.origin, colours=colours),
    )


def _view(
    result: TuneResult, *, key: str, group: Callable[[Candidate], str], colours: dict[str, str]
) -> View:
    names = dict.fromkeys(group(c) for c in result.candidates)
    bars = [_bars(result, name, group=group, colour=colours[name]) for name in names]
    title = "by verdict" if key == "verdict" else "by who proposed"
    figure = {"data": [*bars, *_best(result)], "layout": _layout(result)}
    return View(key=f"timeline-{key}", title=title, note="", figure=figure)


def _bars(
    result: TuneResult, name: str, *, group: Callable[[Candidate], str], colour: str
) -> dict[str, Any]:
    own = [(row, c) for row, c in enumerate(result.candidates) if group(c) == name]
    least = _LEAST * _end(result)
    return {
        "type": "bar",
        "orientation": "h",
        "name": html.escape(name),
        "y": [row for row, _ in own],
        "base": [c.began_s for _, c in own],
        "x": [max(c.seconds, least) for _, c in own],
        "width": 0.8,
        "marker": {"color": colour},
        "hovertext": [_hover(c) for _, c in own],
        "hoverinfo": "text",
    }


def _end(result: TuneResult) -> float:
    return max(c.began_s + c.seconds for c in result.candidates)


def _hover(candidate: Candidate) -> str:
    took = f"{duration(candidate.seconds)} from {duration(candidate.began_s)} on"
    name, origin = html.escape(candidate.recipe.name), html.escape(candidate.origin)
    return f"<b>{name}</b> {candidate.verdict}<br>{took}<br>proposed by {origin}"


def _best(result: TuneResult) -> list[dict[str, Any]]:
    """The least cost of an engine that keeps all limits, as a line that falls."""
    steps = list(best_so_far(result))
    if not steps:
        return []
    end, last = max(_end(result), steps[-1][0]), steps[-1]
    points = [*steps, (end, last[1], last[2])]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [at for at, _, _ in points],
            "y": [cost for _, cost, _ in points],
            "yaxis": "y2",
            "line": {"shape": "hv", "color": GOLD, "width": 2},
            "hovertext": [
                f"<b>{html.escape(name)}</b><br>{cost:.3f} of float" for _, cost, name in points
            ],
            "hoverinfo": "text",
        }
    ]


def best_so_far(result: TuneResult) -> Iterator[tuple[float, float, str]]:
    """Seconds, cost over that of float and name, whenever a better candidate was done."""
    best = float("inf")
    for candidate in sorted(usable(result), key=lambda c: c.began_s + c.seconds):
        cost = guiding_cost(candidate, result)
        if cost is not None and cost < best:
            best = cost
            yield candidate.began_s + candidate.seconds, cost, candidate.recipe.name


def _layout(result: TuneResult) -> dict[str, Any]:
    count = len(result.candidates)
    names = [html.escape(c.recipe.name) for c in result.candidates]
    few = count <= _NAMED
    ticks = (
        {"tickvals": list(range(count)), "ticktext": names} if few else {"showticklabels": False}
    )
    return {
        **frame(height=min(max(260 + 15 * count, 320), 640)),
        "barmode": "overlay",
        "xaxis": {**GRID, "title": {"text": "seconds since the search began"}, "anchor": "y"},
        "yaxis": {
            **GRID,
            "domain": [0, 0.68],
            "showgrid": False,
            "range": [count - 0.4, -0.6],
            **ticks,
        },
        "yaxis2": {**GRID, "domain": [0.76, 1], "title": {"text": "best / float"}, "anchor": "x"},
    }
