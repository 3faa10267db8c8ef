"""Export a trained model: what ``equipoise export`` calls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.data.config import DataConfig
from equipoise.data.readers.base import split_form
from equipoise.errors import IncompatibleError, UsageError
from equipoise.export.config import PROOF_DIRECTORY, ExportConfig, ExportRecord
from equipoise.export.embedded import EmbedConfig
from equipoise.export.given import GivenConfig
from equipoise.export.proving import Shapes
from equipoise.graph.embed import resizable
from equipoise.graph.fuse import FuseConfig
from equipoise.graph.static import StaticConfig
from equipoise.parity.proof import VerifyConfig, VerifyRecord
from equipoise.parity.sizes import BATCH
from equipoise.pipeline import EMBED, EXPORT, FUSE, GIVEN, MODEL_FILE, STATIC, VERIFY, prepare
from equipoise.sources.source import Source, parse_source
from equipoise.spec import TensorSpec
from equipoise.stages import Observer, StageResult, StageRunner, default_cache
from equipoise.targets.machine import detect_machine
from equipoise.targets.profiles import get_target

_DATA_SAMPLES: Final = 32


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, from what inputs, in which shapes.

    Attributes:
        source: As :func:`equipoise.sources.source.parse_source` takes it.
        output: The ``.onnx`` file to write; external data, if any, goes beside it.
        weights: Weights for a factory or a timm model.
        task: Head of a transformers model; from its config when empty.
        data: Labelled data to take inputs from, as ``tune`` takes it.
        sample: ``.npz`` with one array per input.
        inputs: Specs as text, to be filled with random numbers.
        dynamic: Dynamic dimensions; None for batch, lengths of texts, and what differs in the data.
        static: No dynamic dimension at all.
        sizes: Sizes of dimensions that are not dynamic; as sampled where not given.
        buckets: Dimension -> sizes: one more file for every combination, with no dynamic dimension.
        opset: Opset; the target's when None.
        target: Name of a target profile.
        exporter: The only exporter to try; all of them in turn when empty.
        fuse: Make the fusions of the target's runtime.
        embed: Write the normalisation of pictures into the graph, and their resize where the target
            and the preprocessing allow it: the input becomes uint8 [batch, height, width, 3].
        release: Leave out the exporter's metadata.
        tokenizer: ``tokenizer.json`` for text data where the source has none.
        labels: Class names in index order, for data whose labels are names.
        max_length: Most tokens per text.
        cache: Directory of stage results; the user's cache when None.
        time_limit_s: Limit for one exporter.
        fresh: Run every stage again.
    """

    source: str
    output: Path
    weights: Path | None = None
    task: str = ""
    data: str | None = None
    sample: Path | None = None
    inputs: tuple[str, ...] = ()
    dynamic: tuple[str, ...] | None = None
    static: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    opset: int | None = None
    target: str = "cpu"
    exporter: str = ""
    fuse: bool = False
    embed: bool = False
    release: bool = False
    tokenizer: Path | None = None
    labels: tuple[str, ...] = ()
    max_length: int = 512
    cache: Path | None = None
    time_limit_s: float = 900.0
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file that was written.

    Attributes:
        path: The ``.onnx`` file.
        size_bytes: It and its external data.
        verified: Its specs, versions and parity.
    """

    path: Path
    size_bytes: int
    verified: VerifyRecord


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export gave: the record of the stage, and every file that was written."""

    record: ExportRecord
    files: tuple[ExportedFile, ...]


def export_model(request: ExportRequest, *, observer: Observer | None = None) -> ExportResult:
    """Export a model to ONNX, proved at every size that it claims.

    Nothing is written before all of it is proved.

    Raises:
        UsageError: Options that do not go together, or an unknown name.
        InputError: The source or the inputs cannot be used.
        ParityError: No exporter gives the numbers of the source.
        OutputError: The output cannot be written.
    """
    _check(request)
    source = parse_source(request.source, weights=request.weights, task=request.task)
    fs.check_writable(request.output.parent)
    # An exporter's own limit ends a rung; the stage as a whole may take all of its rungs.
    runner = StageRunner(
        request.cache or default_cache(),
        observer=observer,
        time_limit_s=4 * request.time_limit_s,
        fresh=request.fresh,
    )
    combinations = _combinations(request.buckets)
    samples, specs = _samples(request, source, runner)
    target = get_target(request.target, machine=detect_machine())
    config = ExportConfig(
        source=source,
        samples=samples,
        inputs=specs,
        shapes=_shapes(request, combinations),
        opset=request.opset or target.opset,
        max_ir_version=target.max_ir_version,
        exporter=request.exporter,
        release=request.release,
        rung_time_limit_s=request.time_limit_s,
    )
    exported = runner.run(EXPORT, config, label="export to ONNX")
    made = _Files(runner, exported=exported, request=request)
    if request.embed:
        made.embed(resizes=target.resizes)
    finished = [made.finish(model, sizes) for model, sizes in made.models(combinations)]
    return ExportResult(record=exported.record, files=made.write(finished))


def _check(request: ExportRequest) -> None:
    given = [
        name
        for name, value in (
            ("--data", request.data), ("--sample", request.sample), ("--input", request.inputs)
        )
        if value
    ]  # fmt: skip
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: give inputs in one way only")
    if request.static and (request.dynamic is not None or request.buckets):
        raise UsageError("--static leaves no dynamic dimension: drop --dynamic and --buckets")
    if request.output.suffix != ".onnx":
        raise UsageError(f"--output {request.output}: the name of an .onnx file is needed")


def _combinations(buckets: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], ...]:
    """Every combination of bucket sizes; batch 1 unless it is a bucket itself."""
    if not buckets:
        return ()
    sizes = {BATCH: (1,)} | dict(buckets)
    return tuple(
        dict(zip(sizes, chosen, strict=True)) for chosen in itertools.product(*sizes.values())
    )


def _shapes(request: ExportRequest, combinations: tuple[dict[str, int], ...]) -> Shapes:
    dynamic = () if request.static else request.dynamic
    return Shapes(dynamic=dynamic, fixed=dict(request.sizes), also=combinations)


def _samples(
    request: ExportRequest, source: Source, runner: StageRunner
) -> tuple[Path | None, tuple[TensorSpec, ...]]:
    """Rows of inputs and their specs; None lets the model make its own."""
    if request.data is not None:
        prepared = prepare(_data_config(request, source), source=source, runner=runner)
        return prepared.files / "calibration", prepared.record.inputs
    if request.sample is None and not request.inputs:
        return None, ()
    file = request.sample.resolve() if request.sample else None
    given = runner.run(GIVEN, GivenConfig(file=file, inputs=request.inputs), label="read inputs")
    return given.files / "rows", given.record.inputs


def _data_config(request: ExportRequest, source: Source) -> DataConfig:
    data = request.data or ""
    return DataConfig(
        data=data,
        files=split_form(data)[1],
        task=source.task,
        tokenizer=request.tokenizer or source.tokenizer,
        labels=request.labels or source.labels,
        calibration_samples=_DATA_SAMPLES,
        max_length=request.max_length,
    )


class _Files:
    """The files of one export: fixed, fused, proved again, written."""

    def __init__(
        self, runner: StageRunner, *, exported: StageResult[ExportRecord], request: ExportRequest
    ) -> None:
        self._runner = runner
        self._exported = exported
        self._request = request
        self._model = exported.files / MODEL_FILE
        self._proof = exported.files / PROOF_DIRECTORY

    def embed(self, *, resizes: bool) -> None:
        """Let the model take the bytes of pictures from here on."""
        steps = self._exported.record.preprocessing
        if steps is None:
            raise IncompatibleError(
                f"{self._request.source} does not say how pictures are prepared",
                hint="A transformers directory says it in preprocessor_config.json; leave out"
                " --embed-preprocessing, and prepare the pictures as in training.",
            )
        config = EmbedConfig(
            model=self._model,
            proof=self._proof,
            preprocessing=steps,
            resize=resizes and resizable(steps, opset=self._exported.record.verified.opset),
        )
        embedded = self._runner.run(EMBED, config, label="embed the preprocessing").files
        self._model, self._proof = embedded / MODEL_FILE, embedded / PROOF_DIRECTORY

    def models(self, combinations: tuple[dict[str, int], ...]) -> list[tuple[Path, dict[str, int]]]:
        """The model, and one without dynamic dimensions for every combination of sizes."""
        return [(self._model, {}), *((self._fixed(sizes), sizes) for sizes in combinations)]

    def _fixed(self, sizes: dict[str, int]) -> Path:
        """Dimensions that are no bucket get the size they were traced at."""
        config = StaticConfig(model=self._model, sizes=self._exported.record.proof.runs[0] | sizes)
        return self._runner.run(STATIC, config, label="fix the shapes").files / MODEL_FILE

    def finish(
        self, model: Path, sizes: dict[str, int]
    ) -> tuple[Path, dict[str, int], VerifyRecord]:
        """Fuse if asked for, and prove what is no longer the file that the exporter proved."""
        if self._request.fuse:
            fused = self._runner.run(FUSE, FuseConfig(model=model), label="fuse")
            model = fused.files / MODEL_FILE if fused.record.fusions else model
        if model == self._exported.files / MODEL_FILE:
            return model, sizes, self._exported.record.verified
        config = VerifyConfig(model=model, proof=self._proof, sizes=sizes)
        return model, sizes, self._runner.run(VERIFY, config, label="prove").record

    def write(
        self, finished: list[tuple[Path, dict[str, int], VerifyRecord]]
    ) -> tuple[ExportedFile, ...]:
        """Copy the proved files to where the user wants them."""
        written = []
        for model, sizes, verified in finished:
            path = _named(self._request.output, sizes)
            onnxio.copy_model(model, path)
            size_bytes = onnxio.file_bytes(path)
            written.append(ExportedFile(path=path, size_bytes=size_bytes, verified=verified))
        return tuple(written)


def _named(output: Path, sizes: Mapping[str, int]) -> Path:
    """``model.onnx``, or ``model.batch1.sequence32.onnx`` for a bucket."""
    parts = [f"{name}{size}" for name, size in sizes.items()]
    return output.with_name(".".join([output.stem, *parts, "onnx"]))
