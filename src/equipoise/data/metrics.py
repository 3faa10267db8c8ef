"""Task metrics, as statistics per sample.

A metric of a set of samples is ``value(sum of the statistics of its samples)``. So the bootstrap
reweights samples by a matrix product, and nothing is evaluated twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from equipoise import extras
from equipoise.data.text import IGNORED
from equipoise.errors import DataError
from equipoise.registry import Registry
from equipoise.spec import Array, cosine, describe

_ROUNDING: Final = 1e-12
Values = NDArray[np.float64]
Outputs = Mapping[str, Array]


class Metric(ABC):
    """A task metric of at most 1, larger is better, and 0 for what has learned nothing.

    Spearman's correlation is none: the rank of a sample depends on all the others, so that no
    statistic of one sample sums up to it.

    Args:
        labels: Class names in index order; may be empty where a metric needs no names.
    """

    discrete = True
    """Whether it counts decisions, so that a small set can miss rare differences."""

    compares = False
    """Whether it compares with the reference's outputs, and not with labels alone."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    @abstractmethod
    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:
        """float64 [k] of one sample.

        Args:
            outputs: The engine's outputs; the first holds the class scores on its last axis.
            label: int64 class, or classes per position with -100 where none counts; floats of a
                model of values.
            reference: The reference's outputs.

        Raises:
            DataError: The label does not fit the outputs.
        """

    @abstractmethod
    def value(self, totals: Values) -> Values:
        """Metric values [...] of summed statistics [..., k]."""

    def report(self, predicted: Iterable[tuple[Outputs, Array]]) -> str:  # noqa: ARG002
        """Per-class table as text; empty where the metric has none."""
        return ""


METRICS: Final = Registry(
    kind="metric",
    group="equipoise.metrics",
    builtin={
        "accuracy": "equipoise.data.metrics:Accuracy",
        "macro-f1": "equipoise.data.metrics:MacroF1",
        "entity-f1": "equipoise.data.metrics:EntityF1",
        "cosine": "equipoise.data.metrics:Cosine",
        "next-token": "equipoise.data.metrics:NextToken",
        "pearson": "equipoise.data.metrics:Pearson",
        "r2": "equipoise.data.metrics:R2",
    },
)


def get_metric(name: str, *, labels: Sequence[str]) -> Metric:
    """The metric ``name``.

    Raises:
        UsageError: There is none of that name.
        DataError: It needs class names and ``labels`` is empty.
    """
    return cast("type[Metric]", METRICS.get(name))(labels)


def decisions(outputs: Outputs, label: Array) -> tuple[Array, Array, int]:
    """``(predicted, true, number of classes)`` at the positions that count.

    Raises:
        DataError: The label has another shape than the scores, or a class beyond them.
    """
    name, scores = next(iter(outputs.items()))
    classes = scores.shape[-1] if scores.ndim else 0
    if not classes:
        raise DataError(f"output {name!r} is {describe(scores)}; class scores are needed")
    if np.asarray(label).dtype.kind == "f":
        raise DataError(
            f"labels are {describe(np.asarray(label))}: values, where this metric counts classes",
            hint="Choose --metric pearson or --metric r2.",
        )
    predicted, true = scores.argmax(-1).ravel(), np.asarray(label).ravel()
    if predicted.shape != true.shape:
        raise DataError(
            f"labels do not fit the model: output {name!r} is {describe(scores)}, which makes"
            f" {predicted.size} decisions, but the label has {true.size} entries"
        )
    counted = true != IGNORED
    wrong = true[counted & ((true < 0) | (true >= classes))]
    if wrong.size:
        raise DataError(
            f"labels do not fit the model: class {int(wrong[0])} is not among its {classes}"
            f" classes (0 to {classes - 1})"
        )
    return predicted[counted], true[counted], classes


class Accuracy(Metric):
    """Share of decisions that are right. Statistics: right decisions, decisions."""

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        predicted, true, _ = decisions(outputs, label)
        return np.array([(predicted == true).sum(), true.size], dtype=np.float64)

    def value(self, totals: Values) -> Values:
        """See Metric."""
        return _ratio(totals[..., 0], totals[..., 1])


class NextToken(Accuracy):
    """Share of tokens that a causal language model foretells; the labels are the next tokens."""


class MacroF1(Metric):
    """Mean F1 over the classes that occur, as scikit-learn's ``f1_score(average="macro")``.

    Statistics: per class, the decisions that are right, predicted and true.
    """

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        predicted, true, classes = decisions(outputs, label)
        counts = [
            np.bincount(values, minlength=classes)
            for values in (true[predicted == true], predicted, true)
        ]
        return np.concatenate(counts).astype(np.float64)

    def value(self, totals: Values) -> Values:
        """See Metric."""
        right, predicted, true = np.split(totals, 3, axis=-1)
        occurs = predicted + true > 0
        return _ratio((_f1(right, predicted, true) * occurs).sum(-1), occurs.sum(-1))


class EntityF1(Metric):
    """Micro F1 over entity spans, as ``seqeval.metrics.f1_score``.

    Statistics: per entity type, the spans that are right, predicted and true.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(labels)
        if not labels:
            raise DataError(
                "entity-f1 needs the names of the classes",
                hint="Use a transformers directory with id2label, or give --labels.",
            )
        self._types = sorted({name.partition("-")[2] for name in labels if "-" in name})

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        predicted, true = (set(_entities(tags)) for tags in self._tags(outputs, label))
        counts = [
            [sum(span[0] == kind for span in spans) for kind in self._types]
            for spans in (predicted & true, predicted, true)
        ]
        return np.array(counts, dtype=np.float64).ravel()

    def _tags(self, outputs: Outputs, label: Array) -> tuple[list[str], list[str]]:
        predicted, true, classes = decisions(outputs, label)
        if classes != len(self.labels):
            raise DataError(
                f"labels do not fit the model: it gives {classes} classes, but there are"
                f" {len(self.labels)} names: {', '.join(self.labels)}"
            )
        return [self.labels[i] for i in predicted], [self.labels[i] for i in true]

    def value(self, totals: Values) -> Values:
        """See Metric."""
        return _f1(*(part.sum(-1) for part in np.split(totals, 3, axis=-1)))

    def report(self, predicted: Iterable[tuple[Outputs, Array]]) -> str:
        """Seqeval's table: precision, recall, F1 and support per type, and the averages."""
        seqeval: Any = extras.require("seqeval.metrics")
        pairs = [self._tags(outputs, label) for outputs, label in predicted]
        guessed, true = [p for p, _ in pairs], [t for _, t in pairs]
        return str(seqeval.classification_report(true, guessed, digits=4, zero_division=0))


def _entities(tags: list[str]) -> list[tuple[str, int, int]]:
    labelling: Any = extras.require("seqeval.metrics.sequence_labeling")
    return [tuple(span) for span in labelling.get_entities(tags)]


class Cosine(Metric):
    """Mean cosine between the outputs and the reference's. Statistics: sum, samples."""

    discrete = False
    compares = True

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        values = [
            cosine(reference[name].astype(np.float64), outputs[name].astype(np.float64))
            for name in reference
        ]
        return np.array([np.mean(values), 1.0])

    def value(self, totals: Values) -> Values:
        """See Metric."""
        return _ratio(totals[..., 0], totals[..., 1])


def _values_of(outputs: Outputs, label: Array) -> tuple[Values, Values]:
    """``(predicted, true)`` float64 [k], the values of one sample."""
    name, given = next(iter(outputs.items()))
    predicted, true = given.ravel().astype(np.float64), np.asarray(label, np.float64).ravel()
    if predicted.shape != true.shape:
        raise DataError(
            f"labels do not fit the model: output {name!r} is {describe(given)}, the label has"
            f" {true.size} values"
        )
    return predicted, true


def _spread(n: Values, total: Values, squares: Values) -> Values:
    """``n`` squared times the variance; 0 where it is within the rounding of the sums."""
    spread = n * squares - total * total
    return np.where(spread > _ROUNDING * n * squares, spread, 0.0)


class Pearson(Metric):
    """Pearson's correlation of predicted and true values, as GLUE has it for STS-B.

    The mean over the outputs where a model has several. It does not see a wrong scale or offset;
    R2 does. Statistics: per output, 1 and the sums of p, t, p^2, t^2 and p t.
    """

    discrete = False

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        p, t = _values_of(outputs, label)
        return np.concatenate([np.ones_like(p), p, t, p * p, t * t, p * t])

    def value(self, totals: Values) -> Values:
        """See Metric. 0 where either side is constant: there is nothing to correlate."""
        n, p, t, pp, tt, pt = np.split(totals, 6, axis=-1)
        spread = np.sqrt(_spread(n, p, pp)) * np.sqrt(_spread(n, t, tt))
        return np.asarray(_ratio(n * pt - p * t, spread).mean(-1))


class R2(Metric):
    """Share of the variance of the true values that is explained, as scikit-learn's ``r2_score``.

    1 for true values, 0 for their mean, less for worse. The mean over the outputs where a model
    has several. Statistics: per output, 1 and the sums of t, t^2 and (p - t)^2.
    """

    discrete = False

    def statistics(self, outputs: Outputs, label: Array, reference: Outputs) -> Values:  # noqa: ARG002
        """See Metric."""
        p, t = _values_of(outputs, label)
        return np.concatenate([np.ones_like(p), t, t * t, (p - t) ** 2])

    def value(self, totals: Values) -> Values:
        """See Metric. Of constant true values: 1 when they are met, else 0."""
        n, t, tt, errors = np.split(totals, 4, axis=-1)
        spread = _spread(n, t, tt)
        scores = np.where(spread > 0, 1 - _ratio(n * errors, spread), errors == 0)
        return np.asarray(scores.mean(-1))


def _ratio(part: Values, whole: Values) -> Values:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _f1(right: Values, predicted: Values, true: Values) -> Values:
    return _ratio(2 * right, predicted + true)
