"""What a source may be, and which directories are refused before transformers sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.errors import SourceError, UnsafeCheckpointError, UsageError
from equipoise.sources.source import parse_source
from equipoise.sources.transformers_model import read_config

CONFIG = {"architectures": ["BertForTokenClassification"], "model_type": "bert"}
TIMM = os.environ.get("EQUIPOISE_TEST_TIMM", "")


def directory(folder: Path, **changes: object) -> Path:
    """A directory that looks like a transformers model, without weights in the file."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_directory_gives_its_task_labels_tokenizer_and_processor(tmp_path: Path) -> None:
    """Labels belong to tasks that classify; other tasks do not read them."""
    directory(tmp_path, id2label={"0": "O", "1": "B-PER"})
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    source = parse_source(str(tmp_path))
    assert (source.kind, source.task) == ("transformers", "token-classification")
    assert source.labels == ("O", "B-PER")
    assert source.tokenizer == (tmp_path / "tokenizer.json").resolve()
    assert source.processor == (tmp_path / "preprocessor_config.json").resolve()
    directory(tmp_path, id2label={"7": "odd"})
    with pytest.raises(SourceError, match="id2label"):
        parse_source(str(tmp_path))
    assert parse_source(str(tmp_path), task="feature-extraction").labels == ()


@pytest.mark.parametrize(
    ("file", "value", "key"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Net"}}, "auto_map"),
        ("config.json", {"auto_map": {"AutoConfig": "other/repo--c.C"}}, "auto_map"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("config.json", {"_attn_implementation_internal": "x"}, "_attn_implementation_internal"),
        ("config.json", {"anything_internal": 0}, "anything_internal"),
        ("config.json", {"attn_implementation": "some/kernel"}, "attn_implementation"),
        ("config.json", {"_attn_implementation": {"text": "some/kernel"}}, "_attn_implementation"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "m.N"}}}, "auto_map"),
        ("config.json", {"backbone_config": {"trust_remote_code": True}}, "trust_remote_code"),
        ("config.json", {"layers": [{"deep": [{"trust_remote_code": "yes"}]}]}, "trust_remote"),
        ("config.json", {"text_config": {"_attn_implementation_internal": "a"}}, "_internal"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, "auto_map"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "p.P"}}, "auto_map"),
        ("processor_config.json", {"image_processor": {"auto_map": {"A": "p.P"}}}, "auto_map"),
        ("video_preprocessor_config.json", {"trust_remote_code": 1}, "trust_remote_code"),
        ("generation_config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("special_tokens_map.json", {"auto_map": {"A": "p.P"}}, "auto_map"),
    ],
)
def test_settings_that_make_transformers_run_code_are_refused(
    tmp_path: Path, file: str, value: dict, key: str
) -> None:
    """At any depth of any file that transformers reads; the file and the key are named."""
    directory(tmp_path)
    content = CONFIG | value if file == "config.json" else value
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UnsafeCheckpointError, match=rf"{file} asks to run code.*{key}"):
        parse_source(str(tmp_path))


def test_settings_that_are_switched_off_are_let_through(tmp_path: Path) -> None:
    """Old versions of transformers wrote them out."""
    directory(
        tmp_path, auto_map={}, trust_remote_code=False, _attn_implementation_internal=None,
        attn_implementation="sdpa",
    )  # fmt: skip
    assert read_config(tmp_path)["model_type"] == "bert"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', "[" * 100000, "\ufeff{}"])
def test_configs_that_are_no_object_are_named(tmp_path: Path, text: str) -> None:
    """Empty, cut off, of another type, with a key twice, nested without end."""
    directory(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        parse_source(str(tmp_path))
    directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(SourceError, match=r"tokenizer_config\.json"):
        parse_source(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.pkl", "vocab.pkl", "tokenizer.pickle", "t.joblib"])
def test_pickled_tokenizers_are_refused(tmp_path: Path, name: str) -> None:
    """Whatever would read them."""
    directory(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnsafeCheckpointError, match=rf"{name} is a pickle"):
        parse_source(str(tmp_path))


@pytest.mark.parametrize(
    "shard", ["../w.safetensors", "/etc/passwd", "a/../../w", "sub/w.safetensors", "..", "a\\w"]
)
def test_index_that_leaves_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    """Shards lie beside their index."""
    directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"w": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpointError, match=r"index\.json puts 'w' outside"):
        parse_source(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"w": 3}}, "weight_map"),
        ({"weight_map": {}}, "not there"),
        ({"weight_map": {"w": "none.safetensors"}}, r"none\.safetensors"),
    ],
)
def test_index_that_is_broken_is_named(tmp_path: Path, index: dict, words: str) -> None:
    """No map, a wrong one, an empty one, a shard that is missing."""
    directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=words):
        parse_source(str(tmp_path))


def test_weights_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    """Quantised ones, adapters, none at all."""
    directory(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(SourceError, match="quantised already"):
        parse_source(str(tmp_path))
    directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="adapter"):
        parse_source(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no model\.safetensors, nor pytorch_model\.bin"):
        parse_source(str(tmp_path))


def test_forms_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm, a program, an ONNX file, a factory with a pickled state dict."""
    monkeypatch.chdir(tmp_path)
    for name in ("w.pth", "model.pt2", "model.onnx", "shop.py", "model.pt"):
        Path(name).write_bytes(b"")
    timm = parse_source("timm:efficientnet_lite0", weights=Path("w.pth"))
    assert (timm.kind, timm.task) == ("timm", "image-classification")
    assert parse_source("model.pt2").kind == "program"
    assert parse_source("model.onnx").kind == "onnx"
    factory = parse_source("module:shop:make", weights=Path("w.pth"), task="ctc")
    assert (factory.kind, factory.weights, factory.task) == (
        "factory", tmp_path.resolve() / "w.pth", "ctc"
    )  # fmt: skip
    for name, words in (
        ("none.pt2", "no such program"),
        ("timm:resnet18", "needs its weights"),
        ("model.pt", "weights alone do not say what to compute"),
        ("bert-base-uncased", "is no source"),
    ):
        with pytest.raises(SourceError, match=words):
            parse_source(name)
    with pytest.raises(SourceError, match=r"--weights goes with"):
        parse_source("model.pt2", weights=Path("w.pth"))
    with pytest.raises(UsageError, match="unknown task 'ctcc'"):
        parse_source("model.pt2", task="ctcc")


def test_parsing_imports_no_heavy_package(tmp_path: Path) -> None:
    """A wrong name is told in a blink, also where PyTorch is missing."""
    directory(tmp_path)
    code = (
        "import sys; from equipoise.sources.source import parse_source;"
        f" parse_source({str(tmp_path)!r});"
        " print(sorted({'torch', 'transformers', 'timm', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not TIMM, reason="EQUIPOISE_TEST_TIMM names no directory with timm")
def test_timm_model_is_built_filled_and_found_by_near_names(tmp_path: Path) -> None:
    """Beside a torchvision that was built for another PyTorch, which timm imports."""
    code = f"""
import sys
sys.path.append({TIMM!r})
import torch
from pathlib import Path
from equipoise.errors import SourceError, UsageError
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import build_module, load_module
import equipoise.sources.timm_model as ours
model = ours.build_timm("efficientnet_lite0")
torch.save({{"state_dict": model.state_dict()}}, "w.pth")
source = parse_source("timm:efficientnet_lite0", weights=Path("w.pth"))
loaded = load_module(source)
image = torch.rand(1, 3, 64, 64)
assert torch.equal(model.eval()(image), loaded(image))
assert next(build_module(source).parameters()).is_meta
for name, kind, word in (
    ("efficientnet_lit0", UsageError, "efficientnet_lite0"),
    ("zzz", UsageError, "list_models"),
    ("resnet18.nonsense", SourceError, "nonsense"),
):
    try:
        ours.build_timm(name)
    except kind as error:
        assert word in str(error), error
    else:
        raise SystemExit(name)
import transformers
transformers.ViTImageProcessor
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_timm_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    from equipoise.errors import MissingExtraError
    from equipoise.sources.timm_model import build_timm

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("equipoise.sources.timm_model.prepare_torchvision", lambda: None)
    with pytest.raises(MissingExtraError, match="timm") as raised:
        build_timm("resnet18")
    assert "equipoise[timm]" in raised.value.hint
