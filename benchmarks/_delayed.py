"""A runtime that is ONNX Runtime and takes longer: each inference, by a share of its own time.

``DELAY`` in the environment is the share. It is found by its entry point, as any runtime from
outside, so that all that measures an engine measures this one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from equipoise import fs
from equipoise.runtimes.base import Closing
from equipoise.runtimes.onnxruntime.session import OnnxRuntimeSession
from equipoise.runtimes.onnxruntime.session import open_session as open_plain
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds

NAME = "delayed"
DELAY = "EQUIPOISE_BENCHMARK_DELAY"


class DelayedSession(Closing):
    """Runs another session, and waits busily for a share of the time that took."""

    def __init__(self, inner: OnnxRuntimeSession, *, share: float) -> None:
        self._inner, self._share = inner, share
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once, and longer."""
        begin = time.perf_counter()
        outputs = self._inner.run(feeds, out=out)
        now = time.perf_counter()
        until = now + (now - begin) * self._share
        while time.perf_counter() < until:
            pass
        return outputs

    def close(self) -> None:
        """Free the engine."""
        self._inner.close()


def open_session(engine: Path, *, settings: SessionSettings) -> DelayedSession:
    """Open ``engine`` with ONNX Runtime."""
    share = float(os.environ.get(DELAY, "0"))
    return DelayedSession(open_plain(engine, settings=settings), share=share)


def install(folder: Path) -> None:
    """Make the runtime known to this process and to its children, as an installed package does."""
    info = fs.make_directory(folder / "equipoise_delayed-0.dist-info")
    fs.write_text(info / "METADATA", "Metadata-Version: 2.1\nName: equipoise-delayed\nVersion: 0\n")
    fs.write_text(
        info / "entry_points.txt", f"[equipoise.sessions]\n{NAME} = _delayed:open_session\n"
    )
    sys.path.append(str(folder))
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
