"""``equipoise inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.engines import BundleView
    from equipoise.graph.cost import ModelCost, TensorCost


def command(
    path: Annotated[Path, typer.Argument(help="An .onnx file or a bundle.")],
    dim: Annotated[
        list[str] | None, typer.Option(help="Size of a dynamic dimension: sequence=128.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to name.")] = 10,
    json: options.Json = False,
) -> None:
    """Show what a model is and what it costs.

    Inputs, operators, parameters, multiply-accumulates per inference, weight and peak activation
    memory, and the largest tensors. Of a bundle, every hash is checked; then what it holds, which
    of its engines this machine would run, and what that one costs where it is ONNX.
    """
    from equipoise.bundle.reading import is_bundle

    sizes = options.sizes(dim or (), option="--dim")
    if path.is_dir() or is_bundle(path):
        _bundle(path, sizes=sizes, top=top, json=json)
        return
    from equipoise.graph.cost import analyze

    found = analyze(path, sizes=sizes, top=top)
    if json:
        console.print_json(found)
    else:
        _print(found, path=path)


def _bundle(path: Path, *, sizes: dict[str, int], top: int, json: bool) -> None:
    from equipoise.engines import view_bundle

    found = view_bundle(path, sizes=sizes, top=top)
    if json:
        console.print_json(found)
        return
    console.print_lines(*_bundle_lines(found))
    if found.cost is not None:
        console.print_lines("")
        _print(found.cost, path=Path(f"{path}: engine {found.chosen}"))


def _bundle_lines(found: BundleView) -> Iterator[str]:
    from equipoise.report.rows import size

    manifest = found.manifest
    state = "a signature, not checked here: equipoise verify" if found.signed else "not signed"
    yield f"bundle       {found.bundle} ({manifest.name}, serial {manifest.serial}, {state})"
    yield from (f"input        {spec}" for spec in manifest.inputs)
    yield from (f"output       {spec}" for spec in manifest.outputs)
    for engine in manifest.engines:
        kind = f"{engine.precision}, {size(engine.size_bytes)}, {engine.runtime}"
        state = "runs here" if engine.name == found.chosen else found.unfit.get(engine.name, "fits")
        yield f"engine       {engine.name} ({kind}): {state}"
    licences = manifest.licences
    stated = {"model": licences.model, "weights": licences.weights_from, "data": licences.data}
    words = (f"{what} {said or 'not stated'}" for what, said in stated.items())
    yield f"licences     {', '.join(words)}"
    yield from (
        f"file         {name} ({size(entry.size_bytes)})" for name, entry in manifest.files.items()
    )


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
