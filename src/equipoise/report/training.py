"""What training came to, as a table and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.report.rows import interval
from equipoise.training import TrainResult

if TYPE_CHECKING:
    from rich.table import Table


def training_table(result: TrainResult) -> Table:
    """The metric of the teacher, and of the student before and after."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("model", result.metric):
        table.add_column(title)
    rows = {"teacher": result.teacher_metric, "before": result.before, "after": result.after}
    for name, metric in rows.items():
        if metric is not None:
            table.add_row(
                name, interval(metric, digits=4), style="bold green" if name == "after" else ""
            )
    return table


def words_of(result: TrainResult) -> tuple[str, ...]:
    """How it went, one sentence each."""
    training, drop = result.training, result.drop
    than = "the teacher" if result.teacher else "before"
    change = f"{abs(drop.value):.4f} {'below' if drop.value > 0 else 'above'} {than}"
    judged = (
        f"{change} on {result.evaluation_samples} samples that nobody trained on (at most"
        f" {drop.high:.4f} below, at 95 %)."
    )
    took = (
        f"{training.steps} steps, {training.epochs:g} epochs in {training.seconds:.0f} s,"
        f" {training.step_seconds * 1000:.0f} ms a step; {training.stopped}."
    )
    return (judged, took, *(f"warning: {warning}" for warning in result.warnings))
