"""The report and results.json."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from equipoise.errors import InputError
from equipoise.measure.interval import Interval
from equipoise.parity.compare import OutputParity
from equipoise.recipe import Recipe
from equipoise.report.html import render_html
from equipoise.report.rows import size, summary
from equipoise.report.terminal import candidates_table, metric_reports
from equipoise.report.write import read_result, write_report
from equipoise.search.result import Candidate, Measurement, TuneResult
from equipoise.targets.machine import Machine


def candidate(name: str, *, speed: float, verdict="accepted", reason="fine") -> Candidate:
    measurement = Measurement(
        metric=Interval(value=0.93, low=0.91, high=0.95),
        drop=Interval(value=0.001, low=-0.002, high=0.004),
        latency_ms=8 / speed,
        speedup=Interval(value=speed, low=speed - 0.1, high=speed + 0.1),
        size_bytes=int(90e6 / speed),
        peak_memory_bytes=200_000_000,
        load_ms=80.0,
        parity=(
            OutputParity(
                name="logits", max_abs=0.2, max_rel=0.1, excess=0.2, scale=9.0, sqnr_db=None,
                cosine=0.999, least_cosine=0.99, top1_agreement=0.99,
            ),
        ),
        kernels={"MatMul": 3},
    )  # fmt: skip
    return Candidate(
        recipe=Recipe(name=name, summary="What was done."),
        verdict=verdict,
        reason=reason,
        measurement=measurement,
        notes=("left in float: 3 Softmax",),
        metric_report="precision recall f1 support",
        on_front=True,
    )


RESULT = TuneResult(
    source="models/<script>alert(1)</script>",
    data="digits",
    target="cpu",
    metric="entity-f1",
    max_drop=0.01,
    threads=1,
    reference_metric=Interval(value=0.931, low=0.91, high=0.95),
    reference_report="precision recall f1 support",
    reference_name="PyTorch",
    evaluation_samples=400,
    calibration_samples=128,
    candidates=(
        candidate("float32", speed=1.0, verdict="baseline"),
        candidate("int8-dynamic", speed=2.0),
        candidate("int8-static", speed=2.1, verdict="refused", reason="drops by <b>much</b>"),
        Candidate(
            recipe=Recipe(name="fused", summary=""), verdict="not applicable", reason="no block"
        ),
    ),
    chosen="int8-dynamic",
    chosen_reason="int8-dynamic is the fastest",
    machine=Machine(
        cpu="CPU", architecture="x86_64", cores=2, flags=("avx2",), memory_bytes=1, system="Linux"
    ),
    versions={"onnxruntime": "1.32.0"},
    warnings=("few samples",),
    steps=("Exported.", "Chose."),
)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    """results.json holds everything; a file that is none is refused by name."""
    write_report(RESULT, output=tmp_path)
    assert read_result(tmp_path / "results.json") == RESULT
    (tmp_path / "results.json").write_text('{"source": 1}')
    with pytest.raises(InputError, match=r"results\.json"):
        read_result(tmp_path / "results.json")


def test_page_is_complete_self_contained_and_escaped() -> None:
    """Every candidate and warning is there; markup in names stays text; nothing is fetched."""
    page = render_html(RESULT)
    body = page[page.index("<body>") :]
    for text in ("int8-dynamic", "not applicable", "few samples", "Exported.", "exact", "1.32.0"):
        assert text in body
    assert "<script>alert(1)" not in page
    assert "drops by &lt;b&gt;much" in page
    for fetched in ("<script src", "<link", "<img", "@import"):
        assert fetched not in page


class Tags(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.fetched += [
            f"{tag} {k}={v}" for k, v in attrs if k in {"src", "href", "data", "srcset"}
        ]


def test_markup_in_any_name_neither_runs_nor_fetches() -> None:
    """A browser's view: no tag loads anything, and hostile names add no script to the page."""
    hostile = "</script><script src=https://example.org/x.js></script><img src=x>"
    renamed = tuple(
        replace(c, recipe=replace(c.recipe, name=hostile + c.recipe.name), notes=(hostile,))
        for c in RESULT.candidates
    )
    page = render_html(
        replace(
            RESULT, candidates=renamed, chosen=hostile + RESULT.chosen, metric=hostile,
            reference_name=hostile, warnings=(hostile,), steps=(hostile,), data=hostile,
            reference_report=hostile, versions={hostile: hostile},
        )
    )  # fmt: skip
    plain, attacked = Tags(), Tags()
    plain.feed(render_html(RESULT))
    attacked.feed(page)
    assert plain.fetched == attacked.fetched == []
    assert plain.scripts == attacked.scripts > 0
    for fetched in ("url(", "@import"):
        assert fetched not in page[page.index("<style>") : page.index("</style>")]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_shows_all_candidates_at_any_width(width: int) -> None:
    """Names, ratios and verdicts are whole."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(candidates_table(RESULT))
    console.print(metric_reports(RESULT))
    text = console.export_text()
    for name in ("float32", "int8-dynamic", "int8-static", "fused", "2.00x [1.90, 2.10]"):
        assert name in text
    assert text.count("precision recall") == 2


def test_summary_states_the_bound_of_the_drop() -> None:
    """In a sentence, with the reference on the same samples."""
    text = summary(RESULT)
    for words in (
        "4.000 ms per inference",
        "2.0x smaller",
        "PyTorch has 0.9310",
        "at most 0.0040 at 95 %",
    ):
        assert words in text
    unmeasured = replace(RESULT, chosen="fused")
    assert summary(unmeasured) == RESULT.chosen_reason


def test_sizes_are_decimal() -> None:
    """As disks and vendors count."""
    assert [size(n) for n in (12, 1_500, 23_100_000, 2.5e9)] == [
        "12\xa0B", "1.5\xa0kB", "23.1\xa0MB", "2.50\xa0GB"
    ]  # fmt: skip
