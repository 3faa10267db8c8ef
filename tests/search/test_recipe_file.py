"""Recipe files: round trips, and every key that is not known is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.compress.cutting import Pruning
from equipoise.errors import IncompatibleError, RecipeError
from equipoise.search.recipe_file import RecipeFile, read_recipe_file, write_recipe_file
from equipoise.search.space import SpaceSettings, space_for

OPTIONS = ("source", "max-drop", "float-fallback", "samples")
SPACE = space_for(SpaceSettings(saturates=True, prunings=(Pruning(speedup=2.0),), threads=(1, 2)))
POINTS = list(SPACE.points())

words = st.fixed_dictionaries(
    {},
    optional={
        "source": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
        "max-drop": st.floats(allow_nan=False, allow_infinity=False),
        "float-fallback": st.booleans(),
        "samples": st.integers(-(2**40), 2**40),
    },
)


@given(words=words, index=st.none() | st.integers(0, len(POINTS) - 1))
def test_round_trip(tmp_path_factory, words: dict, index: int | None) -> None:
    """Any options and any recipe of the space, nulls included."""
    path = tmp_path_factory.mktemp("r") / "r.toml"
    recipe = None if index is None else SPACE.recipe(POINTS[index])
    content = RecipeFile(words=words, recipe=recipe)
    write_recipe_file(content, path)
    assert read_recipe_file(path, options=OPTIONS) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 1\n[tune]\nmax-drpo = 1", "did you mean 'max-drop'"),
        ("format = 1\n[tone]\n", "did you mean 'tune'"),
        ("format = 1\n[tune]\nsource = [1]", "source is"),
        ("format = 1\ntune = 3", "table of options"),
        ("format = 1\n[recipe]\nname = 'x'", "missing key 'summary'"),
        ("format = 1\n[recipe]\nname = 'x'\nsummary = ''\nfuse = true", "did you mean 'fused'"),
        ("format = 0", "format is 0"),
        ("format = true", "format is True"),
        ("[tune]\n", "format is None"),
        ("format = = 1", "no TOML"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe_file(path, options=OPTIONS)


def test_later_format_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("format = 7")
    with pytest.raises(IncompatibleError, match="format 7"):
        read_recipe_file(path, options=OPTIONS)
    with pytest.raises(RecipeError, match=r"none\.toml"):
        read_recipe_file(tmp_path / "none.toml", options=OPTIONS)
