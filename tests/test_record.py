"""Dataclasses to JSON and back: the same value returns, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import record
from equipoise.errors import DataError, IntegrityError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Round:
    """One of two forms."""

    kind: Literal["round"] = "round"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    """The other."""

    kind: Literal["square"] = "square"
    side: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A field of every allowed type."""

    name: str
    count: int
    share: float
    on: bool
    mode: Literal["fast", "small"]
    path: Path
    shape: tuple[int | str, ...]
    pair: tuple[str, float]
    table: dict[str, float]
    form: Round | Square
    nested: tuple[Round, ...] = ()
    limit: int | None = None


finite = st.floats(allow_nan=False, allow_infinity=False)
forms = st.builds(Round, radius=finite) | st.builds(Square, side=st.integers())
values = st.builds(
    Settings,
    name=st.text(),
    count=st.integers(),
    share=finite,
    on=st.booleans(),
    mode=st.sampled_from(["fast", "small"]),
    path=st.text("abc/.", min_size=1).map(Path),
    shape=st.lists(st.integers() | st.text()).map(tuple),
    pair=st.tuples(st.text(), finite),
    table=st.dictionaries(st.text(), finite),
    form=forms,
    nested=st.lists(st.builds(Round, radius=finite)).map(tuple),
    limit=st.none() | st.integers(),
)

GOOD: dict[str, Any] = {
    "name": "a",
    "count": 1,
    "share": 0.5,
    "on": True,
    "mode": "fast",
    "path": "p",
    "shape": ["batch", 3],
    "pair": ["x", 1.0],
    "table": {"y": 0.1},
    "form": {"kind": "round", "radius": 2.0},
}


def read(data: object) -> Settings:
    """Settings from JSON values."""
    return record.loads(Settings, json.dumps(data), where="settings.json")


@given(value=values)
def test_what_is_written_comes_back(value: Settings) -> None:
    """Any value, through text."""
    assert record.loads(Settings, record.dumps(value), where="x") == value


@given(value=values)
def test_equal_values_are_equal_text(value: Settings) -> None:
    """Text made from what was read is the same text: hashes may be taken of it."""
    text = record.dumps(value)
    assert record.dumps(record.loads(Settings, text, where="x")) == text


@given(text=st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but the error asked for comes out of a file."""
    with pytest.raises(IntegrityError, match=r"^any\.json: "):
        record.loads(Settings, text, where="any.json", error=IntegrityError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(GOOD)), value=json_values)
def test_any_value_of_any_field_is_read_or_refused_by_its_name(key: str, value: object) -> None:
    """A wrong field is a RecipeError that names it."""
    problem = ""
    try:
        read({**GOOD, key: value})
    except RecipeError as error:
        problem = str(error)
    assert not problem or f"Settings.{key}" in problem


def test_defaults_may_be_left_out() -> None:
    """And only they."""
    assert read(GOOD).limit is None
    assert read(GOOD).nested == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuont": 1}, "unknown key 'cuont'; did you mean 'count'"),
        ({"zzz": 1}, "unknown key 'zzz'; known: name, count"),
        ({"count": "1"}, "Settings.count: expected int, got '1'"),
        ({"count": True}, "Settings.count: expected int, got True"),
        ({"count": 1.5}, "Settings.count: expected int, got 1.5"),
        ({"count": None}, "Settings.count: expected int, got None"),
        ({"share": "a"}, "Settings.share: expected float"),
        ({"share": False}, "Settings.share: expected float"),
        ({"on": 1}, "Settings.on: expected bool, got 1"),
        ({"name": 3}, "Settings.name: expected str, got 3"),
        ({"mode": "quick"}, "Settings.mode: 'quick' is not one of ['fast', 'small']"),
        ({"path": 3}, "Settings.path: expected str"),
        ({"shape": "batch"}, "Settings.shape: expected a list, got 'batch'"),
        ({"shape": [1, 2.5]}, "Settings.shape[1]: 2.5 fits no form"),
        ({"pair": ["x"]}, "Settings.pair: expected 2 items, got 1"),
        ({"pair": ["x", "y"]}, "Settings.pair[1]: expected float"),
        ({"table": []}, "Settings.table: expected dict"),
        ({"table": {"y": "z"}}, "Settings.table.y: expected float"),
        (
            {"form": {"kind": "oval"}},
            "Settings.form.kind: 'oval' is not one of ['round', 'square']",
        ),
        ({"form": {"kind": "square", "radius": 1.0}}, "unknown key 'radius'"),
        ({"nested": [{"radius": 1.0}, {}]}, "Settings.nested[1]: missing key 'radius'"),
        ({"limit": "none"}, "Settings.limit: expected int"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(change: dict[str, Any], message: str) -> None:
    """With what was found and what is allowed."""
    with pytest.raises(RecipeError) as caught:
        read({**GOOD, **change})
    assert str(caught.value).startswith("settings.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(key: str) -> None:
    """Each that has no default."""
    with pytest.raises(RecipeError, match=f"missing key '{key}'"):
        read({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"b": {"a": 1, "a": 1}}', "key 'a' appears twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ("[" * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        ("[]", "expected an object"),
    ],
)
def test_text_that_is_no_strict_json_is_refused(text: str, message: str) -> None:
    """As the error that the reader of the file asked for."""
    with pytest.raises(DataError, match=r"f\.json") as caught:
        record.loads(Settings, text, where="f.json", error=DataError)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1" + "0" * 400])
def test_a_number_beyond_float_is_refused(text: str) -> None:
    """It would be infinity."""
    with pytest.raises(RecipeError, match=r"Settings\.share"):
        record.loads(Settings, json.dumps(GOOD).replace("0.5", text), where="x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_not_written(value: float) -> None:
    """No reader could be strict about it."""
    with pytest.raises(ValueError, match="JSON"):
        record.dumps(Round(radius=value))


def test_a_value_of_another_type_has_no_json_form() -> None:
    """Rather than a text that does not come back."""
    with pytest.raises(TypeError, match="set has no JSON form"):
        record.to_json({"a": {1}})


@dataclass(frozen=True, kw_only=True)
class Named:
    """A field ``kind`` that tells nothing apart."""

    kind: Literal["tall", "wide"]


@dataclass(frozen=True, kw_only=True)
class MayHold:
    """One dataclass or none."""

    inner: Named | None = None


@pytest.mark.parametrize("value", [MayHold(), MayHold(inner=Named(kind="wide"))])
def test_an_optional_dataclass_may_have_a_field_kind_of_its_own(value: MayHold) -> None:
    """``kind`` tells apart the members of a union; where there is one, it is a field."""
    assert record.from_json(MayHold, record.to_json(value)) == value
