"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from equipoise.errors import UsageError

Source = Annotated[
    str,
    typer.Argument(
        help="A local transformers directory, module:package.mod:factory or timm:NAME with"
        " --weights, a .pt2 program, or an .onnx file."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, an .npz or .jsonl file, a CoNLL file or directory; FORM:PATH to be explicit."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights of a factory or timm model: .safetensors, or .pth read as data."),
]
Task = Annotated[
    str,
    typer.Option(
        help="Head or part of a transformers model, such as feature-extraction, encoder, decoder or"
        " image-embedding; found in its config by default."
    ),
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
Target = Annotated[
    str, typer.Option(help="Target, or a .toml file of your own; see equipoise targets.")
]
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

Inputs = Annotated[
    Path | None,
    typer.Option(help=".npz with one array per input; a bundle's golden inputs otherwise."),
]
Dims = Annotated[
    list[str] | None, typer.Option("--dim", help="Size of a dynamic dimension: sequence=128.")
]
Rounds = Annotated[int, typer.Option(min=10, help="Number of rounds.")]


_SECONDS = {"ms": 0.001, "us": 1e-6, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9,
    "B": 1.0,
}  # fmt: skip


def seconds(text: str, *, option: str) -> float:
    """Seconds of a time such as ``5ms``, ``90s``, ``5m`` or ``1h``.

    Raises:
        UsageError: A text of another form, or a number without a unit.
    """
    return _quantity(text, _SECONDS, hint=f"{option} {text!r}: say 5ms, 90s, 5m or 1h")


def size_bytes(text: str, *, option: str) -> float:
    """Bytes of a size such as ``8MB`` or ``512KiB``.

    Raises:
        UsageError: A text of another form, or a number without a unit.
    """
    return _quantity(text, _BYTES, hint=f"{option} {text!r}: say 800kB, 8MB or 1GiB")


def _quantity(text: str, units: Mapping[str, float], *, hint: str) -> float:
    """A number with one of the ``units``, longer names first.

    Without a unit it is refused: 5 may be meant as milliseconds as well as seconds.
    """
    text = text.strip()
    unit = next((u for u in sorted(units, key=len, reverse=True) if text.endswith(u)), "")
    try:
        found = float(text.removesuffix(unit)) * units[unit]
    except (KeyError, ValueError):
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UsageError(hint)
    return found


def names(text: str) -> tuple[str, ...]:
    """Comma separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def prunings(text: str) -> tuple[float, ...] | None:
    """Comma separated speed-ups; none of them for ``none``, and None for ``auto``.

    Raises:
        UsageError: Anything else.
    """
    if text in {"auto", "none"}:
        return None if text == "auto" else ()
    try:
        found = tuple(float(part) for part in names(text))
    except ValueError:
        found = (0.0,)
    if not all(1 < factor < float("inf") for factor in found):
        raise UsageError(
            f"--prune {text!r}: give numbers above 1, such as 2 or 2,4; or auto, or none"
        )
    return found


def counts(text: str, *, option: str) -> list[int]:
    """Comma separated whole numbers above 0. Raises UsageError for anything else."""
    parts = names(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r}: give whole numbers above 0, such as 1,2")
    return [int(part) for part in parts]


def sizes(texts: Sequence[str], *, option: str) -> dict[str, int]:
    """Sizes of dimensions from texts such as ``sequence=128``.

    Raises:
        UsageError: A text of another form, or a size below 1.
    """
    lists = size_lists(texts, option=option)
    for name, values in lists.items():
        if len(values) != 1:
            raise UsageError(f"{option} {name}: give one size, not {len(values)}")
    return {name: values[0] for name, values in lists.items()}


def size_lists(texts: Sequence[str], *, option: str) -> dict[str, tuple[int, ...]]:
    """Lists of sizes from texts such as ``sequence=32,64``. Raises as :func:`sizes`."""
    found = {}
    for text in texts:
        name, equals, values = text.partition("=")
        numbers = names(values)
        if not (name and equals and numbers and all(n.isdigit() and int(n) > 0 for n in numbers)):
            raise UsageError(f"{option} {text!r}: expected NAME=SIZE, such as sequence=128")
        found[name] = tuple(int(n) for n in numbers)
    return found
