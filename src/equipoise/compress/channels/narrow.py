"""The stage that makes a convolutional network narrower: one cut, no training.

<output>/model    a source that can be exported, trained and cut again
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.compress.channels.calls import total_macs, watch_calls
from equipoise.compress.channels.compensating import compensate_, has_batch_norms, reestimate_
from equipoise.compress.channels.coupling import best, check_widths
from equipoise.compress.channels.cutting import cut_
from equipoise.compress.channels.graph import Graph
from equipoise.compress.channels.structure import (
    ChannelsConfig,
    count_parameters,
    find_channels,
    open_to_cut,
    samples_of,
    scores_of,
)
from equipoise.compress.cut_record import CutRecord
from equipoise.compress.samples import Samples
from equipoise.errors import ParityError
from equipoise.sources.saving import save_source
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import Array

MODEL: Final = "model"
_BATCH: Final = 32


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(ChannelsConfig):
    """What to cut, beside what :class:`ChannelsConfig` says.

    Attributes:
        widths: Group -> channels that stay. A group that is not named stays as it is.
        compensate: Let the weights that stay make up for the others, by least squares on samples.
        reestimate: Estimate the statistics of batch norms anew on samples.
    """

    widths: dict[str, int]
    compensate: bool = True
    reestimate: bool = True


@dataclass(frozen=True, kw_only=True)
class NarrowRecord(CutRecord):
    """What came of it.

    Attributes:
        macs_before: Multiplications of convolutions and linear layers on one sample.
        macs_after: The same of the result.
        widths_before: Group -> channels.
        widths_after: The same of the result.
    """

    macs_before: int
    macs_after: int
    widths_before: dict[str, int]
    widths_after: dict[str, int]


def narrow(config: NarrowConfig, *, output: Path) -> NarrowRecord:
    """Cut every group to its width and leave the model in ``output/model``.

    Raises:
        SourceError: The model does not run on the samples, or its graph cannot be followed.
        DataError: The data has not got its inputs, or the labels do not fit.
        UsageError: There is no group of that name.
        RecipeError: A group cannot get that width.
        ParityError: What was written does not give the outputs of what was made.
        OutputError: ``output`` cannot be written.
    """
    module = open_to_cut(config.source)
    samples = samples_of(config)
    graph = find_channels(module, names=config.names, samples=samples, source=config.source.name)
    check_widths(graph.couplings, config.widths, multiple=config.multiple)
    kept = _kept(module, graph, samples=samples, config=config)
    narrower, notes = narrowed(module, graph, kept=kept, samples=samples, config=config)
    save_source(narrower, base=config.source, directory=output / MODEL)
    require_same_when_loaded(narrower, output / MODEL, samples=samples, task=config.source.task)
    return _record(config, graph, pair=(module, narrower), notes=(*graph.notes, *notes))


def _kept(module: Any, graph: Graph, *, samples: Samples, config: NarrowConfig) -> dict[str, Array]:
    """Which channels stay of each group that gets narrower."""
    changed = [c for c in graph.couplings if config.widths.get(c.name, c.width) != c.width]
    if not changed:
        return {}
    scores = scores_of(module, graph, samples=samples, config=config)
    return {c.name: best(c, scores=scores[c.name], width=config.widths[c.name]) for c in changed}


def narrowed(
    module: Any,
    graph: Graph,
    *,
    kept: dict[str, Array],
    samples: Samples,
    config: NarrowConfig,
) -> tuple[Any, tuple[str, ...]]:
    """A narrower copy of ``module``, and notes."""
    narrower = copy.deepcopy(module)
    notes = []
    if not kept:
        return narrower, ()
    if config.compensate:
        changed = compensate_(
            narrower, graph.couplings, kept=kept, run=_runner(narrower, samples, config)
        )
        notes.append(f"weights of {len(changed)} layers were fitted to the channels that stay")
    cut_(narrower, graph.couplings, kept)
    if config.reestimate and has_batch_norms(narrower):
        notes.append(_reestimate(narrower, samples, config))
    return narrower, tuple(notes)


def _runner(
    module: Any, samples: Samples, config: NarrowConfig, *, at_least: int = 1
) -> Callable[[], int]:
    """Runs ``module`` over the samples, in batches of ``at_least`` so many; counts them."""
    named = NamedModule(module, names=config.names, source=config.source.name)
    return lambda: sum(
        1 for batch in batches(samples) if len(batch[0]) >= at_least and named.call(batch)
    )


def _reestimate(module: Any, samples: Samples, config: NarrowConfig) -> str:
    """Estimate the statistics of batch norms anew, where there are two samples of one shape."""
    if not any(len(batch[0]) > 1 for batch in batches(samples)):
        return "statistics of batch norms are the old ones: no two samples have one shape"
    reestimate_(module, run=_runner(module, samples, config, at_least=2))
    return "statistics of batch norms were estimated anew"


def batches(samples: Samples) -> Iterator[list[Any]]:
    """Inputs, samples of one shape together, 32 or so at most."""
    torch = extras.require("torch")
    rows = (samples.rows[index] for index in samples.indices)
    arrays = ([row[name] for name in samples.names] for row in rows)
    for _, same in groupby(arrays, key=lambda row: [array.shape for array in row]):
        for part in _chunks(same):
            yield [torch.from_numpy(np.concatenate(column)) for column in zip(*part, strict=True)]


def _chunks(rows: Iterable[list[Array]]) -> Iterator[list[list[Array]]]:
    """A lone last row joins those before it: there may be no statistics of a single one."""
    iterator = iter(rows)
    part = list(islice(iterator, _BATCH))
    while part:
        following = list(islice(iterator, _BATCH))
        if len(following) == 1:
            part, following = part + following, []
        yield part
        part = following


def require_same_when_loaded(module: Any, directory: Path, *, samples: Samples, task: str) -> None:
    """Load what was written and compare its outputs with those of the module that was written.

    Raises:
        ParityError: They are not equal bit for bit.
        SourceError: It cannot be loaded.
    """
    torch = extras.require("torch")
    tensors = list(samples.first().values())
    loaded = load_module(parse_source(str(directory), task=task))
    with torch.no_grad():
        before, after = (
            NamedModule(m, names=samples.names, source=str(directory)).call(tensors)
            for m in (module, loaded)
        )
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            raise ParityError(
                f"{directory}: output {name!r} is another after loading",
                hint="Code of the model depends on more than the sizes of its layers.",
            )


def _record(
    config: NarrowConfig, graph: Graph, *, pair: tuple[Any, Any], notes: tuple[str, ...]
) -> NarrowRecord:
    module, narrower = pair
    before = {coupling.name: coupling.width for coupling in graph.couplings}
    part = "validation" if (config.data / "validation").is_dir() else "training"
    samples = samples_of(config, part=part)
    losses = [samples.mean_loss(m, name=config.source.name) for m in pair]
    return NarrowRecord(
        parameters_before=count_parameters(module),
        parameters_after=count_parameters(narrower),
        macs_before=total_macs(graph.calls),
        macs_after=_macs(narrower, config),
        widths_before=before,
        widths_after=before | config.widths,
        loss_before=losses[0],
        loss_after=losses[1],
        loss_samples=part if losses[0] is not None else "",
        notes=notes,
    )


def _macs(module: Any, config: NarrowConfig) -> int:
    """Multiplications on the sample that those of the original were counted on."""
    torch = extras.require("torch")
    named = NamedModule(module, names=config.names, source=config.source.name)
    tensors = list(samples_of(config).first().values())
    with torch.no_grad():
        return total_macs(watch_calls(module, lambda: named.call(tensors)))
