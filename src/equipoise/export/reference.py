"""The reference stage: what the source itself gives on every evaluation sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equipoise import progress
from equipoise.data.store import Rows, write_rows
from equipoise.errors import SourceError
from equipoise.parity.compare import require_finite
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.sources.source import Source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What to run.

    Attributes:
        source: The trained model.
        samples: Directory of inputs.
        names: Input names, in order.
    """

    source: Source
    samples: Path
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReferenceRecord:
    """How many samples were run, and by what."""

    samples: int
    by: str


def run_reference(config: ReferenceConfig, *, output: Path) -> ReferenceRecord:
    """Write the outputs of the source on every sample as rows into ``output``.

    Raises:
        SourceError: The source cannot be built.
        NonFiniteError: An output is NaN or infinite; names the output and the sample.
    """
    by = "float ONNX" if config.source.kind == "onnx" else "PyTorch"
    header = write_rows(output, _finite(_outputs(config), what=by))
    return ReferenceRecord(samples=header.rows, by=by)


def _finite(rows: Iterator[dict[str, Array]], *, what: str) -> Iterator[dict[str, Array]]:
    for index, outputs in enumerate(rows):
        require_finite(outputs, sample=index, what=what)
        yield outputs


def _outputs(config: ReferenceConfig) -> Iterator[dict[str, Array]]:
    rows = Rows(config.samples)
    if config.source.kind != "onnx":
        model = NamedModule(
            load_module(config.source), names=config.names, source=config.source.name
        )
        for feeds in progress.track(rows, total=len(rows)):
            yield model.run(feeds)
        return
    if config.source.path is None:
        raise SourceError(f"{config.source.name}: an ONNX source needs a path")
    plain = SessionSettings(optimize="none")
    with session_opener("onnxruntime")(config.source.path, settings=plain) as session:
        for feeds in progress.track(rows, total=len(rows)):
            yield session.run(feeds)
