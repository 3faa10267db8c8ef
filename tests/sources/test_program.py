"""Programs of torch.export: read as data, with their names and sizes; code in them is refused."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.errors import SourceError, UnsafeCheckpointError
from equipoise.export.signature import SignatureConfig, read_signature
from equipoise.sources.program import (
    load_program,
    program_inputs,
    program_module,
    program_ranges,
)
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import NamedModule, load_module

AUTO = torch.export.Dim.AUTO


class Pair(torch.nn.Module):
    """Weights, a buffer, a constant, arithmetic on sizes, two inputs, named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0))
        self.constant = torch.ones(3)

    def forward(self, left, *, right):
        hidden = self.dense(left) + right.mean(1, keepdim=True) + self.shift + self.constant
        return {"hidden": hidden, "flat": left.reshape(left.shape[0] * 4)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a dynamic batch and a dynamic width of one input."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Pair().eval(),
        (torch.rand(2, 4),),
        {"right": torch.rand(2, 5)},
        dynamic_shapes={"left": {0: batch}, "right": {0: batch, 1: AUTO}},
    )
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    torch.export.save(program, path)
    return path


def test_program_is_a_module_with_names_and_sizes(good: Path, tmp_path: Path) -> None:
    """Specs, ranges, signature and numbers of the model, at other sizes than it was traced with."""
    program = load_program(good)
    assert [str(spec) for spec in program_inputs(program)] == [
        "left: float32[batch, 4]",
        "right: float32[batch, right_1]",
    ]
    assert program_ranges(program) == {"batch": (2, 64), "right_1": (2, None)}
    source = parse_source(str(good))
    module = load_module(source)
    assert list(inspect.signature(module.forward).parameters) == ["left", "right"]
    assert module.program.range_constraints
    record = read_signature(SignatureConfig(source=source), output=tmp_path)
    assert record.names == ("left", "right")
    named = NamedModule(module, names=["left", "right"], source="program")
    feeds = {"left": np.ones((5, 4), np.float32), "right": np.ones((5, 9), np.float32)}
    found = named.run(feeds)
    torch.manual_seed(0)
    expected = Pair()(torch.ones(5, 4), right=torch.ones(5, 9))
    np.testing.assert_allclose(found["hidden"], expected["hidden"].detach(), rtol=1e-5)
    assert found["flat"].shape == (20,)
    torch.nn.Sequential(module).eval()  # a program has no modes of its own


def test_program_of_a_transformers_model_loads_without_its_code(tmp_path: Path) -> None:
    """Its outputs are of a class of transformers, which is imported for it."""
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    ids = torch.ones(2, 6, dtype=torch.long)
    axes = {0: AUTO, 1: AUTO}
    model = BertModel(small).eval()
    program = torch.export.export(
        model, (ids,), {"attention_mask": ids},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )  # fmt: skip
    torch.export.save(program, tmp_path / "model.pt2")
    module = load_module(parse_source(str(tmp_path / "model.pt2")))
    longer = torch.ones(3, 9, dtype=torch.long)
    found = module(input_ids=longer, attention_mask=longer)
    torch.testing.assert_close(found.last_hidden_state, model(longer, longer).last_hidden_state)


def test_inputs_that_onnx_cannot_have_are_told() -> None:
    """Lists of tensors."""

    class Listed(torch.nn.Module):
        def forward(self, parts):
            return parts[0] + parts[1]

    program = torch.export.export(Listed(), ([torch.ones(2), torch.ones(2)],))
    with pytest.raises(SourceError, match="lists or dicts"):
        program_module(program)


class Marker:
    """Pickles as a call that would leave a directory."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("marker",)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(content: dict[str, bytes], folder: Path, root: str = "model/") -> Path:
    with zipfile.ZipFile(folder / "bad.pt2", "w") as archive:
        for name, data in content.items():
            archive.writestr(root + name, data)
    return folder / "bad.pt2"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


GRAPH = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


@pytest.mark.parametrize(
    "name",
    [
        "data/aotinductor/model/net.so", "data/aotinductor/model/wrapper.cpp", "code/net.py",
        "extra/helper.py", "extra/lib.so", "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0", "data/weights/model.pt", "data/constants/model.pt",
        "models/other.json", "extra/../../x", "anything", "data/sample_inputs/other.pt",
    ],
)  # fmt: skip
def test_members_beyond_a_graph_and_weights_are_refused(
    good: Path, tmp_path: Path, name: str
) -> None:
    """Compiled code, TorchScript, pickled objects, paths that leave the file, the unknown."""
    bad = packed(members(good) | {name: b"x"}, tmp_path)
    with pytest.raises(UnsafeCheckpointError, match=name.rpartition("/")[2]):
        load_program(bad)


def edited(good: Path, folder: Path, member: str, change) -> Path:
    content = members(good)
    value = json.loads(content[member])
    change(value)
    return packed(content | {member: json.dumps(value).encode()}, folder)


def graph_of(value: dict) -> dict:
    return value["graph_module"]["graph"]


def set_size(text: str):
    def change(value: dict) -> None:
        graph_of(value)["tensor_values"]["left"]["sizes"][0]["as_expr"]["expr_str"] = text

    return change


def set_target(text: str):
    return lambda value: graph_of(value)["nodes"][1].update(target=text)


def set_tree(text: str):
    def change(value: dict) -> None:
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = text

    return change


def tree(kind: str, context: str) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


MARK = "__import__('os').mkdir('marker')"
EDITS = {
    "code as a size": (GRAPH, set_size(MARK)),
    "code in a string of a size": (GRAPH, set_size(f'Add("{MARK}")')),
    "an attribute in a size": (GRAPH, set_size("Symbol.__init__")),
    "a function that evaluates": (GRAPH, set_size("sympify('s0')")),
    "a lambda in a size": (GRAPH, set_size("(lambda: 1)()")),
    "a size that is no expression": (GRAPH, set_size("s0 +")),
    "any function below torch": (GRAPH, set_target("torch.hub.os.system")),
    "an operator that loads libraries": (GRAPH, set_target("torch.ops.load_library")),
    "an operator on files": (GRAPH, set_target("torch.ops.aten.from_file.default")),
    "an operator that is nobody's": (GRAPH, set_target("torch.ops.mine.run.default")),
    "an extension": (GRAPH, set_target("#ext:run")),
    "a name that is source": (
        GRAPH,
        lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["left", f"right={MARK}"]
        ),
    ),
    "a key that is source": (GRAPH, lambda v: v["range_constraints"].update({MARK: {}})),
    "a tree that imports": (
        GRAPH,
        set_tree(tree("collections.defaultdict", '{"default_factory_module": "antigravity"}')),
    ),
    "an enum that imports": (
        GRAPH,
        set_tree(tree("builtins.dict", '[{"__enum__": true, "fqn": "antigravity:a"}]')),
    ),
    "a pickled weight": (WEIGHTS, lambda v: v["config"]["shift"].update(use_pickle=True)),
    "a weight elsewhere": (WEIGHTS, lambda v: v["config"]["shift"].update(path_name="../x")),
    "a custom object": (
        CONSTANTS,
        lambda v: v["config"]["constant"].update(path_name="custom_obj_0"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_contents_that_would_run_are_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    """torch.export.load would evaluate, import or look up each of these."""
    monkeypatch.chdir(tmp_path)
    member, change = EDITS[edit]
    bad = edited(good, tmp_path, member, change)
    with pytest.raises(UnsafeCheckpointError, match=r"bad\.pt2 holds more than a graph"):
        load_program(bad)
    assert not Path("marker").exists()


def test_sample_inputs_that_hold_code_are_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export.load would read them again without protection."""
    monkeypatch.chdir(tmp_path)
    for data in (saved(((Marker(),), {})), pickle.dumps(Marker())):
        bad = packed(members(good) | {"data/sample_inputs/model.pt": data}, tmp_path)
        with pytest.raises(UnsafeCheckpointError, match=r"sample inputs\) holds code.*mkdir"):
            load_program(bad)
    assert not Path("marker").exists()


def test_guards_that_hold_code_are_never_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are Python in the file; the module is made without them."""
    monkeypatch.chdir(tmp_path)
    bad = edited(good, tmp_path, GRAPH, lambda v: v.update(guards_code=[f"{MARK} is None"]))
    module = load_module(parse_source(str(bad)))
    assert module(torch.ones(2, 4), torch.ones(2, 3))["hidden"].shape == (2, 3)
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", r"bad\.pt2 is no program"),
        ("text", r"bad\.pt2 is no program"),
        ("half", r"bad\.pt2 is no program"),
        ("another zip", r"it has no models/model\.json"),
        ("old layout", r"it has no models/model\.json"),
        ("graph cut off", r"damaged: models/model\.json"),
        ("graph a list", r"damaged"),
        ("graph without contents", r"damaged"),
        ("weights a list", r"a list of weights is no list"),
        ("weight missing", r"damaged or of another PyTorch"),
        ("weight cut off", r"damaged or of another PyTorch"),
        ("other schema", r"damaged or of another PyTorch"),
    ],
)
def test_files_that_are_no_program_are_named(
    good: Path, tmp_path: Path, name: str, words: str
) -> None:
    """Empty, cut off, another zip, the layout of old versions, a broken graph."""
    data, content, bad = good.read_bytes(), members(good), tmp_path / "bad.pt2"
    raw = {"empty": b"", "text": b"no program" * 9, "half": data[: len(data) // 2]}
    parts = {
        "another zip": {"a.txt": b""},
        "old layout": {"serialized_exported_program.json": b"{}", "version": b"8.1"},
        "graph cut off": content | {GRAPH: b"{"},
        "graph a list": content | {GRAPH: b"[]"},
        "graph without contents": content | {GRAPH: b"{}"},
        "weights a list": content | {WEIGHTS: b"[]"},
        "weight missing": {n: d for n, d in content.items() if n != "data/weights/weight_0"},
        "weight cut off": content | {"data/weights/weight_0": b"\0" * 4},
    }
    if name in raw:
        bad.write_bytes(raw[name])
    elif name in parts:
        packed(parts[name], tmp_path)
    else:
        edited(good, tmp_path, GRAPH, lambda v: v["schema_version"].update(major=1))
    with pytest.raises(SourceError, match=words):
        load_program(bad)


def test_missing_program_and_members_there_twice_are_named(good: Path, tmp_path: Path) -> None:
    """Two readers of a file with twins may see two programs."""
    with pytest.raises(SourceError, match="no such program"):
        load_program(tmp_path / "none.pt2")
    bad = packed(members(good), tmp_path)
    with zipfile.ZipFile(bad, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"model/{GRAPH}", b"{}")
    with pytest.raises(UnsafeCheckpointError, match=r"model\.json"):
        load_program(bad)
