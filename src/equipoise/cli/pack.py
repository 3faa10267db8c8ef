"""``equipoise pack``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.bundle.manifest import Engine
    from equipoise.packing import PackResult


def command(
    engines: Annotated[
        list[str],
        typer.Argument(
            help="Directories that equipoise build wrote, or .onnx files, the preferred one first;"
            " NAME=PATH gives a name."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle; one file if it ends in .zip.")
    ],
    archive: Annotated[
        bool, typer.Option("--zip", help="Write one file; .zip is added to its name.")
    ] = False,
    against: Annotated[
        str, typer.Option(help="The trained model, or the float .onnx file, they were made from.")
    ] = "",
    data: Annotated[str, typer.Option(help="Evaluation data, as tune takes it.")] = "",
    weights: options.Weights = None,
    task: options.Task = "",
    samples: options.Samples = None,
    max_length: options.MaxLength = 512,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    float_fallback: Annotated[
        bool,
        typer.Option("--float-fallback", help="Put the float model last, for any other device."),
    ] = False,
    name: Annotated[
        str, typer.Option(help="Name of the bundle; that of the source if not given.")
    ] = "",
    serial: Annotated[int, typer.Option(help="Rises with every release of that name.")] = 0,
    licence: Annotated[str, typer.Option(help="Of the model, an SPDX expression.")] = "",
    weights_licence: Annotated[
        str, typer.Option(help="Of the weights it was made from, an SPDX expression.")
    ] = "",
    data_licence: Annotated[str, typer.Option(help="Of its data, an SPDX expression.")] = "",
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="For engines that cannot run here: OUTPUT=VALUE, the largest difference from the"
            " source that a device may show."
        ),
    ] = None,
    threads: options.Threads = None,
    cache_dir: options.CacheDir = None,
    time_limit: options.TimeLimit = 3600.0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Pack engines into one bundle; a device runs the first that fits it.

    Each engine that can run here is compared with the source on the data. Golden vectors are the
    first samples of it.
    """
    from equipoise.bundle.manifest import Licences
    from equipoise.packing import PackRequest, pack_engines

    request = PackRequest(
        engines=tuple(engines),
        output=output.with_name(f"{output.name}.zip")
        if archive and output.suffix != ".zip"
        else output,
        against=against,
        data=data,
        weights=weights,
        task=task,
        samples=samples,
        max_length=max_length,
        tokenizer=tokenizer,
        labels=options.names(labels),
        float_fallback=float_fallback,
        name=name,
        serial=serial,
        licences=Licences(model=licence, weights_from=weights_licence, data=data_licence),
        tolerances=_tolerances(tolerance or ()),
        threads=threads,
        cache=cache_dir,
        time_limit_s=time_limit,
    )
    with console.progress(quiet=quiet or json) as observer:
        result = pack_engines(request, observer=observer)
    if json:
        console.print_json(result)
    else:
        console.print_lines(*_lines(result))


def _tolerances(texts: list[str] | tuple[()]) -> dict[str, float]:
    from equipoise.errors import UsageError

    found = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--tolerance {text!r}: expected OUTPUT=VALUE, such as logits=0.05")
    return found


def _lines(result: PackResult) -> Iterator[str]:
    yield f"wrote    {result.bundle} ({result.manifest.name}, serial {result.manifest.serial})"
    for engine in result.manifest.engines:
        yield from _about(engine, result)
    yield ""
    yield "On the device, with numpy and the runtime alone:"
    yield f'    session = equipoise.load("{result.bundle}")'


def _about(engine: Engine, result: PackResult) -> Iterator[str]:
    from equipoise.report.rows import size

    kind = f"{engine.precision}, {size(engine.size_bytes)}, {engine.runtime}"
    yield f"engine   {engine.name} ({kind}{', fallback' if engine.fallback else ''})"
    if engine.name in result.not_run:
        yield f"         not run here: {result.not_run[engine.name]}"
    for output in result.parity[engine.name].engine if engine.name in result.parity else ():
        allowed = engine.golden_tolerance[output.name]
        yield (
            f"         {output.name} differs from the source by at most {output.max_abs:.3g};"
            f" a device may differ from here by {allowed:.3g}"
        )
