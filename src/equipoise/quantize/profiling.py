"""Timing the nodes of a static model as a stage of its own, which runs on the device alone.

The quantise stage writes the models whose profiles it needs, together with some samples; this one
runs them; the next quantise stage decides by what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise.data.store import Rows, write_rows
from equipoise.quantize.static import Prepared
from equipoise.quantize.timing import Timing
from equipoise.quantize.weighing import (
    Openings,
    Timer,
    TimingSettings,
    profile_designs,
    time_nodes,
    timing_of,
    write_designs,
)
from equipoise.spec import Feeds

SETTINGS: Final = TimingSettings(openings=2, runs=5, least_s=0.02)
"""Enough to tell which of two nodes gains more."""

DESIGNS: Final = "designs"
_ROWS: Final = "rows"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to profile.

    Attributes:
        designs: Directory that :func:`write_question` filled.
        machine: The one that runs it: times of another do not count.
        threads: Threads per operator.
    """

    designs: Path
    machine: str
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """Profiles of the models, for each time that all were opened."""

    openings: Openings


def profile(config: ProfileConfig, *, output: Path) -> ProfileRecord:  # noqa: ARG001
    """Run every model of ``config.designs`` in turn, and say where its time goes.

    Raises:
        SourceError: ONNX Runtime refuses a model, or cannot run it on the samples.
    """
    feeds = list(Rows(config.designs / _ROWS))
    openings = profile_designs(
        config.designs, feeds=feeds, threads=config.threads, settings=SETTINGS
    )
    return ProfileRecord(openings=openings)


def write_question(prepared: Prepared, folder: Path, *, feeds: Sequence[Feeds]) -> None:
    """The models to profile, and the samples to run them on."""
    write_rows(folder / _ROWS, feeds)
    write_designs(prepared, folder)


def timer_here(*, threads: int) -> Timer:
    """A timer that measures in this process."""

    def timed(prepared: Prepared, feeds: Sequence[Feeds]) -> Timing:
        return time_nodes(prepared, feeds=feeds, threads=threads, settings=SETTINGS)

    return timed


def timer_of(profiled: ProfileRecord, *, threads: int) -> Timer:
    """A timer that looks up what was profiled before."""

    def timed(prepared: Prepared, feeds: Sequence[Feeds]) -> Timing:
        return timing_of(prepared, profiled.openings, feeds=feeds, threads=threads)

    return timed
