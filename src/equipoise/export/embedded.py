"""The embed stage: a proved model that takes the bytes of pictures, proved once more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import onnxio
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.data.store import Rows
from equipoise.export.config import PROOF_DIRECTORY
from equipoise.graph.embed import embed_preprocessing
from equipoise.parity.proof import ProofRecord, read_proof, write_proof
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, TensorSpec

MODEL_FILE: Final = "model.onnx"
_LARGEST_BYTE: Final = 255


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What to put in front of the model.

    Attributes:
        model: ONNX file, proved by ``proof``.
        proof: Directory of its proof.
        preprocessing: What is done to a picture.
        resize: Resize in the graph too.
    """

    model: Path
    proof: Path
    preprocessing: ImagePreprocessing
    resize: bool


@dataclass(frozen=True, kw_only=True)
class EmbedRecord:
    """Attributes: inputs: What the model takes now."""

    inputs: tuple[TensorSpec, ...]


def embed(config: EmbedConfig, *, output: Path) -> EmbedRecord:
    """Write the model with its preprocessing into ``output``, and a proof for it beside.

    The proof's pictures are those of the model's own proof, turned back into bytes; what the model
    makes of them, normalised outside, is what the new one has to make of the bytes.

    Raises:
        UsageError: The model has no image input, or several.
        IncompatibleError: A step that the graph cannot take.
    """
    model = onnxio.load_ir(config.model)
    name = embed_preprocessing(model, config.preprocessing, resize=config.resize)
    onnxio.save_ir(model, output / MODEL_FILE)
    inputs, _ = onnxio.ir_specs(model)
    _prove_again(config, name, inputs=inputs, directory=output / PROOF_DIRECTORY)
    return EmbedRecord(inputs=inputs)


def _prove_again(
    config: EmbedConfig, name: str, *, inputs: tuple[TensorSpec, ...], directory: Path
) -> None:
    proof = read_proof(config.proof)
    steps = config.preprocessing
    rows = list(Rows(config.proof / "inputs"))
    pictures = [row | {name: _bytes(row[name], steps)} for row in rows]
    floats = [row | {name: _normalised(row[name], steps)} for row in pictures]
    if config.resize:
        pictures = [row | {name: _framed(row[name], steps)} for row in pictures]
    with session_opener("onnxruntime")(config.model, settings=SessionSettings()) as session:
        expected = [session.run(feeds) for feeds in floats]
    write_proof(directory, _record(proof, name, inputs), inputs=pictures, outputs=expected)


def _record(proof: ProofRecord, name: str, inputs: tuple[TensorSpec, ...]) -> ProofRecord:
    """The same sizes were run: a resize to the size that is there changes nothing."""
    before = {spec.name: spec for spec in proof.inputs}
    specs = tuple(spec if spec.name == name else before[spec.name] for spec in inputs)
    return replace(proof, inputs=specs, reference="the model with its pictures normalised outside")


def _per_channel(values: tuple[float, ...]) -> Array:
    return np.array(values, dtype=np.float64).reshape(1, -1, 1, 1)


def _bytes(pixels: Array, steps: ImagePreprocessing) -> Array:
    """uint8 [batch, height, width, 3] of which ``pixels`` are what preprocessing makes, nearly."""
    values = (pixels * _per_channel(steps.std) + _per_channel(steps.mean)) / steps.scale
    whole = np.clip(np.rint(values), 0, _LARGEST_BYTE).astype(np.uint8)
    return np.ascontiguousarray(whole.transpose(0, 2, 3, 1))


def _framed(picture: Array, steps: ImagePreprocessing) -> Array:
    """A larger picture that is resized to itself, and of which the crop is ``picture``."""
    height, width = steps.resized(*steps.size)
    top, left = steps.corner(height, width)
    rows = (top, height - top - picture.shape[1])
    columns = (left, width - left - picture.shape[2])
    return np.pad(picture, [(0, 0), rows, columns, (0, 0)], mode="edge")


def _normalised(picture: Array, steps: ImagePreprocessing) -> Array:
    planar = picture.transpose(0, 3, 1, 2).astype(np.float64)
    values = (planar * steps.scale - _per_channel(steps.mean)) / _per_channel(steps.std)
    return np.ascontiguousarray(values.astype(np.float32))
