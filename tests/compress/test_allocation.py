"""Which widths are chosen. Every latency here is synthetic: made up, not measured."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from equipoise import record
from equipoise.compress.latency.allocate import Allocation, allocate
from equipoise.compress.latency.estimate import Estimator
from equipoise.compress.latency.plans import Choices, Plan, choices_of, plans
from equipoise.compress.latency.shapes import shapes_of
from equipoise.compress.latency.table import LayerLatency, LayerTable
from equipoise.compress.structure import Group, Layer, LayerShape, Structure
from equipoise.errors import InputError, NonFiniteError, NotMetError, UsageError
from equipoise.measure.interval import Interval

Cost = Callable[[LayerShape], float]


def smooth(shape: LayerShape) -> float:
    return 1e-4 * shape.inputs * shape.outputs + 1e-3


def stairs(shape: LayerShape) -> float:
    """A vector of 16: what is narrower by less saves nothing."""
    return smooth(dataclasses.replace(shape, inputs=_up(shape.inputs), outputs=_up(shape.outputs)))


def _up(channels: int) -> int:
    return 16 * math.ceil(channels / 16)


def table(shapes: tuple[LayerShape, ...], cost: Cost) -> LayerTable:
    def interval(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    return LayerTable(
        working_sets=(0,),
        layers=tuple(LayerLatency(shape=s, latency_ms=(interval(cost(s)),)) for s in shapes),
        call_ms=interval(0.01), node_ms=0.0, whole_ms=None,
        whole_nodes=0, runtime="synthetic", precision="float32",
        threads=1, machine="synthetic", rounds=1, took_s=0.0,
    )  # fmt: skip


def linear(inputs: int, outputs: int) -> LayerShape:
    return LayerShape(kind="linear", inputs=inputs, outputs=outputs, size=(4,))


def chain(*scores: tuple[float, ...], multiple: int = 8) -> Structure:
    """3 -> group 0 -> group 1 ... -> 10."""
    groups = tuple(
        Group(name=f"g{i}", width=len(s), multiple=multiple, scores=s) for i, s in enumerate(scores)
    )
    ends = [("", 3), *((group.name, group.width) for group in groups), ("", 10)]
    layers = tuple(
        Layer(name=f"layer{i}", shape=linear(a[1], b[1]), input_group=a[0], output_group=b[0])
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    )
    return Structure(groups=groups, layers=layers)


def estimator_of(structure: Structure, cost: Cost) -> Estimator:
    """Every width that the groups may have is in the table."""
    points = max(group.width // group.multiple for group in structure.groups) + 1
    return Estimator(table(shapes_of(structure, points=max(2, points)), cost), structure)


def best(
    structure: Structure, estimator: Estimator, *, goal_ms: float, least_share: float
) -> float | None:
    """The least score that has to go: every combination is tried."""
    choices = []
    for group in structure.groups:
        least = max(group.multiple, least_share * group.width)
        widths = {w for w in range(least.__ceil__(), group.width + 1) if w % group.multiple == 0}
        choices.append(sorted(widths | {group.width}))
    found = math.inf
    for widths in itertools.product(*choices):
        pairs = list(zip(structure.groups, widths, strict=True))
        lost = sum(sum(sorted(g.scores)[: g.width - w]) for g, w in pairs)
        named = {g.name: w for g, w in pairs}
        if lost < found and estimator.latency_ms(named) <= goal_ms * (1 + 1e-9):
            found = lost
    return None if found == math.inf else found


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    seed = draw(st.integers(0, 2**32))
    generator = random.Random(seed)
    widths = draw(st.lists(st.sampled_from([16, 24, 40, 64]), min_size=1, max_size=3))
    return chain(*(tuple(generator.random() ** 2 for _ in range(width)) for width in widths))


costs = st.sampled_from([smooth, stairs])


@settings(deadline=None, max_examples=60)
@given(structure=structures(), cost=costs, speedup=st.floats(1.05, 4.0))
def test_hardly_more_is_lost_than_has_to_be(
    structure: Structure, cost: Cost, speedup: float
) -> None:
    """Within 3 % of the best of all combinations; where that finds none, none is claimed."""
    estimator = estimator_of(structure, cost)
    goal_ms = estimator.full_ms / speedup
    least = best(structure, estimator, goal_ms=goal_ms, least_share=0.1)
    if least is None:
        with pytest.raises(NotMetError):
            allocate(structure, estimator, speedup=speedup)
        return
    found = allocate(structure, estimator, speedup=speedup)
    assert found.removed_score <= least * 1.03 + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    structure=structures(),
    cost=costs,
    speedup=st.floats(1.05, 4.0),
    scope=st.sampled_from(["global", "per-layer"]),
    least_share=st.floats(0.05, 1.0),
)
def test_what_is_chosen_is_allowed_and_adds_up(
    structure: Structure, cost: Cost, speedup: float, scope: str, least_share: float
) -> None:
    estimator = estimator_of(structure, cost)
    try:
        found = allocate(
            structure,
            estimator,
            speedup=speedup,
            scope=scope,
            least_share=least_share,  # type: ignore[arg-type]
        )
    except NotMetError:
        reject()
    assert found.estimated_speedup >= speedup * (1 - 1e-6)
    assert found.estimated_ms == pytest.approx(estimator.latency_ms(found.widths))
    for group in structure.groups:
        width = found.widths[group.name]
        assert width == group.width or width % group.multiple == 0
        assert width >= least_share * group.width - 1e-9
    saved = sum(step.saved_ms for step in found.steps)
    assert estimator.full_ms - saved == pytest.approx(found.estimated_ms)
    assert sum(step.lost_score for step in found.steps) == pytest.approx(found.removed_score)
    widths = {group.name: group.width for group in structure.groups}
    for step in found.steps:
        assert widths[step.group] == step.before
        widths[step.group] = step.after
    assert widths == found.widths


@settings(deadline=None, max_examples=40)
@given(structure=structures(), cost=costs, speedup=st.floats(1.05, 3.0))
def test_nothing_is_cut_for_nothing(structure: Structure, cost: Cost, speedup: float) -> None:
    """No group could keep one multiple more, or all it had, within the goal."""
    estimator = estimator_of(structure, cost)
    try:
        found = allocate(structure, estimator, speedup=speedup)
    except NotMetError:
        reject()
    for group in structure.groups:
        width = found.widths[group.name]
        for more in range(width + group.multiple, group.width + 1, group.multiple):
            wider = {**found.widths, group.name: more}
            assert estimator.latency_ms(wider) > estimator.full_ms / speedup


def test_a_step_of_the_stairs_is_jumped_and_not_stood_on() -> None:
    """Eight channels less save nothing at a vector of 16: all widths that are cut are of 16."""
    generator = random.Random(0)
    structure = chain(*(tuple(generator.random() for _ in range(64)) for _ in range(3)))
    found = allocate(structure, estimator_of(structure, stairs), speedup=2.0)
    assert all(width % 16 == 0 for width in found.widths.values())
    assert min(found.widths.values()) < 64


def test_a_plateau_too_wide_for_one_multiple_is_crossed() -> None:
    """The first cut that saves anything is four multiples away."""

    def cliff(shape: LayerShape) -> float:
        return 1.0 if shape.outputs > 32 and shape.outputs != 10 else 0.1

    structure = chain((1.0,) * 64)
    found = allocate(structure, estimator_of(structure, cliff), speedup=2.0)
    assert found.widths == {"g0": 32}
    assert [step.after for step in found.steps] == [32]


def test_a_hill_is_jumped_over() -> None:
    """A width that is slower than the full one, as of channels that fit no vector, is not taken."""

    def hill(shape: LayerShape) -> float:
        return {64: 1.0, 56: 3.0, 48: 2.0, 40: 1.5, 32: 0.4}.get(shape.outputs, 0.3)

    structure = chain((1.0,) * 64)
    found = allocate(structure, estimator_of(structure, hill), speedup=1.5)
    assert found.widths == {"g0": 32}


def test_channels_that_score_nothing_go_first() -> None:
    structure = chain((0.0,) * 32 + (5.0,) * 32, (5.0,) * 64)
    found = allocate(structure, estimator_of(structure, smooth), speedup=1.7)
    assert found.widths == {"g0": 32, "g1": 64}
    assert found.removed_score == 0


def test_per_layer_keeps_the_same_share_of_every_group() -> None:
    structure = chain((0.0,) * 64, (5.0,) * 32, (1.0,) * 64)
    found = allocate(structure, estimator_of(structure, smooth), speedup=2.0, scope="per-layer")
    shares = [found.widths[g.name] / g.width for g in structure.groups]
    assert max(shares) - min(shares) <= 8 / 32


def test_a_model_that_was_cut_goes_on_towards_the_speed_up_of_the_original() -> None:
    """The table and the goal are those of the original; scores are of what is left."""
    original = chain((1.0,) * 64, (1.0,) * 64)
    estimator = estimator_of(original, smooth)
    first = allocate(original, estimator, speedup=1.5)
    left = tuple(
        Group(name=name, width=width, multiple=8, scores=(1.0,) * width)
        for name, width in first.widths.items()
    )
    now = dataclasses.replace(original, groups=left)
    assert allocate(now, estimator, speedup=1.5).steps == ()
    second = allocate(now, estimator, speedup=2.5)
    assert second.estimated_speedup >= 2.5
    assert all(second.widths[g.name] <= g.width for g in left)


def test_an_unreachable_speed_up_says_how_far_it_gets() -> None:
    structure = chain((1.0,) * 64, (1.0,) * 64)
    fixed = Layer(name="stem", shape=linear(64, 200))
    structure = dataclasses.replace(structure, layers=(fixed, *structure.layers))
    estimator = estimator_of(structure, smooth)
    with pytest.raises(NotMetError) as caught:
        allocate(structure, estimator, speedup=20.0, least_share=0.5)
    fastest = estimator.latency_ms({"g0": 32, "g1": 32})
    assert f"a speed-up of {estimator.full_ms / fastest:.2f}" in caught.value.message
    assert "stem" in caught.value.message
    assert f"{smooth(fixed.shape) / fastest:.0%}" in caught.value.message
    reachable = float(caught.value.hint.split("at most ")[1].split(",")[0])
    found = allocate(structure, estimator, speedup=reachable, least_share=0.5)
    assert found.estimated_speedup >= reachable


@pytest.mark.parametrize("speedup", [1.0, 0.5, 0.0, -2.0, math.nan, math.inf])
def test_a_speed_up_that_is_none_is_refused(speedup: float) -> None:
    structure = chain((1.0,) * 16)
    estimator = estimator_of(structure, smooth)
    with pytest.raises(UsageError, match="above 1"):
        allocate(structure, estimator, speedup=speedup)
    with pytest.raises(UsageError, match="above 1"):
        plans(structure, estimator, speedup=speedup)


def test_wrong_groups_and_scores_are_refused() -> None:
    structure = chain((1.0,) * 16)
    estimator = estimator_of(structure, smooth)
    (group,) = structure.groups

    def with_group(**changes: object) -> Structure:
        return dataclasses.replace(
            structure,
            groups=(dataclasses.replace(group, **changes),),  # type: ignore[arg-type]
        )

    with pytest.raises(InputError, match="scores"):
        allocate(with_group(scores=(1.0,)), estimator, speedup=1.2)
    with pytest.raises(NonFiniteError, match="g0"):
        allocate(with_group(scores=(math.nan,) * 16), estimator, speedup=1.2)
    with pytest.raises(UsageError, match="g9"):
        allocate(with_group(name="g9"), estimator, speedup=1.2)
    with pytest.raises(UsageError, match="24"):
        allocate(with_group(width=24, scores=(1.0,) * 24), estimator, speedup=1.2)
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(UsageError, match="least_share"):
            allocate(structure, estimator, speedup=1.2, least_share=share)


def test_an_allocation_comes_back_from_its_record() -> None:
    structure = chain((1.0,) * 64)
    found = allocate(structure, estimator_of(structure, smooth), speedup=2.0)
    assert record.loads(Allocation, record.dumps(found), where="allocation") == found


# Transformers.


def transformer(*, blocks: int = 3, hidden: int = 32, intermediate: int = 64) -> Structure:
    layers = []
    for block in range(blocks):
        layers += [
            Layer(name=f"{block}.up", shape=linear(hidden, intermediate), input_group="hidden",
                  output_group="intermediate", block=block),
            Layer(name=f"{block}.down", shape=linear(intermediate, hidden),
                  input_group="intermediate", output_group="hidden", block=block),
        ]  # fmt: skip
    groups = tuple(
        Group(name=name, width=width, multiple=8, scores=(1.0,) * width)
        for name, width in (("hidden", hidden), ("intermediate", intermediate))
    )
    return Structure(groups=groups, layers=tuple(layers))


@settings(deadline=None, max_examples=25)
@given(speedup=st.floats(1.05, 5.0), blocks=st.integers(1, 4), cost=costs)
def test_plans_are_those_of_which_nothing_more_can_be_kept(
    speedup: float, blocks: int, cost: Cost
) -> None:
    """Exactly the undominated ones among all combinations, the slowest first."""
    structure = transformer(blocks=blocks)
    estimator = estimator_of(structure, cost)
    choices = choices_of(structure, shares=(1.0, 0.75, 0.5, 0.25))
    names = list(choices.widths)
    enough = [
        (kept, *widths)
        for kept, *widths in itertools.product(choices.blocks, *choices.widths.values())
        if estimator.full_ms
        / estimator.latency_ms(dict(zip(names, widths, strict=True)), blocks=kept)
        >= speedup
    ]
    wanted = {
        one
        for one in enough
        if not any(
            other != one and all(a >= b for a, b in zip(other, one, strict=True))
            for other in enough
        )
    }
    if not enough:
        with pytest.raises(NotMetError, match="fastest combination"):
            plans(structure, estimator, speedup=speedup, choices=choices)
        return
    found = plans(structure, estimator, speedup=speedup, choices=choices)
    assert {(plan.blocks, *(plan.widths[name] for name in names)) for plan in found} == wanted
    times = [plan.estimated_ms for plan in found]
    assert times == sorted(times, reverse=True)
    assert all(plan.estimated_speedup >= speedup * (1 - 1e-6) for plan in found)


def test_fewer_layers_and_narrower_ones_are_both_planned() -> None:
    structure = transformer(blocks=4)
    found = plans(structure, estimator_of(structure, smooth), speedup=1.9)
    kept = {(plan.blocks, plan.widths["intermediate"], plan.widths["hidden"]) for plan in found}
    assert (2, 64, 32) in kept  # half of the layers, each as it was
    assert any(blocks == 4 for blocks, _, _ in kept)  # all of them, narrower
    assert record.loads(Plan, record.dumps(found[0]), where="plan") == found[0]


def test_choices_are_multiples_with_the_full_width() -> None:
    structure = transformer(hidden=40, intermediate=100)
    choices = choices_of(structure, shares=(0.5,))
    assert choices == Choices(
        blocks=(3, 2, 1), widths={"hidden": (40, 16), "intermediate": (100, 48)}
    )


def test_a_model_without_blocks_is_planned_by_width_alone() -> None:
    structure = chain((1.0,) * 64)
    found = plans(structure, estimator_of(structure, smooth), speedup=2.0)
    assert [plan.blocks for plan in found] == [None]


def test_wrong_choices_are_refused() -> None:
    structure = transformer()
    estimator = estimator_of(structure, smooth)
    for shares in ((), (0.0,), (1.5,)):
        with pytest.raises(UsageError, match="shares"):
            choices_of(structure, shares=shares)
    many = Choices(blocks=(1,), widths={f"g{i}": tuple(range(1, 60)) for i in range(4)})
    none = Choices(blocks=(1,), widths={"hidden": ()})
    for choices in (many, none):
        with pytest.raises(UsageError, match="combinations"):
            plans(structure, estimator, speedup=2.0, choices=choices)
    for choices in (
        Choices(blocks=(9,), widths={}),
        Choices(blocks=(1,), widths={"hiden": (8,)}),
        Choices(blocks=(1,), widths={"hidden": (400,)}),
    ):
        with pytest.raises(UsageError):
            plans(structure, estimator, speedup=2.0, choices=choices)
