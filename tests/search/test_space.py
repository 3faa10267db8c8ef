"""The space: every recipe once, with a name of its own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import record
from equipoise.bundle.names import ENGINE_NAME, engine_name
from equipoise.compress.cutting import Pruning
from equipoise.quantize.schemes import DynamicInt8, StaticInt8
from equipoise.quantize.weight_only import WeightOnly
from equipoise.recipe import Recipe
from equipoise.search.propose import Proposer
from equipoise.search.space import BASELINE, Space, SpaceSettings, baseline_alone, space_for

SPACE = space_for(SpaceSettings(saturates=True, prunings=(Pruning(speedup=2.0),), threads=(1, 2)))


def test_every_point_is_another_recipe_with_another_name() -> None:
    recipes = [SPACE.recipe(point) for point in SPACE.points()]
    assert len(recipes) > 200
    assert len({r.name for r in recipes}) == len(recipes)
    bare = [record.dumps(r).replace(r.name, "").replace(r.summary, "") for r in recipes]
    assert len(set(bare)) == len(recipes)


def test_every_recipe_names_another_engine_of_a_bundle() -> None:
    """Also the longest names, and those that a refinement makes."""
    settings = SpaceSettings(
        saturates=True,
        prunings=(Pruning(speedup=2.5),),
        threads=(1, 2, 3, 16),
        targets=("openvino",),
        tables=True,
    )
    space = space_for(settings)
    names = [space.recipe(point).name for point in space.points()]
    names += [f"{name}@32.4dB-99.9998pc" for name in names]
    engines = {engine_name(name) for name in names}
    assert len(engines) == len(names)
    assert all(ENGINE_NAME.fullmatch(engine) for engine in engines)
    assert engine_name("int8-static-25dB") == "int8-static-25db"


@given(st.text())
def test_anything_names_an_engine(words: str) -> None:
    assert ENGINE_NAME.fullmatch(engine_name(words))


@given(st.data())
def test_idle_choices_change_nothing(data) -> None:
    """Any point, canonical or not, is the recipe of its canonical one."""
    point = tuple(data.draw(st.integers(0, len(axis.choices) - 1)) for axis in SPACE.axes)
    canonical = SPACE.canonical(point)
    assert SPACE.canonical(canonical) == canonical
    assert SPACE.recipe(point) == SPACE.recipe(canonical)
    again = record.loads(Recipe, record.dumps(SPACE.recipe(point)), where="text")
    assert again == SPACE.recipe(point)


def test_names_say_what_is_not_usual() -> None:
    def name(**labels: str) -> str:
        return SPACE.recipe(SPACE.at(labels)).name

    assert name(precision=BASELINE) == "float32"
    assert name(precision=BASELINE, graph="fused") == "float32-fused"
    assert name(model="pruned-2x", precision=BASELINE) == "pruned-2x"
    assert name(model="pruned-2x", precision="int8-static") == "pruned-2x-int8-static"
    assert name(precision="int8-static", kept="30dB", threads="1t") == "int8-static-30dB-1t"


def test_tables_in_blocks_are_an_axis_of_what_has_them() -> None:
    """Beside three precisions, on the first target alone, whose runtime is known to gather them."""
    space = space_for(SpaceSettings(saturates=False, tables=True, targets=("openvino",)))
    recipes = [space.recipe(point) for point in space.points()]
    blocked = [r for r in recipes if getattr(r.quantization, "tables", "") == "blocks"]
    assert {r.target for r in blocked} == {""}
    assert {type(r.quantization) for r in blocked} == {DynamicInt8, StaticInt8, WeightOnly}
    assert "int8-dynamic-4bit-tables" in {r.name for r in blocked}
    starts = [p.recipe.name for p in Proposer(space).starts]
    assert starts.count("int8-dynamic-4bit-tables") == 1


def test_of_prunings_that_nobody_asked_for_the_first_alone_is_a_start() -> None:
    prunings = tuple(Pruning(speedup=speedup) for speedup in (1.6, 2.5))
    for first, wanted in ((False, {"pruned-1.6x", "pruned-2.5x"}), (True, {"pruned-1.6x"})):
        settings = SpaceSettings(saturates=False, prunings=prunings, first_pruning=first)
        space = space_for(settings)
        assert {p.recipe.name for p in Proposer(space).starts if p.recipe.pruning} >= wanted
        started = {p.recipe.pruning for p in Proposer(space).starts if p.recipe.pruning}
        assert len(started) == len(wanted)
        assert len({r.pruning for r in map(space.recipe, space.points())}) == 3
        assert space.axes[0].positions() == [0.0, math.log(1.6), math.log(2.5)]


def test_recipes_follow_the_cpu() -> None:
    """A CPU that saturates gets seven bits in dynamic schemes; static ones choose by layer."""
    for saturates in (False, True):
        space = space_for(SpaceSettings(saturates=saturates))
        recipes = [space.recipe(point) for point in space.points()]
        dynamic = [r.quantization for r in recipes if isinstance(r.quantization, DynamicInt8)]
        static = [r.quantization for r in recipes if isinstance(r.quantization, StaticInt8)]
        assert {q.reduce_range for q in dynamic} == {saturates}
        assert {q.weight_bits for q in static} == {None}


def test_the_float_engine_alone() -> None:
    space = baseline_alone(saturates=False)
    assert [space.recipe(point).name for point in space.points()] == [BASELINE]


def test_unknown_axis_is_no_choice() -> None:
    with pytest.raises(KeyError):
        Space(axes=()).choice((), "precision")
