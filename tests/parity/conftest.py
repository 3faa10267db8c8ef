"""Two small real graphs, their fused and int8 forms, and real-sized inputs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from equipoise.data.store import write_rows
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.targets.profile import Int8Scheme

Feeds = Mapping[str, np.ndarray]

BLOCK = """
block (float[batch, 8, 16] x, int64[batch, 1, 1, 8] mask) => (float[batch, 8, 16] y) {
    q_product = MatMul(x, q_weight)
    q = Add(q_product, q_bias)
    q_view = Reshape(q, heads)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_view)
    k_product = MatMul(x, k_weight)
    k = Add(k_product, k_bias)
    k_view = Reshape(k, heads)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k_view)
    scores = MatMul(q_heads, k_heads)
    scaled = Mul(scores, half)
    kept = Cast <to = 9> (mask)
    padding = Where(kept, zero, lowest)
    masked = Add(scaled, padding)
    shares = Softmax <axis = -1> (masked)
    v_product = MatMul(x, v_weight)
    v = Add(v_product, v_bias)
    v_view = Reshape(v, heads)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_view)
    context = MatMul(shares, v_heads)
    back = Transpose <perm = [0, 2, 1, 3]> (context)
    joined = Reshape(back, flat)
    out_product = MatMul(joined, out_weight)
    out = Add(out_product, out_bias)
    attended = Add(out, x)
    normed = LayerNormalization <axis = -1, epsilon = 1e-12> (attended, gain, shift)
    up_product = MatMul(normed, up_weight)
    up = Add(up_product, up_bias)
    active = Gelu(up)
    down_product = MatMul(active, down_weight)
    down = Add(down_product, down_bias)
    sum = Add(down, normed)
    y = LayerNormalization <axis = -1, epsilon = 1e-12> (sum, gain, shift)
}
"""

PICTURES = """
pictures (float[batch, 3, 12, 12] x) => (float[batch, 10] y) {
    stem = Conv <pads = [1, 1, 1, 1], strides = [1, 1]> (x, stem_weight, stem_bias)
    stem_active = Clip(stem, zero, six)
    depth = Conv <pads = [1, 1, 1, 1], group = 8> (stem_active, depth_weight, depth_bias)
    depth_active = Clip(depth, zero, six)
    point = Conv(depth_active, point_weight, point_bias)
    added = Add(point, stem_active)
    wide = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (added, wide_weight, wide_bias)
    wide_active = Clip(wide, zero, six)
    pooled = GlobalAveragePool(wide_active)
    flat = Flatten(pooled)
    y = Gemm(flat, head_weight, head_bias)
}
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A float file, its int8 form, and inputs."""

    reference: Path
    int8: Path
    feeds: list[dict[str, np.ndarray]]


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    fan = float(np.prod(shape[1:])) if len(shape) == 4 else float(shape[0])
    return rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(fan))


def built(text: str, weights: Mapping[str, np.ndarray]) -> Any:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    return model


def block_model() -> Any:
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "heads": np.array([0, 0, 2, 8]),
        "flat": np.array([0, 0, 16]),
        "half": np.float32(8**-0.5),
        "zero": np.float32(0),
        "lowest": np.float32(np.finfo(np.float32).min),
        "gain": 1 + 0.1 * rng.normal(size=16).astype(np.float32),
        "shift": 0.1 * rng.normal(size=16).astype(np.float32),
    }
    for name, shape in {
        "q": (16, 16), "k": (16, 16), "v": (16, 16), "out": (16, 16), "up": (16, 32),
        "down": (32, 16),
    }.items():  # fmt: skip
        weights[f"{name}_weight"] = weight(rng, *shape)
        weights[f"{name}_bias"] = 0.3 * rng.normal(size=shape[1]).astype(np.float32)
    return built(BLOCK, weights)


def pictures_model() -> Any:
    rng = np.random.default_rng(1)
    weights: dict[str, np.ndarray] = {"zero": np.float32(0), "six": np.float32(6)}
    for name, shape in {
        "stem": (8, 3, 3, 3), "depth": (8, 1, 3, 3), "point": (8, 8, 1, 1), "wide": (16, 8, 3, 3),
    }.items():  # fmt: skip
        weights[f"{name}_weight"] = 3 * weight(rng, *shape)
        weights[f"{name}_bias"] = 0.3 * rng.normal(size=shape[0]).astype(np.float32)
    weights["head_weight"] = weight(rng, 16, 10)
    weights["head_bias"] = rng.normal(size=10).astype(np.float32)
    return built(PICTURES, weights)


def sentences(count: int) -> list[dict[str, np.ndarray]]:
    """Rows of 8 tokens, some of them padding."""
    rng = np.random.default_rng(2)
    rows = []
    for index in range(count):
        mask = np.ones((1, 1, 1, 8), dtype=np.int64)
        mask[..., 4 + index % 4 :] = 0
        rows.append({"x": rng.normal(size=(1, 8, 16)).astype(np.float32), "mask": mask})
    return rows


def images(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def subject(folder: Path, model: Any, *, rows: Sequence[Feeds], feeds: list) -> Subject:
    onnx.save(model, folder / "model.onnx")
    write_rows(folder / "rows", rows)
    calibrate(
        CalibrateConfig(model=folder / "model.onnx", samples=folder / "rows"),
        output=folder / "statistics",
    )
    scheme = Int8Scheme(
        activation="uint8", weight="int8", per_channel=True, saturates=False, reason="a test"
    )
    config = QuantizeConfig(
        model=folder / "model.onnx",
        quantization=StaticInt8(),
        scheme=scheme,
        samples=folder / "rows",
        statistics=folder / "statistics",
    )
    made = quantize(config, output=folder / "int8")
    return Subject(reference=folder / "model.onnx", int8=folder / "int8" / made.file, feeds=feeds)


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A transformer block with two heads and a padding mask."""
    folder = tmp_path_factory.mktemp("block")
    return subject(folder, block_model(), rows=sentences(32), feeds=sentences(2))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A small CNN with a depthwise convolution and a residual sum."""
    folder = tmp_path_factory.mktemp("pictures")
    return subject(folder, pictures_model(), rows=images(32), feeds=images(2))
