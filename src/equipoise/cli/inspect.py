"""``equipoise inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.graph.cost import ModelCost, TensorCost


def command(
    path: Annotated[Path, typer.Argument(help="An .onnx file or a bundle directory.")],
    dim: Annotated[
        list[str] | None, typer.Option(help="Size of a dynamic dimension: sequence=128.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to name.")] = 10,
    json: options.Json = False,
) -> None:
    """Show what a model is and what it costs.

    Inputs, operators, parameters, multiply-accumulates per inference, weight and peak activation
    memory, and the largest tensors.
    """
    from equipoise.graph.cost import analyze

    found = analyze(_engine(path), sizes=options.sizes(dim or (), option="--dim"), top=top)
    if json:
        console.print_json(found)
    else:
        _print(found, path=path)


def _engine(path: Path) -> Path:
    if not path.is_dir():
        return path
    from equipoise.bundle.manifest import read_manifest, verify

    manifest = read_manifest(path)
    verify(path, manifest)
    return path / manifest.engine.file


def _print(found: ModelCost, *, path: Path) -> None:
    from equipoise.report.rows import size

    at = ", ".join(f"{name}={value}" for name, value in found.sizes.items())
    operators = ", ".join(f"{count} {name}" for name, count in found.operators.items())
    console.print_lines(
        f"model        {path} (opset {found.opset}, IR {found.ir_version})",
        *(f"input        {spec}" for spec in found.inputs),
        *(f"output       {spec}" for spec in found.outputs),
        f"parameters   {found.parameters:,}",
        f"MACs         {found.multiply_accumulates:,} per inference{f' at {at}' if at else ''}",
        f"weights      {size(found.weight_bytes)}; file {size(found.file_bytes)}",
        f"activations  {size(found.peak_activation_bytes)} at the peak{f' at {at}' if at else ''}",
        f"operators    {operators}",
    )
    if found.uncounted:
        console.print_lines(f"not counted  {', '.join(found.uncounted)}")
    _print_tensors("largest weights", found.largest_weights)
    _print_tensors("largest activations", found.largest_activations)


def _print_tensors(title: str, tensors: tuple[TensorCost, ...]) -> None:
    from equipoise.report.rows import size

    if tensors:
        console.print_lines("", title)
    for tensor in tensors:
        shape = ", ".join(map(str, tensor.shape))
        console.print_lines(
            f"  {size(tensor.size_bytes):>10}  {tensor.name}: {tensor.dtype}[{shape}]"
        )
