"""``equipoise quantize``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.quantize.blockwise import Algorithm
    from equipoise.quantize.clip import Clipping
    from equipoise.quantize.ranges import Method
    from equipoise.quantize.rounding import RoundingSettings
    from equipoise.quantize.schemes import Quantization
    from equipoise.quantize.weight_only import WeightOnly
    from equipoise.quantizing import QuantizeResult


class Scheme(StrEnum):
    """Ways to quantise."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    WEIGHTS = "weights"
    BLOCKS = "blocks"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Ranges(StrEnum):
    """Ways to choose ranges of activations."""

    MSE = "mse"
    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MOVING_AVERAGE = "moving-average"


class WeightRanges(StrEnum):
    """Ways to choose ranges of weights."""

    LARGEST = "largest"
    LEAST_ERROR = "least-error"
    OCTAV = "octav"


class Rounding(StrEnum):
    """Ways to round weights."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    HQQ = "hqq"


class Tables(StrEnum):
    """Ways to store embeddings."""

    INT8 = "int8"
    BLOCKS = "blocks"
    FLOAT = "float"


_BLOCKS = "Weight-only blocks"
_STATIC = "Static int8"


def command(
    model: Annotated[Path, typer.Argument(help="Float .onnx file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: digits, .npz, .jsonl, CoNLL, a directory of pictures, or"
            " python:MODULE:FUNCTION. It needs no labels."
        ),
    ] = None,
    synthetic: Annotated[
        int | None, typer.Option(help="Calibrate on so many samples of random numbers instead.")
    ] = None,
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="static: weights and activations in int8. dynamic: ranges taken in every run."
            " weights: int8 in the file, float in computation. blocks: 4 or 8 bits by blocks."
        ),
    ] = Scheme.STATIC,
    target: options.Target = "cpu",
    samples: Annotated[int, typer.Option(help="Most calibration samples.")] = 128,
    evaluation: Annotated[
        str | None, typer.Option(help="Data to come: say how much of it calibration has covered.")
    ] = None,
    min_sqnr: Annotated[
        float,
        typer.Option(help="Signal to noise, in dB, to keep.", rich_help_panel=_STATIC),
    ] = 20.0,
    budget: Annotated[
        str,
        typer.Option(help="Time for finding nodes to leave in float: 90s, 5m, 1h."),
    ] = "5m",
    nodes_to_exclude: Annotated[
        str,
        typer.Option(help="Nodes to leave in float, by name.", rich_help_panel=_STATIC),
    ] = "",
    ranges: Annotated[
        Ranges,
        typer.Option(help="How ranges of activations are chosen.", rich_help_panel=_STATIC),
    ] = Ranges.MSE,
    smoothing: Annotated[
        bool,
        typer.Option(help="SmoothQuant, where it pays.", rich_help_panel=_STATIC),
    ] = True,
    outliers: Annotated[
        bool,
        typer.Option(help="Outlier channels in float, where it pays.", rich_help_panel=_STATIC),
    ] = True,
    clipping: Annotated[
        bool,
        typer.Option(help="Cut off extremes, where it pays.", rich_help_panel=_STATIC),
    ] = True,
    bias_correction: Annotated[
        bool,
        typer.Option(help="Take mean errors off the biases.", rich_help_panel=_STATIC),
    ] = True,
    weight_ranges: Annotated[
        WeightRanges,
        typer.Option(help="How far the grids of weights reach.", rich_help_panel=_STATIC),
    ] = WeightRanges.LARGEST,
    equalize: Annotated[
        bool,
        typer.Option("--equalize", help="Cross-layer equalisation first.", rich_help_panel=_STATIC),
    ] = False,
    weight_bits: Annotated[
        int | None,
        typer.Option(help="8 or 7; as the target needs by default.", rich_help_panel=_STATIC),
    ] = None,
    save_ranges: Annotated[
        Path | None,
        typer.Option(help="Write the chosen ranges as JSON.", rich_help_panel=_STATIC),
    ] = None,
    load_ranges: Annotated[
        Path | None,
        typer.Option(help="Take ranges that --save-ranges wrote.", rich_help_panel=_STATIC),
    ] = None,
    rounding: Annotated[
        Rounding | None,
        typer.Option(help="nearest or gptq; for blocks also hqq. By default what pays."),
    ] = None,
    tables: Annotated[
        Tables | None,
        typer.Option(help="Embeddings as rows of int8, in blocks of 4 bits, or in float."),
    ] = None,
    bits: Annotated[int, typer.Option(help="4 or 8.", rich_help_panel=_BLOCKS)] = 4,
    block_size: Annotated[
        int,
        typer.Option(help="16 to 256, or 0 for whole columns.", rich_help_panel=_BLOCKS),
    ] = 32,
    qdq: Annotated[
        bool,
        typer.Option(
            "--qdq", help="DequantizeLinear instead of MatMulNBits.", rich_help_panel=_BLOCKS
        ),
    ] = False,
    task: options.Task = "",
    tokenizer: options.Tokenizer = None,
    preprocessing: Annotated[
        Path | None, typer.Option(help="preprocessor_config.json, for pictures.")
    ] = None,
    labels: options.Labels = "",
    threads: options.Threads = None,
    cache_dir: options.CacheDir = None,
    time_limit: options.TimeLimit = 3600.0,
    fresh: options.Fresh = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Quantise a float ONNX file, and leave in float what must be."""
    from equipoise.quantize.schemes import StaticInt8
    from equipoise.quantize.treatment import Remedies
    from equipoise.quantizing import QuantizeRequest, quantize_model

    if scheme is Scheme.STATIC:
        quantization: Quantization = StaticInt8(
            method=_method(ranges),
            remedies=Remedies(smoothing=smoothing, outliers=outliers, clipping=clipping),
            rounding=_rounding(rounding),
            bias_correction=bias_correction,
            weight_ranges=_weight_ranges(weight_ranges),
            weight_bits=_weight_bits(weight_bits),
            min_sqnr_db=min_sqnr,
            budget_s=options.seconds(budget, option="--budget"),
            float_nodes=options.names(nodes_to_exclude),
        )
    else:
        blocks = partial(_blocks, rounding, bits=bits, block_size=block_size, qdq=qdq)
        quantization = _other(scheme, target=target, blocks=blocks)
    if tables is not None:
        quantization = _with_tables(quantization, tables, target=target)
    request = QuantizeRequest(
        model=model,
        output=output,
        data=data,
        synthetic=synthetic,
        evaluation=evaluation,
        quantization=quantization,
        equalize=equalize,
        target=target,
        samples=samples,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        task=task,
        labels=options.names(labels),
        save_ranges=save_ranges,
        ranges=load_ranges,
        threads=threads,
        cache=cache_dir,
        time_limit_s=time_limit,
        fresh=fresh,
    )
    with console.progress(quiet=quiet or json) as observer:
        result = quantize_model(request, observer=observer)
    if json:
        console.print_json(result)
    else:
        _print(result, output)


def _method(ranges: Ranges) -> Method:
    from equipoise.quantize import ranges as methods

    by_name: dict[Ranges, Method] = {
        Ranges.MSE: methods.Mse(),
        Ranges.MINMAX: methods.MinMax(),
        Ranges.PERCENTILE: methods.Percentile(),
        Ranges.ENTROPY: methods.Entropy(),
        Ranges.MOVING_AVERAGE: methods.MovingAverage(),
    }
    return by_name[ranges]


def _weight_ranges(ranges: WeightRanges) -> Clipping:
    from equipoise.quantize import clip

    by_name: dict[WeightRanges, Clipping] = {
        WeightRanges.LARGEST: clip.LargestWeight(),
        WeightRanges.LEAST_ERROR: clip.LeastError(),
        WeightRanges.OCTAV: clip.FixedPoint(),
    }
    return by_name[ranges]


def _rounding(rounding: Rounding | None) -> RoundingSettings | None:
    from equipoise.errors import UsageError
    from equipoise.quantize.rounding import RoundingSettings

    if rounding is Rounding.HQQ:
        raise UsageError("--rounding hqq is for --scheme blocks; static takes nearest or gptq")
    return None if rounding is Rounding.NEAREST else RoundingSettings()


def _weight_bits(bits: int | None) -> Literal[7, 8] | None:
    from equipoise.errors import UsageError

    if bits not in {None, 7, 8}:
        raise UsageError(f"--weight-bits is {bits}; 7 or 8 is possible")
    return cast("Literal[7, 8] | None", bits)


def _other(scheme: Scheme, *, target: str, blocks: Callable[[], WeightOnly]) -> Quantization:
    from equipoise.quantize.halves import Halves
    from equipoise.quantize.schemes import DynamicInt8, WeightOnlyInt8
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target

    if scheme is Scheme.DYNAMIC:
        saturates = get_target(target, machine=detect_machine()).int8.saturates
        return DynamicInt8(reduce_range=saturates)
    if scheme is Scheme.BLOCKS:
        return blocks()
    if scheme is Scheme.WEIGHTS:
        return WeightOnlyInt8()
    return Halves(dtype="float16" if scheme is Scheme.FLOAT16 else "bfloat16")


def _with_tables(quantization: Quantization, tables: Tables, *, target: str) -> Quantization:
    from equipoise.errors import UsageError
    from equipoise.quantize.schemes import DynamicInt8, StaticInt8
    from equipoise.quantize.weight_only import WeightOnly
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target

    if not isinstance(quantization, DynamicInt8 | StaticInt8 | WeightOnly):
        raise UsageError("--tables is for --scheme static, dynamic and blocks")
    found = get_target(target, machine=detect_machine())
    if tables is Tables.BLOCKS and not found.gathers_blocks:
        raise UsageError(
            f"the runtime of target {target!r}, {found.runtime}, gathers from no blocks",
            hint="--tables int8 or float is possible.",
        )
    return replace(quantization, tables=tables.value)


def _blocks(rounding: Rounding | None, *, bits: int, block_size: int, qdq: bool) -> WeightOnly:
    from equipoise.errors import UsageError
    from equipoise.quantize.blockwise import BlockGrid, Gptq, HalfQuadratic, Nearest
    from equipoise.quantize.weight_only import WeightOnly

    if bits not in {4, 8}:
        raise UsageError(f"--bits is {bits}; 4 or 8 is possible")
    algorithms: dict[Rounding, Algorithm] = {
        Rounding.NEAREST: Nearest(),
        Rounding.GPTQ: Gptq(),
        Rounding.HQQ: HalfQuadratic(),
    }
    return WeightOnly(
        grid=BlockGrid(bits=cast("Literal[4, 8]", bits), block_size=block_size, symmetric=qdq),
        algorithm=algorithms[rounding or Rounding.NEAREST],
        form="qdq" if qdq else "matmulnbits",
        tables="float" if qdq else "int8",
    )


def _print(result: QuantizeResult, output: Path) -> None:
    from equipoise.report.rows import size

    made = result.quantized
    added = ", ".join(f"{count} {op}" for op, count in made.quantized.items())
    kept = "no loss" if made.optimized_sqnr_db is None else f"{made.optimized_sqnr_db:.1f} dB"
    console.print_lines(
        f"wrote    {output} ({size(result.size_bytes)}, float"
        f" {size(result.float_bytes)}, {result.wall_s:.0f} s)",
        f"added    {added}",
        f"keeps    {kept} of the outputs' signal on calibration samples"
        f"{' (simulated)' if made.simulated else ''}",
        *(f"note     {note}" for note in result.notes),
    )
