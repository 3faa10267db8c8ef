"""Pack the chosen engine of a run into a bundle, and the float engine beside it where asked."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from equipoise import fs
from equipoise.assembly.parts import Part, cpu_flags_for, engine_files, run_part
from equipoise.assembly.writing import About, exported_parity, write_parts
from equipoise.bundle.manifest import Calibration, Manifest, Needs
from equipoise.bundle.names import engine_name
from equipoise.parity.precision import precision_of
from equipoise.parity.record import ParityRecord
from equipoise.pipeline import Pipeline
from equipoise.quantize.schemes import StaticInt8
from equipoise.recipe import Recipe
from equipoise.runtimes.protocol import SessionSettings
from equipoise.search.result import TuneResult
from equipoise.search.space import BASELINE


def pack(
    pipeline: Pipeline, result: TuneResult, *, output: Path, fallback: bool = False
) -> Manifest:
    """Write the bundle of ``result.chosen`` to ``output``. All stages have run before.

    Args:
        pipeline: The stages.
        result: What was chosen.
        output: Where; an archive if it ends in ``.zip``.
        fallback: Put the float engine beside it, for devices that the chosen one does not fit.
    """
    recipes = {c.recipe.name: c.recipe for c in result.candidates}
    names = [result.chosen, *([BASELINE] if fallback and result.chosen != BASELINE else [])]
    ran = []
    for name in names:
        part = _part(pipeline, recipes[name], fallback=name != result.chosen)
        ran.append(replace(run_part(part, pipeline), parity=_evaluated(pipeline, part)))
    calibrated = isinstance(recipes[result.chosen].quantization, StaticInt8)
    about = About(
        name=result.source,
        calibration=calibration_of(pipeline) if calibrated else None,
        versions=result.versions,
    )
    return write_parts(pipeline, ran, output=output, about=about)


def _part(pipeline: Pipeline, recipe: Recipe, *, fallback: bool) -> Part:
    threads = recipe.threads or pipeline.job.threads
    built = pipeline.build(pipeline.make(recipe).model, label=recipe.name, threads=recipe.threads)
    target = pipeline.job.target
    files = engine_files(built.files, file=built.record.file)
    precision = precision_of(files[built.record.file]) or "unknown"
    return Part(
        name=engine_name(recipe.name),
        file=built.record.file,
        files=files,
        runtime=target.runtime,
        settings=SessionSettings(threads=threads),
        target=target.name,
        precision=precision,
        needs=Needs(any_cpu_flag=cpu_flags_for(target, precision)),
        fallback=fallback,
        recipe=recipe,
    )


def _evaluated(pipeline: Pipeline, part: Part) -> ParityRecord:
    """Parity of an engine on all evaluation samples, which a stage has measured."""
    assert part.recipe is not None  # noqa: S101  of a candidate
    evaluated = pipeline.evaluate(part.files[part.file], label=part.recipe.name).record
    return replace(
        exported_parity(pipeline),
        samples=evaluated.samples,
        engine=evaluated.parity,
        engine_batch=evaluated.batch_parity,
    )


def calibration_of(pipeline: Pipeline) -> Calibration:
    """What calibrated: SHA-256 over the names and hashes of the files of its rows."""
    digest = hashlib.sha256()
    for path in sorted(pipeline.calibration.iterdir()):
        digest.update(f"{path.name} {fs.sha256_file(path)}\n".encode())
    data = pipeline.job.data
    return Calibration(
        fingerprint=digest.hexdigest(),
        samples=pipeline.data.record.calibration_samples,
        data=data.calibration or data.data,
    )
