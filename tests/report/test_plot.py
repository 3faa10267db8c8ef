"""Plots as data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.report.making import CANDIDATES, FLOAT_MS, INFEASIBLE, RESULT, candidate, large

from equipoise.report.axes import axis, view
from equipoise.report.figures import exactly
from equipoise.report.plot import pareto_views
from equipoise.report.timeline import best_so_far, timeline_views
from equipoise.report.views import View
from equipoise.search.goal import Goal
from equipoise.search.result import TuneResult


def views(result: TuneResult) -> dict[str, View]:
    return {found.key: found for found in pareto_views(result)}


def traces(found: View) -> dict[str, dict]:
    return {trace["name"]: trace for trace in found.figure["data"]}


@pytest.mark.parametrize("result", [RESULT, INFEASIBLE, large(40)], ids=["found", "none", "large"])
def test_plotly_knows_every_name_in_the_figures(result: TuneResult) -> None:
    """Its own checker takes them; they are JSON."""
    go = pytest.importorskip("plotly.graph_objects")
    found = [*pareto_views(result), *timeline_views(result)]
    assert [v.key for v in found] == [
        "latency-metric", "size-metric", "memory-metric", "latency-size", "timeline-verdict",
        "timeline-origin",
    ]  # fmt: skip
    for each in found:
        assert json.loads(json.dumps(each.figure, allow_nan=False)) == each.figure
        go.Figure(each.figure)


def test_every_candidate_with_both_values_has_a_mark() -> None:
    """At the ratio to float, with its interval as a bar; the sketch of a lost race too."""
    found = traces(views(RESULT)["latency-metric"])
    assert found["chosen"]["x"] == [pytest.approx(0.52)]
    assert found["chosen"]["error_x"]["array"][0] == pytest.approx(0.52 / 0.975 - 0.52)
    assert found["baseline"]["x"] == [1.0]
    outraced = found["outraced"]
    assert outraced["y"] == [0.917]
    assert outraced["error_y"]["visible"] is False
    marked = sum(len(t["x"]) for t in found.values() if "hovertext" in t)
    assert marked == 8


def test_the_memory_of_a_lost_race_is_not_known() -> None:
    """So it has no mark there."""
    assert "outraced" not in traces(views(RESULT)["memory-metric"])


def test_the_front_runs_through_usable_engines_only_and_the_knee_is_on_it() -> None:
    """A refused engine is faster, and not on it."""
    found = traces(views(RESULT)["latency-metric"])
    line = list(zip(found["Pareto front"]["x"], found["Pareto front"]["y"], strict=True))
    assert line == sorted(line)
    assert [y for _, y in line] == sorted(y for _, y in line)
    assert line[0][0] == pytest.approx(0.52)
    (knee,) = zip(found["knee"]["x"], found["knee"]["y"], strict=True)
    assert knee in line[1:-1]
    assert "The front bends most at int8-dynamic." in views(RESULT)["latency-metric"].note


def test_sizes_have_a_front_that_falls() -> None:
    """Of two costs both are better the less they are."""
    line = traces(views(RESULT)["latency-size"])["Pareto front"]
    assert line["x"] == sorted(line["x"])
    assert line["y"] == sorted(line["y"], reverse=True)


def test_limits_shade_the_side_that_they_forbid() -> None:
    """Below the least metric, right of the largest latency and size."""
    goal = Goal(max_drop=0.01, min_metric=0.925, max_latency_ms=FLOAT_MS / 2, max_size_bytes=30e6)
    found = views(replace(RESULT, goal=goal))
    first = {
        s["xref"]: s
        for s in found["latency-metric"].figure["layout"]["shapes"]
        if s["type"] == "rect"
    }
    assert first["x"]["x0"] == pytest.approx(0.5)
    assert first["x"]["x1"] > 1.0
    assert first["paper"]["y0"] == 0.925
    assert first["paper"]["y1"] < 0.241
    second = found["latency-size"].figure["layout"]["shapes"]
    assert [s["y0"] for s in second if s["type"] == "rect" and s["yref"] == "y"] == [30.0]


def test_no_limit_no_shade() -> None:
    """Of what nobody limits."""
    found = views(replace(RESULT, goal=Goal(max_drop=None)))
    assert found["latency-metric"].figure["layout"]["shapes"] == []


def test_one_that_collapsed_does_not_press_the_others_together() -> None:
    """It lies outside of the first view, and the note counts it."""
    found = views(RESULT)["latency-metric"]
    low, high = found.figure["layout"]["yaxis"]["range"]
    assert 0.88 < low < 0.9212
    assert 0.9392 < high < 0.96
    assert "1 candidate lies outside of this view" in found.note


def test_the_view_shows_all_where_nothing_is_usable() -> None:
    """But outliers; and it has a width where all values are equal."""
    values = [exactly(0.2), exactly(0.9)]
    low, high = view(values, usable=[], limit=None)
    assert low < 0.2
    assert high > 0.9
    values = [exactly(v) for v in (0.24, 0.917, 0.921, 0.926, 0.928, 0.93)]
    assert view(values, usable=[], limit=None)[0] > 0.9
    low, high = view([exactly(3.0)], usable=[exactly(3.0)], limit=900.0)
    assert low < 3.0 < high < 4.0
    assert view([exactly(0.0)], usable=[], limit=None)[0] < 0.0


def test_the_least_metric_is_the_stricter_of_both_limits() -> None:
    """The drop is taken off the reference."""
    metric = axis("metric", metric="f1")
    goals = (Goal(), Goal(min_metric=0.95), Goal(min_metric=0.5), Goal(max_drop=None))
    found = [metric.limit(replace(RESULT, goal=goal)) for goal in goals]
    assert found[:3] == [pytest.approx(0.9212), 0.95, pytest.approx(0.9212)]
    assert found[3] is None


def test_a_name_stays_inside_of_the_plot() -> None:
    """Near the upper edge it hangs below its mark, near the lower one it stands above."""
    layout = views(large(40))["latency-metric"].figure["layout"]
    low, high = layout["yaxis"]["range"]
    near = 0.2 * (high - low)
    assert {label["text"] for label in layout["annotations"]} == {
        "<b>int8-static</b>", "int8-dynamic (knee)", "float32",
    }  # fmt: skip
    cut = replace(RESULT, goal=Goal(max_drop=None, min_metric=0.9))
    for result in (RESULT, large(40), cut):
        for label in views(result)["latency-metric"].figure["layout"]["annotations"]:
            assert label["ay"] > 0 or label["y"] < high - near
            assert label["ay"] < 0 or label["y"] > low + near


def test_names_are_text_to_plotly() -> None:
    """It reads some tags in labels and hovers, links among them."""
    link = "<a href='javascript:alert(1)'>x</a>"
    renamed = replace(CANDIDATES[3], recipe=replace(CANDIDATES[3].recipe, name=link), origin=link)
    hostile = replace(
        RESULT, metric=link, chosen=link, candidates=(*CANDIDATES[:3], renamed, *CANDIDATES[4:])
    )
    figures = [v.figure for v in (*pareto_views(hostile), *timeline_views(hostile))]
    text = json.dumps(figures)
    assert "&lt;a href=" in text
    assert "<a" not in text


def test_a_bar_for_each_candidate_where_it_ran() -> None:
    """Coloured by verdict, or by who proposed it."""
    by_verdict, by_origin = timeline_views(RESULT)
    bars = [t for t in by_verdict.figure["data"] if t["type"] == "bar"]
    rows = {
        row: (base, x) for t in bars for row, base, x in zip(t["y"], t["base"], t["x"], strict=True)
    }
    assert rows == {i: (c.began_s, max(c.seconds, 0.004 * 664)) for i, c in enumerate(CANDIDATES)}
    assert {t["name"] for t in by_origin.figure["data"]} == {
        "start", "model", "optuna", "best so far",
    }  # fmt: skip


def test_the_line_of_the_best_falls_with_each_better_engine() -> None:
    """Refused and lost ones do not count, and it ends with the choice."""
    steps = list(best_so_far(RESULT))
    assert [name for _, _, name in steps] == ["float32", "int8-dynamic", "int8-static"]
    assert [at for at, _, _ in steps] == [31, 71, 135]
    costs = [cost for _, cost, _ in steps]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 1.0


def test_without_times_there_is_no_timeline_and_without_figures_no_plot() -> None:
    """A result of failures alone."""
    failed = candidate("a", took=0.0, verdict="failed")
    empty = replace(RESULT, candidates=(failed,), chosen="")
    assert pareto_views(empty) == timeline_views(empty) == ()
