"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="module:package.mod:factory with --weights, a local transformers directory,"
        " or an .onnx file."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, an .npz or .jsonl file, a CoNLL file or directory; FORM:PATH to be explicit."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Safetensors file with the weights of a factory's module.")
]
Task = Annotated[
    str, typer.Option(help="token-classification or sequence-classification; from the config.")
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Calibration data; a part of --data is set aside when not given."),
]
CalibrationSamples = Annotated[int, typer.Option(help="Number of calibration samples.")]
Samples = Annotated[int | None, typer.Option(help="Evaluate on the first so many samples only.")]
MaxLength = Annotated[int, typer.Option(help="Most tokens per text.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="tokenizer.json for text data without a transformers directory.")
]
Labels = Annotated[
    str, typer.Option(help="Class names in index order, comma separated, if the source has none.")
]
Target = Annotated[str, typer.Option(help="Target profile; see equipoise targets.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads per operator; all usable cores when not given.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Directory of finished stages.", envvar="EQUIPOISE_CACHE_DIR"),
]
TimeLimit = Annotated[float, typer.Option(help="Limit for one stage, in seconds.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run every stage again.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def names(text: str) -> tuple[str, ...]:
    """Comma separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
