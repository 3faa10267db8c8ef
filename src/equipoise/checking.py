"""Parity of engines with the model they were made from: what ``equipoise check`` calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs
from equipoise.bundle.reading import is_bundle
from equipoise.checks.golden import GoldenSettings, check_golden
from equipoise.checks.running import SideRun, SideRunner
from equipoise.checks.sides import FLOAT_OPTIMISED, FLOAT_WRITTEN, Side, SideSettings, sides_of
from equipoise.checks.verdict import CheckedSide, CheckRecord, MetricCheck, verdict
from equipoise.data.metrics import Metric, get_metric
from equipoise.data.store import Rows
from equipoise.engines import find_engine
from equipoise.errors import UsageError
from equipoise.jobs import JobConfig, make_pipeline, metric_of
from equipoise.locked import read_lock
from equipoise.locking import LatencySettings, check_locked
from equipoise.measure.interval import metric_interval, paired_drop
from equipoise.parity.blame import Blame, BlameSettings, find_blame
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.parity.limits import Finding, Limits, judge
from equipoise.parity.precision import Precision
from equipoise.parity.reproduce import write_reproducer
from equipoise.parity.tolerance import Allowed, allowed_difference
from equipoise.pipeline import Pipeline
from equipoise.report.gates import Gate
from equipoise.runtimes.protocol import SessionSettings
from equipoise.sources.source import parse_source
from equipoise.spec import Array
from equipoise.stages import Observer, StageRunner, default_cache
from equipoise.targets.machine import detect_machine

_BLAME_SAMPLES: Final = 8


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check, against what, on what data.

    Attributes:
        engines: Bundles, directories of engines, or ONNX files.
        against: The trained model, as ``tune`` takes it. Without it a bundle is checked against
            the reference outputs that it carries, which needs no PyTorch.
        data: Evaluation data; without it a bundle is checked on its golden inputs.
        weights: Weights of a factory or timm model.
        task: Head of a transformers model.
        samples: Only the first so many samples.
        tokenizer: ``tokenizer.json`` for texts.
        labels: Class names in index order.
        metric: Task metric, which needs labelled data. With ``limits.max_drop``, that of the task
            when empty; without either, none.
        limits: The user's own limits.
        precision: Of engines that do not say theirs.
        repeat: How often each engine is made, and run each time, to see how far it is from itself.
        blame: Look for the guilty node; None does where an engine fails.
        repro: Directory to write a reproducer of the departure to.
        locked: Lock to compare with; metric, samples and threads are those of it by default.
        any_machine: Compare latencies though the lock is of another CPU.
        threads: Threads per operator; all usable cores when None.
        target: Whose runtime ONNX files are built with.
        cache: Directory of stage results; the user's cache when None.
        time_limit_s: Limit for one side or stage.
    """

    engines: tuple[Path, ...]
    against: str = ""
    data: str = ""
    weights: Path | None = None
    task: str = ""
    samples: int | None = None
    tokenizer: Path | None = None
    labels: tuple[str, ...] = ()
    metric: str = ""
    limits: Limits = field(default_factory=Limits)
    precision: Precision | None = None
    repeat: int = 1
    blame: bool | None = None
    repro: Path | None = None
    locked: Path | None = None
    any_machine: bool = False
    threads: int | None = None
    target: str = "cpu"
    cache: Path | None = None
    time_limit_s: float = 3600.0


def run_check(request: CheckRequest, *, observer: Observer | None = None) -> CheckRecord:
    """Check engines, step by step from the source to each of them.

    Raises:
        UsageError: Options that do not go together, or a setting out of range.
        InputError: The model, an engine or the data cannot be used.
        IntegrityError: An engine is not what its manifest says.
        BackendError: An engine does not run.
    """
    _check_request(request)
    if not request.data:
        return _golden(request, observer or Observer())
    if request.locked is not None:
        request = _as_locked(request, request.locked)
    pipeline = make_pipeline(_job_config(request), observer=observer)
    with fs.scratch_directory() as folder:
        found = _Checks(pipeline, request, folder=folder, observer=observer).run()
    locked = _locked(request, pipeline, observer=observer)
    found = replace(found, locked=locked)
    return replace(found, verdict=verdict(found))


def _check_request(request: CheckRequest) -> None:
    if not request.engines:
        raise UsageError("nothing to check: give a bundle, an engine or an .onnx file")
    if request.repeat < 1:
        raise UsageError(f"--repeat is {request.repeat}; it must be at least 1")
    plain = [p for p in request.engines if not (is_bundle(p) or p.suffix == ".zip")]
    if (not request.against or not request.data) and plain:
        raise UsageError(
            f"checking {plain[0]} needs --against SOURCE and --data DATA",
            hint="A bundle alone carries reference outputs of its own.",
        )
    if request.data and not request.against:
        raise UsageError("--data needs --against: what should its outputs be compared with?")
    for option, wanted in (("--locked", request.locked), ("--repro", request.repro)):
        if wanted is not None and not request.data:
            raise UsageError(f"{option} needs --against SOURCE and --data DATA")
    if (request.metric or request.limits.max_drop is not None) and not request.data:
        raise UsageError("a task metric needs --against SOURCE and labelled --data DATA")


def _golden(request: CheckRequest, observer: Observer) -> CheckRecord:
    source = None
    if request.against:
        source = parse_source(request.against, weights=request.weights, task=request.task)
    settings = GoldenSettings(
        source=source,
        limits=request.limits,
        repeat=request.repeat,
        session=SessionSettings(threads=request.threads or detect_machine().cores),
    )
    runner = StageRunner(request.cache or default_cache(), observer=observer)
    return check_golden(request.engines, settings, runner=runner, observer=observer)


def _job_config(request: CheckRequest) -> JobConfig:
    return JobConfig(
        source=request.against,
        data=request.data,
        weights=request.weights,
        task=request.task,
        target=request.target,
        metric=request.metric or "accuracy",
        samples=request.samples,
        tokenizer=request.tokenizer,
        labels=request.labels,
        threads=request.threads,
        time_limit_s=request.time_limit_s,
        cache=request.cache,
        labelled=bool(request.metric) or request.limits.max_drop is not None,
    )


def _as_locked(request: CheckRequest, lock: Path) -> CheckRequest:
    """``request`` on the samples that were locked, judged by the same metric."""
    compared = read_lock(lock).compared
    return replace(
        request,
        metric=request.metric or (compared.metric if compared.labelled else ""),
        samples=request.samples or compared.samples,
        threads=request.threads or compared.threads,
    )


def _locked(
    request: CheckRequest, pipeline: Pipeline, *, observer: Observer | None
) -> tuple[Gate, ...]:
    if request.locked is None:
        return ()
    settings = LatencySettings(any_machine=request.any_machine)
    return tuple(
        gate
        for path in request.engines
        for gate in check_locked(
            request.locked, find_engine(path), pipeline, settings=settings, observer=observer
        )
    )


class _Checks:
    """The sides of one source, run and judged one after the other."""

    def __init__(
        self, pipeline: Pipeline, request: CheckRequest, *, folder: Path, observer: Observer | None
    ) -> None:
        self._pipeline, self._request = pipeline, request
        self._tolerances = {t.output: t for t in pipeline.exported.record.proof.tolerances}
        self._reference = Rows(pipeline.reference.files)
        self._metric = self._find_metric()
        self._runner = SideRunner(
            pipeline.evaluation,
            folder=folder,
            observer=observer or Observer(),
            time_limit_s=request.time_limit_s,
        )
        self._outputs: dict[str, Rows] = {pipeline.reference.record.by: self._reference}

    def run(self) -> CheckRecord:
        """Everything but the lock and the words."""
        planned = self._sides()
        runs = self._runner.run(planned, repeat=self._request.repeat)
        sides = tuple(self._check(side, run) for side, run in zip(planned, runs, strict=True))
        blame, reproducer = self._blame(sides)
        proof = self._pipeline.exported.record.proof
        return CheckRecord(
            reference=self._pipeline.reference.record.by,
            source=self._request.against,
            samples=len(self._reference),
            data=self._request.data,
            floors={t.output: t.floor for t in proof.tolerances},
            floor_by=proof.floor_by,
            sides=sides,
            blame=blame,
            reproducer=reproducer,
        )

    def _sides(self) -> tuple[Side, ...]:
        job = self._pipeline.job
        settings = SideSettings(
            session=SessionSettings(threads=job.threads),
            runtime=job.target.runtime,
            precision=self._request.precision,
        )
        return sides_of(
            self._request.engines,
            self._pipeline.float_model,
            reference=self._pipeline.reference.record.by,
            settings=settings,
        )

    def _check(self, side: Side, run: SideRun) -> CheckedSide:
        """Judge a side. One that is there to tell steps apart may have failed to run."""
        if run.error is not None and side.given:
            raise run.error
        if run.outputs is None:
            return CheckedSide(side=side, failed=run.error.message if run.error else "")
        outputs = run.outputs
        self._outputs[side.name] = outputs
        compared = self._compare(self._reference, outputs)
        before = self._outputs.get(side.before)
        return CheckedSide(
            side=side,
            outputs=compared,
            by_step=() if before is None else self._compare(before, outputs),
            allowed={p.name: self._allowed(side, p).atol for p in compared},
            findings=tuple(self._judge(side, compared)),
            metric=self._metric_of(outputs) if side.given else None,
            spreads=run.spreads,
        )

    def _compare(self, reference: Rows, outputs: Rows) -> tuple[OutputParity, ...]:
        comparison = Comparison(rtol=self._request.limits.rtol or 0.0)
        for wanted, found in zip(reference, outputs, strict=True):
            comparison.add(wanted, found)
        return comparison.result()

    def _judge(self, side: Side, compared: Sequence[OutputParity]) -> Iterator[Finding]:
        """The float sides keep to the noise floor, given engines to the user's limits if any.

        Below float32, a limit of the task metric is one too: the task decides, not the numbers.
        """
        if not side.given and side.name not in {FLOAT_WRITTEN, FLOAT_OPTIMISED}:
            return
        limits = self._request.limits if side.given else Limits()
        if side.precision != "float32" and limits.max_drop is not None and not limits.stated:
            return
        for parity in compared:
            yield from judge(parity, limits, allowed=self._allowed(side, parity))

    def _allowed(self, side: Side, parity: OutputParity) -> Allowed:
        tolerance = self._tolerances[parity.name]
        return allowed_difference(tolerance, precision=side.precision, scale=parity.scale)

    def _find_metric(self) -> str:
        """The metric that was asked for; with a limit of its drop, that of the task; else none."""
        request = self._request
        if request.metric or request.limits.max_drop is None:
            return request.metric
        return metric_of(self._pipeline.job.source)

    def _metric_of(self, outputs: Rows) -> MetricCheck | None:
        if not self._metric:
            return None
        metric = get_metric(self._metric, labels=self._pipeline.data.record.labels)
        labels = Rows(self._pipeline.data.files / "labels")
        reference, own = (
            _statistics(metric, found, labels=labels, reference=self._reference)
            for found in (self._reference, outputs)
        )
        return MetricCheck(
            name=self._metric,
            value=metric_interval(own, metric.value),
            drop=paired_drop(reference, own, metric.value, discrete=metric.discrete),
            max_drop=self._request.limits.max_drop,
        )

    def _blame(self, sides: Sequence[CheckedSide]) -> tuple[Blame | None, str]:
        """The node that departs in the first engine that fails, and its reproducer."""
        failing = [c for c in sides if c.side.given and not c.passed]
        chosen = failing or [c for c in sides if c.side.given and self._request.blame]
        wanted = self._request.blame is not False or self._request.repro is not None
        if not chosen or not wanted:
            return None, ""
        return self._blame_of(chosen[0].side)

    def _blame_of(self, side: Side) -> tuple[Blame | None, str]:
        engine = find_engine(side.path)
        if engine.file.suffix != ".onnx":
            return None, ""
        feeds = list(Rows(self._pipeline.evaluation)[:_BLAME_SAMPLES])
        settings = BlameSettings(runtime=side.build_with or engine.runtime, session=side.settings)
        blame = find_blame(self._pipeline.float_model, engine.file, feeds=feeds, settings=settings)
        if self._request.repro is None or blame.first is None:
            return blame, ""
        made = write_reproducer(
            self._request.repro,
            blame.first,
            reference=self._pipeline.float_model,
            candidate=engine.file,
            feeds=feeds,
            settings=settings,
        )
        return blame, str(made.directory)


def _statistics(metric: Metric, outputs: Rows, *, labels: Rows, reference: Rows) -> Array:
    """float64 [samples, k]."""
    rows = zip(outputs, labels, reference, strict=True)
    return np.stack([metric.statistics(found, w["label"], r) for found, w, r in rows])
