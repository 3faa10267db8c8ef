"""Architectures from the benchmark's list, exported by the command line, judged by its yardstick.

The yardstick shares no code with equipoise's own proof.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAST = ("bert", "resnet", "whisper-encoder")
REFUSED = {
    "mamba": "sequence",
    "funnel": "sequence",
    "longformer": "could not be exported",
}
"""Architectures whose Python code depends on the length: no exporter can follow it."""


def _benchmark() -> ModuleType:
    """``benchmarks/architectures.py``: a program, not part of a package."""
    name = "architectures"
    if name not in sys.modules:
        path = ROOT / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


BENCHMARK = _benchmark()
CASES = {case.name: case for case in BENCHMARK.CASES}
SLOW = [name for name in CASES if name not in FAST and name not in REFUSED]


def _environment(name: str) -> dict[str, str]:
    """timm's folder is importable for timm alone: torchvision lies beside it."""
    folder = os.environ.get("EQUIPOISE_TEST_TIMM", "")
    extra = {"PYTHONPATH": folder} if name.startswith("timm-") and folder else {}
    return {**os.environ, **extra, "OMP_NUM_THREADS": "1"}


def _export(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build and save the model in one process, export it in another."""
    case, environment = CASES[name], _environment(name)
    if name.startswith("timm-"):
        saving = [sys.executable, BENCHMARK.__file__, "--child", "save", name, str(folder)]
        subprocess.run(saving, check=True, env=environment, capture_output=True)
    else:
        BENCHMARK.save(case, folder)
    command = BENCHMARK.our_command(case, folder, folder / "equipoise.onnx")
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _judged(name: str, folder: Path) -> Any:
    if name.startswith("timm-"):
        return BENCHMARK.run_child("judge:equipoise", CASES[name], folder)["equipoise"]
    return BENCHMARK.judge(CASES[name], folder, folder / "equipoise.onnx")


def _exports(name: str, folder: Path) -> None:
    if name.startswith("timm-") and not BENCHMARK.timm_available():
        pytest.skip("timm is not installed")
    done = _export(name, folder)
    assert done.returncode == 0, done.stderr
    assert tuple(_judged(name, folder))[:2] == ("ok", "")


@pytest.fixture(scope="module")
def exported_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved BERT and of the file that the command line made of it."""
    folder = tmp_path_factory.mktemp("bert")
    done = _export("bert", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_bert_is_exported(exported_bert: Path) -> None:
    """The file gives PyTorch's numbers at batch sizes and lengths that nobody traced."""
    assert tuple(_judged("bert", exported_bert))[:2] == ("ok", "")


@pytest.mark.parametrize("name", [name for name in FAST if name != "bert"])
def test_an_architecture_is_exported(name: str, tmp_path: Path) -> None:
    """The file gives PyTorch's numbers at batch sizes and lengths that nobody traced."""
    _exports(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_other_architecture_is_exported(name: str, tmp_path: Path) -> None:
    """The file gives PyTorch's numbers at batch sizes and lengths that nobody traced."""
    _exports(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_exported_is_refused(name: str, tmp_path: Path) -> None:
    """No file is left, and the message says what stood in the way of each exporter."""
    done = _export(name, tmp_path)
    assert done.returncode in {3, 6}
    assert REFUSED[name] in done.stderr
    assert not list(tmp_path.glob("equipoise.onnx*"))


def _wrong(model: Any) -> None:
    """One per cent more in every matrix."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 2 and array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array * np.float32(1.01), tensor.name))


def _frozen(model: Any) -> None:
    """A fixed length."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 7


def _broken(model: Any) -> None:
    """An operator that nobody knows."""
    model.graph.node[-1].op_type = "Nonsense"


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [(_wrong, "wrong numbers"), (_frozen, "frozen dimension"), (_broken, "does not run")],
)
def test_the_yardstick_finds_what_is_wrong(
    spoil: Callable[[Any], None], verdict: str, exported_bert: Path, tmp_path: Path
) -> None:
    """A spoilt file is not ok, and the verdict says in what way."""
    import onnx

    model = onnx.load(exported_bert / "equipoise.onnx")
    spoil(model)
    onnx.save(model, tmp_path / "spoilt.onnx")
    found = BENCHMARK.judge(CASES["bert"], exported_bert, tmp_path / "spoilt.onnx")
    assert found[0] == verdict


def test_the_list_is_long_and_every_name_is_unique() -> None:
    """At least 46 architectures, of text, images, sound and video."""
    names = [case.name for case in BENCHMARK.CASES]
    assert len(set(names)) == len(names) >= 46
    dimensions = {dim for case in BENCHMARK.CASES for dim in case.dynamic}
    assert dimensions <= set(BENCHMARK.SIZES)
