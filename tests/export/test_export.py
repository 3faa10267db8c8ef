"""Exports of real modules: proved, or refused without a file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from equipoise.data.store import Rows, write_rows
from equipoise.errors import NonFiniteError, ParityError, SourceError
from equipoise.export.export import ExportConfig, export
from equipoise.export.reference import ReferenceConfig, run_reference
from equipoise.sources.source import Source, parse_source
from equipoise.spec import TensorSpec

MODULES = '''
import torch
from torch import nn

class Pair(nn.Module):
    """Two inputs by name, two outputs by name."""
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 4)
    def forward(self, left, right):
        hidden = self.dense(left) + right.mean(1, keepdim=True)
        return {"scores": hidden, "total": hidden.sum(-1)}

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 4)
    def forward(self, left):
        return self.dense(left) + torch.rand(1)

class Branching(nn.Module):
    """Its code looks at the numbers, which a traced graph cannot follow."""
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 4)
    def forward(self, left):
        return self.dense(left) if float(left.sum()) > 0 else -self.dense(left)

def no_module():
    return 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on the module path with modules, weights and samples."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "shop.py").write_text(MODULES)
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    dense = torch.nn.Linear(6, 4)
    good = {f"dense.{name}": value for name, value in dense.state_dict().items()}
    save_file(good, folder / "good.safetensors")
    save_file({n: v * float("nan") for n, v in good.items()}, folder / "nan.safetensors")
    save_file({"other": torch.ones(1)}, folder / "other.safetensors")
    generator = np.random.default_rng(0)
    rows = [
        {
            n: generator.normal(size=(1, k)).astype(np.float32)
            for n, k in (("left", 6), ("right", 3))
        }
        for _ in range(8)
    ]
    write_rows(folder / "both", rows)
    write_rows(folder / "left", [{"left": row["left"]} for row in rows])
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def _exporters_find_the_modules(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in processes of their own, which look in the current directory."""
    monkeypatch.chdir(place)


def spec(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", size))


LEFT, RIGHT = spec("left", 6), spec("right", 3)


def source(place: Path, function: str, weights: str = "good") -> Source:
    return parse_source(f"module:shop:{function}", weights=place / f"{weights}.safetensors")


def test_named_inputs_and_outputs_survive_with_a_dynamic_batch(place: Path, tmp_path) -> None:
    """Parity holds at batch 1, 2 and 3."""
    config = ExportConfig(
        source=source(place, "Pair"), samples=place / "both", inputs=(LEFT, RIGHT)
    )
    record = export(config, output=tmp_path)
    assert record.exporter == "dynamo"
    found = record.verified
    assert found.opset == 20
    assert [s.shape for s in found.inputs] == [("batch", 6), ("batch", 3)]
    assert [s.name for s in found.outputs] == ["scores", "total"]
    assert [entry.sizes for entry in found.parity] == [{"batch": n} for n in (2, 1, 3)]
    allowed = {limit.output: limit.atol for limit in record.proof.tolerances}
    for entry in found.parity:
        assert all(p.max_abs <= allowed[p.name] for p in entry.outputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "proof"]


def test_reference_is_what_pytorch_gives(place: Path, tmp_path: Path) -> None:
    """One row per sample, outputs by name."""
    config = ReferenceConfig(
        source=source(place, "Pair"), samples=place / "both", names=("left", "right")
    )
    assert run_reference(config, output=tmp_path).by == "PyTorch"
    rows = Rows(tmp_path)
    assert len(rows) == 8
    assert rows[0]["scores"].shape == (1, 4)
    np.testing.assert_allclose(rows[0]["total"], rows[0]["scores"].sum(-1), rtol=1e-5)


def test_module_that_disagrees_with_its_export_leaves_no_file(place: Path, tmp_path) -> None:
    """A branch on values: each exporter's failure is told, and it is a parity error."""
    branching = source(place, "Branching")
    config = ExportConfig(source=branching, samples=place / "left", inputs=(LEFT,))
    with pytest.raises(ParityError, match=r"(?s)dynamo: .*torchscript: batch \d: output 'output'"):
        export(config, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_module_that_draws_random_numbers_is_refused(place: Path, tmp_path: Path) -> None:
    """It has no right answer, and its noise must not pass for a tolerance."""
    config = ExportConfig(source=source(place, "Noisy"), samples=place / "left", inputs=(LEFT,))
    with pytest.raises(ParityError, match="differs between two runs"):
        export(config, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(place: Path, tmp_path: Path) -> None:
    """NaN weights: the file and the tensor are named before any exporter runs."""
    bad = source(place, "Pair", "nan")
    config = ExportConfig(source=bad, samples=place / "both", inputs=(LEFT, RIGHT))
    with pytest.raises(NonFiniteError, match=r"nan\.safetensors: 24 of 24 .*'dense\.weight'"):
        export(config, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_sources_that_do_not_fit_are_named(place: Path, tmp_path: Path) -> None:
    """Wrong weights, no module, unknown function, inputs that forward does not take."""
    cases = [
        (source(place, "Pair", "other"), (LEFT, RIGHT), "both", r"other\.safetensors does not fit"),
        (source(place, "no_module"), (LEFT,), "left", "returned int"),
        (source(place, "missing"), (LEFT,), "left", "missing"),
        (source(place, "Noisy"), (LEFT, RIGHT), "both", r"\['left', 'right'\].*\['left'\]"),
    ]
    for bad, inputs, samples, words in cases:
        config = ExportConfig(source=bad, samples=place / samples, inputs=inputs)
        with pytest.raises(SourceError, match=words):
            export(config, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_transformers_directories_are_checked_before_any_import(tmp_path: Path) -> None:
    """No config, a broken one, no weights, an unknown architecture."""
    with pytest.raises(SourceError, match=r"config\.json"):
        parse_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="is no JSON"):
        parse_source(str(tmp_path))
    unknown = "BertForNextSentencePrediction"
    (tmp_path / "config.json").write_text(f'{{"architectures": ["{unknown}"]}}')
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        parse_source(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=unknown):
        parse_source(str(tmp_path))
    found = parse_source(str(tmp_path), task="token-classification")
    assert found.task == "token-classification"
    config = '{"architectures": ["BertForTokenClassification"], "id2label": {"1": "A"}}'
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match="id2label"):
        parse_source(str(tmp_path))
