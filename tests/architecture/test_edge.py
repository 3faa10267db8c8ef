"""What a device needs: NumPy and the runtime, with nothing that made the bundle installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.bundle.making import make_bundle

from equipoise.bundle.manifest import Needs
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings

BLOCKED = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "typer", "rich", "tokenizers",
    "safetensors", "sklearn", "scipy", "seqeval", "jinja2", "plotly", "filelock", "platformdirs",
)  # fmt: skip

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""

RUN = """
import json, sys
import numpy as np
import equipoise

with equipoise.load(sys.argv[1]) as session:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = session.run({spec.name: x for spec in session.inputs})
    test = session.selftest()
    print(json.dumps({
        "y": outputs["y"].tolist(),
        "passed": test.passed,
        "samples": test.samples,
        "third_party": sorted(
            {name.partition(".")[0] for name in sys.modules} & {"numpy", "onnxruntime", "pydantic"}
        ),
        "ours": sorted(name for name in sys.modules if name.startswith("equipoise.")),
    }))
"""


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a new interpreter."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module", params=["bundle", "bundle.zip"])
def bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path
) -> Path:
    """A real bundle of the linear model, in either form, with an engine that fits no device."""
    engines = {"gpu": {"needs": Needs(compute_capabilities=("0.1",))}, "float": {"fallback": True}}
    place = tmp_path_factory.mktemp("edge") / request.param
    return make_bundle(place, linear_onnx, engines=engines)


def test_a_bundle_runs_with_numpy_and_onnxruntime_alone(bundle: Path, linear_onnx: Path) -> None:
    """Load, run and self-test with everything else blocked give the numbers of this process."""
    child = run_python(BLOCK + RUN, str(bundle))
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with open_session(linear_onnx, settings=SessionSettings()) as session:
        expected = session.run({"x": x})["y"]
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5)
    assert found["passed"]
    assert found["samples"] == 2
    assert found["third_party"] == ["numpy", "onnxruntime"]


def test_a_device_imports_only_the_edge_of_equipoise(bundle: Path) -> None:
    """The closure of a running bundle holds nothing that makes, measures or searches."""
    child = run_python(BLOCK + RUN, str(bundle))
    ours = {name.split(".")[1] for name in json.loads(child.stdout)["ours"]}
    allowed = {"errors", "record", "spec", "fs", "extras", "registry", "data", "bundle", "vouching"}
    allowed |= {"targets", "serving"}
    assert ours <= allowed | {"deploy", "runtimes"}


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_blocks(name: str) -> None:
    """The test above could fail: a blocked package does not import."""
    child = run_python(BLOCK + f"import {name}")
    assert child.returncode == 1
    assert f"{name} is blocked" in child.stderr


MISSING_RUNTIME = """
import sys
import equipoise
from equipoise.errors import IncompatibleError

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    equipoise.load(sys.argv[1])
except IncompatibleError as error:
    print(error)
"""


def test_a_missing_runtime_is_named_with_the_line_that_installs_it(bundle: Path) -> None:
    """Without onnxruntime, loading a bundle is an error with a pip line."""
    child = run_python(MISSING_RUNTIME, str(bundle))
    assert "'onnxruntime'" in child.stdout, child.stderr
    assert 'pip install "equipoise[ort]"' in child.stdout
