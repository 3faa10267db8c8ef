"""The stages of pruning and training, over the samples of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from equipoise import record
from equipoise.compress.channels.narrow import NarrowConfig
from equipoise.compress.channels.structure import ChannelsConfig, ChannelsRecord
from equipoise.compress.cut_record import CutRecord
from equipoise.compress.cutting import Cutting, Sparsity
from equipoise.compress.distributed import launched_world
from equipoise.compress.importance import Importance
from equipoise.compress.latency.shapes import shapes_of, working_sets_of
from equipoise.compress.latency.table import LayerTable, TableConfig
from equipoise.compress.settings import TrainSettings
from equipoise.compress.sparsity import SparsifyConfig
from equipoise.compress.structure import Structure
from equipoise.compress.study import StudyResult, StudySettings
from equipoise.compress.studying import SearchConfig
from equipoise.compress.train import TrainConfig, TrainRecord
from equipoise.compress.transformer.reading import (
    LayersConfig,
    LayersRecord,
    ReadConfig,
    TransformerReading,
)
from equipoise.compress.transformer.reduce import ReduceConfig
from equipoise.compress.transformer.shapes import TransformerShape
from equipoise.compress.transformer.vocabulary import TrimConfig
from equipoise.compression.models import Cut, Score, SourceEngine, Trained, Workplace
from equipoise.compression.stages import (
    MODEL,
    MODULE_RANGES,
    NARROW,
    READ_CHANNELS,
    READ_LAYERS,
    READ_TRANSFORMER,
    REDUCE,
    SPARSIFY,
    STUDY,
    TABLE,
    TRAIN,
    TRIM,
)
from equipoise.data.metrics import Metric, get_metric
from equipoise.data.store import Rows
from equipoise.errors import UsageError
from equipoise.export.reference import ReferenceConfig
from equipoise.graph.cost import analyze
from equipoise.measure.evaluate import EvaluateConfig, read_statistics
from equipoise.measure.interval import Interval, metric_interval, paired_drop
from equipoise.measure.latency import LatencyRecord
from equipoise.pipeline import EVALUATE, EXPORT, MODEL_FILE, REFERENCE, Pipeline
from equipoise.quantize.module_ranges import ModuleRangesConfig
from equipoise.sources.source import Source, parse_source
from equipoise.stages import StageResult


class Compression:
    """Pruning and training of one model, run when asked for.

    Args:
        pipeline: Has the samples, prepared for training, and the target.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.metric: Metric = get_metric(pipeline.job.metric, labels=pipeline.data.record.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(spec.name for spec in self.pipeline.data.record.inputs)

    def train(self, config: TrainConfig, *, label: str) -> StageResult[TrainRecord]:
        """Train; the result's files have ``model``.

        Processes of a launcher train in any case: one that had a kept result would leave those
        that have none waiting for it.
        """
        launched = launched_world() > 1
        return self.pipeline.runner.run(TRAIN, config, label=label, fresh=launched)

    def recover(
        self,
        student: Source,
        *,
        teacher: Source | None,
        settings: TrainSettings,
        workplace: Workplace,
        label: str,
    ) -> Trained:
        """Train ``student`` beside ``teacher`` and open what came of it."""
        config = TrainConfig(
            student=student,
            teacher=teacher,
            data=self.pipeline.data.files,
            names=self.names,
            metric=self.pipeline.job.metric,
            label_names=self.pipeline.data.record.labels,
            settings=settings,
            processes=workplace.processes,
            threads=workplace.threads,
            checkpoints=workplace.checkpoints,
        )
        found = self.train(config, label=label)
        source = parse_source(str(found.files / MODEL), task=student.task)
        return Trained(source=source, metric=found.record.best_metric, record=found.record)

    def with_layers(self, source: Source, count: int) -> Source:
        """``source`` with ``count`` of its layers: those that it can least do without.

        Raises:
            UsageError: It has not got so many.
            SourceError: It is no transformers model whose layers can be left out.
        """
        reading = self.read_layers(source, label="look at the layers")
        layers = reading.shape.layers
        if not 0 < count <= len(layers) or not reading.dispensable:
            raise UsageError(
                f"{source.name} has {len(layers)} layers; {count} of them cannot be kept",
                hint=f"Give a number from 1 to {len(layers)}.",
            )
        gone = reading.dispensable[: len(layers) - count]
        shape = replace(reading.shape, layers=tuple(i for i in layers if i not in gone))
        return self.reduce(source, shape, label=f"keep {count} layers").source

    def multiple_of(self, cutting: Cutting) -> int:
        """What widths have to be multiples of."""
        return cutting.multiple or self.pipeline.job.target.channel_multiple

    def read_channels(self, source: Source, cutting: Cutting, *, label: str) -> ChannelsRecord:
        """What can be cut of a module, channel by channel."""
        config = ChannelsConfig(
            source=source,
            data=self.pipeline.data.files,
            names=self.names,
            importance=cutting.importance,
            multiple=self.multiple_of(cutting),
        )
        return self.pipeline.runner.run(READ_CHANNELS, config, label=label).record

    def narrow(
        self, source: Source, widths: dict[str, int], *, cutting: Cutting, label: str
    ) -> Cut:
        """``source`` with its groups cut to ``widths``."""
        config = NarrowConfig(
            source=source,
            data=self.pipeline.data.files,
            names=self.names,
            importance=cutting.importance,
            multiple=self.multiple_of(cutting),
            widths=widths,
        )
        found = self.pipeline.runner.run(NARROW, config, label=label)
        return self._cut(found.files, found.record, base=source)

    def table(self, structure: Structure, *, multiple: int) -> LayerTable:
        """Latencies of the layers of ``structure`` on the target, at many widths."""
        job = self.pipeline.job
        config = TableConfig(
            shapes=shapes_of(structure, multiple=multiple),
            runtime=job.target.runtime,
            machine=record.dumps(job.machine),
            scheme=job.target.int8,
            threads=job.threads,
            working_sets=working_sets_of(structure, precision="float32"),
        )
        return self.pipeline.runner.run(TABLE, config, label="time the layers").record

    def read_transformer(
        self, source: Source, *, label: str, importance: Importance = "taylor"
    ) -> TransformerReading:
        """What can be cut of a transformer."""
        config = ReadConfig(
            source=source,
            data=self.pipeline.data.files,
            names=self.names,
            sequence=self.sequence,
            importance=importance,
        )
        return self.pipeline.runner.run(READ_TRANSFORMER, config, label=label).record

    def read_layers(self, source: Source, *, label: str) -> LayersRecord:
        """Which layers of a transformer can go."""
        config = LayersConfig(source=source, data=self.pipeline.data.files, names=self.names)
        return self.pipeline.runner.run(READ_LAYERS, config, label=label).record

    def reduce(
        self,
        source: Source,
        shape: TransformerShape,
        *,
        label: str,
        importance: Importance = "taylor",
    ) -> Cut:
        """``source`` cut to ``shape``."""
        config = ReduceConfig(
            source=source,
            shape=shape,
            importance=importance,
            data=self.pipeline.data.files,
            names=self.names,
        )
        found = self.pipeline.runner.run(REDUCE, config, label=label)
        return self._cut(found.files, found.record, base=source)

    def _cut(self, files: Path, found: CutRecord, *, base: Source) -> Cut:
        return Cut(
            source=parse_source(str(files / MODEL), task=base.task),
            parameters=found.parameters_after,
            loss_before=found.loss_before,
            loss_after=found.loss_after,
            notes=found.notes,
        )

    def trimmed(self, source: Source) -> tuple[Source, tuple[str, ...]]:
        """``source`` with the tokens that the training texts need, and what that costs in words."""
        config = TrimConfig(source=source, data=self.pipeline.data.files)
        found = self.pipeline.runner.run(TRIM, config, label="trim the vocabulary")
        trimmed = parse_source(str(found.files / MODEL), task=source.task)
        kept, before = found.record.tokens_after, found.record.tokens_before
        return trimmed, (f"{kept:,} of {before:,} tokens are kept", *found.record.notes)

    def sparse(self, source: Source, sparsity: Sparsity) -> Source:
        """``source`` with weights set to zero, its sizes as they are."""
        config = SparsifyConfig(
            source=source,
            data=self.pipeline.data.files,
            names=self.names,
            pattern=sparsity.pattern,
            share=sparsity.share,
        )
        found = self.pipeline.runner.run(SPARSIFY, config, label=f"{sparsity.words} zeros")
        return parse_source(str(found.files / MODEL), task=source.task)

    @cached_property
    def sequence(self) -> int:
        """Mean number of positions of an evaluation sample; 1 where no input varies in length."""
        rows = Rows(self.pipeline.evaluation)
        lengths = [
            rows.shapes(column.name)[:, 1] for column in rows.header.columns if column.rank > 1
        ]
        return max(1, round(float(lengths[0].mean()))) if lengths else 1

    def study(self, config: TrainConfig, settings: StudySettings) -> StudyResult:
        """Search the settings of a training."""
        search = SearchConfig(training=config, study=settings)
        return self.pipeline.runner.run(STUDY, search, label="search the settings").record

    def ranges(self) -> Path:
        """File of the grids of the modules under the target's static int8."""
        pipeline = self.pipeline
        config = replace(pipeline.export_config, release=False)
        exported = pipeline.runner.run(EXPORT, config, label="export with names")
        model = exported.files / MODEL_FILE
        grids = ModuleRangesConfig(
            model=model,
            scheme=pipeline.job.target.int8,
            samples=pipeline.calibration,
            statistics=pipeline.statistics(model),
            threads=pipeline.job.threads,
        )
        found = pipeline.runner.run(MODULE_RANGES, grids, label="read the grids of modules")
        return found.files / found.record.file

    def beside(self, source: Source) -> Pipeline:
        """The same job for another model, which may have a tokenizer of its own."""
        job = self.pipeline.job
        data = replace(job.data, tokenizer=source.tokenizer or job.data.tokenizer)
        return Pipeline(replace(job, source=source, data=data), runner=self.pipeline.runner)

    def engine(self, source: Source, *, label: str) -> SourceEngine:
        """Export ``source``, prove it, and build the target's float engine."""
        pipeline = self.beside(source)
        built = pipeline.build(pipeline.float_model, label=label)
        cost = analyze(pipeline.float_model)
        return SourceEngine(
            source=source,
            label=label,
            file=built.files / built.record.file,
            model=pipeline.float_model,
            size_bytes=built.record.size_bytes,
            nodes=sum(built.record.kernels.values()),
            parameters=cost.parameters,
            multiply_accumulates=cost.multiply_accumulates,
        )

    def latency(self, engine: SourceEngine, baseline: SourceEngine) -> LatencyRecord:
        """Latency of ``engine`` beside ``baseline``, both built here.

        Both run the samples of ``engine``: a trimmed vocabulary has fewer tokens than the other.
        """
        pipeline = self.beside(engine.source)
        return pipeline.latency(engine.file, baseline=baseline.file, label=engine.label)

    def validation_metric(self, source: Source) -> float:
        """The metric of ``source`` on the validation samples.

        Without labels the metric compares with the source itself, and is 1.
        """
        if not (self.pipeline.data.files / "validation_labels").exists():
            return 1.0
        score = self.score(source, label="original, validation", part="validation")
        return score.metric.value

    def score(
        self,
        source: Source,
        *,
        label: str,
        reference: Source | None = None,
        part: str = "evaluation",
    ) -> Score:
        """The metric of ``source``, run in PyTorch.

        Args:
            source: A trained model.
            label: What a person calls it.
            reference: The model that a metric compares with, where it compares. Where it does not,
                the outputs need not be of one shape: a trimmed vocabulary has other tokens.
            part: ``evaluation`` or ``validation`` samples.
        """
        compared = reference if reference is not None and self.metric.compares else source
        files = self.beside(source).data.files
        config = EvaluateConfig(
            inputs=files / part,
            labels=files / {"evaluation": "labels"}.get(part, f"{part}_labels"),
            reference=self._outputs(compared, part=part, label=label),
            outputs=self._outputs(source, part=part, label=label),
            metric=self.pipeline.job.metric,
            label_names=self.pipeline.data.record.labels,
        )
        found = self.pipeline.runner.run(EVALUATE, config, label=f"{label}: evaluate")
        statistics = read_statistics(found.files)
        return Score(
            statistics=statistics,
            metric=metric_interval(statistics, self.metric.value),
            report=found.record.report,
        )

    def _outputs(self, source: Source, *, part: str, label: str) -> Path:
        samples = self.beside(source).data.files / part
        config = ReferenceConfig(source=source, samples=samples, names=self.names)
        return self.pipeline.runner.run(REFERENCE, config, label=f"{label}: run").files

    def drop(self, reference: Score, score: Score) -> Interval:
        """How much of the metric is lost, paired over the samples."""
        return paired_drop(
            reference.statistics,
            score.statistics,
            self.metric.value,
            discrete=self.metric.discrete,
        )
