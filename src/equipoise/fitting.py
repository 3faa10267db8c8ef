"""Whether a model fits a target, before anything is built: what ``equipoise fit`` calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import extras, onnxio
from equipoise.graph.cost import ModelCost, analyze
from equipoise.measure.peaks import measured_peaks
from equipoise.measure.roofline import PEAK_OF, Estimate, estimate
from equipoise.runtimes.registry import BUILDERS, builder
from equipoise.spec import TensorSpec
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Figure, Target
from equipoise.targets.profiles import get_target, is_here

_TIGHT: Final = 0.5

Kind = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that will not work on the target, or not as one might think.

    Attributes:
        kind: ``error`` when no engine can be made or run, else ``warning``.
        what: What is the matter, with the tensor, operator or value.
        do: What to do about it.
    """

    kind: Kind
    what: str
    do: str


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model fits a target.

    Attributes:
        target: Name of the target.
        findings: What will not work there, the worst first.
        operators_checked: Who looked at the operators; empty when nobody here can.
        sizes: Sizes of the dynamic dimensions that were used.
        memory_bytes: Weights and the most activations at once, estimated.
        estimate: Latency; None when the target has no figures for one.
        fits: Whether there is no error among the findings.
    """

    target: str
    findings: tuple[Finding, ...]
    operators_checked: str
    sizes: dict[str, int]
    memory_bytes: int
    estimate: Estimate | None
    fits: bool


def fit_model(model: Path, *, target: str, sizes: Mapping[str, int] | None = None) -> Fit:
    """Compare a model with what a target can do.

    Args:
        model: ONNX file.
        target: Name of a target, or a ``.toml`` file.
        sizes: Dynamic dimension -> size; see :func:`equipoise.graph.cost.analyze`.

    Raises:
        SourceError: It is no ONNX model, or the runtime here cannot run it.
        UsageError: There is no such target, or no dimension of such a name.
    """
    profile = _with_peaks(get_target(target, machine=detect_machine()))
    proto, cost = onnxio.load_model(model), analyze(model, sizes=sizes)
    checked, refused = _operators(profile, model)
    findings = [
        *refused,
        *_format_findings(profile, cost),
        *_shape_findings(profile, cost.inputs),
        *_type_findings(profile, cost),
        *_integer_findings(profile, proto),
        *_memory_findings(profile, cost),
    ]
    return Fit(
        target=profile.name,
        findings=tuple(sorted(findings, key=lambda finding: finding.kind)),
        operators_checked=checked,
        sizes=cost.sizes,
        memory_bytes=cost.weight_bytes + cost.peak_activation_bytes,
        estimate=estimate(profile, cost),
        fits=all(finding.kind != "error" for finding in findings),
    )


def _with_peaks(target: Target) -> Target:
    """The target with peaks measured here, where it is this machine and has none."""
    machine = detect_machine()
    if target.hardware.dense_tops or not is_here(target, machine):
        return target
    product, copy = measured_peaks()
    memory = Figure(value=machine.memory_bytes / 1e9, source="measured here")
    hardware = replace(
        target.hardware, dense_tops={"fp32": product}, bandwidth_gb_s=copy, memory_gb=memory
    )
    return replace(target, hardware=hardware)


# What will not work.


def _operators(target: Target, model: Path) -> tuple[str, list[Finding]]:
    """Who checked the operators, and what is refused."""
    if target.runtime not in BUILDERS.names():
        return "", []
    found = builder(target.runtime)
    refused = found.refusals(model) if found.availability().available else None
    if refused is None:
        return "", []
    do = "Leave these nodes to another provider, or rewrite them before export."
    errors = [Finding(kind="error", what=text, do=do) for text in refused]
    return f"{target.runtime} {found.availability().version}", errors


def _format_findings(target: Target, cost: ModelCost) -> Iterator[Finding]:
    if cost.opset > target.opset:
        yield Finding(
            kind="warning",
            what=f"the model is of opset {cost.opset}; {target.name} is known to read up to"
            f" {target.opset}",
            do=f"Export with --opset {target.opset} or --target {target.name}.",
        )
    if cost.ir_version > target.max_ir_version:
        yield Finding(
            kind="error",
            what=f"the file is of IR version {cost.ir_version}; {target.name} reads up to"
            f" {target.max_ir_version}",
            do=f"Export with --target {target.name}.",
        )


def _shape_findings(target: Target, inputs: tuple[TensorSpec, ...]) -> Iterator[Finding]:
    for spec in inputs:
        dynamic = [str(dim) for dim in spec.shape if isinstance(dim, str)]
        if target.static_shapes and dynamic:
            yield Finding(
                kind="error",
                what=f"input {spec.name!r} has dynamic dimensions ({', '.join(dynamic)});"
                f" {target.name} takes static shapes alone",
                do="Export with --static " + " ".join(f"{dim}=SIZE" for dim in dynamic) + ".",
            )


def _type_findings(target: Target, cost: ModelCost) -> Iterator[Finding]:
    used = Counter(node.dtype for node in cost.nodes if node.multiply_accumulates)
    for dtype, count in used.items():
        if dtype in target.dtypes or dtype not in PEAK_OF:
            continue
        if dtype == "float32":
            yield Finding(
                kind="warning",
                what=f"{count} products are in float32, which {target.name} computes in"
                f" {target.dtypes[0]}",
                do="Compare the outputs there, or quantise.",
            )
        else:
            yield Finding(
                kind="warning",
                what=f"{count} products are in {dtype}, which {target.name} does not compute in;"
                " it converts, and gains nothing",
                do=f"Use one of {', '.join(target.dtypes)}.",
            )


def _integer_findings(target: Target, proto: Any) -> Iterator[Finding]:
    """Q/DQ pairs that were made for another target."""
    constants = onnxio.initializers(proto)
    to_array = extras.require("onnx").numpy_helper.to_array
    zeros = [
        to_array(constants[node.input[2]])
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in constants
    ]
    scheme = target.int8
    other = {str(zero.dtype) for zero in zeros} - {scheme.activation}
    shifted = scheme.symmetric and any(bool(zero.any()) for zero in zeros)
    if other or shifted:
        wrong = f"{', '.join(sorted(other))} activations" if other else "zero points that are not 0"
        yield Finding(
            kind="error" if scheme.symmetric else "warning",
            what=f"the Q/DQ pairs are for another target: they have {wrong};"
            f" {target.name} wants {scheme.activation}{' around 0' if scheme.symmetric else ''}",
            do=f"Quantise the float model with --target {target.name}.",
        )


def _memory_findings(target: Target, cost: ModelCost) -> Iterator[Finding]:
    memory = target.hardware.memory_gb
    needed = cost.weight_bytes + cost.peak_activation_bytes
    if memory is None or needed < _TIGHT * memory.value * 1e9:
        return
    fits = needed < memory.value * 1e9
    yield Finding(
        kind="warning" if fits else "error",
        what=f"it needs about {needed / 1e9:.1f} GB of the {memory.value:g} GB of {target.name}",
        do="Quantise, prune, or run shorter sequences or smaller batches.",
    )
