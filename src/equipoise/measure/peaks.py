"""What this machine's CPU reaches, measured in a moment: a matrix product and a copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Figure

_SIDE: Final = 1024
_COPIED_BYTES: Final = 96 << 20
_REPEATS: Final = 8
_MEASURED: Final = "measured here: {what}"
_PRODUCT: Final = """
<ir_version: 9, opset_import: ["" : 17]>
product (float[{side}, {side}] x) => (float[{side}, {side}] y) {{ y = MatMul(x, w) }}
"""


@functools.cache
def measured_peaks() -> tuple[Figure, Figure]:
    """float32 operations, in 10^12 per second, and bandwidth, in 10^9 bytes per second.

    The product is ONNX Runtime's on all usable cores: what runs models here, not what the CPU could
    do. A copy reads and writes; a multiplication and an addition are two operations.
    """
    with fs.scratch_directory() as folder:
        multiplied_s = _product_s(folder / "product.onnx")
    source = np.ones(_COPIED_BYTES // 4, dtype=np.float32)
    copy = np.empty_like(source)
    copied_s = _shortest(lambda: np.copyto(copy, source))
    return (
        Figure(
            value=2 * _SIDE**3 / multiplied_s / 1e12,
            source=_MEASURED.format(what="a matrix product of ONNX Runtime, all usable cores"),
        ),
        Figure(value=2 * source.nbytes / copied_s / 1e9, source=_MEASURED.format(what="a copy")),
    )


def _product_s(path: Path) -> float:
    onnx: Any = extras.require("onnx")
    parser: Any = extras.require("onnx.parser")
    model = parser.parse_model(_PRODUCT.format(side=_SIDE))
    matrix = np.ones((_SIDE, _SIDE), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix, "w"))
    onnxio.save_model(model, path)
    settings = SessionSettings(threads=detect_machine().cores)
    with session_opener("onnxruntime")(path, settings=settings) as session:
        return _shortest(lambda: session.run({"x": matrix}))


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: what else goes on only adds."""
    work()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
