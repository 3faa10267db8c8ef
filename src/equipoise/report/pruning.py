"""What pruning came to, as tables and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.pruning import PruneResult
from equipoise.report.rows import interval, size

if TYPE_CHECKING:
    from rich.table import Table


def steps_table(result: PruneResult) -> Table:
    """Every step that was tried, and why it was taken or not."""
    table = _table("step", "cut", "by the table", "measured", f"{result.metric}, validation", "")
    for number, step in enumerate(result.steps, start=1):
        table.add_row(
            str(number),
            step.cut,
            f"{step.estimated:.2f}x",
            interval(step.speedup, digits=2, unit="x"),
            f"{step.metric:.4f}",
            f"{'taken' if step.taken else 'not taken'}: {step.reason}",
            style="" if step.taken else "red",
        )
    return table


def sides_table(result: PruneResult) -> Table:
    """The original, the pruned model, and others beside them."""
    table = _table("model", result.metric, "drop", "latency", "speed", "size", "parameters", "MACs")
    for side in result.sides:
        table.add_row(
            side.name,
            interval(side.metric, digits=4),
            interval(side.drop, digits=4),
            f"{side.latency_ms:.3f} ms",
            interval(side.speedup, digits=2, unit="x"),
            size(side.size_bytes),
            f"{side.parameters:,}",
            f"{side.multiply_accumulates:,}",
            style="bold green" if side.name == result.chosen else "",
        )
    return table


def _table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title)
    return table


def words_of(result: PruneResult) -> tuple[str, ...]:
    """How it ended, one sentence each."""
    chosen = next(side for side in result.sides if side.name == result.chosen)
    verdict = (
        f"Chosen: {chosen.name}, {chosen.speedup.value:.2f}x as fast as the original (goal"
        f" {result.speedup:g}x); {result.metric} drops by {chosen.drop.value:.4f}, at most"
        f" {chosen.drop.high:.4f} at 95 % (allowed {result.max_drop:g})."
    )
    return (
        f"The steps ended because {result.stopped}.",
        verdict,
        *result.notes,
        *(f"warning: {warning}" for warning in result.warnings),
    )
