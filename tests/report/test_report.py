"""The report page, results.json, and the tables of the terminal."""

from __future__ import annotations

import functools
import io
import re
import typing
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.report.making import CANDIDATES, INFEASIBLE, RESULT, candidate, large, measurement

from equipoise import record
from equipoise.errors import InputError
from equipoise.measure.interval import Interval
from equipoise.recipe import Recipe
from equipoise.report.compare import compare
from equipoise.report.explain import explain, summary
from equipoise.report.html import render_html
from equipoise.report.rows import duration, fine, rows, size
from equipoise.report.terminal import (
    candidates_table,
    comparison_tables,
    explanation_grid,
    metric_reports,
)
from equipoise.report.write import read_result, write_report
from equipoise.search.goal import QUANTITIES, Goal
from equipoise.search.result import Candidate, TuneResult

HOSTILE = "</script><script src=https://example.org/x.js></script><img src=x onerror=alert(1)>"


@functools.cache
def plotly_code() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


class Tags(HTMLParser):
    """Collects what a browser would fetch or run, and every id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page.replace(plotly_code(), ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "href" and tag == "a" and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif name in {"src", "href", "data", "srcset", "action"}:
                self.fetched.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")
            if name == "id":
                self.ids.append(value or "")


def text_of(*renderables: object, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("result", [RESULT, INFEASIBLE, large(5)], ids=["found", "none", "large"])
def test_results_come_back_as_they_were(result: TuneResult, tmp_path: Path) -> None:
    """results.json holds everything; the directory names it as well as the file."""
    write_report(result, output=tmp_path)
    assert read_result(tmp_path) == read_result(tmp_path / "results.json") == result
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(result)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no results.json in"),
        (b"{", "is damaged: it is no JSON"),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected an object"),
        (b'{"source": 1}', "missing key|expected"),
        (b'{"max_drop": 0.01}', "unknown key 'max_drop'"),
    ],
)
def test_a_file_that_is_no_result_is_refused(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    """Missing, cut off, no text, bottomless, of another version: an error with the name in it."""
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_result(tmp_path)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("change", ["NaN", "-1e999", '"a"', "null", "[]"])
def test_a_number_that_is_none_is_refused(change: str, tmp_path: Path) -> None:
    """Where a size in seconds belongs."""
    text = record.dumps(RESULT).replace('"seconds": 664.0', f'"seconds": {change}')
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        read_result(tmp_path)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """JSON can name one; no page can hold it."""
    text = record.dumps(RESULT).replace("models/minilm-conll", "models/\\ud800")
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="no result"):
        read_result(tmp_path)


def test_the_page_says_everything() -> None:
    """Candidates, figures, knee, prices, nodes, what blocks, the search, how to do it again."""
    page = render_html(RESULT)
    body = re.sub(r"\s+", " ", page[page.index("<body>") :])
    for name in ("float32", *(c.recipe.name for c in CANDIDATES)):
        assert name in body
    for words in (
        "Sweet spot: int8-static",
        "0.52×",
        "0.9268",
        "PyTorch 0.9312; drop at most 0.0078",
        "latency would go from 0.52 to 0.47 of float: int8-static-fused.",
        "Limits that bind: drop of entity-f1.",
        "3 of 6 nodes compute in float and take 68 % of the time",
        "alone in integers it brings the worst output to 9.4 dB",
        "Tried 10 recipes, of 1152 in the space, in 11 min 4 s: 4 accepted",
        "no recipe that is left is expected to be better",
        "equipoise tune models/minilm-conll",
        "3 labels occur fewer than 10 times",
        "Example CPU @ 2.60GHz",
        "≈ 0.9170",
        "The front bends most at int8-dynamic.",
    ):
        assert words in body.replace("\xa0", " "), words


def test_where_nothing_keeps_the_limits_the_page_says_how_near_it_came() -> None:
    """The limits in large digits, what relaxing them would buy, and no plot of a choice."""
    page = render_html(INFEASIBLE).replace("\xa0", " ")
    body = re.sub(r"\s+", " ", page[page.index("<body>") :])
    assert "<h2>No engine keeps all limits</h2>" in body
    assert "int8-static comes nearest." in body
    assert "latency: 4.310 ms found, at most 2 ms allowed (115 % away)" in body
    assert "int8-static would keep all limits, at 0.52 of the latency of float." in body
    assert "Sweet spot" not in body


def test_a_page_is_self_contained_and_its_links_lead_somewhere() -> None:
    """No tag fetches anything; every id is there once; no handler stands in the markup."""
    page = render_html(large(3), compared=compare(RESULT, INFEASIBLE))
    tags = Tags(page)
    assert tags.fetched == tags.handlers == []
    assert len(tags.ids) == len(set(tags.ids))
    assert len(tags.links) > 5
    assert set(tags.links) <= set(tags.ids)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert page.count(plotly_code()) == 1


def _with_texts(value: object, text: str) -> object:
    """The same with ``text`` in front of every string that is not one of a fixed set."""
    if isinstance(value, tuple):
        return tuple(_with_texts(item, text) for item in value)
    if isinstance(value, dict):
        return {text + key: _with_texts(item, text) for key, item in value.items()}
    if isinstance(value, TuneResult | Candidate | Recipe) or (
        is_dataclass(value) and type(value).__name__ in {"Machine", "NodeFact", "OutputParity",
        "Measurement", "Price"}
    ):  # fmt: skip
        hints = typing.get_type_hints(type(value))
        free = {
            f.name: _with_texts(getattr(value, f.name), text)
            for f in fields(value)
            if typing.get_origin(hints[f.name]) is not typing.Literal and f.name != "cost"
        }
        return replace(value, **free)
    return text + value if isinstance(value, str) else value


def test_markup_in_any_text_neither_runs_nor_fetches() -> None:
    """A browser's view: hostile names add no tag and no handler to the page."""
    attacked = _with_texts(RESULT, HOSTILE)
    assert isinstance(attacked, TuneResult)
    assert attacked.nodes[0].operator == f"{HOSTILE}Gather"
    assert attacked.candidates[2].notes == (f"{HOSTILE}left in float: 3 Softmax",)
    compared = compare(RESULT, attacked)
    plain, other = (Tags(render_html(r, compared=compared)) for r in (RESULT, attacked))
    assert other.fetched == other.handlers == []
    assert other.tags["script"] == plain.tags["script"]
    assert "img" not in other.tags
    assert summary(attacked).count(HOSTILE) >= 2


def test_the_attack_would_be_noticed() -> None:
    """The test above could fail: the same text, not escaped, is seen."""
    tags = Tags(render_html(RESULT).replace("models/minilm-conll", HOSTILE))
    assert tags.fetched
    assert tags.handlers


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("result", [RESULT, INFEASIBLE], ids=["found", "none"])
def test_the_table_shows_all_candidates_at_any_width(result: TuneResult, width: int) -> None:
    """Names, ratios and verdicts are whole; what was measured roughly is marked so."""
    text = text_of(candidates_table(result), metric_reports(result), width=width)
    for name in (*(c.recipe.name for c in CANDIDATES), "0.52 [0.51, 0.53]"):
        assert name in text
    assert "≈\xa00.9170" in text
    assert text.count("precision    recall") == (2 if result.chosen else 1)


def test_a_long_table_keeps_what_matters_and_counts_the_rest() -> None:
    """The choice and the float engine stay, failures go first."""
    text = text_of(candidates_table(large(60), most=5))
    assert "and 65 more, in the report" in text
    for name in ("float32", "int8-static"):
        assert re.search(rf"^ *{name} ", text, re.MULTILINE)
    assert "int4-weights" not in text


def test_nothing_of_a_file_moves_the_cursor_of_a_terminal() -> None:
    """Escape sequences in names, reasons, reports and warnings are left out."""
    attacked = _with_texts(RESULT, "\x1b[2J\r")
    assert isinstance(attacked, TuneResult)
    told = explain(attacked)
    text = text_of(
        candidates_table(attacked), metric_reports(attacked), explanation_grid(told),
        *comparison_tables(compare(RESULT, attacked)), width=200,
    )  # fmt: skip
    assert "[2J" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_table_of_nothing_but_the_float_engine() -> None:
    """Chosen itself: no rival, no price, no map."""
    alone = replace(
        RESULT, candidates=CANDIDATES[:1], chosen="float32", prices=(), nodes=(), points=0
    )
    assert "baseline, chosen" in text_of(candidates_table(alone))
    page = render_html(alone)
    assert "No limit binds" in page
    assert "The chosen model, node by node" not in page


def test_rows_sort_by_what_was_measured() -> None:
    """Numbers where there are numbers, nothing where there is nothing."""
    found = {row.name: row for row in rows(RESULT)}
    assert found["int8-static"].cells["ratio"].value == pytest.approx(0.52)
    assert found["float32"].cells["ratio"].value == 1.0
    assert found["int4-weights"].cells["ratio"].value is None
    assert found["pruned-2x"].cells["size"].value == 52e6
    assert found["pruned-2x"].cells["memory"].value is None
    assert found["int8-static"].chosen


def test_small_times_keep_three_figures() -> None:
    """Microseconds are not all 0.005 ms; nothing has fewer than three digits."""
    assert [fine(value) for value in (812.5, 4.2, 0.1, 0.052, 0.0051, 1e-9, 0.0)] == [
        3, 3, 3, 4, 5, 6, 3
    ]  # fmt: skip
    fast = measurement(ratio=0.001, drop=0.0, size=0.2)
    found = rows(replace(RESULT, candidates=(candidate("fast", measurement=fast),)))[0]
    assert found.cells["latency"].text == "0.00812\xa0ms [0.00796, 0.00828]"


def test_sizes_are_decimal_and_times_are_short() -> None:
    """As disks and vendors count, and as people say it."""
    assert [size(n) for n in (12, 1_500, 23_100_000, 2.5e9)] == [
        "12\xa0B", "1.5\xa0kB", "23.1\xa0MB", "2.50\xa0GB"
    ]  # fmt: skip
    assert [duration(s).replace("\xa0", " ") for s in (4.25, 42, 200, 4320)] == [
        "4.2 s", "42 s", "3 min 20 s", "1 h 12 min"
    ]  # fmt: skip


# Any valid result can be shown.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [HOSTILE, "<b>", "{{ 7 * 7 }}", "a" * 300, "&amp;", "\u2028", "$x$", "%", "size", "drop"]
)
POSITIVE = st.floats(1e-6, 1e9)


def intervals(values: st.SearchStrategy[float]) -> st.SearchStrategy[Interval]:
    ordered = st.tuples(values, values, values).map(sorted)
    return ordered.map(lambda v: Interval(low=v[0], value=v[1], high=v[2]))


def strategy(kind: object) -> st.SearchStrategy:
    """Values of a field's type, from the type itself, so that a new field is tried at once."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]()
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: strategy(hints[f.name]) for f in fields(kind)})
    if origin is tuple:
        return st.lists(strategy(arguments[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, strategy(arguments[1]), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    return st.one_of([st.none() if a is type(None) else strategy(a) for a in arguments])


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    minimise = tuple(draw(st.lists(st.sampled_from(QUANTITIES), min_size=1, unique=True)))
    weights = draw(st.just(()) | st.just(tuple(0.5 + i for i in range(len(minimise)))))
    limits = {
        name: draw(st.none() | POSITIVE)
        for name in (
            "max_drop",
            "min_metric",
            "max_latency_ms",
            "max_size_bytes",
            "max_memory_bytes",
        )
    }
    return Goal(minimise=minimise, weights=weights, **limits)


@st.composite
def results(draw: st.DrawFn) -> TuneResult:
    found: TuneResult = draw(strategy(TuneResult))
    names = [c.recipe.name for c in found.candidates]
    return replace(found, chosen=draw(st.sampled_from(["", *names])))


PLAIN = {
    str: lambda: TEXT,
    int: lambda: st.integers(0, 10**12),
    float: lambda: POSITIVE,
    bool: st.booleans,
    Interval: lambda: intervals(POSITIVE),
    Goal: goals,
    Recipe: lambda: st.builds(Recipe, name=TEXT, summary=TEXT),
}


@settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(results())
def test_any_valid_result_can_be_shown(result: TuneResult) -> None:
    """On the page, in the terminal and in words; and no text of it becomes a tag."""
    assert record.loads(TuneResult, record.dumps(result), where="") == result
    compared = compare(RESULT, result)
    tags = Tags(render_html(result, compared=compared))
    assert tags.fetched == tags.handlers == []
    assert {"img", "b"} & set(tags.tags) <= {"b"}
    assert tags.tags["script"] <= 5
    text = text_of(
        candidates_table(result), explanation_grid(explain(result)), *comparison_tables(compared)
    )
    assert "\x1b" not in text
