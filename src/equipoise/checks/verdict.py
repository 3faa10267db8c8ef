"""What a check found, and its verdict in words: what passed, what failed, where, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from equipoise.checks.running import Spread
from equipoise.checks.sides import Side
from equipoise.measure.interval import Interval
from equipoise.parity.blame import Blame
from equipoise.parity.compare import OutputParity
from equipoise.parity.limits import Finding
from equipoise.report.gates import Gate


@dataclass(frozen=True, kw_only=True)
class MetricCheck:
    """The task metric of a side.

    Attributes:
        name: The metric.
        value: Of this side, with its 95 % interval over samples.
        drop: Metric of the reference minus this one, paired; one-sided 95 % bounds.
        max_drop: Largest allowed drop; None where the user named none.
    """

    name: str
    value: Interval
    drop: Interval
    max_drop: float | None

    @property
    def passed(self) -> bool:
        """Whether the bound of the drop is allowed."""
        return self.max_drop is None or self.drop.high <= self.max_drop


@dataclass(frozen=True, kw_only=True)
class CheckedSide:
    """A side beside the reference and beside the side that it is made from.

    Attributes:
        side: Which.
        outputs: How each output compares with the reference.
        by_step: How it compares with the side before; empty where that did not run.
        allowed: Output -> difference that the noise floor or the bundle allows.
        findings: What was judged.
        metric: The task metric; None where none was asked for.
        spreads: How far it is from itself; empty without repetition.
        failed: Why it did not run; empty when it did.
    """

    side: Side
    outputs: tuple[OutputParity, ...] = ()
    by_step: tuple[OutputParity, ...] = ()
    allowed: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    metric: MetricCheck | None = None
    spreads: tuple[Spread, ...] = ()
    failed: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything that was judged is as it has to be."""
        judged = all(finding.passed for finding in self.findings)
        return judged and (self.metric is None or self.metric.passed)


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """The outcome of a check.

    Attributes:
        reference: What everything was compared with: ``PyTorch``.
        source: The trained model, as the user named it.
        samples: Number of real samples.
        data: Where they come from, in words.
        floors: Output -> float32 noise floor of the model on this data; empty where limits come
            from elsewhere.
        floor_by: What it was measured by.
        sides: All sides, each after the one that it is made from.
        blame: The node that departs; None where nobody looked or nothing departs.
        reproducer: Directory of the reproducer; empty without one.
        locked: What was compared with a lock.
        verdict: The outcome in words.
    """

    reference: str
    source: str
    samples: int
    data: str
    sides: tuple[CheckedSide, ...]
    floors: dict[str, float] = field(default_factory=dict)
    floor_by: str = ""
    blame: Blame | None = None
    reproducer: str = ""
    locked: tuple[Gate, ...] = ()
    verdict: str = ""

    @property
    def passed(self) -> bool:
        """Whether every gate is passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Everything that was judged."""
        found = (gate for checked in self.sides for gate in _gates(checked, self))
        return (*found, *self.locked)


def _gates(checked: CheckedSide, record: CheckRecord) -> Iterator[Gate]:
    advice = "" if checked.passed else advice_for(parting(record.sides, checked) or checked)
    for finding in checked.findings:
        yield Gate(
            name=f"{finding.output}: {finding.measure}",
            group=checked.side.name,
            passed=finding.passed,
            measured=finding.measured,
            allowed=finding.limit,
            advice="" if finding.passed else advice,
        )
    metric = checked.metric
    if metric is not None and metric.max_drop is not None:
        yield Gate(
            name=f"drop of {metric.name}",
            group=checked.side.name,
            passed=metric.passed,
            measured=f"{metric.drop.value:+.4f}, at most {metric.drop.high:.4f} at 95 %",
            allowed=f"at most {metric.max_drop:g}",
            advice="" if metric.passed else f"{advice} More samples make the bound tighter.",
        )


def chain(sides: tuple[CheckedSide, ...], last: CheckedSide) -> tuple[CheckedSide, ...]:
    """The sides from the reference to ``last``, in order."""
    by_name = {checked.side.name: checked for checked in sides}
    found = [last]
    while (before := by_name.get(found[0].side.before)) is not None:
        found.insert(0, before)
    return tuple(found)


def parting(sides: tuple[CheckedSide, ...], last: CheckedSide) -> CheckedSide | None:
    """The side behind the step that changes the numbers most, on the way to ``last``."""
    ran = [checked for checked in chain(sides, last) if checked.by_step]
    return min(ran, key=lambda checked: _least_sqnr(checked.by_step), default=None)


def _least_sqnr(outputs: tuple[OutputParity, ...]) -> float:
    return min((math.inf if p.sqnr_db is None else p.sqnr_db for p in outputs), default=math.inf)


def worst(outputs: tuple[OutputParity, ...]) -> OutputParity:
    """The output with the least signal over noise."""
    return min(outputs, key=lambda p: math.inf if p.sqnr_db is None else p.sqnr_db)


_ADVICE = {
    "exporter": "Export again with `equipoise export`, which names the node that departs.",
    "quantiser": "Run `equipoise diagnose FLOAT.onnx ENGINE.onnx --data DATA`, or quantise again"
    " with `equipoise quantize --min-sqnr`.",
    "conversion to half precision": "Convert it with `equipoise quantize --scheme float16`, which"
    " keeps in float32 what needs it.",
    "changes to the file": "It is not the file that this source exports: it has other weights, or"
    " its graph was edited.",
    "runtime kernels": "Take the reproducer of --repro to the runtime's makers; on a CPU without"
    " VNNI, build with --exact-integers.",
}


def advice_for(checked: CheckedSide) -> str:
    """What to do about the step that leads to a side."""
    step = checked.side.step
    return _ADVICE.get(step, f"{step.capitalize()} changed the numbers: see --repro.")


def verdict(record: CheckRecord) -> str:
    """The outcome in sentences."""
    given = [checked for checked in record.sides if checked.side.given]
    bad = [checked for checked in record.sides if not checked.passed]
    sentences = [_failed(checked, record) for checked in bad]
    sentences += [_passed(checked, record) for checked in given if checked.passed]
    sentences += [
        f"FAILED against the lock: {gate.name} is {gate.measured}; allowed {gate.allowed}."
        f" {gate.advice}".rstrip()
        for gate in record.locked
        if not gate.passed
    ]
    if record.locked and all(gate.passed for gate in record.locked):
        sentences.append(f"PASSED against the lock: all {len(record.locked)} gates.")
    return "\n".join(sentences)


def _passed(checked: CheckedSide, record: CheckRecord) -> str:
    words = (
        f"PASSED: {checked.side.name} agrees with {record.reference} on {record.samples} samples:"
        f" {_numbers(worst(checked.outputs))}"
    )
    return f"{words}{_metric_words(checked.metric)}."


def _numbers(parity: OutputParity) -> str:
    words = f"{parity.name} differs by at most {parity.max_abs:.3g}"
    if parity.sqnr_db is not None:
        words += f" (SQNR {parity.sqnr_db:.1f} dB)"
    return words


def _metric_words(metric: MetricCheck | None) -> str:
    if metric is None:
        return ""
    return (
        f"; {metric.name} {metric.value.value:.4f}, a drop of {metric.drop.value:+.4f}, at most"
        f" {metric.drop.high:.4f} at 95 %"
    )


def _failed(checked: CheckedSide, record: CheckRecord) -> str:
    reasons = [
        f"{f.measure} of {f.output} is {f.measured}, allowed {f.limit}"
        for f in checked.findings
        if not f.passed
    ]
    metric = checked.metric
    if metric is not None and not metric.passed:
        reasons.append(
            f"{metric.name} drops by {metric.drop.value:.4f}, at most {metric.drop.high:.4f} at"
            f" 95 %, allowed {metric.max_drop:g}"
        )
    words = [f"FAILED: {checked.side.name} on {record.samples} samples: {'; '.join(reasons)}."]
    step = parting(record.sides, checked)
    if step is not None:
        words.append(_step_words(step, record.sides, checked))
        if record.blame is not None and checked.side.given:
            words.append(_sentence(record.blame.in_words()))
        words.append(advice_for(step))
    return " ".join(words)


def _sentence(text: str) -> str:
    """A text of one line or several as sentences of one line."""
    lines = (line.strip().rstrip(".") for line in text.splitlines() if line.strip())
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)


def _step_words(step: CheckedSide, sides: tuple[CheckedSide, ...], last: CheckedSide) -> str:
    others = [c for c in chain(sides, last) if c.by_step and c is not step]
    words = (
        f"They part by the {step.side.step}, between {step.side.before} and {step.side.name}"
        f" ({_decibels(step.by_step)}"
    )
    if others:
        least = min(others, key=lambda c: _least_sqnr(c.by_step))
        words += f"; no other step is below {_decibels(least.by_step)}"
    return f"{words})."


def _decibels(outputs: tuple[OutputParity, ...]) -> str:
    least = _least_sqnr(outputs)
    return "no difference" if least == math.inf else f"{least:.1f} dB"


def details(record: CheckRecord) -> Mapping[str, str]:
    """What a reader of a summary may want to unfold: title -> text."""
    return {
        f"{checked.side.name}: {parity.name}": describe(parity)
        for checked in record.sides
        for parity in checked.outputs
    }


def describe(parity: OutputParity) -> str:
    """All measures of one output, in words."""
    words = [
        f"largest difference {parity.max_abs:.3g} (relative {parity.max_rel:.3g})",
        f"SQNR {_decibels((parity,))}",
        f"cosine {parity.cosine:.6f} (least {parity.least_cosine:.6f})",
    ]
    if parity.flips is not None:
        words.append(f"arg-max flips {parity.flips:.3%}")
    if parity.top_k_overlap is not None:
        words.append(f"top-{parity.top_k} overlap {parity.top_k_overlap:.3%}")
    if parity.kl is not None:
        words.append(f"KL {parity.kl:.3g} nats")
    return ", ".join(words)
