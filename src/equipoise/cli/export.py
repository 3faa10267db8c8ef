"""``equipoise export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equipoise.exporting import ExportedFile, ExportResult


def command(
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    weights: options.Weights = None,
    task: options.Task = "",
    data: Annotated[
        str | None,
        typer.Option(help="Take inputs from labelled data; the model's own otherwise."),
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help=".npz with one array per input, samples first.")
    ] = None,
    input_spec: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input: image=float32[batch,3,224,224]."),
    ] = None,
    dynamic: Annotated[
        str, typer.Option(help="Dynamic dimensions: batch,sequence. By default those, where used.")
    ] = "",
    static: Annotated[bool, typer.Option("--static", help="No dynamic dimension.")] = False,
    size: Annotated[
        list[str] | None, typer.Option(help="Size of a dimension that is fixed: sequence=128.")
    ] = None,
    buckets: Annotated[
        list[str] | None,
        typer.Option(help="One more file, all sizes fixed, for each of: sequence=32,64,128."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the target's by default.")] = None,
    target: options.Target = "cpu",
    exporter: Annotated[
        str,
        typer.Option(
            help="The only exporter to try: dynamo, dynamo-eager, dynamo-decomposed or torchscript."
        ),
    ] = "",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fuse transformer blocks for the target's runtime.")
    ] = False,
    embed: Annotated[
        bool,
        typer.Option(
            "--embed-preprocessing",
            help="Normalise pictures in the graph, and resize where it can: it takes uint8 pixels.",
        ),
    ] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Leave out the exporter's metadata.")
    ] = False,
    max_length: options.MaxLength = 512,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    time_limit: Annotated[float, typer.Option(help="Limit for one exporter, in seconds.")] = 900.0,
    cache_dir: options.CacheDir = None,
    fresh: options.Fresh = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Export a model to ONNX, proved at every size it claims.

    Exporters are tried in turn, each in a process of its own; the first whose file gives the
    numbers of PyTorch, at the traced size and at others, is kept. Without parity no file is
    written, the first node that departs is named, and the exit code is 6.
    """
    from equipoise.exporting import ExportRequest, export_model

    request = ExportRequest(
        source=source,
        output=output,
        weights=weights,
        task=task,
        data=data,
        sample=sample,
        inputs=tuple(input_spec or ()),
        dynamic=options.names(dynamic) or None,
        static=static,
        sizes=options.sizes(size or (), option="--size"),
        buckets=options.size_lists(buckets or (), option="--buckets"),
        opset=opset,
        target=target,
        exporter=exporter,
        fuse=fuse,
        embed=embed,
        release=release,
        tokenizer=tokenizer,
        labels=options.names(labels),
        max_length=max_length,
        cache=cache_dir,
        time_limit_s=time_limit,
        fresh=fresh,
    )
    with console.progress(quiet=quiet or json) as observer:
        found = export_model(request, observer=observer)
    if json:
        console.print_json(found)
    else:
        console.print_lines(*_lines(found))


_SIZES_SHOWN: Final = 5


def _lines(found: ExportResult) -> Iterator[str]:
    from equipoise.report.rows import size

    record = found.record
    yield from (f"tried    {note}" for note in record.notes)
    yield f"inputs   {record.proof.made_by}"
    for file in found.files:
        verified = file.verified
        yield (
            f"wrote    {file.path} ({size(file.size_bytes)}, opset {verified.opset},"
            f" IR {verified.ir_version})"
        )
        yield from _specs(file)
        yield from _parity(found, file)


def _specs(file: ExportedFile) -> Iterator[str]:
    yield from (f"input    {spec}" for spec in file.verified.inputs)
    yield from (f"output   {spec}" for spec in file.verified.outputs)


def _parity(found: ExportResult, file: ExportedFile) -> Iterator[str]:
    from equipoise.parity.sizes import in_words

    allowed = {limit.output: limit.atol for limit in found.record.proof.tolerances}
    entries = file.verified.parity
    for entry in entries[:_SIZES_SHOWN]:
        yield from (
            f"parity   {in_words(entry.sizes)}: {p.name} differs by {p.max_abs:.2g};"
            f" allowed {allowed[p.name]:.2g}"
            for p in entry.outputs
        )
    if rest := entries[_SIZES_SHOWN:]:
        yield f"parity   and at {len(rest)} other sizes, within what is allowed"
