"""Metrics agree with the libraries that define them, and sum over samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.metrics import get_metric
from equipoise.errors import DataError, UsageError

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
sentences = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    min_size=1,
    max_size=12,
)


def scores(classes: list[int], count: int) -> dict[str, np.ndarray]:
    """Outputs [1, n, count] whose largest entries are ``classes``."""
    return {"logits": np.eye(count, dtype=np.float32)[classes][None]}


def total(metric, pairs, count: int) -> float:
    """The metric of samples given as pairs of predicted and true classes."""
    rows = [
        metric.statistics(scores([p for p, _ in pair], count), np.array([t for _, t in pair]), {})
        for pair in pairs
    ]
    return float(metric.value(np.sum(rows, axis=0)))


@settings(deadline=None, max_examples=150)
@given(sentences)
def test_entity_f1_is_that_of_seqeval(pairs) -> None:
    """Micro F1 over spans, for any tag sequences, broken ones included."""
    from seqeval.metrics import f1_score

    true = [[TAGS[t] for _, t in pair] for pair in pairs]
    predicted = [[TAGS[p] for p, _ in pair] for pair in pairs]
    expected = f1_score(true, predicted, zero_division=0)
    assert total(get_metric("entity-f1", labels=TAGS), pairs, 5) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(sentences)
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs) -> None:
    """Summed statistics give the metric of all decisions at once."""
    from sklearn.metrics import accuracy_score, f1_score

    flat = [p for pair in pairs for p in pair]
    predicted, true = [p for p, _ in flat], [t for _, t in flat]
    accuracy, macro = get_metric("accuracy", labels=()), get_metric("macro-f1", labels=())
    assert total(accuracy, pairs, 5) == pytest.approx(accuracy_score(true, predicted))
    expected = f1_score(true, predicted, average="macro", zero_division=0)
    assert total(macro, pairs, 5) == pytest.approx(expected)


def test_value_takes_many_totals_at_once() -> None:
    """The bootstrap passes [resamples, k] and gets [resamples]."""
    generator = np.random.default_rng(0)
    widths = {"accuracy": 2, "macro-f1": 9, "entity-f1": 6, "cosine": 2, "pearson": 6, "r2": 4}
    for name, width in widths.items():
        totals = generator.integers(1, 9, size=(7, width)).astype(float)
        metric = get_metric(name, labels=TAGS)
        each = [float(metric.value(row)) for row in totals]
        np.testing.assert_allclose(metric.value(totals), each)


floats = st.floats(-1e3, 1e3, allow_subnormal=False)


def of_values(name: str, pairs) -> float:
    """The metric of samples given as pairs of predicted and true values."""
    metric = get_metric(name, labels=())
    rows = [metric.statistics({"y": np.array([[p]])}, np.float32(t), {}) for p, t in pairs]
    return float(metric.value(np.sum(rows, axis=0)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=20))
def test_metrics_of_values_are_those_of_scikit_learn_and_numpy(pairs) -> None:
    """Summed statistics give the metric of all values at once."""
    from sklearn.metrics import r2_score

    pairs = [(p, float(np.float32(t))) for p, t in pairs]
    predicted, true = np.array(pairs).T
    clear = min(np.ptp(side) / max(np.abs(side).max(), 1e-9) for side in (predicted, true))
    if clear > 1e-2:  # else the sums have lost what the libraries see
        expected = np.corrcoef(predicted, true)[0, 1]
        assert of_values("pearson", pairs) == pytest.approx(expected, abs=1e-6)
        assert of_values("r2", pairs) == pytest.approx(
            r2_score(true, predicted), rel=1e-6, abs=1e-6
        )


def test_constant_values_have_no_correlation() -> None:
    """0.1 summed up is not exact, and what is left of the variance is no variance."""
    constant, varied = [(0.1, t) for t in (1, 2, 3)] * 5, [(p, 0.1) for p in (1, 2, 3)] * 5
    assert of_values("pearson", constant) == 0
    assert of_values("pearson", varied) == 0
    assert of_values("r2", varied) == 0
    assert of_values("r2", [(float(np.float32(0.1)), 0.1)] * 7) == 1


def test_only_r2_sees_a_wrong_scale() -> None:
    """Half of every value correlates fully, and explains less than all."""
    pairs = [(t / 2, t) for t in (1.0, 2.0, 4.0)]
    assert of_values("pearson", pairs) == pytest.approx(1)
    assert of_values("r2", pairs) < 0.5


def test_several_values_of_a_sample_are_metrics_of_their_own() -> None:
    """The mean over the outputs: here 1 and -1."""
    metric = get_metric("pearson", labels=())
    rows = [metric.statistics({"y": np.array([[v, v]])}, np.array([v, -v]), {}) for v in (1, 2, 3)]
    assert float(metric.value(np.sum(rows, axis=0))) == pytest.approx(0)


def test_next_tokens_are_counted_where_there_are_labels() -> None:
    """The last token of a text has none."""
    metric = get_metric("next-token", labels=())
    statistics = metric.statistics(scores([1, 2, 0], 3), np.array([1, 0, -100]), {})
    assert statistics.tolist() == [1, 2]


def test_values_and_classes_are_not_mixed_up() -> None:
    """Accuracy of values, and values of another number."""
    with pytest.raises(DataError, match=r"float32.*values, where this metric counts classes") as e:
        get_metric("accuracy", labels=()).statistics(scores([0], 3), np.float32(0.5), {})
    assert "pearson" in str(e.value)
    with pytest.raises(DataError, match="the label has 2 values"):
        get_metric("r2", labels=()).statistics({"y": np.ones((1, 1))}, np.ones(2), {})


def test_ignored_positions_do_not_count() -> None:
    """-100 marks special tokens and later pieces of a word."""
    metric = get_metric("accuracy", labels=())
    statistics = metric.statistics(scores([0, 1, 2], 3), np.array([-100, 1, 0]), {})
    assert statistics.tolist() == [1, 2]


def test_cosine_compares_with_the_reference() -> None:
    """1 for the reference itself, -1 for its negative, 0 for NaN."""
    metric = get_metric("cosine", labels=())
    reference = {"y": np.array([[1.0, 2.0]])}
    label = np.array(0)
    values = [1.0, -1.0, np.nan]
    found = [metric.statistics({"y": reference["y"] * v}, label, reference)[0] for v in values]
    assert found == pytest.approx([1.0, -1.0, 0.0])
    assert not metric.discrete


def test_entity_report_has_every_type_and_the_averages() -> None:
    """seqeval's table, with four digits."""
    metric = get_metric("entity-f1", labels=TAGS)
    label = np.array([1, 2, 0, 3])
    report = metric.report([(scores([1, 2, 0, 0], 5), label)])
    for word in ("PER", "ORG", "precision", "recall", "support", "micro avg", "1.0000"):
        assert word in report


def test_labels_that_do_not_fit_are_refused_with_the_numbers() -> None:
    """A class beyond the scores, another length, too few names."""
    metric = get_metric("accuracy", labels=())
    with pytest.raises(DataError, match="class 5 is not among its 3 classes"):
        metric.statistics(scores([0], 3), np.array([5]), {})
    with pytest.raises(DataError, match="2 decisions, but the label has 3"):
        metric.statistics(scores([0, 1], 3), np.array([0, 1, 2]), {})
    with pytest.raises(DataError, match="3 classes, but there are 5 names"):
        get_metric("entity-f1", labels=TAGS).statistics(scores([0], 3), np.array([0]), {})
    with pytest.raises(DataError, match="names of the classes"):
        get_metric("entity-f1", labels=())
    with pytest.raises(UsageError, match=r"'f1'.*accuracy"):
        get_metric("f1", labels=())
