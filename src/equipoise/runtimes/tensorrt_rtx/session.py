"""Run an engine of TensorRT-RTX. Imports nothing but NumPy and the vendor's package."""

from __future__ import annotations

from pathlib import Path

from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.tensorrt.flavor import RTX
from equipoise.runtimes.tensorrt.session import TensorRtSession


def open_session(engine: Path, *, settings: SessionSettings) -> TensorRtSession:  # noqa: ARG001
    """Open ``engine``; kernels are compiled for the GPU here while it opens.

    Raises:
        IntegrityError: It is not what its manifest says.
        IncompatibleError: It is for another version, platform or GPU.
        MissingExtraError: tensorrt_rtx is not installed.
    """
    return TensorRtSession(engine, flavor=RTX)
