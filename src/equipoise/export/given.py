"""Inputs that the user gave: a sample file, or specs to fill with random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from equipoise.data.prepare import input_specs
from equipoise.data.readers.npz import read_arrays
from equipoise.data.store import Rows, write_rows
from equipoise.errors import DataError
from equipoise.export.samples import parse_input, parse_sizes, random_rows
from equipoise.spec import Array, TensorSpec, describe


@dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """What was given: one of the two.

    Attributes:
        file: ``.npz`` with one array per input, the first axis of each counting samples.
        inputs: Specs as text: ``image=float32[batch,3,224,224]``.
    """

    file: Path | None = None
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GivenRecord:
    """Attributes: inputs: Specs of the rows; made_by: where they come from, in words."""

    inputs: tuple[TensorSpec, ...]
    made_by: str


def read_given(config: GivenConfig, *, output: Path) -> GivenRecord:
    """Write the inputs as rows into ``output/rows``.

    Raises:
        DataError: The file is no .npz of numbers, or its arrays have different lengths.
        UsageError: A spec that cannot be read.
    """
    if config.file is not None:
        write_rows(output / "rows", _rows(config.file))
        specs = input_specs(Rows(output / "rows"))
        return GivenRecord(inputs=specs, made_by=f"the samples in {config.file.name}")
    parsed = tuple(parse_input(text) for text in config.inputs)
    write_rows(output / "rows", random_rows(parsed, sizes=parse_sizes(config.inputs)))
    return GivenRecord(inputs=parsed, made_by="random numbers in the shapes that were given")


def _rows(file: Path) -> Iterator[Mapping[str, Array]]:
    arrays = read_arrays(file)
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        shown = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise DataError(
            f"{file}: the first axis of every array must count the same samples; it has {shown}",
            hint="Save every input with a leading batch axis, of the same length.",
        )
    count = next(iter(lengths.values()))
    return ({n: a[i : i + 1] for n, a in arrays.items()} for i in range(count))
