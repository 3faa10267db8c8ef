"""Measuring what each node gains in integers, and what it costs to pass between them and float.

Models with various nodes in integers are profiled in turn: all in float, all in integers, and
mixtures in which neighbours differ, so that every border is seen from both sides. ``timing`` says
what follows from the times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise import fs, onnxio, progress
from equipoise.quantize.attribution import Attribution, Spent, unprofiled
from equipoise.quantize.borders import Border, find_borders, find_joins
from equipoise.quantize.nodes import connected
from equipoise.quantize.observe import observing
from equipoise.quantize.rewritten import profile_kernels, run_ms
from equipoise.quantize.static import Prepared, written, written_alone
from equipoise.quantize.sweeps import Judge, noise_power
from equipoise.quantize.timing import Design, Timing, fit_times
from equipoise.spec import Feeds


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How long nodes are timed.

    Attributes:
        openings: Times that every model is opened anew; models take turns.
        runs: Profiled runs of each opening, at least.
        least_s: Seconds that they take, at least.
    """

    openings: int = 3
    runs: int = 8
    least_s: float = 0.05


def harms_of(prepared: Prepared, *, judge: Judge, budget_s: float) -> dict[str, float]:
    """Node -> noise power of the worst output with that node alone in integers.

    Args:
        prepared: What to quantise.
        judge: Samples, and the float model's outputs on them.
        budget_s: Time in seconds; at least one node is measured, in graph order.
    """
    start = time.monotonic()
    nodes = prepared.placement.nodes
    ordered = [node.name for node in prepared.model.graph.node if node.name in nodes]
    found: dict[str, float] = {}
    for name in progress.track(ordered, total=len(ordered)):
        if found and time.monotonic() > start + budget_s:
            break
        found[name] = noise_power(judge.rounding(written_alone(prepared, name)))
    return found


def weight_sizes(prepared: Prepared) -> dict[str, int]:
    """Node that may run in integers -> number of its weights."""
    weights = prepared.placement.weights
    return {
        str(node.name): sum(int(weights[n].values.size) for n in node.input if n in weights)
        for node in prepared.model.graph.node
        if node.name in prepared.placement.nodes
    }


def time_nodes(
    prepared: Prepared,
    *,
    feeds: Sequence[Feeds],
    threads: int = 1,
    settings: TimingSettings | None = None,
) -> Timing:
    """Measure every node and every border of ``prepared`` on this machine.

    Args:
        prepared: What may run in integers.
        feeds: Samples, taken in turn.
        threads: Threads per operator.
        settings: How long.

    Raises:
        SourceError: ONNX Runtime refuses a model, or cannot run it on the samples.
    """
    settings = settings or TimingSettings()
    borders = find_borders(prepared)
    chosen = designs(prepared, borders)
    with fs.scratch_directory() as folder:
        sessions = _Sessions(prepared, chosen, folder=folder, threads=threads)
        openings = [
            sessions.opened(feeds, settings, turned=bool(opening % 2))
            for opening in progress.track(range(settings.openings), total=settings.openings)
        ]
    sizes = _sizes(prepared, borders, feeds=feeds[0], threads=threads)
    return fit_times(prepared, openings, designs=chosen, sizes=sizes)


class _Sessions:
    """The models of some designs, to be opened together again and again."""

    def __init__(
        self, prepared: Prepared, chosen: Sequence[Design], *, folder: Path, threads: int
    ) -> None:
        self._threads = threads
        self._attribution = Attribution(prepared.model)
        self._files = [folder / f"{index}.onnx" for index in range(len(chosen))]
        for file, design in zip(self._files, chosen, strict=True):
            onnxio.save_model(written(prepared, without=prepared.placement.nodes - design), file)

    def opened(
        self, feeds: Sequence[Feeds], settings: TimingSettings, *, turned: bool
    ) -> list[Spent]:
        """Open every model once, in turned order, and say where its runs spend their time."""
        found: dict[int, Spent] = {}
        order = range(len(self._files))
        for index in reversed(order) if turned else order:
            found[index] = self._spent(self._files[index], feeds, settings)
        return [found[index] for index in order]

    def _spent(self, file: Path, feeds: Sequence[Feeds], settings: TimingSettings) -> Spent:
        runs, least_s, threads = settings.runs, settings.least_s, self._threads
        kernels, times = profile_kernels(
            file, feeds=feeds, runs=runs, least_s=least_s, threads=threads
        )
        whole_ms = run_ms(file, feeds=feeds, runs=runs, least_s=least_s, threads=threads)
        return self._attribution.spent(kernels, unprofiled(kernels, times, whole_ms=whole_ms))


def _sizes(
    prepared: Prepared, borders: Sequence[Border], *, feeds: Feeds, threads: int
) -> dict[str, int]:
    """Tensor -> number of its values on one sample."""
    given = {name: int(np.size(array)) for name, array in feeds.items()}
    names = [border.tensor for border in borders if border.tensor not in given]
    if not names:
        return given
    with observing(prepared.model, names, threads=threads) as observe:
        return {**given, **{name: int(array.size) for name, array in observe(feeds).items()}}


# Which models to profile.


def designs(prepared: Prepared, borders: Sequence[Border]) -> tuple[Design, ...]:
    """All in float, all in integers, and mixtures that show each border from both sides.

    One mixture has the layers in integers and what joins them in float, one the joins and the
    layers that lead to them, and two have layers of turned colours.
    """
    nodes = prepared.placement.nodes
    joins = {join.name for join in find_joins(prepared)}
    colours = _colours(borders)
    layers = nodes - joins
    halves = [{n for n in layers if colours.get(n, 0) == colour} for colour in (0, 1)]
    leading = {b.producer for b in borders if joins.intersection(b.readers)}
    wanted = [frozenset(), nodes, layers, leading | joins, *(half | joins for half in halves)]
    settled = [connected(prepared.model, design) for design in wanted]
    return tuple(dict.fromkeys(settled))


def _colours(borders: Sequence[Border]) -> dict[str, int]:
    """Node -> 0 or 1, unlike most of the nodes that give what it reads."""
    before: dict[str, list[str]] = {}
    for border in borders:
        for reader in border.readers:
            before.setdefault(reader, []).extend([border.producer] * bool(border.producer))
    colours: dict[str, int] = {}
    for name, makers in before.items():
        ones = [colours[maker] for maker in makers if maker in colours]
        colours[name] = int(bool(ones) and 2 * sum(ones) <= len(ones))
    return colours
