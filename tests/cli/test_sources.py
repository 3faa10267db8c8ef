"""Each kind of source goes the whole way from the shell: export, reference, candidates, bundle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import equipoise as library
from equipoise.report.write import read_result

WORDS = ("anna", "bern", "met", "in", "paris", "otto", "the", "near", "lake", "##s", "walk")
PEOPLE, PLACES = {"anna", "otto"}, {"bern", "paris"}
LABELS = ("O", "B-PER", "B-LOC")


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {token: index for index, token in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(path))


def _distilbert(directory: Path) -> Path:
    """A small DistilBERT sequence classifier: it takes no token types."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=32, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64,
        num_labels=3,
    )  # fmt: skip
    DistilBertForSequenceClassification(config).eval().save_pretrained(directory)
    _tokenizer(directory / "tokenizer.json")
    return directory


def _bert(directory: Path) -> Path:
    """A small BERT that has learnt to tag names, saved as transformers does."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = torch.randint(4, 15, (32, 10))
        names = {4: 1, 9: 1, 5: 2, 8: 2}
        labels = torch.tensor([[names.get(int(i), 0) for i in row] for row in ids])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(directory)
    _tokenizer(directory / "tokenizer.json")
    return directory


def _tag(word: str) -> str:
    return "B-PER" if word in PEOPLE else "B-LOC" if word in PLACES else "O"


def _sentences(count: int) -> list[list[str]]:
    generator = random.Random(0)
    plain = [word for word in WORDS if not word.startswith("##")]
    return [generator.choices(plain, k=generator.randint(3, 12)) for _ in range(count)]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory, equipoise) -> tuple[Path, Path]:
    """A finished run on a token classifier: model directory, output directory."""
    folder = tmp_path_factory.mktemp("tagger")
    model = _bert(folder / "model")
    lines = ["\n".join(f"{w} {_tag(w)}" for w in sentence) for sentence in _sentences(420)]
    (folder / "data.txt").write_text("\n\n".join(lines) + "\n")
    done = equipoise(
        "tune", model, "--task", "token-classification", "--data", folder / "data.txt",
        "--metric", "entity-f1", "--max-drop", "0.05", "--threads", "1", "--rounds", "12",
        "--calibration-samples", "64", "--trials", "6", "-o", folder / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "precision" in done.stdout
    assert "support" in done.stdout
    return model, folder / "out"


def test_transformers_token_classifier_is_tuned(tagged) -> None:
    """Fusions apply, text lengths stay dynamic, and the per-class report is in the results."""
    _, output = tagged
    result = read_result(output / "results.json")
    assert result.reference_name == "PyTorch"
    assert result.reference_metric.value > 0.9
    assert "LOC" in result.reference_report
    fused = next(c for c in result.candidates if c.recipe.name == "float32-fused")
    assert any("fused: 2" in note or "Attention" in note for note in fused.notes)
    with library.load(output / "bundle") as session:
        assert session.manifest.labels == LABELS
        assert session.inputs[0].shape == ("batch", "sequence")


def test_parity_record_covers_two_batch_sizes(tagged) -> None:
    """The bundle proves the export at several sizes, and the engine at two batches."""
    _, output = tagged
    records = json.loads((output / "bundle/parity.json").read_text())
    (parity,) = records.values()
    for part in ("engine", "engine_batch"):
        assert parity[part][0]["name"] == "logits"
    assert {entry["sizes"]["batch"] for entry in parity["exported"]} == {1, 2, 3}
    assert all(entry["outputs"][0]["name"] == "logits" for entry in parity["exported"])
    assert parity["exporter"] == "dynamo"
    assert parity["samples"] > 300


def test_bundle_runs_on_text_and_checks_against_pytorch(tagged, equipoise) -> None:
    """run prints the entities; check computes the reference anew from the directory."""
    model, output = tagged
    done = equipoise("run", output / "bundle", "--text", "Otto met Anna in Bern")
    assert [line.split("\t")[:2] for line in done.stdout.splitlines()] == [
        ["Otto", "PER"], ["Anna", "PER"], ["Bern", "LOC"]
    ]  # fmt: skip
    done = equipoise("check", output / "bundle", "--against", model)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sequence_classifier_is_exported_from_json_lines(tmp_path: Path, equipoise) -> None:
    """Pairs of texts go in; token types stay out of a model that takes none."""
    model = _distilbert(tmp_path / "model")
    lines = [
        json.dumps({"text": " ".join(s), "text_pair": "the lake", "label": i % 3})
        for i, s in enumerate(_sentences(60))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    output = tmp_path / "model.onnx"
    done = equipoise("export", model, "--data", tmp_path / "data.jsonl", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "input_ids: int64[batch, sequence]" in done.stdout
    assert "token_type_ids" not in done.stdout
    assert output.is_file()
    assert not output.with_name("model.onnx.data").exists()


def test_factory_with_safetensors_is_exported(tmp_path: Path, equipoise) -> None:
    """A module of the user's own is found from the current directory."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "network.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    done = equipoise(
        "export", "module:network:build", "--weights", "weights.safetensors", "--data", "digits",
        "-o", "model.onnx", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "float32[batch, 1, 8, 8]" in done.stdout
    wrong = torch.nn.Linear(3, 3)
    save_file(wrong.state_dict(), tmp_path / "wrong.safetensors")
    done = equipoise(
        "export", "module:network:build", "--weights", "wrong.safetensors", "--data", "digits",
        "-o", "other.onnx", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    assert "wrong.safetensors" in done.stderr
    assert not (tmp_path / "other.onnx").exists()
