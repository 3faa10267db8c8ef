"""Prune a model for a device: what ``equipoise prune`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.compress.cutting import Pruning, Sparsity
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.publishing import CHECKPOINTS, publish
from equipoise.compression.steps import (
    Pruned,
    PruneStep,
    Side,
    check_pruning,
    prune,
    side_of,
)
from equipoise.errors import IncompatibleError
from equipoise.jobs import FREE_BYTES, JobConfig, make_pipeline
from equipoise.pipeline import Pipeline
from equipoise.runtimes.registry import BUILDERS
from equipoise.sources.source import Source, parse_source
from equipoise.stages import Observer, versions_of
from equipoise.targets.machine import Machine
from equipoise.targets.profiles import require_measurable

_VERSIONS: Final = (
    "equipoise", "torch", "transformers", "accelerate", "torch-pruning", "onnxruntime", "numpy"
)  # fmt: skip

_LEAST_GAIN: Final = 1.05
"""Zeros cost accuracy; a few per cent are what two engines of one form differ by anyway."""


@dataclass(frozen=True, kw_only=True)
class PruneRequest(JobConfig):
    """What to prune, for what, on what data.

    Attributes:
        output: Directory for ``model/``, ``results.json`` and, while it runs, ``checkpoints/``.
        pruning: How far, and how.
        teacher: Trained model to learn from; the source itself when empty.
        teacher_weights: Its checkpoint, for a factory or a model of timm.
        stock: A smaller trained model for the same task, a candidate beside the pruned one.
        stock_weights: Its checkpoint.
        sparsity: Set weights to zero too, where the target gains from it; refused where not.
        trim_vocabulary: Leave out tokens that the training texts do not need.
        processes: Processes on this machine.
        checkpoints: Directory of checkpoints; ``checkpoints`` in ``output`` when None.
    """

    output: Path
    pruning: Pruning = field(default_factory=Pruning)
    teacher: str = ""
    teacher_weights: Path | None = None
    stock: str = ""
    stock_weights: Path | None = None
    sparsity: Sparsity | None = None
    trim_vocabulary: bool = False
    processes: int = 1
    checkpoints: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What pruning gave: the content of ``results.json``.

    Attributes:
        source: The model as the user named it.
        data: The data.
        target: Name of the target.
        metric: Name of the metric.
        speedup: The goal.
        max_drop: The limit.
        threads: Threads per operator while measuring.
        evaluation_samples: Samples that judge, none of which was trained on.
        sides: The original, the pruned one, and others beside them.
        chosen: Name of the fastest side that keeps the metric; ``original`` when none does.
        reached: Whether that one reaches the goal.
        stopped: Why the steps ended.
        steps: All that were tried.
        notes: What stages noticed.
        machine: Where it was measured.
        versions: Package -> version.
        warnings: What the user should know.
    """

    source: str
    data: str
    target: str
    metric: str
    speedup: float
    max_drop: float
    threads: int
    evaluation_samples: int
    sides: tuple[Side, ...]
    chosen: str
    reached: bool
    stopped: str
    steps: tuple[PruneStep, ...]
    notes: tuple[str, ...]
    machine: Machine
    versions: dict[str, str]
    warnings: tuple[str, ...]


def prune_model(request: PruneRequest, *, observer: Observer | None = None) -> PruneResult:
    """Prune; write ``model/`` and ``results.json`` into ``request.output``.

    The model that is written is the fastest that keeps the metric, the goal reached or not.

    Raises:
        UsageError: Options that do not go together, or a setting out of range.
        InputError: A model or the data cannot be used; nothing in the model can be cut.
        OutputError: The output or the checkpoints cannot be written.
        As ``train_model`` besides.
    """
    check_pruning(request.pruning)
    fs.check_writable(request.output, needed_bytes=FREE_BYTES)
    pipeline = make_pipeline(replace(request, for_training=True), observer=observer)
    require_measurable(pipeline.job.target, machine=pipeline.job.machine, runtimes=BUILDERS.names())
    return _Request(pipeline, request).answer()


class _Request:
    """One request, from the source to the files that are written."""

    def __init__(self, pipeline: Pipeline, request: PruneRequest) -> None:
        self._pipeline, self._request = pipeline, request
        self._compression = Compression(pipeline)
        self._sources: dict[str, Source] = {"original": pipeline.job.source}

    def answer(self) -> PruneResult:
        if self._request.sparsity is not None:
            self._sources["sparse"] = self._sparse(self._request.sparsity)
        pruned = prune(
            self._pipeline,
            self._request.pruning,
            teacher=self._named(self._request.teacher, self._request.teacher_weights),
            workplace=self._workplace,
        )
        notes = self._gather(pruned)
        sides = [self._side(name) for name in self._sources]
        chosen = self._choose(sides)
        result = self._result(pruned, sides, chosen=chosen, notes=notes)
        model = None if chosen.name == "original" else self._sources[chosen.name]
        publish(result, model, output=self._request.output)
        return result

    @property
    def _workplace(self) -> Workplace:
        request = self._request
        return Workplace(
            checkpoints=request.checkpoints or request.output / CHECKPOINTS,
            processes=request.processes,
        )

    def _named(self, name: str, weights: Path | None) -> Source | None:
        task = self._pipeline.job.source.task
        return parse_source(name, weights=weights, task=task) if name else None

    def _gather(self, pruned: Pruned) -> tuple[str, ...]:
        """Every model that may be chosen; what stages noticed on the way."""
        notes = pruned.notes
        self._sources["pruned"] = pruned.source
        stock = self._named(self._request.stock, self._request.stock_weights)
        if stock is not None:
            self._sources["stock"] = stock
            self._sources["stock, trained"] = self._trained(stock)
        if self._request.trim_vocabulary:
            trimmed, told = self._compression.trimmed(pruned.source)
            self._sources["pruned, trimmed"] = trimmed
            notes = (*notes, *told)
        return notes

    def _sparse(self, sparsity: Sparsity) -> Source:
        """The original with zeros among its weights, where that makes its engine faster.

        Raises:
            IncompatibleError: It does not, as measured.
        """
        original = self._pipeline.job.source
        sparse = self._compression.sparse(original, sparsity)
        engines = [
            self._compression.engine(source, label=label)
            for source, label in ((sparse, "sparse"), (original, "original"))
        ]
        speedup = self._compression.latency(*engines).speedup
        if speedup.low >= _LEAST_GAIN:
            return sparse
        target = self._pipeline.job.target
        raise IncompatibleError(
            f"{sparsity.words} zeros gain nothing on target {target.name}: measured"
            f" {speedup.value:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}] the speed of the dense"
            f" model, because {target.runtime} multiplies zeros like any other number",
            hint="Leave out --sparsity; cutting channels and layers is faster on every runtime.",
        )

    def _trained(self, stock: Source) -> Source:
        """The stock model with the training that the pruned one had in the end."""
        return self._compression.recover(
            stock,
            teacher=self._named(self._request.teacher, self._request.teacher_weights)
            or self._pipeline.job.source,
            settings=self._request.pruning.recovery,
            workplace=self._workplace,
            label="stock: train",
        ).source

    def _side(self, name: str) -> Side:
        original = self._pipeline.job.source
        return side_of(self._sources[name], self._compression, original=original, name=name)

    def _choose(self, sides: Sequence[Side]) -> Side:
        """The fastest that keeps the metric; of equally fast ones the smallest."""
        limit = self._request.pruning.max_drop
        usable = [s for s in sides if s.name == "original" or s.drop.high <= limit]
        fastest = max(usable, key=lambda s: s.speedup.value)
        tied = [s for s in usable if s.speedup.high >= fastest.speedup.low]
        return min(tied, key=lambda s: s.size_bytes)

    def _result(
        self, pruned: Pruned, sides: Sequence[Side], *, chosen: Side, notes: tuple[str, ...]
    ) -> PruneResult:
        request, job, data = self._request, self._pipeline.job, self._pipeline.data.record
        return PruneResult(
            source=request.source,
            data=request.data,
            target=request.target,
            metric=job.metric,
            speedup=request.pruning.speedup,
            max_drop=request.pruning.max_drop,
            threads=job.threads,
            evaluation_samples=data.evaluation_samples,
            sides=tuple(sides),
            chosen=chosen.name,
            reached=chosen.speedup.value >= request.pruning.speedup,
            stopped=pruned.stopped,
            steps=pruned.steps,
            notes=notes,
            machine=job.machine,
            versions=versions_of(_VERSIONS),
            warnings=data.warnings,
        )
