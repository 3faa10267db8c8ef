"""A line per trial, while a search runs."""

from __future__ import annotations

from equipoise.report.rows import size
from equipoise.search.choose import speedup
from equipoise.search.result import Candidate


def trial_line(candidate: Candidate, *, best: Candidate | None, left_s: float | None) -> str:
    """``int8-static: accepted, 2.41x float, 6.3 MB | best int8-static 2.41x | 12 min left``."""
    parts = [f"{candidate.recipe.name}: {candidate.verdict}{_figures(candidate)}"]
    if best is not None:
        parts.append(f"best {best.recipe.name} {speedup(best).value:.2f}x")
    if left_s is not None:
        parts.append(f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left")
    return " | ".join(parts)


def _figures(candidate: Candidate) -> str:
    found = candidate.measurement
    if found is not None:
        return f", {speedup(candidate).value:.2f}x float, {size(found.size_bytes)}"
    sketch = candidate.sketch
    if sketch.speedup is not None:
        return f", {sketch.speedup.value:.2f}x float in few rounds"
    return f" ({candidate.reason})"
