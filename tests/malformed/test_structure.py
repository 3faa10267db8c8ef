"""M4: models whose graph, operators, attributes or tensors are not what ONNX allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.malformed import material
from tests.malformed.counting import Campaign, Case

Change = Callable[[onnx.ModelProto], object]


def _node(model: onnx.ModelProto, index: int) -> onnx.NodeProto:
    return model.graph.node[index]


def _tensor(model: onnx.ModelProto, index: int) -> onnx.TensorProto:
    return model.graph.initializer[index]


def _set(target: Callable[[onnx.ModelProto], object], **fields: object) -> Change:
    """Set fields of a part of the model."""

    def change(model: onnx.ModelProto) -> None:
        for name, value in fields.items():
            setattr(target(model), name, value)

    return change


def _inputs(index: int, *names: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _node(model, index).input[:] = names

    return change


def _attribute(index: int, name: str, value: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _node(model, index).attribute.append(helper.make_attribute(name, value))

    return change


def _opsets(*pairs: tuple[str, int]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(*pair) for pair in pairs)

    return change


def _dims(index: int, *dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _tensor(model, index).dims[:] = dims

    return change


def _input_dims(*dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        shape = model.graph.input[0].type.tensor_type.shape
        del shape.dim[:]
        for size in dims:
            shape.dim.add().dim_value = size

    return change


def _two_payloads(model: onnx.ModelProto) -> None:
    _tensor(model, 1).float_data.extend([1.0] * 16)


def _renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _field(number: int, payload: bytes) -> bytes:
    """A field of a protobuf message that is a message or text itself."""
    size, length = len(payload), b""
    while size > 127:
        length, size = length + bytes([size % 128 | 128]), size // 128
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


def _nested(depth: int) -> bytes:
    """The perceptron with an ``If`` in an ``If``, and so on; no library writes that."""
    model = material.perceptron()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((), dtype=bool), "yes"))
    graph = helper.make_graph([helper.make_node("Relu", ["h"], ["o"])], "g", [], [])
    graph.output.add().name = "o"
    inner, kind = graph.SerializeToString(), bytes([20 << 3 & 255 | 128, 1, 5])  # type: GRAPH
    for level in range(depth):
        branches = b"".join(
            _field(5, _field(1, name) + _field(6, inner if first else small) + kind)
            for first, (name, small) in enumerate(
                ((b"else_branch", graph.SerializeToString()), (b"then_branch", b""))
            )
        )
        node = _field(1, b"yes") + _field(2, b"o") + _field(3, b"if%d" % level) + _field(4, b"If")
        inner = _field(1, node + branches) + _field(2, b"g") + _field(12, _field(1, b"o"))
    return model.SerializeToString() + _field(7, inner)  # a second graph is merged into the first


def _bad_type(model: onnx.ModelProto) -> None:
    """The number of a type that there is none of, past what the library's own setter allows."""
    _tensor(model, 1).data_type = 99


CASES: dict[str, tuple[Change, str]] = {
    "cycle": (_inputs(0, "r", "kernel", "bias"), "first"),
    "self loop": (_inputs(1, "r"), "relu"),
    "duplicate initializer": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(16, "f4"), "bias")),
        "bias",
    ),
    "duplicate output of two nodes": (
        lambda m: m.graph.node.append(helper.make_node("Relu", ["h"], ["r"], name="again")),
        "'r'",
    ),
    "duplicate output in one node": (
        lambda m: m.graph.node.append(
            helper.make_node("Split", ["h"], ["s", "s"], name="split", num_outputs=2)
        ),
        "'s'",
    ),
    "output that is an initializer": (
        lambda m: m.graph.node.append(helper.make_node("Relu", ["h"], ["kernel"], name="over")),
        "kernel",
    ),
    "output that is an input": (
        lambda m: m.graph.node.append(helper.make_node("Relu", ["h"], ["x"], name="over")),
        "'x'",
    ),
    "duplicate graph output": (lambda m: m.graph.output.append(m.graph.output[0]), "'y'"),
    "duplicate graph input": (lambda m: m.graph.input.append(m.graph.input[0]), "'x'"),
    "duplicate node name": (_set(lambda m: _node(m, 1), name="first"), "first"),
    "unknown operator": (_set(lambda m: _node(m, 1), op_type="Relux"), "Relux"),
    "no operator": (_set(lambda m: _node(m, 1), op_type=""), "relu"),
    "unknown domain": (_set(lambda m: _node(m, 1), domain="com.nobody"), "com.nobody"),
    "unknown domain, imported": (
        lambda m: (
            _set(lambda m: _node(m, 1), domain="com.nobody")(m),
            m.opset_import.append(helper.make_opsetid("com.nobody", 1)),
        ),
        "com.nobody:Relu",
    ),
    "dangling input": (_inputs(1, "nothing"), "relu"),
    "missing output": (_set(lambda m: m.graph.output[0], name="z"), "'z'"),
    "too few inputs": (_inputs(2, "r"), "second"),
    "too many inputs": (_inputs(1, "h", "head"), "relu"),
    "too many outputs": (lambda m: _node(m, 1).output.append("more"), "relu"),
    "no output": (lambda m: _node(m, 1).output.pop(), "relu"),
    "unknown attribute": (_attribute(1, "colour", 3), "relu"),
    "attribute of another type": (_attribute(0, "alpha", "one"), "first"),
    "attribute twice": (
        lambda m: [_attribute(0, "alpha", value)(m) for value in (1.0, 2.0)],
        "first",
    ),
    "attribute whose type lies": (
        lambda m: (
            _attribute(0, "alpha", 2.0)(m),
            setattr(_node(m, 0).attribute[0], "type", onnx.AttributeProto.INT),
        ),
        "first",
    ),
    "opset 0": (_opsets(("", 0)), "domain_version of 0"),
    "opset 999": (_opsets(("", 999)), "opset"),
    "no opset": (_opsets(), "opset"),
    "two opsets of one domain": (_opsets(("", 21), ("", 13)), "opset"),
    "IR version 99": (_set(lambda m: m, ir_version=99), "ir_version 99"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "ir_version"),
    "no graph": (lambda m: m.ClearField("graph"), "graph"),
    "nothing in the graph": (lambda m: m.graph.Clear(), "graph"),
    "shape of an output that lies": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 5),
        "y",
    ),
    "type of an output that lies": (
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.INT64),
        "y",
    ),
    "weights that do not fit": (_dims(0, 16, 8), "first"),
    "two payloads": (_two_payloads, "bias"),
    "short raw_data": (lambda m: setattr(_tensor(m, 1), "raw_data", b"\0" * 60), "bias"),
    "long raw_data": (lambda m: setattr(_tensor(m, 1), "raw_data", b"\0" * 68), "bias"),
    "no data": (lambda m: _tensor(m, 1).ClearField("raw_data"), "bias"),
    "type that is none": (_bad_type, "bias"),
    "type undefined": (_set(lambda m: _tensor(m, 1), data_type=0), "bias"),
    "negative size": (_dims(1, -16), "bias"),
    "size of 2^40": (_dims(1, 2**40), "bias"),
    "sizes that overflow": (_dims(1, 2**62, 2**62), "bias"),
    "sizes that overflow to what is there": (_dims(1, 2**32, 2**32, 16), "bias"),
    "negative size of an input": (_input_dims(-1, 8), "x"),
    "size of an input of 2^40": (_input_dims(2**40, 8), "x"),
    "control characters in a name": (lambda m: _renamed(m, "h", "h\x00\x1b[31m"), "name"),
    "name of ten megabytes": (lambda m: _renamed(m, "h", "h" * 10_000_000), "name"),
    "no elem_type of an input": (
        lambda m: m.graph.input[0].type.tensor_type.ClearField("elem_type"),
        "x",
    ),
    "type of an input that is none": (
        _set(lambda m: m.graph.input[0].type.tensor_type, elem_type=77),
        "x",
    ),
    "an input that is no tensor": (
        lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.CopyFrom(
            m.graph.output[0].type.tensor_type
        ),
        "x",
    ),
}


def _cases(folder: Path) -> Iterator[Case]:
    material.write_onnx(folder / "good.onnx")
    for index, (name, (change, word)) in enumerate(CASES.items()):
        model = material.perceptron()
        change(model)
        file = f"m{index}.onnx"
        (folder / file).write_bytes(model.SerializeToString())
        yield Case(
            name=name, subject="onnx_open", folder=folder, file=file, target=file,
            good="good.onnx", words=(word,) if word else (),
        )  # fmt: skip


def _deep(folder: Path) -> Iterator[Case]:
    for depth in (10, 50, 200, 2000):
        file = f"deep{depth}.onnx"
        (folder / file).write_bytes(_nested(depth))
        yield Case(
            name=f"If nested {depth} times",
            subject="onnx_open",
            folder=folder,
            file=file,
            target=file,
        )


def test_structure(campaign: Campaign, tmp_path: Path) -> None:
    """Refused when it is read or at the latest by the session, with what is wrong named."""
    campaign.run([*_cases(tmp_path), *_deep(tmp_path)], what="M4 structure", least=40)
