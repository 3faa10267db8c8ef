"""The way a model goes, stage by stage. This module alone joins the stages.

source ── export ──> model ── fuse ── quantize ──> candidate ── build ──> engine
  │                                    ▲                                     │
  │                     calibrate ─────┘           evaluate, memory, latency ┘
  └── reference ──> outputs of the source on the evaluation samples ────┘
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from equipoise import record
from equipoise.data.config import DataConfig
from equipoise.data.prepare import DataRecord
from equipoise.errors import RecipeError
from equipoise.export.config import ExportConfig, ExportRecord
from equipoise.export.embedded import EmbedRecord
from equipoise.export.given import GivenRecord
from equipoise.export.reference import ReferenceConfig, ReferenceRecord
from equipoise.export.signature import SignatureConfig, SignatureRecord
from equipoise.graph.fuse import FuseConfig, FuseRecord
from equipoise.graph.static import StaticRecord
from equipoise.measure.evaluate import EvaluateConfig, EvaluateRecord
from equipoise.measure.latency import LatencyConfig, LatencyRecord
from equipoise.measure.memory import MemoryConfig, MemoryRecord
from equipoise.parity.proof import VerifyRecord
from equipoise.quantize.calibrate import CalibrateConfig, CalibrateRecord
from equipoise.quantize.equalize import EqualizeRecord
from equipoise.quantize.plans import GainsRecord
from equipoise.quantize.profiling import DESIGNS, ProfileConfig, ProfileRecord
from equipoise.quantize.quantize import QuantizeConfig, QuantizeRecord
from equipoise.quantize.schemes import Quantization, StaticInt8
from equipoise.recipe import Recipe
from equipoise.runtimes.build import BuildConfig
from equipoise.runtimes.protocol import EngineRecord, SessionSettings
from equipoise.sources.source import Source
from equipoise.stages import Stage, StageResult, StageRunner
from equipoise.targets.machine import Machine
from equipoise.targets.profile import Target

MODEL_FILE: Final = "model.onnx"
ONNX: Final = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
TORCH: Final = (
    *ONNX, "torch", "transformers", "safetensors", "tokenizers", "pillow", "timm", "torchvision"
)  # fmt: skip
_RUN: Final = ("numpy", "onnxruntime")
QUICK_ROUNDS: Final = 16
"""Of a latency that only has to show that a candidate is out of the race."""

_LATENCY_BUDGET_S: Final = 60.0
MOST_OF_ROUNDS: Final = 4
"""Times the rounds of the job, until the interval is narrow enough."""

PREPARE = Stage(
    name="data",
    function="equipoise.data.prepare:prepare_data",
    record=DataRecord,
    packages=("numpy", "tokenizers", "scikit-learn"),
)
SIGNATURE = Stage(
    name="signature",
    function="equipoise.export.signature:read_signature",
    record=SignatureRecord,
    packages=TORCH,
)
EXPORT = Stage(
    name="export",
    function="equipoise.export.export:export",
    record=ExportRecord,
    packages=TORCH,
)
GIVEN = Stage(
    name="given",
    function="equipoise.export.given:read_given",
    record=GivenRecord,
    packages=("numpy",),
)
EMBED = Stage(
    name="embed",
    function="equipoise.export.embedded:embed",
    record=EmbedRecord,
    packages=ONNX,
)
STATIC = Stage(
    name="static",
    function="equipoise.graph.static:static_stage",
    record=StaticRecord,
    packages=ONNX,
)
VERIFY = Stage(
    name="verify",
    function="equipoise.parity.proof:verify",
    record=VerifyRecord,
    packages=_RUN,
)
REFERENCE = Stage(
    name="reference",
    function="equipoise.export.reference:run_reference",
    record=ReferenceRecord,
    packages=TORCH,
)
FUSE = Stage(name="fuse", function="equipoise.graph.fuse:fuse", record=FuseRecord, packages=ONNX)
CALIBRATE = Stage(
    name="calibrate",
    function="equipoise.quantize.calibrate:calibrate",
    record=CalibrateRecord,
    packages=_RUN,
)
EQUALIZE = Stage(
    name="equalize",
    function="equipoise.quantize.equalize:equalize_stage",
    record=EqualizeRecord,
    packages=ONNX,
)
QUANTIZE = Stage(
    name="quantize",
    function="equipoise.quantize.quantize:quantize",
    record=QuantizeRecord,
    packages=ONNX,
)
PROFILE = Stage(
    name="profile",
    function="equipoise.quantize.profiling:profile",
    record=ProfileRecord,
    packages=ONNX,
    measures=True,
)
GAINS = Stage(
    name="gains",
    function="equipoise.quantize.gains:weigh_nodes",
    record=GainsRecord,
    packages=(*ONNX, "scipy"),
    measures=True,
)
BUILD = Stage(
    name="build",
    function="equipoise.runtimes.build:build",
    record=EngineRecord,
    packages=_RUN,
)
EVALUATE = Stage(
    name="evaluate",
    function="equipoise.measure.evaluate:evaluate",
    record=EvaluateRecord,
    packages=(*_RUN, "seqeval"),
)
MEMORY = Stage(
    name="memory",
    function="equipoise.measure.memory:measure_memory",
    record=MemoryRecord,
    packages=_RUN,
    measures=True,
)
LATENCY = Stage(
    name="latency",
    function="equipoise.measure.latency:measure_latency",
    record=LatencyRecord,
    packages=_RUN,
    measures=True,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all stages of one run share.

    Attributes:
        source: The trained model.
        data: Its calibration and evaluation data.
        target: The device to make engines for.
        machine: The machine that measures.
        metric: Name of the task metric.
        threads: Threads per operator.
        rounds: Interleaved rounds of a latency measurement.
    """

    source: Source
    data: DataConfig
    target: Target
    machine: Machine
    metric: str
    threads: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model made by a recipe.

    Attributes:
        model: Its file.
        notes: What the stages noticed, in words.
        kept_db: See :class:`~equipoise.quantize.quantize.QuantizeRecord`.
    """

    model: Path
    notes: tuple[str, ...]
    kept_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How an engine is measured.

    Attributes:
        threads: Threads per operator; the job's when None.
        quick: In few rounds.
        baseline_runtime: Of the float engine; the target's when None.
        take: Which of several measurements of the same; each is kept.
    """

    threads: int | None = None
    quick: bool = False
    baseline_runtime: str | None = None
    take: int = 0


class Pipeline:
    """The stages of one job, run when first asked for.

    Args:
        job: What they share.
        runner: Runs them in child processes and keeps their results.
    """

    def __init__(self, job: Job, *, runner: StageRunner) -> None:
        self.job = job
        self.runner = runner

    def on(self, target: Target) -> Pipeline:
        """The same for another target."""
        return Pipeline(replace(self.job, target=target), runner=self.runner)

    @cached_property
    def data(self) -> StageResult[DataRecord]:
        """Calibration and evaluation samples on disk."""
        return prepare(self.job.data, source=self.job.source, runner=self.runner)

    @cached_property
    def exported(self) -> StageResult[ExportRecord]:
        """The source as float ONNX, proved equal to it."""
        return self.runner.run(EXPORT, self.export_config, label="export to ONNX")

    @property
    def export_config(self) -> ExportConfig:
        """How the source is exported for the target."""
        return ExportConfig(
            source=self.job.source,
            samples=self.calibration,
            inputs=self.data.record.inputs,
            opset=self.job.target.opset,
            max_ir_version=self.job.target.max_ir_version,
            release=True,
        )

    @cached_property
    def reference(self) -> StageResult[ReferenceRecord]:
        """Outputs of the source on the evaluation samples."""
        config = ReferenceConfig(
            source=self.job.source,
            samples=self.evaluation,
            names=tuple(spec.name for spec in self.data.record.inputs),
        )
        return self.runner.run(REFERENCE, config, label="run the reference")

    @property
    def calibration(self) -> Path:
        """Directory of calibration inputs."""
        return self.data.files / "calibration"

    @property
    def evaluation(self) -> Path:
        """Directory of evaluation inputs."""
        return self.data.files / "evaluation"

    @property
    def float_model(self) -> Path:
        """The exported ONNX file."""
        return self.exported.files / MODEL_FILE

    def make(self, recipe: Recipe) -> Made:
        """Make the model of ``recipe``.

        Raises:
            RecipeError: The recipe finds nothing to act on in this model.
        """
        made = self.float_of(recipe)
        if recipe.quantization is None:
            return made
        quantized = self.quantize(made.model, recipe.quantization, label=recipe.name)
        return Made(
            model=quantized.files / quantized.record.file,
            notes=(*made.notes, *quantized.record.notes),
            kept_db=quantized.record.kept_db,
        )

    def float_of(self, recipe: Recipe) -> Made:
        """The float model that ``recipe`` quantises: as exported, or fused.

        Raises:
            RecipeError: There is nothing to fuse.
        """
        model = self.float_model
        if not recipe.fused:
            return Made(model=model, notes=())
        fused = self.runner.run(FUSE, FuseConfig(model=model), label=f"{recipe.name}: fuse")
        if not fused.record.fusions:
            raise RecipeError("the graph has no transformer block to fuse")
        return Made(model=fused.files / MODEL_FILE, notes=_fusion_notes(fused.record))

    def quantize(
        self, model: Path, quantization: Quantization, *, label: str
    ) -> StageResult[QuantizeRecord]:
        """Quantise a float model. Static schemes calibrate first."""
        config = self._quantize_config(model, quantization)
        return quantized(config, runner=self.runner, machine=self.job.machine, label=label)

    def gains(self, model: Path, quantization: StaticInt8, *, label: str) -> GainsRecord:
        """What each node of a float model harms and gains in integers."""
        config = self._quantize_config(model, quantization)
        return self.runner.run(GAINS, config, label=f"{label}: weigh the nodes").record

    def _quantize_config(self, model: Path, quantization: Quantization) -> QuantizeConfig:
        return QuantizeConfig(
            model=model,
            quantization=quantization,
            scheme=self.job.target.int8,
            samples=self.calibration,
            statistics=self.statistics(model) if isinstance(quantization, StaticInt8) else None,
            threads=self.job.threads,
        )

    def statistics(self, model: Path) -> Path:
        """Directory with what calibration saw of the activations of a float model."""
        config = CalibrateConfig(
            model=model,
            samples=self.calibration,
            threads=self.job.threads,
            scheme=self.job.target.int8,
        )
        return self.runner.run(CALIBRATE, config, label="calibrate").files

    def build(
        self, model: Path, *, label: str, threads: int | None = None
    ) -> StageResult[EngineRecord]:
        """Build the target's engine from an ONNX file, for the job's threads where None."""
        config = BuildConfig(
            model=model,
            runtime=self.job.target.runtime,
            settings=SessionSettings(threads=threads or self.job.threads),
        )
        return self.runner.run(BUILD, config, label=f"{label}: build")

    def evaluate(
        self, engine: Path | None, *, label: str, samples: int | None = None
    ) -> StageResult[EvaluateRecord]:
        """Metric and parity of an engine; of the reference itself for None.

        Args:
            engine: Engine file.
            label: What a person calls it.
            samples: On the first so many samples; all when None.
        """
        config = EvaluateConfig(
            inputs=self.evaluation,
            labels=self.data.files / "labels",
            reference=self.reference.files,
            metric=self.job.metric,
            label_names=self.data.record.labels,
            engine=engine,
            runtime=self.job.target.runtime,
            threads=self.job.threads,
            samples=samples,
        )
        return self.runner.run(EVALUATE, config, label=f"{label}: evaluate")

    def memory(
        self, engine: Path, *, label: str, measuring: Measuring | None = None
    ) -> MemoryRecord:
        """Peak memory and start of an engine in processes of its own."""
        how = measuring or Measuring()
        config = MemoryConfig(
            engine=engine,
            samples=self.evaluation,
            machine=self._machine,
            runtime=self.job.target.runtime,
            threads=how.threads or self.job.threads,
            take=how.take,
        )
        return self.runner.run(MEMORY, config, label=f"{label}: memory").record

    def latency(
        self, engine: Path, *, baseline: Path, label: str, measuring: Measuring | None = None
    ) -> LatencyRecord:
        """Latency of an engine against the float engine, interleaved.

        The float engine has the job's threads, whatever the other one has.
        """
        how = measuring or Measuring()
        rounds = QUICK_ROUNDS if how.quick else self.job.rounds
        config = LatencyConfig(
            engine=engine,
            baseline=baseline,
            samples=self.evaluation,
            machine=self._machine,
            runtime=self.job.target.runtime,
            rounds=rounds,
            most_rounds=rounds if how.quick else MOST_OF_ROUNDS * rounds,
            budget_s=0.0 if how.quick else _LATENCY_BUDGET_S,
            threads=how.threads or self.job.threads,
            baseline_runtime=how.baseline_runtime,
            baseline_threads=self.job.threads,
            take=how.take,
        )
        name = f"{label}: quick latency" if how.quick else f"{label}: latency"
        return self.runner.run(LATENCY, config, label=name).record

    @cached_property
    def _machine(self) -> str:
        return record.dumps(self.job.machine)


def quantized(
    config: QuantizeConfig, *, runner: StageRunner, machine: Machine, label: str = ""
) -> StageResult[QuantizeRecord]:
    """Quantise; where stages run at once, nodes are timed in one of its own, on ``machine``."""
    # Among others, times would be those of a busy machine, or of one that is not the device.
    config = replace(config, apart=runner.slots > 1)
    of = f"{label}: " if label else ""
    found = runner.run(QUANTIZE, config, label=f"{of}quantise")
    if found.record.file:
        return found
    question = ProfileConfig(
        designs=found.files / DESIGNS, machine=record.dumps(machine), threads=config.threads
    )
    profile = runner.run(PROFILE, question, label=f"{of}time the nodes").record
    again = replace(config, profile=profile)
    return runner.run(QUANTIZE, again, label=f"{of}quantise by times")


def prepare(data: DataConfig, *, source: Source, runner: StageRunner) -> StageResult[DataRecord]:
    """Calibration and evaluation samples on disk, with the text inputs that the source takes."""
    if data.tokenizer is not None:
        config = SignatureConfig(source=source)
        found = runner.run(SIGNATURE, config, label="read the signature")
        data = replace(data, accepted=found.record.names)
    return runner.run(PREPARE, data, label="prepare data")


def _fusion_notes(fused: FuseRecord) -> tuple[str, ...]:
    made = ", ".join(f"{count} {name}" for name, count in sorted(fused.fusions.items()))
    return (f"fused: {made}",)
