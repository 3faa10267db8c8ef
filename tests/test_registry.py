"""Tables of names, opened on first use and open to other packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equipoise.data import metrics
from equipoise.data.readers import base
from equipoise.errors import UsageError
from equipoise.registry import Registry
from equipoise.runtimes import registry as runtimes

TABLE = Registry(
    kind="thing",
    group="equipoise.things",
    builtin={"path": "pathlib:Path", "parser": "tomllib:loads"},
)
OURS = [
    value
    for module in (metrics, base, runtimes)
    for value in vars(module).values()
    if isinstance(value, Registry)
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package of somebody else with two entry points."""
    info = tmp_path / "outside_things-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-things\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[equipoise.things]\nbrush = outside_things:BRUSH\npath = outside_things:BRUSH\n"
    )
    (tmp_path / "outside_things.py").write_text("BRUSH = 'a brush'\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_name_gives_its_object() -> None:
    """Imported when asked for."""
    assert TABLE.get("path") is Path


def test_listing_names_imports_nothing() -> None:
    """So --help can list them."""
    table = Registry(kind="thing", group="equipoise.none", builtin={"broken": "no.such.module:X"})
    assert table.names() == ("broken",)
    assert "no.such" not in sys.modules


@pytest.mark.usefixtures("outside")
def test_another_package_adds_a_name() -> None:
    """Through an entry point."""
    assert TABLE.names() == ("brush", "parser", "path")
    assert TABLE.get("brush") == "a brush"


@pytest.mark.usefixtures("outside")
def test_another_package_cannot_replace_a_builtin_name() -> None:
    """What ships with equipoise stays what it is."""
    assert TABLE.get("path") is Path


def test_an_unknown_name_lists_the_known_ones() -> None:
    """With the nearest as a hint."""
    with pytest.raises(UsageError, match="unknown thing 'paht'; known: parser, path") as caught:
        TABLE.get("paht")
    assert caught.value.hint == "Did you mean 'path'?"


def test_the_tables_of_equipoise_were_found() -> None:
    """The test below covers runtimes, metrics and readers."""
    assert len({table.group for table in OURS}) >= 4


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, name) for t in OURS for name in t.builtin],
    ids=lambda v: getattr(v, "group", v),
)
def test_every_name_of_ours_resolves(table: Registry, name: str) -> None:
    """No table holds a misspelt module or attribute."""
    assert table.get(name) is not None
