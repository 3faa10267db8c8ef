"""What all plots share: a view among several, colours, the frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from equipoise.search.result import Verdict

COLOURS: Final[dict[Verdict, str]] = {
    "baseline": "#7d8590", "accepted": "#1f9d6b", "refused": "#d2564a", "outraced": "#9a8fc0",
    "failed": "#b0568f", "not applicable": "#a5abb3",
}  # fmt: skip
GOLD: Final = "#d99a1c"
_QUIET: Final = "rgba(128,128,128,.22)"

GRID: Final = {"gridcolor": _QUIET, "zeroline": False, "automargin": True}
"""What all axes share."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One plot among those that people switch between.

    Attributes:
        key: Name in the page.
        title: Of the button.
        note: What to know about it, in words.
        figure: ``data`` and ``layout`` of plotly.js.
    """

    key: str
    title: str
    note: str
    figure: dict[str, Any]


def frame(*, height: int) -> dict[str, Any]:
    """What the layouts of all plots share; the page sets the colour of the text."""
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
    }
