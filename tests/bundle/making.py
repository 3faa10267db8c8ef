"""Small real bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings

NAME = "float"
FILE = f"engines/{NAME}/engine.onnx"


def engine_of(model: Path, *, name: str = NAME, **fields: Any) -> Engine:
    """What a manifest says of an ONNX file."""
    file = f"engines/{name}/engine.onnx"
    settings = {"golden_tolerance": {"y": 1e-4}, "runtime": "onnxruntime", **fields}
    return Engine(name=name, file=file, files=(file,), size_bytes=model.stat().st_size, **settings)


def make_bundle(
    path: Path,
    model: Path,
    *,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
    shift: float = 0.0,
    documents: Mapping[str, bytes] | None = None,
    **fields: Any,
) -> Path:
    """A bundle of ``model`` with x float32[batch, 4] and y.

    Args:
        path: Where; an archive if it ends in ``.zip``.
        model: ONNX file.
        engines: Name -> fields of engines, all of ``model``.
        shift: What golden outputs are off by.
        documents: Further files.
        fields: Of the manifest.
    """
    random = np.random.default_rng(4)
    named = engines or {NAME: {}}
    with open_session(model, settings=SessionSettings()) as session:
        inputs, outputs = session.inputs, session.outputs
        samples = [random.normal(size=(n, 4)).astype(np.float32) for n in (1, 3)]
        results = [session.run({"x": x}) for x in samples]
    vectors = [
        Golden(
            inputs={"x": x},
            reference=r,
            outputs={name: {"y": r["y"] + np.float32(shift)} for name in named},
        )
        for x, r in zip(samples, results, strict=True)
    ]
    manifest = Manifest(
        engines=tuple(engine_of(model, name=n, **own) for n, own in named.items()),
        inputs=inputs,
        outputs=outputs,
        **{"name": "linear", **fields},
    )
    copies = {f"engines/{name}/engine.onnx": model for name in named}
    golden = {GOLDEN_FILE: golden_bytes(vectors), **(documents or {})}
    write_bundle(path, manifest, copies=copies, documents=golden)
    return path


def linear_model(path: Path, *, constant: float) -> Path:
    """``y = 0 x + constant``: whichever model answered can be told from any answer."""
    import onnx

    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        linear (float[batch, 4] x) => (float[batch, 64] y) { y = Gemm(x, w, b) }
        """
    )
    weights = {"w": np.zeros((4, 64), np.float32), "b": np.full(64, constant, np.float32)}
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path
