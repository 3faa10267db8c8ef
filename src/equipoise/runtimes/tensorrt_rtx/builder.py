"""Make an engine for TensorRT-RTX, on any machine."""

from __future__ import annotations

from typing import Final

from equipoise.runtimes.tensorrt.builder import TensorRtBuilder
from equipoise.runtimes.tensorrt.flavor import RTX

BUILDER: Final = TensorRtBuilder(flavor=RTX)
