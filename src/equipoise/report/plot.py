"""Plots as data: Pareto fronts with intervals, the knee, and what the limits forbid.

A figure is what plotly.js draws, as plain values. Names come from elsewhere, and plotly.js reads
some tags in text, so all of them are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equipoise.measure.interval import Interval
from equipoise.report.axes import Axis, Key, axis, view
from equipoise.report.figures import usable
from equipoise.report.knee import front, knee
from equipoise.report.labels import Leader, Place, leaders
from equipoise.report.rows import Cell, rows
from equipoise.report.views import COLOURS, GOLD, GRID, View, frame
from equipoise.search.result import Candidate, TuneResult, Verdict

_SYMBOLS: Final[dict[Verdict, str]] = {
    "baseline": "square", "accepted": "circle", "refused": "x", "outraced": "circle-open",
}  # fmt: skip
_SIZES: Final[dict[Verdict, int]] = {"outraced": 7}
_AXES: Final[tuple[tuple[Key, Key], ...]] = (
    ("latency", "metric"), ("size", "metric"), ("memory", "metric"), ("latency", "size"),
)  # fmt: skip
_FORBIDDEN: Final = "rgba(210,86,74,.10)"
_MOST_NAMES: Final = 8
_MOST_BARS: Final = 15
"""With more candidates the bars of their intervals are drawn faintly."""


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """A candidate in a plot."""

    candidate: Candidate
    x: Interval
    y: Interval
    hover: str

    @property
    def name(self) -> str:
        return self.candidate.recipe.name


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """What one plot shows."""

    result: TuneResult
    across: Axis
    up: Axis
    marks: tuple[_Mark, ...]
    allowed: tuple[_Mark, ...]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Cost and gain of the marks that keep all limits."""
        return [(m.x.value, self.up.gain(m.y.value)) for m in self.allowed]

    @property
    def knee(self) -> _Mark | None:
        bend = knee(self.points)
        return None if bend is None else self.allowed[bend]


def pareto_views(result: TuneResult) -> tuple[View, ...]:
    """The plots that show something: each needs a candidate with both values."""
    hovers = [_hover(row.cells, metric=result.metric) for row in rows(result)]
    keeps = {id(candidate) for candidate in usable(result)}
    scenes = [_scene(result, hovers, keeps, keys=keys) for keys in _AXES]
    return tuple(_view(scene) for scene in scenes if scene.marks)


def _scene(
    result: TuneResult, hovers: Sequence[str], keeps: set[int], *, keys: tuple[Key, Key]
) -> _Scene:
    across, up = (axis(key, metric=result.metric) for key in keys)
    placed = [
        (c, across.of(c), up.of(c), hover)
        for c, hover in zip(result.candidates, hovers, strict=True)
        if c.verdict in _SYMBOLS
    ]
    marks = [_Mark(candidate=c, x=x, y=y, hover=hover) for c, x, y, hover in placed if x and y]
    return _Scene(
        result=result,
        across=across,
        up=up,
        marks=tuple(marks),
        allowed=tuple(m for m in marks if id(m.candidate) in keeps),
    )


def _view(scene: _Scene) -> View:
    across, up = scene.across, scene.up
    x, y = _range(scene, across), _range(scene, up)
    figure = {"data": _traces(scene), "layout": _layout(scene, x=x, y=y)}
    return View(
        key=f"{across.key}-{up.key}",
        title=f"{across.short} – {up.short}",
        note=_note(scene, x=x, y=y),
        figure=figure,
    )


def _range(scene: _Scene, of: Axis) -> tuple[float, float]:
    across = of is scene.across
    everything, allowed = (
        [m.x if across else m.y for m in marks] for marks in (scene.marks, scene.allowed)
    )
    return view(everything, usable=allowed, limit=of.limit(scene.result))


def _note(scene: _Scene, *, x: tuple[float, float], y: tuple[float, float]) -> str:
    """What the knee is, and how many candidates the first view leaves out."""
    outside = sum(
        not (x[0] <= m.x.value <= x[1] and y[0] <= m.y.value <= y[1]) for m in scene.marks
    )
    bend = scene.knee
    words = [f"The front bends most at {bend.name}."] if bend is not None else []
    if outside:
        lie = "candidate lies" if outside == 1 else "candidates lie"
        words.append(f"{outside} {lie} outside of this view; a double click shows all.")
    return " ".join(words)


def _traces(scene: _Scene) -> list[dict[str, Any]]:
    groups: dict[Verdict, list[_Mark]] = {}
    for mark in scene.marks:
        if mark.name != scene.result.chosen:
            groups.setdefault(mark.candidate.verdict, []).append(mark)
    order = [verdict for verdict in reversed(_SYMBOLS) if verdict in groups]
    return [
        _front_line(scene),
        *(_markers(groups[verdict], verdict=verdict) for verdict in order),
        *_chosen(scene),
        *_knee(scene),
    ]


def _front_line(scene: _Scene) -> dict[str, Any]:
    kept = [scene.allowed[i] for i in front(scene.points)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [m.x.value for m in kept],
        "y": [m.y.value for m in kept],
        "line": {"color": COLOURS["accepted"], "width": 1.5, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _markers(marks: Sequence[_Mark], *, verdict: Verdict) -> dict[str, Any]:
    marker = {"symbol": _SYMBOLS[verdict], "size": _SIZES.get(verdict, 10), "opacity": 0.9}
    return _scatter(marks, name=verdict, colour=COLOURS[verdict], marker=marker)


def _chosen(scene: _Scene) -> list[dict[str, Any]]:
    marks = [m for m in scene.marks if m.name == scene.result.chosen]
    marker = {"symbol": "star", "size": 19, "line": {"width": 1, "color": "#fff"}}
    return [_scatter(marks, name="chosen", colour=GOLD, marker=marker)] if marks else []


def _knee(scene: _Scene) -> list[dict[str, Any]]:
    bend = scene.knee
    if bend is None:
        return []
    ring = {"symbol": "circle-open", "size": 26, "color": COLOURS["accepted"], "line": {"width": 2}}
    point = {"x": [bend.x.value], "y": [bend.y.value], "hoverinfo": "skip", "marker": ring}
    return [{"type": "scatter", "mode": "markers", "name": "knee", **point}]


def _scatter(
    marks: Sequence[_Mark], *, name: str, colour: str, marker: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [m.x.value for m in marks],
        "y": [m.y.value for m in marks],
        "error_x": _bars([m.x for m in marks], colour=colour),
        "error_y": _bars([m.y for m in marks], colour=colour),
        "hovertext": [m.hover for m in marks],
        "hoverinfo": "text",
        "marker": {"color": colour, **marker},
    }


def _bars(values: Sequence[Interval], *, colour: str) -> dict[str, Any]:
    """Intervals as error bars."""
    channels = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(v.high - v.value, 0.0) for v in values],
        "arrayminus": [max(v.value - v.low, 0.0) for v in values],
        "visible": any(v.high > v.low for v in values),
        "color": f"rgba({channels},{0.35 if len(values) > _MOST_BARS else 0.9})",
        "thickness": 1,
        "width": 3,
    }


def _layout(scene: _Scene, *, x: tuple[float, float], y: tuple[float, float]) -> dict[str, Any]:
    limits = [
        shape
        for of, shown in ((scene.across, x), (scene.up, y))
        for shape in _forbidden(scene, of, shown=shown)
    ]
    return {
        **frame(height=460),
        "xaxis": {
            **GRID,
            "title": {"text": html.escape(scene.across.title), "standoff": 10},
            "range": list(x),
        },
        "yaxis": {
            **GRID,
            "title": {"text": html.escape(scene.up.title), "standoff": 10},
            "range": list(y),
        },
        "shapes": limits,
        "annotations": _names(scene, x=x, y=y),
    }


def _forbidden(scene: _Scene, of: Axis, *, shown: tuple[float, float]) -> list[dict[str, Any]]:
    """A shade over what the limit on an axis excludes, and a line at the limit."""
    limit = of.limit(scene.result)
    if limit is None:
        return []
    across = of is scene.across
    values = [m.x if across else m.y for m in scene.marks]
    low = min([shown[0], limit, *(v.low for v in values)])
    high = max([shown[1], limit, *(v.high for v in values)])
    reach = (high - low) / 4
    far = low - reach if of.rising else high + reach
    line, area = _span(limit, limit, across=across), _span(limit, far, across=across)
    edge = {"color": COLOURS["refused"], "width": 1, "dash": "dot"}
    return [
        {"type": "rect", "layer": "below", "fillcolor": _FORBIDDEN, "line": {"width": 0}, **area},
        {"type": "line", "layer": "below", "line": edge, **line},
    ]


def _span(start: float, end: float, *, across: bool) -> dict[str, Any]:
    """From ``start`` to ``end`` on one axis, over all of the other one."""
    along, beside = ("x", "y") if across else ("y", "x")
    return {
        f"{along}ref": along, f"{along}0": start, f"{along}1": end,
        f"{beside}ref": "paper", f"{beside}0": 0, f"{beside}1": 1,
    }  # fmt: skip


def _names(
    scene: _Scene, *, x: tuple[float, float], y: tuple[float, float]
) -> list[dict[str, Any]]:
    """Of the choice, the knee, the baseline and the front, on thin leaders, where there is room."""
    wanted = _to_name(scene)
    names = [(_text(mark, scene), _place(mark, x=x, y=y)) for mark in wanted]
    marks = [_place(mark, x=x, y=y) for mark in scene.marks]
    found = zip(wanted, leaders(names, marks=marks), strict=True)
    return [_name(mark, scene, leader=leader) for mark, leader in found if leader is not None]


def _to_name(scene: _Scene) -> list[_Mark]:
    """The most important first."""
    bend = scene.knee
    wanted = [m for m in scene.marks if m.name == scene.result.chosen]
    wanted += [bend] if bend is not None else []
    wanted += [m for m in scene.allowed if m.candidate.verdict == "baseline"]
    kept = [scene.allowed[i] for i in front(scene.points)]
    wanted += kept if len(kept) <= _MOST_NAMES - 2 else []
    return list({id(mark): mark for mark in wanted}.values())[:_MOST_NAMES]


def _place(mark: _Mark, *, x: tuple[float, float], y: tuple[float, float]) -> Place:
    return Place(
        x=(mark.x.value - x[0]) / (x[1] - x[0]),
        y=(mark.y.value - y[0]) / (y[1] - y[0]),
    )


def _text(mark: _Mark, scene: _Scene) -> str:
    return f"{mark.name} (knee)" if mark is scene.knee else mark.name


def _name(mark: _Mark, scene: _Scene, *, leader: Leader) -> dict[str, Any]:
    text, first = html.escape(_text(mark, scene)), mark.name == scene.result.chosen
    return {
        "x": mark.x.value,
        "y": mark.y.value,
        "text": f"<b>{text}</b>" if first else text,
        "name": "first" if first or mark is scene.knee else "other",
        "ax": leader.x,
        "ay": leader.y,
        "arrowwidth": 0.6,
        "arrowhead": 0,
        "arrowcolor": COLOURS["baseline"],
        "font": {"size": 11},
    }


def _hover(cells: Mapping[str, Cell], *, metric: str) -> str:
    shown = (
        (metric, "metric"), ("drop", "drop"), ("latency", "latency"), ("latency / float", "ratio"),
        ("size", "size"), ("peak memory", "memory"),
    )  # fmt: skip
    lines = [f"{html.escape(title)} {html.escape(cells[key].text)}" for title, key in shown]
    head = f"<b>{html.escape(cells['candidate'].text)}</b> {html.escape(cells['verdict'].text)}"
    return "<br>".join([head, *lines])
