"""What a file computes in is read from it, whatever form its integers have."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.errors import SourceError
from equipoise.parity.precision import precision_of

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
GRAPHS = {
    "float32": "g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }",
    "float16": "g (float16[n, 4] x) => (float16[n, 4] y) { y = Relu(x) }",
    "float16, cast": """g (float[n, 4] x) => (float[n, 4] y) {
        h = Cast <to = 10> (x)
        r = Relu(h)
        y = Cast <to = 1> (r)
    }""",
    "bfloat16": "g (bfloat16[n, 4] x) => (bfloat16[n, 4] y) { y = Relu(x) }",
    "int8, Q/DQ": """g (float[n, 4] x, float s) => (float[n, 4] y) {
        q = QuantizeLinear(x, s)
        y = DequantizeLinear(q, s)
    }""",
    "int8, weights alone": """g (float[n, 4] x, int8[4, 4] w, float s) => (float[n, 4] y) {
        d = DequantizeLinear(w, s)
        y = MatMul(x, d)
    }""",
    "int8, dynamic": """g (float[n, 4] x, int8[4, 4] w) => (int32[n, 4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        y = MatMulInteger(q, w, z)
    }""",
    "int8, blocks": """g (float[n, 16] x, uint8[4, 1, 16] w, float[4] s) => (float[n, 4] y) {
        y = com.microsoft.MatMulNBits <K = 16, N = 4, bits = 8, block_size = 16> (x, w, s)
    }""",
    "int4, blocks": """g (float[n, 16] x, uint8[4, 1, 8] w, float[4] s) => (float[n, 4] y) {
        y = com.microsoft.MatMulNBits <K = 16, N = 4, bits = 4, block_size = 16> (x, w, s)
    }""",
    "int4, Q/DQ": """g (float[n, 4] x, int4[4, 4] w, float s) => (float[n, 4] y) {
        d = DequantizeLinear(w, s)
        y = MatMul(x, d)
    }""",
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_lowest_precision_is_found(tmp_path: Path, name: str) -> None:
    onnx = pytest.importorskip("onnx")
    onnx.save(onnx.parser.parse_model(f"{HEAD} {GRAPHS[name]}"), tmp_path / "model.onnx")
    assert precision_of(tmp_path / "model.onnx") == name.partition(",")[0]


@pytest.mark.parametrize(
    ("mark", "precision"),
    [
        ('element_type="f32"', "float32"),
        ('element_type="f16"', "float16"),
        ('type="FakeQuantize"', "int8"),
        ('element_type="i8"', "int8"),
        ('element_type="u4"', "int4"),
    ],
)
def test_an_ir_says_it_in_its_text(tmp_path: Path, mark: str, precision: str) -> None:
    (tmp_path / "engine.xml").write_text(f"<net><layer {mark}/></net>")
    assert precision_of(tmp_path / "engine.xml") == precision


def test_a_plan_does_not_say(tmp_path: Path) -> None:
    assert precision_of(tmp_path / "engine.plan") is None


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(SourceError, match=r"model\.onnx is no ONNX model"):
        precision_of(tmp_path / "model.onnx")
