"""Random inputs for a model without data: enough to run it, not to calibrate it well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from equipoise import onnxio
from equipoise.spec import Array, TensorSpec

_LENGTH: Final = 32
"""Size of a dimension that is open, but for the batch."""


def synthetic_rows(model: Any, *, count: int, seed: int = 0) -> Iterator[dict[str, Array]]:
    """Random inputs with batch 1.

    Floats are drawn from the standard normal distribution. Integers that look up rows of a table
    are drawn among its rows; others are 1, as in a mask that hides nothing.

    Args:
        model: ``onnx.ModelProto``.
        count: Number of samples.
        seed: Of the draw.
    """
    inputs, _ = onnxio.graph_specs(model)
    rows = _table_rows(model)
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield {spec.name: _drawn(spec, rows.get(spec.name), random) for spec in inputs}


def _table_rows(model: Any) -> dict[str, int]:
    """Input -> least number of rows of the tables that it looks up."""
    constants = onnxio.initializers(model)
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in constants:
            rows = int(constants[node.input[0]].dims[0])
            name = node.input[1]
            found[name] = min(rows, found.get(name, rows))
    return found


def _drawn(spec: TensorSpec, rows: int | None, random: np.random.Generator) -> Array:
    shape = [
        size if isinstance(size, int) else 1 if axis == 0 else _LENGTH
        for axis, size in enumerate(spec.shape)
    ]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if rows is None:
        return np.ones(shape, dtype=dtype)
    return random.integers(0, rows, size=shape).astype(dtype)
