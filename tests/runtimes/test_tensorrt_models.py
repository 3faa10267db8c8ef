"""MiniLM and EfficientNet-Lite0 as TensorRT-RTX engines, and the same files on ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import fs
from equipoise.quantize.blockwise import BlockGrid, Gptq
from equipoise.quantize.halves import Halves
from equipoise.quantize.schemes import Quantization, StaticInt8
from equipoise.quantize.weight_only import WeightOnly
from equipoise.quantizing import QuantizeRequest, quantize_model
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.protocol import BuildSettings, SessionSettings
from equipoise.runtimes.registry import builder, session_opener

pytest.importorskip("tensorrt_rtx")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODELS = ("minilm", "lite0")
SAMPLES = 32
JUDGED = 4
CAPABILITIES = ("8.6", "8.9", "12.0")
SCHEMES: dict[str, Quantization | None] = {
    "float32": None,
    "float16": Halves(dtype="float16"),
    "int8": StaticInt8(),
    "int4": WeightOnly(
        grid=BlockGrid(bits=4, block_size=32, symmetric=True),
        algorithm=Gptq(),
        form="qdq",
        tables="float",
    ),
}
LEAST_SQNR_DB = {"float32": 100.0, "float16": 30.0, "int8": 20.0, "int4": 20.0}
LESS = {("minilm", "int4"): 15.0}
"""Four bits in every product of MiniLM leave 17 dB."""
PREPARE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import _cases
_cases.CASES[sys.argv[2]](Path(sys.argv[3]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A model and its inputs, as the benchmarks make them from packages."""
    place = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-c", PREPARE, str(BENCHMARKS), request.param, str(place)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert child.returncode == 0, child.stderr
    return request.param, place


def held_out(place: Path) -> list[dict[str, Any]]:
    """Calibration inputs that quantisation does not see: the last ones."""
    with np.load(place / "calibration.npz") as stored:
        arrays = {name: stored[name][-JUDGED:] for name in stored.files if name != "label"}
    return [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(JUDGED)]


def outputs_of(model: Path, feeds: list[dict[str, Any]]) -> dict[str, Any]:
    """By ONNX Runtime, without its int8 kernels, which saturate on CPUs without VNNI."""
    settings = SessionSettings(optimize="none", threads=2)
    with session_opener("onnxruntime")(model, settings=settings) as session:
        results = [session.run(one) for one in feeds]
    return {name: np.concatenate([r[name] for r in results]) for name in results[0]}


def sqnr_db(reference: dict[str, Any], found: dict[str, Any]) -> float:
    """The least signal to noise of all outputs."""
    ratios = []
    for name, signal in reference.items():
        wanted = np.asarray(signal, dtype=np.float64)
        noise = np.square(found[name] - wanted).sum()
        ratios.append(10 * np.log10(np.square(wanted).sum() / max(noise, 1e-30)))
    return float(min(ratios))


@pytest.mark.parametrize("precision", SCHEMES)
def test_real_models_build_and_keep_their_signal(
    case: tuple[str, Path], precision: str, tmp_path: Path
) -> None:
    """No refusal, an engine for each GPU, and the same file close to float on ONNX Runtime."""
    name, place = case
    path = place / "model.onnx"
    if scheme := SCHEMES[precision]:
        path = tmp_path / f"{precision}.onnx"
        request = QuantizeRequest(
            model=place / "model.onnx",
            output=path,
            data=str(place / "calibration.npz"),
            quantization=scheme,
            target="tensorrt-rtx",
            samples=SAMPLES,
        )
        quantize_model(request)
    assert builder("tensorrt-rtx").refusals(path) == ()
    feeds = held_out(place)
    ratio = sqnr_db(outputs_of(place / "model.onnx", feeds), outputs_of(path, feeds))
    assert ratio > LESS.get((name, precision), LEAST_SQNR_DB[precision])
    for capability in CAPABILITIES:
        output = fs.make_directory(tmp_path / capability)
        config = BuildConfig(
            model=path,
            runtime="tensorrt-rtx",
            settings=SessionSettings(),
            options=BuildSettings(compute_capabilities=(capability,)),
        )
        made = build(config, output=output)
        assert made.compute_capabilities == (capability,)
        assert made.size_bytes > 0.9 * path.stat().st_size
