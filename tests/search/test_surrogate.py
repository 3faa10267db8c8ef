"""Predictions from what was tried, and the proposals that follow from them."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.compress.cutting import Pruning
from equipoise.search.propose import Proposer, Seen, scaled_excess
from equipoise.search.space import BASELINE, SpaceSettings, space_for
from equipoise.search.surrogate import (
    Coordinates,
    Prediction,
    expected_improvement,
    fit_and_predict,
    probability_below,
)

SPACE = space_for(SpaceSettings(saturates=False, threads=(1, 2)))
POINTS = list(SPACE.points())


def value(point: tuple[int, ...]) -> float:
    """Effects of single choices that add up, as logarithms of latencies nearly do."""
    return sum(0.3 * index * (axis % 3) for axis, index in enumerate(point))


def test_what_cannot_be_pruned_so_far_cannot_be_pruned_further() -> None:
    """Less may still be possible; and where something else is to blame, it is that alone."""
    prunings = tuple(Pruning(speedup=speedup) for speedup in (1.6, 1.3, 2.5))
    space = space_for(SpaceSettings(saturates=False, prunings=prunings))
    plain = space.at({"precision": BASELINE})
    points = {
        s: space.at({"precision": BASELINE, "model": f"pruned-{s}x"}) for s in (1.3, 1.6, 2.5)
    }
    proposer = Proposer(space)
    proposer.exclude(points[1.6], applicable=[plain])
    assert [proposer.may_apply(points[s]) for s in (1.3, 1.6, 2.5)] == [True, False, False]
    proposer = Proposer(space)
    fused = space.at({"precision": BASELINE, "model": "pruned-1.6x", "graph": "fused"})
    proposer.exclude(fused, applicable=[plain, points[1.6]])
    assert proposer.may_apply(points[2.5])
    assert not proposer.may_apply(fused)


def test_effects_of_choices_are_learned_from_a_few() -> None:
    """A seventh of the points: the others are predicted with a tenth of their spread."""
    random = np.random.default_rng(0)
    chosen = random.permutation(len(POINTS))
    seen = [POINTS[i] for i in chosen[:32]]
    rest = [POINTS[i] for i in chosen[32:]]
    coordinates = Coordinates(SPACE)
    found = fit_and_predict(coordinates, seen, [value(p) for p in seen], rest)
    errors = found.mean - [value(p) for p in rest]
    assert np.std(errors) < 0.2 * np.std([value(p) for p in rest])
    at_seen = fit_and_predict(coordinates, seen, [value(p) for p in seen], seen)
    assert np.mean(at_seen.deviation) < np.mean(found.deviation)


def test_constant_values_are_no_trouble() -> None:
    found = fit_and_predict(Coordinates(SPACE), POINTS[:3], [1.0, 1.0, 1.0], POINTS)
    assert np.allclose(found.mean, 1.0)
    assert np.isfinite(found.deviation).all()


def test_improvement_and_probability_are_those_of_a_normal_distribution() -> None:
    """Against a sum over a fine grid."""
    predicted = Prediction(mean=np.array([0.3, -1.0]), deviation=np.array([0.5, 0.1]))
    grid = np.linspace(-8, 8, 200_001)
    for index in range(2):
        mean, deviation = predicted.mean[index], predicted.deviation[index]
        density = np.exp(-0.5 * ((grid - mean) / deviation) ** 2) / deviation / np.sqrt(2 * np.pi)
        step = grid[1] - grid[0]
        gain = (np.maximum(0.2 - grid, 0) * density).sum() * step
        assert expected_improvement(predicted, 0.2)[index] == pytest.approx(gain, abs=1e-6)
        below = density[grid <= 0.2].sum() * step
        assert probability_below(predicted, 0.2)[index] == pytest.approx(below, abs=1e-4)


def test_excess_has_the_sign_of_the_limit_and_grows() -> None:
    for quantity, allowed, better, worse in (
        ("drop", 0.01, 0.005, 0.02), ("metric", 0.9, 0.95, 0.5), ("size", 100, 50, 1000),
        ("latency", 5.0, 4.0, 6.0), ("drop", 0.0, -0.01, 0.01),
    ):  # fmt: skip
        assert scaled_excess(quantity, allowed=allowed, found=better) < 0
        assert scaled_excess(quantity, allowed=allowed, found=worse) > 0
        assert scaled_excess(quantity, allowed=allowed, found=allowed) == 0


def test_starts_are_cheapest_first() -> None:
    """Float, then what needs no calibration, then static."""
    names = [p.recipe.name for p in Proposer(SPACE).starts]
    assert names[0] == BASELINE
    assert names.index("int8-dynamic") < names.index("int8-static")


def test_an_impossible_choice_is_told_from_an_impossible_recipe() -> None:
    """Where float goes unfused and not fused, no fused recipe goes; where nothing else is known,
    that one recipe alone is struck out."""
    proposer = Proposer(SPACE)
    fused = SPACE.at({"precision": BASELINE, "graph": "fused"})
    plain = SPACE.at({"precision": BASELINE})
    proposer.exclude(fused, applicable=[])
    assert [p for p in POINTS if not proposer.may_apply(p)] == [fused]
    proposer.exclude(fused, applicable=[plain])
    assert not any(SPACE.recipe(p).fused for p in POINTS if proposer.may_apply(p))


def test_of_two_choices_the_lesser_one_is_struck_out() -> None:
    """Static int8 that keeps 0 dB changes nothing beside the usual one: static itself stays."""
    proposer = Proposer(SPACE)
    static = {"precision": "int8-static"}
    same = SPACE.at({**static, "kept": "0dB"})
    proposer.exclude(same, applicable=[SPACE.at({"precision": BASELINE}), SPACE.at(static)])
    assert proposer.may_apply(SPACE.at({**static, "kept": "30dB"}))
    assert not proposer.may_apply(SPACE.at({**static, "kept": "0dB", "threads": "1t"}))


def test_proposals_avoid_what_breaks_limits() -> None:
    """A cheap region that was seen to break the limit is left for one that keeps it."""
    static = [p for p in POINTS if SPACE.choice(p, "precision").label == "int8-static"]
    others = [p for p in POINTS if SPACE.choice(p, "precision").label == "int8-dynamic"]
    seen = [Seen(point=p, log_cost=-2.0, excess={"drop": 5.0}) for p in static[:12]]
    seen += [Seen(point=p, log_cost=-0.5, excess={"drop": -1.0}) for p in others[:2]]
    proposal = Proposer(SPACE).next(seen, best=-0.5)
    assert proposal is None or proposal.point not in static


def test_nothing_is_proposed_when_nothing_is_to_be_gained() -> None:
    seen = [Seen(point=p, log_cost=value(p), excess={"drop": -1.0}) for p in POINTS]
    assert Proposer(SPACE).next(seen, best=0.0) is None
