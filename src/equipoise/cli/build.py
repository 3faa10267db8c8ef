"""``equipoise build``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.building import BuildResult
    from equipoise.runtimes.protocol import SizeRange


def command(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    target: options.Target = "cpu",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of dynamic dimensions, least:usual:largest, such as"
            " batch=1:1:8,sequence=1:64:128; repeat it for several profiles."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real inputs, as for calibration: their sizes make the profiles."),
    ] = None,
    buckets: Annotated[int, typer.Option(min=1, help="Profiles from the sizes of --data.")] = 3,
    tokenizer: options.Tokenizer = None,
    compute_capability: Annotated[
        str, typer.Option(help="Of the NVIDIA GPUs it is for, such as 8.6,8.9.")
    ] = "",
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Let later versions of the runtime load it."),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option("--hardware-compatible", help="Let other GPUs of its generation load it."),
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights out of the engine.")
    ] = False,
    hint: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="Execution provider or device instead of the target's, options after a colon:"
            " CUDAExecutionProvider:device_id=0; repeat it for several."
        ),
    ] = None,
    exact_integers: Annotated[
        bool,
        typer.Option("--exact-integers", help="No saturation on CPUs without VNNI; slower."),
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File in which kernel timings are kept.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per operator.")] = 1,
    cache_dir: options.CacheDir = None,
    time_limit: options.TimeLimit = 3600.0,
    fresh: options.Fresh = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Build the engine of a target, and say whether it was run here or only built."""
    from equipoise.building import BuildRequest, build_engine
    from equipoise.errors import UsageError
    from equipoise.runtimes.protocol import BuildSettings, SessionSettings

    if hint not in {"latency", "throughput"}:
        raise UsageError(f"--hint is {hint!r}; latency or throughput is possible")
    request = BuildRequest(
        model=model,
        output=output,
        target=target,
        options=BuildSettings(
            profiles=tuple(_profile(text) for text in profile or ()),
            compute_capabilities=options.names(compute_capability),
            timing_cache=timing_cache,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            strip_weights=strip_weights,
        ),
        settings=SessionSettings(
            threads=threads,
            hint=cast("Literal['latency', 'throughput']", hint),
            providers=tuple(provider or ()),
            exact_integers=exact_integers,
        ),
        data=data,
        tokenizer=tokenizer,
        buckets=buckets,
        cache=cache_dir,
        time_limit_s=time_limit,
        fresh=fresh,
    )
    with console.progress(quiet=quiet or json) as observer:
        result = build_engine(request, observer=observer)
    if json:
        console.print_json(result)
    else:
        console.print_lines(*_lines(result, output))


def _profile(text: str) -> dict[str, SizeRange]:
    """``batch=1:1:8,sequence=64``: one size stands for all three."""
    from equipoise.errors import UsageError
    from equipoise.runtimes.protocol import SizeRange

    found = {}
    for part in options.names(text):
        name, equals, values = part.partition("=")
        sizes = [int(value) for value in values.split(":") if value.isdigit()]
        whole = len(sizes) == len(values.split(":")) and len(sizes) in {1, 3} and sizes[0] > 0
        if not (name and equals and whole and sizes == sorted(sizes)):
            raise UsageError(
                f"--profile {part!r}: expected NAME=LEAST:USUAL:LARGEST, such as sequence=1:64:128"
            )
        found[name] = SizeRange(least=sizes[0], usual=sizes[len(sizes) // 2], largest=sizes[-1])
    if not found:
        raise UsageError(f"--profile {text!r}: no dimension; say sequence=1:64:128")
    return found


def _lines(result: BuildResult, output: Path) -> Iterator[str]:
    from equipoise.report.rows import size

    manifest, engine = result.manifest, result.manifest.engine
    yield f"wrote    {output} ({size(engine.size_bytes)})"
    capabilities = ", ".join(engine.compute_capabilities)
    where = f" for compute capability {capabilities}" if capabilities else ""
    by = f", by {manifest.runtime} {engine.version}".rstrip()
    yield f"engine   {result.artefact}{where}{by}"
    if not engine.loaded:
        yield "state    only built: it cannot be loaded on this machine"
    elif result.here:
        yield "state    loaded here, and this machine is the target"
    else:
        yield f"state    loaded here; this machine is no {manifest.target}, so measure it there"
    for note in engine.notes:
        yield f"note     {note}"
