"""Run an engine with OpenVINO. Imports nothing but NumPy and openvino."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import BackendError
from equipoise.runtimes.base import BaseSession
from equipoise.runtimes.openvino.core import compile_model, first_line, read_ir, specs_of
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds


class OpenVinoSession(BaseSession):
    """An engine opened by OpenVINO. Threads may share it: each run has a request of its own."""

    concurrent = True

    def __init__(self, engine: Path, *, settings: SessionSettings) -> None:
        model = read_ir(engine)
        specs = specs_of(model, engine)
        super().__init__(specs.inputs, specs.outputs)
        self._compiled = compile_model(model, settings=settings, where=engine)
        self._idle: list[Any] = []

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        ordered = [np.require(feeds[spec.name], requirements="C") for spec in self.inputs]
        request = self._request()
        try:
            # Not infer(): with one thread, that loses what a kernel throws and gives empty arrays.
            request.start_async(ordered, share_inputs=True)
            request.wait()
        except Exception as error:  # RuntimeError, but nothing promises that
            raise BackendError(f"OpenVINO failed: {first_line(error)}") from error
        results = {
            spec.name: request.get_output_tensor(index).data.copy()
            for index, spec in enumerate(self.outputs)
        }
        self._idle.append(request)
        return results

    def _request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def close(self) -> None:
        """Free the engine."""
        self._idle.clear()
        self._compiled = None
        super().close()


def open_session(engine: Path, *, settings: SessionSettings) -> OpenVinoSession:
    """Open ``engine``, the ``.xml`` file that the builder wrote.

    Raises:
        SourceError: There is no such file, it or its ``.bin`` is broken, or the builder did not
            make it.
        IncompatibleError: A device that ``settings`` name is not here.
        UsageError: ``settings`` name what is no device.
        MissingExtraError: openvino is not installed.
    """
    return OpenVinoSession(engine, settings=settings)
