"""The signature stage: which inputs a source takes, read without its weights.

Tokenizers give token types to every model; DistilBERT and others take none.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from equipoise import onnxio
from equipoise.sources.source import Source, path_of
from equipoise.sources.torch_model import build_module


@dataclass(frozen=True, kw_only=True)
class SignatureConfig:
    """Attributes: source: The trained model."""

    source: Source


@dataclass(frozen=True, kw_only=True)
class SignatureRecord:
    """Attributes: names: Inputs by name, in order; empty when ``forward`` names none."""

    names: tuple[str, ...]


def read_signature(config: SignatureConfig, *, output: Path) -> SignatureRecord:  # noqa: ARG001
    """The names of the inputs that ``config.source`` takes.

    Raises:
        SourceError: It cannot be built.
    """
    source = config.source
    if source.kind == "onnx":
        inputs, _ = onnxio.graph_specs(onnxio.load_model(path_of(source)))
        return SignatureRecord(names=tuple(spec.name for spec in inputs))
    parameters = inspect.signature(build_module(source).forward).parameters.values()
    open_ended = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return SignatureRecord(names=tuple(p.name for p in parameters if p.kind not in open_ended))
