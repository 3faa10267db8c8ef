"""Samples to score and refit a model on, and the loss over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.compress.importance import sample_losses
from equipoise.compress.objective.task_losses import LABEL, Kind, task_kind
from equipoise.data.store import Rows
from equipoise.errors import DataError, UsageError
from equipoise.sources.torch_model import NamedModule


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some rows of a data directory, with their labels where it has them.

    Attributes:
        rows: Inputs.
        labels: Their labels, or None.
        indices: The rows that are taken.
        names: Inputs of the model.
        kind: Which loss; None where the task has none.
    """

    rows: Rows
    labels: Rows | None
    indices: tuple[int, ...]
    names: tuple[str, ...]
    kind: Kind | None

    def losses(self, module: Any, *, name: str) -> Iterator[Any]:
        """The loss of each sample, as of ``importance.sample_losses``; ``name`` is for messages."""
        model = NamedModule(module, names=self.names, source=name)
        labels = self.labels
        return sample_losses(
            model,
            rows=(self.rows[i] for i in self.indices),
            labels=None if labels is None else (labels[i] for i in self.indices),
            kind=self.kind,
        )

    def mean_loss(self, module: Any, *, name: str) -> float | None:
        """Mean over samples; None when neither labels nor the text itself say what is right."""
        torch = extras.require("torch")
        if self.labels is None and self.kind != "causal-lm":
            return None
        with torch.no_grad():
            values = [float(loss) for loss in self.losses(module, name=name)]
        return sum(values) / len(values) if values else None

    def run(self, module: Any, *, name: str) -> Callable[[], int]:
        """Run all forward passes; how many there were."""
        return lambda: sum(1 for _ in self.losses(module, name=name))

    def first(self) -> dict[str, Any]:
        """Inputs of one sample, as tensors."""
        torch = extras.require("torch")
        row = self.rows[self.indices[0]]
        return {name: torch.from_numpy(row[name]) for name in self.names}


def read_samples(
    data: Path, *, part: str, names: tuple[str, ...], task: str, count: int
) -> Samples:
    """Up to ``count`` rows of one part of a data directory, drawn at random.

    Args:
        data: With ``training``, ``validation`` and their ``_labels``.
        part: ``training`` or ``validation``.
        names: Inputs of the model.
        task: What the model is for.
        count: Most rows.

    Raises:
        DataError: There are no such rows, an input is not among them, or labels are of another
            number than rows.
    """
    rows = Rows(data / part)
    missing = [name for name in names if name not in {c.name for c in rows.header.columns}]
    if missing or not names:
        there = ", ".join(column.name for column in rows.header.columns)
        raise DataError(f"{data / part} has {there}; the model takes {', '.join(names) or 'none'}")
    labels = _labels(data / f"{part}_labels", rows=len(rows))
    if count < 1:
        raise DataError(f"samples {count}: at least 1 is needed")
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    kind = _kind(task, labels)
    return Samples(
        rows=rows, labels=labels, indices=tuple(sorted(order.tolist())), names=names, kind=kind
    )


def _labels(directory: Path, *, rows: int) -> Rows | None:
    if not directory.is_dir():
        return None
    labels = Rows(directory)
    if len(labels) != rows or LABEL not in {c.name for c in labels.header.columns}:
        raise DataError(f"{directory}: {rows} arrays named {LABEL!r} are needed, one per sample")
    return labels


def _kind(task: str, labels: Rows | None) -> Kind | None:
    """Which loss; None where none is known and no labels ask for one."""
    column = next((c for c in labels.header.columns if c.name == LABEL), None) if labels else None
    try:
        return task_kind(
            task,
            label_dtype=column.dtype if column else "",
            label_rank=column.rank if column else 0,
        )
    except UsageError:
        if labels is not None:
            raise
        return None
