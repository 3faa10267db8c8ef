"""Measuring what each node gains in integers, and what it costs to pass between them and float.

Models with various nodes in integers are profiled in turn: all in float, all in integers, and
mixtures in which neighbours differ, so that every border is seen from both sides. ``timing`` says
what follows from the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise import fs, onnxio, progress
from equipoise.quantize.attribution import Attribution, unprofiled
from equipoise.quantize.borders import Border, find_borders, find_joins
from equipoise.quantize.nodes import connected
from equipoise.quantize.observe import observing
from equipoise.quantize.rewritten import Kernel, profile_kernels, run_ms
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


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One session of a model.

    Attributes:
        kernels: In the order of the rewritten graph.
        times: Kernel -> its operator and milliseconds; they add up to a run without a profile.
    """

    kernels: tuple[Kernel, ...]
    times: dict[str, tuple[str, float]]


Openings = tuple[tuple[Profile, ...], ...]
"""For each time that all models were opened, the profile of each."""


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


Timer = Callable[[Prepared, Sequence[Feeds]], Timing]
"""Measures every node and every border of what is prepared, on samples taken in turn."""


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
    with fs.scratch_directory() as folder:
        write_designs(prepared, folder)
        openings = profile_designs(folder, feeds=feeds, threads=threads, settings=settings)
    return timing_of(prepared, openings, feeds=feeds, threads=threads)


def write_designs(prepared: Prepared, folder: Path) -> None:
    """The models whose profiles :func:`timing_of` needs, as files named by their numbers."""
    for index, design in enumerate(designs(prepared, find_borders(prepared))):
        model = written(prepared, without=prepared.placement.nodes - design)
        onnxio.save_model(model, folder / f"{index}.onnx")


def profile_designs(
    folder: Path, *, feeds: Sequence[Feeds], threads: int, settings: TimingSettings
) -> Openings:
    """Profile the models in ``folder``, opened again and again, in turned order every other time.

    Raises:
        SourceError: ONNX Runtime refuses a model, or cannot run it on the samples.
    """
    files = sorted(folder.glob("*.onnx"), key=lambda file: int(file.stem))
    found = []
    for opening in progress.track(range(settings.openings), total=settings.openings):
        order = range(len(files))
        turned = reversed(order) if opening % 2 else order
        profiles = {
            index: _profiled(files[index], feeds=feeds, threads=threads, settings=settings)
            for index in turned
        }
        found.append(tuple(profiles[index] for index in order))
    return tuple(found)


def _profiled(
    file: Path, *, feeds: Sequence[Feeds], threads: int, settings: TimingSettings
) -> Profile:
    runs, least_s = settings.runs, settings.least_s
    kernels, times = profile_kernels(file, feeds=feeds, runs=runs, least_s=least_s, threads=threads)
    whole_ms = run_ms(file, feeds=feeds, runs=runs, least_s=least_s, threads=threads)
    return Profile(kernels=kernels, times=unprofiled(kernels, times, whole_ms=whole_ms))


def timing_of(
    prepared: Prepared, openings: Openings, *, feeds: Sequence[Feeds], threads: int = 1
) -> Timing:
    """What the profiles of the designs of ``prepared`` say of its nodes and borders."""
    borders = find_borders(prepared)
    attribution = Attribution(prepared.model)
    spent = [[attribution.spent(one.kernels, one.times) for one in every] for every in openings]
    sizes = _sizes(prepared, borders, feeds=feeds[0], threads=threads)
    return fit_times(prepared, spent, designs=designs(prepared, borders), sizes=sizes)


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
