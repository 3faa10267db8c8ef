"""``equipoise export`` from the shell: every kind of source, every way to say inputs and shapes."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

Run = Callable[..., subprocess.CompletedProcess[str]]

NETWORK = '''
from torch import nn

class Net(nn.Module):
    """image [batch, 3, height, width] -> scores [batch, 5], whatever the height and width."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
    def forward(self, image):
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))
'''
INPUT = "image=float32[batch,3,32,32]"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network of the user's own, its weights as safetensors and as .pth."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "network.py").write_text(NETWORK)
    space: dict[str, type[torch.nn.Module]] = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    network = space["Net"]().eval()
    save_file(network.state_dict(), folder / "w.safetensors")
    torch.save(network.state_dict(), folder / "w.pth")
    example = torch.randn(2, 3, 32, 32)
    program = torch.export.export(
        network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, folder / "program.pt2")
    images = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "images.npz", image=images)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights as a transformers directory, without a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    return folder


def export(equipoise: Run, folder: Path, *arguments: object) -> dict[str, object]:
    """Export in ``folder`` and give back the JSON."""
    done = equipoise("export", *arguments, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shapes(found: dict[str, object], index: int = 0) -> list[list[int | str]]:
    return [spec["shape"] for spec in found["files"][index]["verified"]["inputs"]]


def test_factory_with_a_spec_and_a_pickled_checkpoint(shop: Path, equipoise: Run) -> None:
    """The .pth is read as data; the file runs at a batch that was never tried."""
    found = export(
        equipoise, shop, "module:network:Net", "--weights", "w.pth", "--input", INPUT,
        "-o", "factory.onnx",
    )  # fmt: skip
    assert shapes(found) == [["batch", 3, 32, 32]]
    session = onnxruntime.InferenceSession(str(shop / "factory.onnx"))
    assert session.run(None, {"image": np.zeros((7, 3, 32, 32), np.float32)})[0].shape == (7, 5)
    assert not (shop / "factory.onnx.data").exists()


def test_factory_with_a_sample_file(shop: Path, equipoise: Run) -> None:
    """Inputs come from the file, and the record says so."""
    found = export(
        equipoise, shop, "module:network:Net", "--weights", "w.safetensors", "--sample",
        "images.npz", "-o", "sample.onnx",
    )  # fmt: skip
    assert "images.npz" in found["record"]["proof"]["made_by"] or (
        found["record"]["proof"]["made_by"] == "the data"
    )


def test_dimensions_are_asked_for_by_name(shop: Path, equipoise: Run) -> None:
    """Height and width too, proved at sizes that differ from the traced ones."""
    found = export(
        equipoise, shop, "module:network:Net", "--weights", "w.pth",
        "--input", "image=float32[batch,3,height:32,width:48]",
        "--dynamic", "batch,height", "-o", "dynamic.onnx",
    )  # fmt: skip
    assert shapes(found) == [["batch", 3, "height", 48]]
    sizes = [entry["sizes"] for entry in found["files"][0]["verified"]["parity"]]
    assert {"batch": 2, "height": 16} in sizes


def test_program_of_torch_export(shop: Path, equipoise: Run) -> None:
    """Its inputs and dynamic dimensions are in the file."""
    found = export(equipoise, shop, "program.pt2", "-o", "program.onnx")
    assert shapes(found)[0][1:] == [3, 32, 32]
    assert isinstance(shapes(found)[0][0], str)


def test_onnx_file_is_cleaned_and_proved_against_itself(shop: Path, equipoise: Run) -> None:
    """What leads nowhere goes, the numbers stay."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y)
        <float one = {1.0}, float again = {1.0}>
        { a = Identity(x) b = Add(a, one) lost = Mul(x, again) y = Mul(b, again) }
        """
    )
    onnx.save(model, shop / "raw.onnx")
    found = export(equipoise, shop, "raw.onnx", "-o", "cleaned.onnx")
    assert found["record"]["proof"]["reference"] == "float ONNX"
    cleaned = onnx.load(shop / "cleaned.onnx").graph
    assert [node.op_type for node in cleaned.node] == ["Add", "Mul"]
    assert len(cleaned.initializer) == 1


def test_transformers_directory_needs_nothing_but_itself(bert: Path, equipoise: Run) -> None:
    """Task, inputs and dynamic dimensions are found; the terminal says what was done."""
    done = equipoise("export", bert, "-o", bert / "out/model.onnx")
    assert done.returncode == 0, done.stderr
    assert "input_ids: int64[batch, sequence]" in done.stdout
    assert "dynamo: agrees with the source at every size" in done.stdout
    assert "parity   batch 1, sequence" in done.stdout


def test_another_task_is_another_head(bert: Path, equipoise: Run) -> None:
    """The body of a classifier gives features."""
    found = export(
        equipoise, bert, bert, "--task", "feature-extraction", "-o", bert / "features.onnx"
    )
    names = [spec["name"] for spec in found["files"][0]["verified"]["outputs"]]
    assert "last_hidden_state" in names


def test_buckets_are_files_of_fixed_sizes(bert: Path, equipoise: Run) -> None:
    """One for every size beside the dynamic one, each proved."""
    found = export(equipoise, bert, bert, "--buckets", "sequence=8,16", "-o", bert / "b/model.onnx")
    names = sorted(path.name for path in (bert / "b").iterdir())
    assert names == [
        "model.batch1.sequence16.onnx", "model.batch1.sequence8.onnx", "model.onnx",
    ]  # fmt: skip
    assert all(shape == [1, 8] for shape in shapes(found, 1))
    assert all(len(entry["verified"]["parity"]) >= 1 for entry in found["files"])
    sizes = onnxruntime.InferenceSession(str(bert / "b" / names[0])).get_outputs()[0].shape
    assert sizes == [1, 3]


def test_static_has_no_dynamic_dimension(bert: Path, equipoise: Run) -> None:
    """At the size that was asked for."""
    found = export(
        equipoise, bert, bert, "--static", "--size", "sequence=24", "-o", bert / "static.onnx"
    )
    assert all(shape == [1, 24] for shape in shapes(found))


def test_fusions_of_the_runtime_keep_parity(bert: Path, equipoise: Run) -> None:
    """Attention is one operator, and the fused file was proved."""
    found = export(equipoise, bert, bert, "--fuse", "--release", "-o", bert / "fused.onnx")
    kinds = {node.op_type for node in onnx.load(bert / "fused.onnx").graph.node}
    assert kinds & {"MultiHeadAttention", "Attention"}
    assert len(found["files"][0]["verified"]["parity"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "x.onnx"], 3, "--input"),
        (["--input", INPUT, "--sample", "images.npz", "-o", "x.onnx"], 2, "one way only"),
        (["--input", INPUT, "--static", "--dynamic", "batch", "-o", "x.onnx"], 2, "--static"),
        (["--input", INPUT, "-o", "x.bin"], 2, ".onnx file is needed"),
        (["--input", "image=float33[batch,3]", "-o", "x.onnx"], 2, "float33"),
        (["--input", INPUT, "--buckets", "batch=0", "-o", "x.onnx"], 2, "NAME=SIZE"),
        (["--input", INPUT, "--size", "batch=1,2", "-o", "x.onnx"], 2, "one size, not 2"),
        (["--input", INPUT, "--dynamic", "height", "-o", "x.onnx"], 2, "no input has a dimension"),
        (["--input", INPUT, "--exporter", "onnx", "-o", "x.onnx"], 2, "unknown exporter"),
        (["--input", INPUT, "--target", "tpu", "-o", "x.onnx"], 2, "unknown target"),
        (["--input", "image=float32[batch,4,32,32]", "-o", "x.onnx"], 3, "forward failed"),
        (["--sample", "none.npz", "-o", "x.onnx"], 3, "none.npz"),
        (["--sample", "network.py", "-o", "x.onnx"], 3, "network.py"),
        (["--input", INPUT, "--opset", "99", "-o", "x.onnx"], 5, "opset 99"),
        (["--input", INPUT, "-o", "w.pth/x.onnx"], 7, "w.pth"),
    ],
)
def test_what_cannot_be_is_a_typed_error_and_writes_nothing(
    shop: Path, equipoise: Run, arguments: list[str], code: int, words: str
) -> None:
    """The exit code of its kind, and the value in the message."""
    done = equipoise("export", "module:network:Net", "--weights", "w.pth", *arguments, cwd=shop)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shop / "x.onnx").exists()


LARGE = '''
import torch
from torch import nn

class Net(nn.Module):
    """Eight wide layers, 2.3 GB in all."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8480, 8480, bias=False) for _ in range(8))
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x
'''
MEMORY_LIMIT_BYTES = 12_000_000_000


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_exported_in_bounded_memory(
    tmp_path: Path, equipoise: Run
) -> None:
    """Its weights are in one file beside it; no process takes as much as 12 GB."""
    (tmp_path / "large.py").write_text(LARGE)
    layer = torch.nn.init.orthogonal_(torch.empty(64, 64)).repeat(133, 133)[:8480, :8480] / 133
    weights = {f"layers.{i}.weight": (layer * (1 + i / 100)).contiguous() for i in range(8)}
    save_file(weights, tmp_path / "large.safetensors")
    del weights, layer
    try:
        done = equipoise(
            "export", "module:large:Net", "--weights", "large.safetensors",
            "--input", "x=float32[batch,8480]", "-o", "out/large.onnx", "--release",
            "--cache-dir", "cache", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["large.onnx", "large.onnx.data"]
        assert (tmp_path / "out/large.onnx.data").stat().st_size > 2_300_000_000
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        assert peak < MEMORY_LIMIT_BYTES
        session = onnxruntime.InferenceSession(str(tmp_path / "out/large.onnx"))
        assert session.run(None, {"x": np.ones((1, 8480), np.float32)})[0].shape == (1, 8480)
    finally:
        shutil.rmtree(tmp_path)
