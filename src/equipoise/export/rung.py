"""One rung of the ladder, in a process of its own: load, prove if nobody has, export, clean."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import onnxio
from equipoise.data.preprocessing import ImagePreprocessing, read_processor
from equipoise.data.store import Rows
from equipoise.errors import DataError, IncompatibleError
from equipoise.export.exporters import Trace, export_with
from equipoise.export.proving import Shapes, prove
from equipoise.export.samples import ModelSamples, model_samples, module_preprocessing
from equipoise.graph.clean import CleanRecord, clean
from equipoise.parity.proof import ProofRecord, has_proof, read_proof
from equipoise.sources.source import Source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import TensorSpec

MODEL_FILE: Final = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class RungConfig:
    """What to export and how.

    Attributes:
        source: The trained model.
        rung: Name of the exporter.
        proof: Directory of the proof; made here when it is not there.
        samples: Rows of inputs; None lets the model's own tokenizer, processor or signature make
            them.
        inputs: Specs of ``samples``.
        shapes: Which dimensions are dynamic.
        opset: The opset to ask for.
        max_ir_version: The largest IR version that the target reads.
        release: Leave out the exporter's metadata.
    """

    source: Source
    rung: str
    proof: Path
    samples: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    shapes: Shapes
    opset: int
    max_ir_version: int
    release: bool = False


@dataclass(frozen=True, kw_only=True)
class RungRecord:
    """What a rung did.

    Attributes:
        cleaned: What the clean-up did to the graph.
        export_s: Seconds inside the exporter.
        preprocessing: What is done to a picture first, where the source says it.
    """

    cleaned: CleanRecord
    export_s: float
    preprocessing: ImagePreprocessing | None


def run_rung(config: RungConfig, *, output: Path) -> RungRecord:
    """Export ``config.source`` with one exporter to ``output/model.onnx``.

    Raises:
        SourceError: The source cannot be built, or the exporter cannot take it.
        IncompatibleError: The file has another opset than was asked for.
        NonFiniteError: The source gives NaN or infinity.
    """
    module = load_module(config.source)
    samples = read_samples(config) or model_samples(config.source, module)
    names = [spec.name for spec in samples.inputs]
    named = NamedModule(module, names=names, source=config.source.name)
    proof = _proof(named, samples, config)
    started = time.perf_counter()
    model = export_with(config.rung, trace_of(named, proof, config)).model
    seconds = time.perf_counter() - started
    _check_opset(model, wanted=config.opset)
    cleaned = clean(model, release=config.release)
    onnxio.lower_ir_version(model, largest=config.max_ir_version)
    onnxio.save_ir(model, output / MODEL_FILE)
    steps = preprocessing_of(config.source, module)
    return RungRecord(cleaned=cleaned, export_s=seconds, preprocessing=steps)


def preprocessing_of(source: Source, module: Any) -> ImagePreprocessing | None:
    """What is done to a picture before it is an input of ``module``.

    None where the source does not say, or says steps that cannot be told: the file is good
    without them.
    """
    try:
        found = read_processor(source.processor) if source.processor else None
        return found or module_preprocessing(module)
    except DataError:
        return None


def read_samples(config: RungConfig) -> ModelSamples | None:
    """The user's samples as rows of the model's inputs; None without any."""
    if config.samples is None:
        return None
    rows = Rows(config.samples)
    first = tuple(rows[i] for i in range(min(len(rows), 16)))
    return ModelSamples(inputs=config.inputs, rows=first, made_by="the data")


def _proof(named: NamedModule, samples: ModelSamples, config: RungConfig) -> ProofRecord:
    if has_proof(config.proof):
        return read_proof(config.proof)
    given = config.samples is not None
    return prove(named, samples, shapes=config.shapes, given=given, directory=config.proof)


def trace_of(named: NamedModule, proof: ProofRecord, config: RungConfig) -> Trace:
    """The traced run of the proof, for an exporter."""
    feeds = Rows(config.proof / "inputs")[0]
    return Trace(module=named, feeds=feeds, inputs=proof.inputs, opset=config.opset)


def _check_opset(model: Any, *, wanted: int) -> None:
    """Below 18 the dynamo exporter converts down, and may fail to with no more than a log line."""
    found = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if found != wanted:
        raise IncompatibleError(f"opset {wanted} was asked for, but the file has opset {found}")
