"""Parity of a bundle or an ONNX file against the source it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise import fs
from equipoise.data.store import Rows, write_rows
from equipoise.deploy import BundleSession
from equipoise.export.reference import ReferenceConfig
from equipoise.export.source import Source
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.parity.tolerance import Tolerance
from equipoise.pipeline import REFERENCE, Pipeline
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.stages import StageRunner


@dataclass(frozen=True, kw_only=True)
class CheckedOutput:
    """One output and what it is allowed.

    Attributes:
        parity: How it compares with the reference.
        allowed: Largest allowed absolute difference.
    """

    parity: OutputParity
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.parity.max_abs <= self.allowed


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """The outcome of a check.

    Attributes:
        subject: What was checked.
        reference: What it was compared with.
        samples: Number of real samples.
        outputs: One entry per output.
    """

    subject: str
    reference: str
    samples: int
    outputs: tuple[CheckedOutput, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within what is allowed."""
        return all(output.passed for output in self.outputs)


def check_bundle(
    bundle: BundleSession, *, source: Source | None, runner: StageRunner, atol: float | None
) -> CheckRecord:
    """Run the golden inputs of a bundle here and compare with the reference.

    Args:
        bundle: The open bundle; its hashes have been verified.
        source: The trained model, to compute the reference anew; None takes the reference outputs
            that the bundle carries, which needs no PyTorch.
        runner: Runs the source in a child process.
        atol: Largest allowed absolute difference; the bundle's own tolerance when None.
    """
    vectors = bundle.golden()
    references = [dict(vector.reference) for vector in vectors]
    if source is not None:
        with fs.scratch_directory() as folder:
            write_rows(folder / "inputs", [vector.inputs for vector in vectors])
            config = ReferenceConfig(
                source=source,
                samples=folder / "inputs",
                names=tuple(spec.name for spec in bundle.inputs),
            )
            references = list(Rows(runner.run(REFERENCE, config, label="run the source").files))
    comparison = Comparison()
    for vector, reference in zip(vectors, references, strict=True):
        comparison.add(reference, bundle.run(vector.inputs))
    limits = bundle.manifest.golden_tolerance
    return CheckRecord(
        subject=str(bundle.directory),
        reference=source.name if source else "the reference outputs in the bundle",
        samples=len(vectors),
        outputs=tuple(
            CheckedOutput(parity=p, allowed=limits.get(p.name, 0.0) if atol is None else atol)
            for p in comparison.result()
        ),
    )


def check_onnx(model: Path, *, pipeline: Pipeline, atol: float | None) -> CheckRecord:
    """Compare an ONNX file with its source on the evaluation data.

    Args:
        model: The file.
        pipeline: Of the source and the data.
        atol: Largest allowed absolute difference; from the source's float32 noise floor when None.
    """
    inputs, references = Rows(pipeline.evaluation), Rows(pipeline.reference.files)
    comparison = Comparison()
    settings = SessionSettings(threads=pipeline.job.threads)
    with session_opener(pipeline.job.target.runtime)(model, settings=settings) as session:
        for feeds, reference in zip(inputs, references, strict=True):
            comparison.add(reference, session.run(feeds))
    limits = {t.output: t for t in pipeline.exported.record.proof.tolerances}
    return CheckRecord(
        subject=str(model),
        reference=pipeline.job.source.name,
        samples=len(inputs),
        outputs=tuple(
            CheckedOutput(parity=p, allowed=_allowed(p, limits, atol=atol))
            for p in comparison.result()
        ),
    )


def _allowed(parity: OutputParity, limits: dict[str, Tolerance], *, atol: float | None) -> float:
    return limits[parity.name].atol if atol is None else atol
