"""Run an engine with ONNX Runtime. Imports nothing but NumPy and onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import BackendError, SourceError, UsageError
from equipoise.runtimes.base import BaseSession, fill
from equipoise.runtimes.onnxruntime.feeds import Buffers, dimensions_of, fast_check
from equipoise.runtimes.onnxruntime.providers import (
    CPU,
    check_placed,
    first_line,
    place,
    refused,
    wanted_providers,
)
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds, TensorSpec, check_feeds

_ERRORS_ONLY: Final = 3
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_DTYPES: Final = {"float": "float32", "double": "float64"}


def _onnxruntime() -> Any:
    # Since 1.32 the Linux wheel collects usage events in the user's cache unless told not to
    # before it is imported. An engine on a device has nothing to report.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return extras.require("onnxruntime")


def session_options(settings: SessionSettings) -> Any:
    """``onnxruntime.SessionOptions`` for ``settings``, without its providers."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if settings.spin else "0"
    )
    if settings.exact_integers:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if settings.optimize == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def open_inference_session(
    engine: Path,
    *,
    options: Any,
    providers: tuple[str, ...] = (),
    data: bytes | Path | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on ``providers`` and no others.

    Args:
        engine: ONNX file.
        options: ``onnxruntime.SessionOptions``; providers are put into it.
        providers: As in :class:`~equipoise.runtimes.protocol.SessionSettings`.
        data: The content of the file, or a copy of it; the file is not opened then.

    Raises:
        SourceError: There is no such file, or ONNX Runtime refuses it.
        UsageError: There is no such provider.
        IncompatibleError: A provider is not here, or does not take every node.
    """
    ort = _onnxruntime()
    if data is not None:
        # A model from memory may name weights in files, which would be looked for where its copy
        # is, or in the directory that the process happens to be in.
        options.add_session_config_entry(_WEIGHTS_FOLDER, os.devnull)
    elif not engine.is_file():
        raise SourceError(f"no such engine file: {engine}")
    wanted = wanted_providers(providers)
    named = place(wanted, options=options)
    source = data if isinstance(data, bytes) else str(data or engine)
    try:
        # Its fallback would change providers with no more than a line printed.
        session = ort.InferenceSession(source, options, providers=named, enable_fallback=0)
    except Exception as error:  # onnxruntime has a class per status code and no common base
        said = first_line(error).replace(str(data), str(engine))
        raise refused(error, wanted, engine=engine) or SourceError(
            f"ONNX Runtime {ort.__version__} cannot load {engine}: {said}"
        ) from error
    check_placed(session, wanted, engine=engine)
    if isinstance(data, bytes) and hasattr(session, "_model_bytes"):
        # It is kept for the fallback that is turned off, and would be the model a second time.
        session._model_bytes = None  # noqa: SLF001
    return session


class OnnxRuntimeSession(BaseSession):
    """An engine opened by ONNX Runtime. Threads may share it.

    Args:
        engine: ONNX file.
        settings: How it runs.
        data: The content of the file, or a copy of it; the file is not opened then.
    """

    concurrent = True

    def __init__(
        self, engine: Path, *, settings: SessionSettings, data: bytes | Path | None = None
    ) -> None:
        self._session = open_inference_session(
            engine, options=session_options(settings), providers=settings.providers, data=data
        )
        super().__init__(*_specs(self._session, engine))
        self._names = [spec.name for spec in self.outputs]
        # The method of the class around it looks again at what has been looked at here, which on
        # a small model takes a fifth of the time.
        self._call = getattr(self._session, "_sess", self._session).run
        self._fit = fast_check(self.inputs)
        self._buffers = Buffers(self.outputs, dimensions_of(self.inputs))
        self._on_cpu = self._session.get_providers() == [CPU]

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see :class:`equipoise.runtimes.protocol.Session`."""
        if self._closed:
            raise UsageError("this session is closed", hint="Open the engine again.")
        if not self._fit(feeds):
            check_feeds(feeds, self.inputs)
        if out is None:
            return self._compute(feeds)
        if self._on_cpu and self._buffers.take(out, feeds):
            return self._compute_into(out, feeds)
        return fill(self._compute(feeds), out)

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        try:
            results = self._call(self._names, feeds if type(feeds) is dict else dict(feeds), None)
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        return dict(zip(self._names, results, strict=True))

    def _compute_into(self, out: Mapping[str, Array], feeds: Feeds) -> dict[str, Array]:
        """As :meth:`_compute`, with the outputs ``out`` computed where the caller wants them."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.require(array, requirements="C"))
        for name in self._names:
            if name in out:
                buffer = out[name]
                place_of = (buffer.dtype, buffer.shape, buffer.ctypes.data)
                binding.bind_output(name, "cpu", 0, *place_of)
            else:
                binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        values = zip(self._names, binding.get_outputs(), strict=True)
        return {name: out[name] if name in out else value.numpy() for name, value in values}

    def close(self) -> None:
        """Free the engine."""
        super().close()
        self._session = self._call = None


def _specs(session: Any, engine: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of inputs and outputs. Raises SourceError for a name that is no text."""
    try:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        return tuple(map(_spec, inputs)), tuple(map(_spec, outputs))
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{engine}: a name of an input, an output or a dimension is no UTF-8: {error}"
        ) from error


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
        UsageError: ``settings`` name no execution provider.
        IncompatibleError: A provider that they name is not here, or does not take the whole model.
        MissingExtraError: onnxruntime is not installed.
    """
    return OnnxRuntimeSession(engine, settings=settings)


def open_bytes(data: bytes | Path, *, settings: SessionSettings, where: Path) -> OnnxRuntimeSession:
    """Open a model of one file from its content or a copy; see :func:`open_session`.

    Raises:
        SourceError: It is no ONNX model that the runtime can load, or has weights in other files.
        As :func:`open_session` besides.
    """
    return OnnxRuntimeSession(where, settings=settings, data=data)
