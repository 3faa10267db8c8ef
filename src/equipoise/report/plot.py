"""The Pareto plot: latency against metric, with size as area."""

from __future__ import annotations

import math
from typing import Any, Final

from equipoise import extras
from equipoise.report.rows import interval, size
from equipoise.search.choose import measured
from equipoise.search.result import Candidate, TuneResult

_COLOURS: Final = {"baseline": "#7a7f87", "accepted": "#1a7f5a", "refused": "#c0392b"}
_SYMBOLS: Final = {"baseline": "square", "accepted": "circle", "refused": "x"}
_LARGEST_MARKER: Final = 48.0
_SMALLEST_MARKER: Final = 9.0
_LEADERS: Final = (-36, 36, -58, 58)
"""Lengths of the leaders of names in pixels, upwards below zero."""


def pareto_plot(result: TuneResult) -> str:
    """An HTML fragment with the interactive plot and plotly's code inside."""
    go: Any = extras.require("plotly.graph_objects")
    points = [c for c in result.candidates if c.measurement is not None]
    figure = go.Figure()
    figure.add_trace(_front(go, points))
    for verdict in _COLOURS:
        chosen = [c for c in points if c.verdict == verdict]
        if chosen:
            figure.add_trace(_markers(go, chosen, points, result))
    for rank, candidate in enumerate(sorted(points, key=_latency)):
        figure.add_annotation(_label(candidate, result, rank=rank))
    threshold = result.reference_metric.value - result.max_drop
    figure.add_hline(
        y=threshold,
        line={"dash": "dot", "color": "#c0392b", "width": 1},
        annotation_text=f"{result.reference_name} minus {result.max_drop:g}",
        annotation_position="bottom right",
    )
    figure.update_layout(
        xaxis_title="latency / latency of float32, interleaved",
        yaxis_title=result.metric,
        margin={"l": 64, "r": 24, "t": 16, "b": 56},
        height=460,
        legend={"orientation": "h", "y": 1.08},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7a7f87"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.2)", zeroline=False)
    config = {"responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=True, config=config))


def _front(go: Any, points: list[Candidate]) -> Any:
    front = sorted((c for c in points if c.on_front), key=_latency)
    return go.Scatter(
        x=[_latency(c) for c in front],
        y=[measured(c).metric.value for c in front],
        mode="lines",
        name="Pareto front",
        line={"color": "#1a7f5a", "width": 1},
        hoverinfo="skip",
    )


def _markers(go: Any, group: list[Candidate], points: list[Candidate], result: TuneResult) -> Any:
    largest = max(measured(c).size_bytes for c in points)
    verdict = group[0].verdict
    return go.Scatter(
        x=[_latency(c) for c in group],
        y=[measured(c).metric.value for c in group],
        mode="markers",
        name=verdict,
        hovertext=[_hover(c) for c in group],
        hoverinfo="text",
        marker={
            "size": [_diameter(measured(c).size_bytes / largest) for c in group],
            "color": _COLOURS[verdict],
            "symbol": _SYMBOLS[verdict],
            "opacity": 0.75,
            "line": {"width": [3 if c.recipe.name == result.chosen else 0 for c in group]},
        },
    )


def _latency(candidate: Candidate) -> float:
    """Latency relative to float: a machine that drifts between two candidates does not show."""
    return 1 / measured(candidate).speedup.value


def _diameter(share: float) -> float:
    """Marker diameter whose area is in proportion to the engine's size."""
    return max(_SMALLEST_MARKER, _LARGEST_MARKER * math.sqrt(share))


def _label(candidate: Candidate, result: TuneResult, *, rank: int) -> dict[str, Any]:
    """A name on a thin leader, at four heights in turn, so that neighbours do not overlap."""
    name = candidate.recipe.name
    return {
        "x": _latency(candidate),
        "y": measured(candidate).metric.value,
        "text": f"<b>{name}</b>" if name == result.chosen else name,
        "ax": 0,
        "ay": _LEADERS[rank % len(_LEADERS)],
        "arrowwidth": 0.6,
        "arrowhead": 0,
        "arrowcolor": "#7a7f87",
    }


def _hover(candidate: Candidate) -> str:
    m = measured(candidate)
    return "<br>".join(
        [
            f"<b>{candidate.recipe.name}</b> {candidate.verdict}",
            f"metric {interval(m.metric, digits=4)}",
            f"drop {interval(m.drop, digits=4)}",
            f"latency {m.latency_ms:.3f} ms",
            f"speed / float {interval(m.speedup, digits=2, unit='x')}",
            f"size {size(m.size_bytes)}",
            f"peak memory {size(m.peak_memory_bytes)}",
        ]
    )
