"""Running a model so that it also gives out its intermediate values."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio, progress
from equipoise.data.store import Rows
from equipoise.quantize.structure import load_structure
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds

Observer = Callable[[Feeds], dict[str, Array]]
Receiver = Callable[[int, Mapping[str, Array]], None]
"""Called with the index of a row and some of the values observed on it."""

Opener = Callable[[bytes, tuple[str, ...]], AbstractContextManager[Observer]]
"""Opens the model with these bytes after it, to give these values."""

_GROUP_BYTES: Final = 32_000_000
"""So much of the activations at a time keeps the peak memory near that of an inference."""

_FLOAT32_BYTES: Final = 4
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ObserveSettings:
    """How a model is observed.

    Attributes:
        threads: Threads per operator.
        group_bytes: Bytes of values that are held at a time; those of one tensor at the least.
            None: as many as the model has itself, which an inference needs too, or 32 MB.
    """

    threads: int = 1
    group_bytes: int | None = None

    def limit_bytes(self, model: Path) -> int:
        """Bytes of values of ``model`` that are held at a time."""
        return self.group_bytes or max(_GROUP_BYTES, onnxio.file_bytes(model))


@contextmanager
def observing(model: Any, names: Iterable[str], *, threads: int = 1) -> Iterator[Observer]:
    """Open ``model`` so that every run gives the named values.

    Args:
        model: ``onnx.ModelProto``; it is not changed.
        names: Inputs, intermediate values and outputs of its main graph.
        threads: Threads per operator.

    Yields:
        A function from the feeds of a run to ``name -> array``, with exactly ``names``.

    Raises:
        InputError: The feeds do not fit the model.
    """
    wanted = tuple(dict.fromkeys(names))
    opened = extras.require("onnx").ModelProto()
    opened.CopyFrom(model)
    opened.MergeFromString(_outputs(model, wanted))
    with fs.scratch_directory() as folder:
        onnxio.save_model(opened, folder / "observed.onnx")
        del opened
        with _observer(folder / "observed.onnx", wanted, threads=threads) as observe:
            yield observe


def observe_rows(
    model: Path,
    rows: Rows,
    *,
    names: Sequence[str],
    receive: Receiver,
    settings: ObserveSettings,
) -> None:
    """Run a model file on every row and hand over the named values, in bounded memory.

    The weights are never read into this process but by the runtime. Values are asked for in groups
    of a bounded size on the largest row, with one pass over the rows for each.

    Args:
        model: ONNX file.
        rows: Inputs.
        names: float32 inputs, intermediate values and outputs of its main graph.
        receive: Gets every row of the first group, then every row of the next.
        settings: Threads, and how many values at a time.

    Raises:
        SourceError: The model is no ONNX file that the runtime takes.
        InputError: The rows do not fit the model.
    """
    structure = load_structure(model)
    with fs.scratch_directory() as folder:
        source = _beside_its_data(model, folder)

        def opened(more: bytes, wanted: tuple[str, ...]) -> AbstractContextManager[Observer]:
            return _observer(
                _extended(source, more, folder=folder), wanted, threads=settings.threads
            )

        sizes = _value_bytes(structure, names, feeds=_largest(rows))
        groups = _groups(sizes, limit=settings.limit_bytes(model))
        runs = _runs(opened, rows, structure=structure, groups=groups)
        for observe, index, feeds in progress.track(runs, total=len(groups) * len(rows)):
            receive(index, observe(feeds))


def _runs(
    opened: Opener, rows: Rows, *, structure: Any, groups: Sequence[tuple[str, ...]]
) -> Iterator[tuple[Observer, int, Feeds]]:
    """Every row of the first group, then every row of the next, each group in a session."""
    for group in groups:
        with opened(_outputs(structure, group), group) as observe:
            for index, feeds in enumerate(rows):
                yield observe, index, feeds


@contextmanager
def _observer(path: Path, names: tuple[str, ...], *, threads: int) -> Iterator[Observer]:
    with session_opener("onnxruntime")(path, settings=SessionSettings(threads=threads)) as session:

        def observe(feeds: Feeds) -> dict[str, Array]:
            found = {**feeds, **session.run(dict(feeds))}
            return {name: found[name] for name in names}

        yield observe


def _outputs(model: Any, names: Iterable[str]) -> bytes:
    """What to append to a serialised ``model`` so that it gives out ``names``.

    Protobuf reads two messages in a row as one message, their lists joined (Protocol Buffers,
    Encoding, "Last One Wins").
    """
    onnx = extras.require("onnx")
    types = onnxio.value_types(model)
    present = {value.name for value in [*model.graph.input, *model.graph.output]}
    added = onnx.ModelProto()
    added.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, types[name], None)
        for name in names
        if name not in present
    )
    return bytes(added.SerializeToString())


def _beside_its_data(model: Path, folder: Path) -> Path:
    """``model``, or a copy in ``folder`` if it has external data."""
    if onnxio.file_bytes(model) == model.stat().st_size:
        return model
    onnxio.copy_model(model, folder / "source.onnx")
    return folder / "source.onnx"


def _extended(source: Path, more: bytes, *, folder: Path) -> Path:
    """A file in ``folder`` with the bytes of ``source`` and ``more``."""
    path = folder / "observed.onnx"
    with fs.appending(path) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file, _CHUNK_BYTES)
        file.write(more)
    return path


def _largest(rows: Rows) -> dict[str, Array]:
    """The row with the most values."""
    columns = [rows.shapes(column.name).prod(axis=1) for column in rows.header.columns]
    return rows[int(np.sum(columns, axis=0).argmax())]


def _value_bytes(structure: Any, names: Sequence[str], *, feeds: Feeds) -> dict[str, int]:
    """Bytes of each float32 value on ``feeds``, by shape inference.

    A shape that cannot be inferred counts as the mean of those that can.
    """
    onnx = extras.require("onnx")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(structure)
    for value in fixed.graph.input:
        if value.name in feeds:
            for dim, size in zip(
                value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=False
            ):
                dim.dim_value = size
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    found = {v.name: _bytes(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    sizes = {name: found.get(name) for name in names}
    known = [size for size in sizes.values() if size is not None]
    mean = sum(known) // max(len(known), 1)
    return {name: mean if size is None else size for name, size in sizes.items()}


def _bytes(value: Any) -> int | None:
    """Bytes of a float32 value of fixed shape; None when its shape is not known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return _FLOAT32_BYTES * math.prod(int(d.dim_value) for d in tensor.shape.dim)


def _groups(sizes: Mapping[str, int], *, limit: int) -> list[tuple[str, ...]]:
    """Names in order, in groups of at most ``limit`` bytes or one name."""
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [tuple(group) for group in groups]
