"""Two results side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.report.making import (
    CANDIDATES,
    INFEASIBLE,
    MACHINE,
    RESULT,
    around,
    candidate,
    measurement,
)

from equipoise.report.compare import compare
from equipoise.report.comparing import difference_rows, figure_rows, moved_rows, verdict_lines
from equipoise.search.goal import Goal
from equipoise.search.result import Candidate, TuneResult


def with_choice(**changes: object) -> TuneResult:
    """The result with other figures of its choice."""
    found = CANDIDATES[3].measurement
    assert found is not None
    chosen = replace(CANDIDATES[3], measurement=replace(found, **changes))
    return replace(RESULT, candidates=(*CANDIDATES[:3], chosen, *CANDIDATES[4:]))


def outcomes(before: TuneResult, after: TuneResult) -> dict[str, str]:
    return {change.quantity: change.outcome for change in compare(before, after).figures}


def test_a_result_and_itself() -> None:
    """Nothing differs, and that is said."""
    found = compare(RESULT, RESULT)
    assert outcomes(RESULT, RESULT) == dict.fromkeys(
        ("metric", "latency", "size", "memory"), "the same"
    )
    assert found.moved == found.only_before == found.only_after == ()
    assert difference_rows(found) == ()
    assert verdict_lines(found) == (
        "The choice is the same: int8-static.",
        "Nothing in its figures changed beyond the noise.",
    )


@pytest.mark.parametrize(
    ("changes", "quantity", "outcome"),
    [
        ({"speedup": around(1 / 0.53, 0.025)}, "latency", "within the noise"),
        ({"speedup": around(1 / 0.60, 0.025)}, "latency", "worse"),
        ({"speedup": around(1 / 0.40, 0.025)}, "latency", "better"),
        ({"metric": around(0.921, 0.005)}, "metric", "within the noise"),
        ({"metric": around(0.80, 0.005)}, "metric", "worse"),
        ({"metric": around(0.99, 0.005)}, "metric", "better"),
        ({"size_bytes": 20_000_000}, "size", "better"),
        ({"size_bytes": 24_000_000}, "size", "worse"),
        ({"peak_memory_bytes": 190_000_000}, "memory", "within the noise"),
        ({"peak_memory_bytes": 260_000_000}, "memory", "worse"),
        ({"peak_memory_bytes": 100_000_000}, "memory", "better"),
    ],
)
def test_only_what_lies_beyond_both_intervals_is_a_change(
    changes: dict[str, object], quantity: str, outcome: str
) -> None:
    """In both directions, and of one figure alone."""
    after = with_choice(**changes)
    assert outcomes(RESULT, after)[quantity] == outcome
    assert [o for q, o in outcomes(RESULT, after).items() if q != quantity] == ["the same"] * 3
    turned = {"better": "worse", "worse": "better"}.get(outcome, outcome)
    assert outcomes(after, RESULT)[quantity] == turned


def test_words_say_by_how_much() -> None:
    """In per cent of costs, in its own unit of the metric."""
    found = compare(RESULT, with_choice(speedup=around(1 / 0.65), metric=around(0.8)))
    rows = {row[0]: row for row in figure_rows(found)}
    assert rows["latency / float"][3] == "worse by 25.0\xa0%"
    assert rows["metric"][3] == "worse by 0.1268"
    assert rows["latency / float"][1].startswith("0.520 [")


def test_other_choices_and_verdicts_are_named() -> None:
    """What was refused is chosen now; one is gone, one is new."""
    allowed: Candidate = replace(CANDIDATES[4], verdict="accepted", reason="keeps the metric")
    after = replace(
        RESULT,
        candidates=(*CANDIDATES[:4], allowed, *CANDIDATES[5:-1], candidate("new")),
        chosen="int8-static-fused",
        goal=Goal(max_drop=0.02),
    )
    found = compare(RESULT, after)
    assert moved_rows(found) == (
        ("int8-static-fused", "refused → accepted", "–", "keeps the metric"),
    )
    assert (found.only_before, found.only_after) == (("float32-fused",), ("new",))
    assert difference_rows(found) == (("goal", "max drop", "0.01", "0.02"),)
    lines = verdict_lines(found)
    assert lines[0] == "The choice changed from int8-static to int8-static-fused."
    assert "1 candidate changed the verdict." in lines
    assert "Candidates that are new: new." in lines


def test_a_candidate_whose_figures_moved_is_named_with_them() -> None:
    """Though its verdict is the same."""
    found = moved_rows(compare(RESULT, with_choice(size_bytes=50_000_000)))
    assert [row[:3] for row in found] == [
        ("int8-static", "accepted", "size 23.3\xa0MB → 50.0\xa0MB")
    ]


def test_another_machine_is_marked() -> None:
    """At every figure that depends on it; the size does not."""
    other = replace(RESULT, machine=replace(MACHINE, cpu="Other CPU", flags=("avx512f",)))
    found = compare(RESULT, other)
    assert not found.same_machine
    notes = {change.quantity: change.note for change in found.figures}
    assert notes == {
        "metric": "", "size": "", "latency": "measured on another machine",
        "memory": "measured on another machine",
    }  # fmt: skip
    assert any("different machines" in line for line in verdict_lines(found))
    assert ("machine", "flags", "avx2 fma f16c", "avx512f") in difference_rows(found)


def test_a_new_kernel_is_no_other_machine() -> None:
    """It is listed, and comparing goes on."""
    found = compare(RESULT, replace(RESULT, machine=replace(MACHINE, system="Linux 6.9")))
    assert found.same_machine
    assert difference_rows(found) == (("machine", "system", "Linux 6.8.0", "Linux 6.9"),)


def test_metrics_on_other_data_are_not_compared() -> None:
    """Nor on other samples; costs still are."""
    after = replace(with_choice(metric=around(0.5)), data="other", evaluation_samples=10)
    found = compare(RESULT, after)
    assert outcomes(RESULT, after)["metric"] == "not comparable"
    assert found.figures[0].note == "other data and evaluation samples"
    assert ("run", "data", "conll:data/conll2003", "other") in difference_rows(found)


def test_versions_that_differ_are_listed_and_missing_ones_too() -> None:
    """A package that was not there before has the version none."""
    found = compare(RESULT, replace(RESULT, versions={"equipoise": "0.2.0", "numpy": "2"}))
    assert difference_rows(found) == (
        ("version", "equipoise", "0.1.0", "0.2.0"),
        ("version", "numpy", "none", "2"),
        ("version", "onnxruntime", "1.32.0", "none"),
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (INFEASIBLE, RESULT, "Before, no engine kept all limits; now it is int8-static."),
        (RESULT, INFEASIBLE, "The choice was int8-static; now no engine keeps all limits."),
        (INFEASIBLE, INFEASIBLE, "Neither run found an engine."),
    ],
)
def test_a_side_without_a_choice(before: TuneResult, after: TuneResult, words: str) -> None:
    """There are no figures to compare, and the verdicts say the rest."""
    found = compare(before, after)
    assert found.figures == ()
    assert verdict_lines(found)[0] == words


def test_sketches_are_not_compared() -> None:
    """A candidate that was measured whole in one run only has a verdict, and no figures."""
    whole = replace(
        CANDIDATES[7], verdict="accepted",
        measurement=measurement(ratio=0.75, drop=0.01, size=0.5),
    )  # fmt: skip
    found = compare(RESULT, replace(RESULT, candidates=(*CANDIDATES[:7], whole, *CANDIDATES[8:])))
    assert [(m.name, m.before, m.after, m.changes) for m in found.moved] == [
        ("pruned-2x", "outraced", "accepted", ())
    ]
