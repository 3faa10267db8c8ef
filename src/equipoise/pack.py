"""Pack the chosen engine of a run into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from equipoise import record
from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.data.store import Rows
from equipoise.parity.record import ParityRecord
from equipoise.parity.tolerance import Tolerance
from equipoise.pipeline import Pipeline
from equipoise.recipe import Recipe
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.search.result import TuneResult
from equipoise.spec import Array, TensorSpec

_GOLDEN_SAMPLES: Final = 4


def pack(pipeline: Pipeline, result: TuneResult, *, output: Path) -> Manifest:
    """Write the bundle of ``result.chosen`` to ``output``. All stages have run before."""
    recipe = next(c.recipe for c in result.candidates if c.recipe.name == result.chosen)
    built = pipeline.build(pipeline.make(recipe).model, label=recipe.name)
    engine = built.files / built.record.file
    inputs, outputs, golden = _golden(pipeline, engine)
    tokenizer = pipeline.job.data.tokenizer
    manifest = Manifest(
        name=result.source,
        target=result.target,
        engine=Engine(
            file=built.record.file,
            runtime=pipeline.job.target.runtime,
            threads=result.threads,
            size_bytes=built.record.size_bytes,
        ),
        inputs=inputs,
        outputs=outputs,
        files={},
        golden_tolerance=golden_tolerance(golden, pipeline.exported.record.proof.tolerances),
        task=pipeline.job.source.task,
        labels=pipeline.data.record.labels,
        tokenizer="tokenizer.json" if tokenizer else None,
        max_length=pipeline.job.data.max_length,
        preprocessing=pipeline.exported.record.preprocessing,
        versions=result.versions,
    )
    copies = {file.name: file for file in built.files.iterdir()}
    if tokenizer:
        copies["tokenizer.json"] = tokenizer
    documents = {
        GOLDEN_FILE: golden_bytes(golden),
        "parity.json": record.dumps(_parity(pipeline, engine, recipe)).encode(),
        "recipe.json": record.dumps(recipe).encode(),
    }
    return write_bundle(output, manifest, copies=copies, documents=documents)


def _golden(
    pipeline: Pipeline, engine: Path
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], tuple[Golden, ...]]:
    """Specs of the engine, and the first samples with its outputs and the reference's."""
    rows, reference = Rows(pipeline.evaluation), Rows(pipeline.reference.files)
    settings = SessionSettings(threads=pipeline.job.threads)
    open_session = session_opener(pipeline.job.target.runtime)
    with open_session(engine, settings=settings) as session:
        vectors = [
            Golden(inputs=rows[i], outputs=session.run(rows[i]), reference=reference[i])
            for i in range(min(_GOLDEN_SAMPLES, len(rows)))
        ]
        return session.inputs, session.outputs, tuple(vectors)


def golden_tolerance(
    vectors: tuple[Golden, ...], allowed: tuple[Tolerance, ...]
) -> dict[str, float]:
    """Output -> how far another device may be from the golden outputs.

    The tolerance of the float model, plus the engine's own largest difference from the reference:
    another kernel may round otherwise, but not by more than quantisation itself did.
    """
    return {
        limit.output: limit.atol
        + max(
            _largest_difference(v.outputs[limit.output], v.reference[limit.output]) for v in vectors
        )
        for limit in allowed
    }


def _largest_difference(left: Array, right: Array) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0))


def _parity(pipeline: Pipeline, engine: Path, recipe: Recipe) -> ParityRecord:
    exported = pipeline.exported.record
    evaluated = pipeline.evaluate(engine, label=recipe.name).record
    return ParityRecord(
        reference=pipeline.reference.record.by,
        exporter=exported.exporter,
        samples=evaluated.samples,
        tolerances=exported.proof.tolerances,
        exported=exported.verified.parity,
        engine=evaluated.parity,
        engine_batch=evaluated.batch_parity,
    )
