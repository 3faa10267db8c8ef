"""Run an engine with ONNX Runtime. Imports nothing but NumPy and onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import BackendError, SourceError
from equipoise.runtimes.base import BaseSession
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds, TensorSpec

_ERRORS_ONLY: Final = 3
_DTYPES: Final = {"float": "float32", "double": "float64"}
_PROVIDERS: Final = ["CPUExecutionProvider"]


def _onnxruntime() -> Any:
    # Since 1.32 the Linux wheel collects usage events in the user's cache unless told not to
    # before it is imported. An engine on a device has nothing to report.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return extras.require("onnxruntime")


def session_options(settings: SessionSettings) -> Any:
    """``onnxruntime.SessionOptions`` for ``settings``."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if settings.spin else "0"
    )
    if settings.optimize == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def open_inference_session(engine: Path, *, options: Any) -> Any:
    """An ``onnxruntime.InferenceSession``. Raises SourceError when it refuses the file."""
    ort = _onnxruntime()
    if not engine.is_file():
        raise SourceError(f"no such engine file: {engine}")
    try:
        return ort.InferenceSession(str(engine), options, providers=_PROVIDERS)
    except Exception as error:  # onnxruntime has a class per status code and no common base
        raise SourceError(
            f"ONNX Runtime {ort.__version__} cannot load {engine}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class OnnxRuntimeSession(BaseSession):
    """An engine opened by ONNX Runtime."""

    def __init__(self, engine: Path, *, settings: SessionSettings) -> None:
        self._session = open_inference_session(engine, options=session_options(settings))
        self._names = [output.name for output in self._session.get_outputs()]
        super().__init__(
            tuple(_spec(value) for value in self._session.get_inputs()),
            tuple(_spec(value) for value in self._session.get_outputs()),
        )

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime failed: {_first_line(error)}") from error
        return dict(zip(self._names, map(np.asarray, results), strict=True))

    def close(self) -> None:
        """Free the engine."""
        self._session = None
        super().close()


def _spec(value: Any) -> TensorSpec:
    """A spec from a NodeArg: type ``tensor(float)``, dimensions int, name or None."""
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(
        dim if isinstance(dim, int) else str(dim or f"{value.name}_dim{axis}")
        for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(name=value.name, dtype=_DTYPES.get(kind, kind), shape=shape)


def open_session(engine: Path, *, settings: SessionSettings) -> OnnxRuntimeSession:
    """Open ``engine``.

    Raises:
        SourceError: There is no such file, or it is no ONNX model that the runtime can load.
        MissingExtraError: onnxruntime is not installed.
    """
    return OnnxRuntimeSession(engine, settings=settings)
