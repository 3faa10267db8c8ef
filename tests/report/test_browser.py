"""The page in a real browser: it runs, sorts, switches plots, and asks for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.making import INFEASIBLE, RESULT, large

from equipoise.report.compare import compare
from equipoise.report.html import render_html

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=4000", "--window-size=1280,900",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the browser made of a page: the document after its scripts ran, and its console."""

    document: str
    console: tuple[str, ...]

    def column(self, section: str, *, cell: int = 0) -> list[str]:
        """Texts of a column of the first table of a section, without hidden rows."""
        part = self.document[self.document.index(f'id="{section}"') :]
        table = Rows(part[part.index("<table") : part.index("</table>")])
        return [row[cell] for row in table.rows]


class Rows(HTMLParser):
    """The cells of the rows of a table's body that are not hidden."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self._shown = True
        self.feed(table[table.index("<tbody") :])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._shown = "hidden" not in dict(attrs)
            if self._shown:
                self.rows.append([])
        elif tag in {"td", "th"} and self._shown:
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell and self._shown:
            self.rows[-1][-1] += data


@pytest.fixture
def see(tmp_path: Path) -> Callable[..., Seen]:
    """Load a page with a fragment, and say what is there in the end."""

    def run(page: str, *, fragment: str = "") -> Seen:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             f"{file.as_uri()}{fragment}"],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert "</html>" in done.stdout, done.stderr[-2000:]
        lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        body = done.stdout[done.stdout.index("<body") :]
        return Seen(document=re.sub(r"(?s)<script>.*?</script>", "", body), console=tuple(lines))

    return run


def test_the_page_runs_without_a_word_in_the_console(see: Callable[..., Seen]) -> None:
    """Both plots are drawn. Its policy forbids every request, and one would be told there."""
    seen = see(render_html(large(30), compared=compare(INFEASIBLE, RESULT)))
    assert seen.console == ()
    assert seen.document.count('class="main-svg"') >= 2
    assert "Pareto front</text>" in seen.document
    assert "The front bends most at" in seen.document


def test_a_request_and_an_error_would_be_seen(see: Callable[..., Seen]) -> None:
    """The test above could fail."""
    added = "<img src='https://example.org/x.png'><script>nothing_of_that_name()</script></body>"
    seen = see(render_html(INFEASIBLE).replace("</body>", added))
    assert any("Content Security Policy" in line and "example.org" in line for line in seen.console)
    assert any("nothing_of_that_name" in line for line in seen.console)


def test_a_fragment_sorts_and_filters_the_tables(see: Callable[..., Seen]) -> None:
    """Falling by size, of those that were accepted; the nodes by themselves."""
    fragment = "#sort=-size&filter=int8&verdict=accepted&nodes.sort=-time"
    seen = see(render_html(RESULT), fragment=fragment)
    assert seen.console == ()
    assert seen.column("candidates") == [
        "int8-dynamic", "int8-weights", "int8-static", "int8-static-tables",
    ]  # fmt: skip
    assert 'aria-sort="descending"' in seen.document
    assert "4 of 10 shown" in seen.document
    assert seen.column("nodes")[:3] == ["4", "2", "3"]
    assert seen.column("nodes")[-1] == "5"


def test_clicks_and_keys_do_what_they_say(see: Callable[..., Seen]) -> None:
    """As a person would: a head, a tab by its arrow key, a node, the filter; nothing comes last."""
    acts = """<script>
    const heads = [...document.querySelectorAll("#candidates th button")];
    heads.find((button) => button.textContent === "size").click();
    const tab = document.querySelector("#plots-fronts [role=tab]");
    tab.focus();
    tab.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    document.querySelectorAll("#nodes tbody tr")[3].focus();
    const filter = document.querySelector(".filter");
    filter.value = "weights";
    filter.dispatchEvent(new Event("input", { bubbles: true }));
    document.body.dataset.fragment = location.hash;
    </script></body>"""
    seen = see(render_html(RESULT).replace("</body>", acts))
    assert seen.console == ()
    assert seen.column("candidates") == ["int8-weights", "int4-weights"]
    assert 'data-fragment="#sort=size&amp;filter=weights"' in seen.document
    assert re.search(r'aria-selected="true"[^>]*>size – entity-f1<', seen.document)
    assert "size on disk, MB</text>" in seen.document
    assert "float32: alone in integers it brings the worst output to 9.4 dB" in seen.document


@pytest.mark.slow
def test_without_javascript_it_is_a_plain_page(see: Callable[..., Seen]) -> None:
    """Every candidate is there, in the order tried; no button that does nothing is shown."""
    forbidden = render_html(RESULT).replace("script-src 'unsafe-inline'", "script-src 'none'")
    seen = see(forbidden)
    assert seen.column("candidates") == [c.recipe.name for c in RESULT.candidates]
    assert '<button type="button">' not in seen.document
    assert 'class="main-svg"' not in seen.document


@pytest.mark.slow
def test_names_that_are_markup_stay_text(see: Callable[..., Seen]) -> None:
    """In the table, in the plots and in what the scripts write."""
    name = "<img src=x onerror=document.title='x'>"
    renamed = tuple(
        replace(c, recipe=replace(c.recipe, name=name + c.recipe.name), origin=name, reason=name)
        for c in RESULT.candidates
    )
    nodes = tuple(replace(n, name=name, reason=name) for n in RESULT.nodes)
    acts = '<script>document.querySelectorAll("#nodes tbody tr")[3].focus();</script></body>'
    hostile = replace(
        RESULT, candidates=renamed, chosen=name + RESULT.chosen, nodes=nodes, metric=name
    )
    seen = see(render_html(hostile).replace("</body>", acts), fragment="#sort=reason")
    assert seen.console == ()
    assert "<img" not in seen.document
    assert len(re.findall(r"&lt;img src=x[^<]*</text>", seen.document)) >= 2
