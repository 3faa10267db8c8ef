"""Six faults, planted by hand into a transformer block and into a CNN: the guilty node is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from equipoise.parity.blame import Blame, BlameSettings, find_blame

SUBJECTS = ("block", "pictures")
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "blame.py"


def blamed(subject: Any, candidate: Any, folder: Path, **settings: Any) -> Blame:
    path = candidate
    if not isinstance(candidate, Path):
        path = folder / "candidate.onnx"
        onnx.save(candidate, path)
    return find_blame(
        subject.reference, path, feeds=subject.feeds, settings=BlameSettings(**settings)
    )


def node_of(model: Any, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def tensor_of(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replace(model: Any, name: str, array: np.ndarray) -> None:
    tensor_of(model, name).CopyFrom(numpy_helper.from_array(np.asarray(array), name))


def add(model: Any, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def set_attribute(node: Any, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


# The planters: model in, guilty node out.


def one_weight(model: Any, name: str) -> None:
    array = numpy_helper.to_array(tensor_of(model, name)).copy()
    array.ravel()[int(np.abs(array).argmax())] *= -2
    replace(model, name, array)


def weight_of_block(model: Any) -> str:
    one_weight(model, "down_weight")
    return "node_down_product"


def weight_of_pictures(model: Any) -> str:
    one_weight(model, "depth_weight")
    return "node_depth"


def transpose_of_block(model: Any) -> str:
    set_attribute(node_of(model, "node_k_heads"), "perm", [0, 2, 1, 3])
    return "node_k_heads"


def transpose_of_pictures(model: Any) -> str:
    node = node_of(model, "node_point")
    node.output[0] = "point.untransposed"
    added = helper.make_node(
        "Transpose", ["point.untransposed"], ["point"], name="swapped", perm=[0, 1, 3, 2]
    )
    model.graph.node.insert(list(model.graph.node).index(node) + 1, added)
    return "swapped"


def epsilon_of_block(model: Any) -> str:
    set_attribute(node_of(model, "node_normed"), "epsilon", 1e-5)
    return "node_normed"


def epsilon_of_pictures(model: Any) -> str:
    """A batch normalisation folded with 1e-5 in the place of 1e-3."""
    variance = np.random.default_rng(0).uniform(0.01, 0.5, 16).astype(np.float32)
    ratio = np.sqrt((variance + 1e-3) / (variance + 1e-5)).reshape(-1, 1, 1, 1)
    weight = numpy_helper.to_array(tensor_of(model, "wide_weight"))
    replace(model, "wide_weight", (weight * ratio).astype(np.float32))
    return "node_wide"


def pad_of_block(model: Any) -> str:
    node = node_of(model, "node_padding")
    node.input[2] = add(model, "small", np.float32(-2))
    return "node_padding"


def pad_of_pictures(model: Any) -> str:
    set_attribute(node_of(model, "node_wide"), "pads", [0, 0, 2, 2])
    return "node_wide"


def fusion_of_block(model: Any) -> str:
    """Bias and GELU as one node, which approximates what was exact."""
    node, before = node_of(model, "node_active"), node_of(model, "node_up")
    fused = helper.make_node(
        "FastGelu", ["up_product", "up_bias"], ["active"], name="fused", domain="com.microsoft"
    )
    node.CopyFrom(fused)
    model.graph.node.remove(before)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return "fused"


def fusion_of_pictures(model: Any) -> str:
    """Convolution and Clip as one node, with the bound of another."""
    node, before = node_of(model, "node_depth_active"), node_of(model, "node_depth")
    fused = helper.make_node(
        "FusedConv", list(before.input), ["depth_active"], name="fused", domain="com.microsoft",
        pads=[1, 1, 1, 1], group=8, activation="Clip", activation_params=[0.0, 1.0],
    )  # fmt: skip
    node.CopyFrom(fused)
    model.graph.node.remove(before)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return "fused"


def saturate(model: Any) -> str:
    """An eighth of its scale for the last activation that has one of its own."""
    node = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][-1]
    scale = numpy_helper.to_array(tensor_of(model, node.input[1])) / np.float32(8)
    replace(model, node.input[1], scale)
    return str(node.name)


FAULTS: dict[tuple[str, str], Callable[[Any], str]] = {
    ("block", "weight"): weight_of_block,
    ("block", "transpose"): transpose_of_block,
    ("block", "epsilon"): epsilon_of_block,
    ("block", "pad"): pad_of_block,
    ("block", "fusion"): fusion_of_block,
    ("block", "saturation"): saturate,
    ("pictures", "weight"): weight_of_pictures,
    ("pictures", "transpose"): transpose_of_pictures,
    ("pictures", "epsilon"): epsilon_of_pictures,
    ("pictures", "pad"): pad_of_pictures,
    ("pictures", "fusion"): fusion_of_pictures,
    ("pictures", "saturation"): saturate,
}


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_the_planted_node_is_named_first(
    name: str, fault: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """One fault, one node; it is the worst as well."""
    subject = request.getfixturevalue(name)
    model = onnx.load(subject.int8 if fault == "saturation" else subject.reference)
    guilty = FAULTS[name, fault](model)
    found = blamed(subject, model, tmp_path)
    assert found.first is not None
    assert found.first.node == guilty
    assert found.worst == found.first
    assert found.departures == 1
    assert guilty in found.in_words()


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("form", ["reference", "int8"])
def test_nobody_is_named_without_a_fault(
    name: str, form: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Honest rounding is no fault, in float and in integers, as written and as optimised."""
    subject = request.getfixturevalue(name)
    found = blamed(subject, getattr(subject, form), tmp_path)
    assert found.first is None
    assert found.outputs_agree is True
    assert "none of" in found.in_words()


def test_two_faults_are_told_apart(block: Any, tmp_path: Path) -> None:
    """The first is small, the second large: each is named, and what was before the first."""
    model = onnx.load(block.reference)
    first, second = epsilon_of_block(model), weight_of_block(model)
    found = blamed(block, model, tmp_path)
    assert found.first is not None
    assert found.worst is not None
    assert (found.first.node, found.worst.node) == (first, second)
    assert found.departures == 2
    assert found.first.before == 0.0
    assert found.worst.before > 0.0


def test_words_say_what_differs(block: Any, pictures: Any, tmp_path: Path) -> None:
    """The attribute, the constant, the operator, the share that is cut off."""
    expected = {
        ("block", "epsilon"): "epsilon is 1e-05, in the reference 1e-12",
        ("block", "weight"): "its constant down_weight differs from the reference's in 1 of 512",
        ("block", "fusion"): "the reference makes this value by Gelu (node_active)",
        # 8 tokens and 8 channels of a head: the shape does not tell.
        ("block", "transpose"): "perm is [0, 2, 1, 3], in the reference [0, 2, 3, 1]",
        ("pictures", "pad"): "pads is [0, 0, 2, 2], in the reference [1, 1, 1, 1]",
        ("pictures", "saturation"): "% are cut off",
    }
    for (name, fault), words in expected.items():
        subject = block if name == "block" else pictures
        model = onnx.load(subject.int8 if fault == "saturation" else subject.reference)
        FAULTS[name, fault](model)
        found = blamed(subject, model, tmp_path)
        assert words in found.in_words()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["minilm", "lite0"])
def test_real_models(name: str, tmp_path: Path) -> None:
    """The benchmark at one place per fault: real weights, all six faults, no false alarm."""
    work = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "record.json")]
    command = [sys.executable, str(BENCHMARK), "--cases", name, "--seeds", "1", *work]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1100)
    assert child.returncode == 0, child.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    six = {
        one["fault"]: one["named"] == one["node"]
        for one in record["planted"]
        if one["fault"] != "changed weight" or one["form"] == "float"
    }
    assert len(six) == 6
    assert all(six.values()), six
    assert [one["named"] for one in record["honest"]] == [""] * len(record["honest"])
