"""``equipoise fit``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.fitting import Fit
    from equipoise.measure.roofline import Estimate

_NOT_FITTING = 5


def command(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    target: options.Target = "cpu",
    dim: Annotated[
        list[str] | None, typer.Option(help="Size of a dynamic dimension: sequence=128.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Say what of a model will not work on a target, and estimate what it costs there.

    Nothing is built or measured. Exits with 5 when the model does not fit.
    """
    from equipoise.fitting import fit_model

    found = fit_model(model, target=target, sizes=options.sizes(dim or (), option="--dim"))
    if json:
        console.print_json(found)
    else:
        console.print_lines(*_lines(found))
    if not found.fits:
        raise typer.Exit(_NOT_FITTING)


def _lines(found: Fit) -> Iterator[str]:
    from equipoise.report.rows import size

    at = ", ".join(f"{name}={value}" for name, value in found.sizes.items())
    yield f"{'fits' if found.fits else 'does not fit'} {found.target}"
    for finding in found.findings:
        yield f"{finding.kind:<10} {finding.what}"
        yield f"{'':<10} {finding.do}"
    if found.operators_checked:
        yield f"operators  checked by {found.operators_checked}"
    else:
        yield "operators  not checked: the target's runtime is not here"
    yield f"memory     {size(found.memory_bytes)} estimated{f' at {at}' if at else ''}"
    if found.estimate is None:
        yield "latency    not estimated: no figures of this target are known"
    else:
        yield from _estimate(found.estimate)


def _estimate(estimate: Estimate) -> Iterator[str]:
    shares = ", ".join(
        f"{milliseconds / estimate.latency_ms:.0%} {bound}"
        for bound, milliseconds in sorted(estimate.bound_ms.items(), key=lambda item: -item[1])
    )
    yield f"latency    {estimate.latency_ms:.2f} ms estimated (waiting: {shares})"
    yield f"{'':<10} from {estimate.peak.value:.3g} TOPS ({estimate.peak.source})"
    bandwidth = estimate.bandwidth_gb_s
    yield f"{'':<10} and {bandwidth.value:.3g} GB/s ({bandwidth.source})"
    for node in estimate.slowest:
        yield f"{'':<10} {node.latency_ms:.3f} ms  {node.operator} {node.name} ({node.bound})"
