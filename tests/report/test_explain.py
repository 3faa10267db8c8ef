"""The explanation of a result: the facts are those of the result, and the words say them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.report.making import CANDIDATES, INFEASIBLE, RESULT, around, candidate, measurement

from equipoise import record
from equipoise.quantize.plans import NodeFact
from equipoise.report.explain import explain, summary
from equipoise.report.nodes import blocked, node_map, precisions
from equipoise.report.words import amount, goal_words, price_words
from equipoise.search.goal import Goal, Limit, parse_minimise
from equipoise.search.result import Price, Repeat, TuneResult


def told(result: TuneResult) -> dict[str, str]:
    return {topic: text.replace("\xa0", " ") for topic, text in explain(result).sentences.items()}


def test_the_summary_has_the_choice_its_cost_and_its_certainty() -> None:
    """With intervals, the reference on the same samples, and the bound of the drop."""
    text = summary(RESULT).replace("\xa0", " ")
    for words in (
        "int8-static is the fastest candidate that keeps the metric.",
        "4.222 ms [4.138, 4.307] per inference, 0.52 [0.51, 0.53] of float",
        "23.3 MB on disk (0.26 of float)",
        "186.0 MB of memory (0.60 of float)",
        "Its entity-f1 is 0.9268 [0.9188, 0.9348]; PyTorch has 0.9312 on the same 3453 samples",
        "The drop is +0.0044, and at most 0.0078 at 95 % confidence for all candidates together",
        "together (allowed 0.01)",
    ):
        assert words in text


def test_every_topic_is_told_of_a_full_result() -> None:
    """In the order in which they are read."""
    assert list(told(RESULT)) == [
        "choice", "cost", "certainty", "runner-up", "refused", "relaxing", "blocks", "search",
    ]  # fmt: skip
    assert list(told(INFEASIBLE)) == ["choice", "binding", "refused", "relaxing", "search"]


def test_the_runner_up_is_the_next_best_and_the_reason_is_what_it_costs() -> None:
    """Slower beyond the intervals."""
    found = explain(RESULT).runner_up
    assert found is not None
    assert found.name == "int8-static-tables"
    assert found.why_not == "slower (0.55 [0.54, 0.56] against 0.52 [0.51, 0.53] of float)"


@pytest.mark.parametrize(
    ("ratio", "size", "memory", "words"),
    [
        (0.525, 0.30, 0.6, "as fast within the intervals, but larger (27.1 MB against 23.3 MB)"),
        (0.525, 0.258, 0.7, "as large, but needs more memory (217.0 MB against 186.0 MB)"),
        (0.525, 0.2585, 0.61, "tied with the choice in every cost"),
    ],
)
def test_a_tie_goes_to_the_next_cost(ratio: float, size: float, memory: float, words: str) -> None:
    """What cannot be told apart decides nothing."""
    rival = candidate(
        "rival", measurement=measurement(ratio=ratio, drop=0, size=size, memory=memory)
    )
    found = explain(replace(RESULT, candidates=(CANDIDATES[0], CANDIDATES[3], rival))).runner_up
    assert found is not None
    assert found.name == "rival"
    assert words in found.why_not.replace("\xa0", " ")


def test_with_weights_the_product_decides() -> None:
    """Latency squared times size, as in the goal."""
    costs, weights = parse_minimise("latency=2,size=1")
    weighted = replace(RESULT, goal=Goal(minimise=costs, weights=weights))
    found = explain(weighted).runner_up
    assert found is not None
    assert found.why_not == "its weighted cost over that of float is 0.076, against 0.070"
    assert "least latency^2 x size^1" in goal_words(weighted.goal, metric="f1")


def test_what_is_cheaper_but_refused_is_named_with_its_reason() -> None:
    """Only one that costs less than the choice; a refused one that is slower is not."""
    found = explain(RESULT).refused
    assert found is not None
    assert found.name == "int8-static-fused"
    assert "cannot be ruled out" in found.why_not
    faster = replace(RESULT, candidates=(*CANDIDATES[:4], candidate(
        "slow", verdict="refused", measurement=measurement(ratio=0.9, drop=0.5, size=0.26)
    )))  # fmt: skip
    assert explain(faster).refused is None


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (
            Limit(quantity="drop", allowed=0.01, found=0.0136),
            "With 0.4 points more drop of entity-f1 (0.0136 instead of 0.01), latency would go",
        ),
        (
            Limit(quantity="metric", allowed=0.93, found=0.92),
            "With 1.0 points less entity-f1 (0.9200 instead of 0.93), latency",
        ),
        (
            Limit(quantity="latency", allowed=5.0, found=6.25),
            "With a limit of 6.250 ms instead of 5 ms for the latency, latency",
        ),
        (
            Limit(quantity="size", allowed=8e6, found=9e6),
            "With a limit of 9.0 MB instead of 8.0 MB for the size on disk, latency",
        ),
        (
            Limit(quantity="memory", allowed=8e6, found=9e6),
            "With a limit of 9.0 MB instead of 8.0 MB for the peak memory, latency",
        ),
    ],
)
def test_a_price_in_words(limit: Limit, words: str) -> None:
    """What is given up, what it buys, and which candidate that is."""
    price = Price(limit=limit, candidate="other", cost="latency", now=0.52, then=0.47)
    told = price_words(price, RESULT).replace("\xa0", " ")
    assert told.startswith(words)
    assert told.endswith("latency would go from 0.52 to 0.47 of float: other.")


def test_limits_that_bind_are_named_when_nothing_was_found() -> None:
    """With what was found and how far that is."""
    words = told(INFEASIBLE)
    assert words["choice"] == "No engine keeps all limits. int8-static comes nearest."
    assert words["binding"] == (
        "What binds is latency: 4.310 ms found, at most 2 ms allowed (115 % away); size on disk:"
        " 23.3 MB found, at most 8.0 MB allowed (191 % away)."
    )
    assert "int8-static would keep all limits, at 0.52 of the latency" in words["relaxing"]
    assert words["refused"].startswith("int8-static-fused costs least, but is refused")
    assert explain(INFEASIBLE).choice is None


def test_a_goal_in_words() -> None:
    """Every limit with its side, then what is least."""
    goal = Goal(min_metric=0.9, max_latency_ms=5, max_size_bytes=8e6, max_memory_bytes=50e6)
    words = [text.replace("\xa0", " ") for text in goal_words(goal, metric="f1")]
    assert words == [
        "drop of f1 at most 0.01", "f1 at least 0.9", "latency at most 5 ms",
        "size on disk at most 8.0 MB", "peak memory at most 50.0 MB",
        "least latency, then size, then memory", "confidence 0.95",
    ]  # fmt: skip
    assert amount("drop", 0.25) == "0.2500"


def test_what_blocks_is_sorted_by_time_and_named_with_its_harm() -> None:
    """Only nodes that do not compute in integers; one without a time comes last."""
    found = blocked(RESULT)
    assert found is not None
    assert [node.name for node in found.nodes] == [
        "/encoder/0/output/MatMul", "/encoder/0/Softmax", "/encoder/0/Add",
    ]  # fmt: skip
    assert found.share == pytest.approx(0.5 / (0.034 + 0.171 + 0.102 + 0.398 + 0.029))
    first = found.nodes[0].words.replace("\xa0", " ")
    assert first.startswith("0.398 ms, 0.166 ms in integers; alone 9.4 dB; alone in integers it")
    assert blocked(replace(RESULT, nodes=())) is None
    whole = replace(RESULT, nodes=RESULT.nodes[:2])
    assert told(whole)["blocks"] == "All 2 nodes of the chosen model compute in integers."


def test_times_are_summed_by_precision() -> None:
    """Of each node in what it computes in; together they are the whole."""
    sums = {p.name: p for p in precisions(node_map(RESULT))}
    assert sums["int8"].time_ms == pytest.approx(0.034 + 0.171 + 0.029)
    assert sums["float32"].nodes == 3
    assert sum(p.share for p in sums.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("precision", "tone"),
    [("int8", "integer"), ("uint8", "integer"), ("int4", "integer"), ("float32", "float"),
     ("float16", "half"), ("bfloat16", "half"), ("", "other")],
)  # fmt: skip
def test_the_bar_of_harm_is_longer_for_a_worse_node(precision: str, tone: str) -> None:
    """From nothing at 60 dB on to the whole at 0 dB; nothing where no loss was measured."""
    values = (None, 75.0, 30.0, -5.0)
    plans = tuple(
        NodeFact(name="n", operator="Add", precision=precision, sqnr_db=v) for v in values
    )
    nodes = node_map(replace(RESULT, nodes=plans))
    assert [node.harm_share for node in nodes] == [0, 0, 0.5, 1]
    assert {node.tone for node in nodes} == {tone}


def test_how_stable_the_choice_is_is_stated() -> None:
    """How many of the repeated searches chose the same, what the others chose, how fast it was."""
    names = ("int8-static", "int8-dynamic", "int8-static", "")
    again = tuple(
        Repeat(chosen=name, speedup=around(1.9 + i / 10) if name else None, size_bytes=1, trials=9)
        for i, name in enumerate(names)
    )
    assert told(replace(RESULT, repeats=again))["stability"] == (
        "Searched 4 more times with every measurement made anew: 2 of 4 chose the same; the others"
        " chose int8-dynamic (1), no engine (1). The speeds over float are 1.90 to 2.10."
    )
    assert told(replace(RESULT, repeats=again[:1]))["stability"] == (
        "Searched 1 more time with every measurement made anew: 1 of 1 chose the same. The speeds"
        " over float are 1.90 to 1.90."
    )
    assert "stability" not in told(RESULT)


def test_the_facts_are_json() -> None:
    """With the sentences among them."""
    facts = json.loads(record.dumps(explain(RESULT)))
    assert facts["choice"]["relative"]["latency"] == pytest.approx(0.52)
    assert facts["verdicts"]["refused"] == 2
    assert facts["blocked"]["nodes"][0]["sqnr_db"] == 9.4
    assert facts["sentences"] == explain(RESULT).sentences
