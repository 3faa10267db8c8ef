"""M3: tensors whose data are said to lie where they must not, in every place of a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.malformed import material
from tests.malformed.counting import Campaign, Case

from equipoise import onnxio

SIZE = 16
NEEDED = 4 * SIZE
ENTRIES: dict[str, dict[str, str]] = {
    "one folder up": {"location": "../outside.bin"},
    "up from a folder": {"location": "sub/../../outside.bin"},
    "absolute": {"location": "OUTSIDE"},
    "with a drive": {"location": "C:\\data.bin"},
    "on a server": {"location": "\\\\server\\share\\data.bin"},
    "with backslashes": {"location": "..\\outside.bin"},
    "with a NUL": {"location": "data.bin\0.png"},
    "empty": {"location": ""},
    "missing": {"location": "nowhere.bin"},
    "a directory": {"location": "sub"},
    "a FIFO": {"location": "fifo"},
    "a device": {"location": "device"},
    "a symlink": {"location": "link.bin"},
    "through a symlink": {"location": "linked/outside.bin"},
    "a hard link": {"location": "hard.bin"},
    "in memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"},
    "before the file": {"location": "data.bin", "offset": "-64"},
    "past the end": {"location": "data.bin", "offset": "4096"},
    "of a huge length": {"location": "data.bin", "length": str(2**50)},
    "with a wrong sum": {"location": "data.bin", "checksum": "0" * 40},
    "too short": {"location": "data.bin", "length": str(NEEDED - 4)},
    "said twice": {"location": "data.bin", "location ": "../outside.bin"},
    "at a number that is none": {"location": "data.bin", "offset": "1_6"},
}
"""What is wrong -> entries of the external data; ``OUTSIDE`` is an absolute path."""


def _external(folder: Path, entries: Mapping[str, str], *, dims: tuple[int, ...]) -> TensorProto:
    """A float32 tensor called ``bias`` with its data outside."""
    tensor = TensorProto(name="bias", data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"length": str(NEEDED)} | dict(entries)).items():
        text = value.replace("OUTSIDE", str(folder.parent / "outside.bin"))
        tensor.external_data.add(key=key.strip(), value=text)
    return tensor


def _base(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """The perceptron, whose bias comes from ``nodes``."""
    model = material.perceptron()
    if nodes:
        kept = [t for t in model.graph.initializer if t.name != "bias"]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
    return model


def _dense(tensor: TensorProto) -> onnx.ModelProto:
    model = _base()
    next(t for t in model.graph.initializer if t.name == "bias").CopyFrom(tensor)
    return model


def _sparse_tensor(tensor: TensorProto) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(SIZE, dtype=np.int64), "at")
    return helper.make_sparse_tensor(tensor, indices, [SIZE])


def _sparse(tensor: TensorProto) -> onnx.ModelProto:
    model = _base(helper.make_node("Identity", ["other"], ["bias"]))
    tensor.name = "other"
    model.graph.sparse_initializer.append(_sparse_tensor(tensor))
    return model


def _constant(tensor: TensorProto) -> onnx.ModelProto:
    return _base(helper.make_node("Constant", [], ["bias"], name="made", value=tensor))


def _sparse_constant(tensor: TensorProto) -> onnx.ModelProto:
    value = _sparse_tensor(tensor)
    return _base(helper.make_node("Constant", [], ["bias"], name="made", sparse_value=value))


def _attribute(tensor: TensorProto) -> onnx.ModelProto:
    """A list of tensors in an attribute of an operator of somebody."""
    node = helper.make_node("Keep", [], ["kept"], name="keeper", domain="com.somebody")
    node.attribute.append(helper.make_attribute("values", [tensor]))
    model = _base()
    model.graph.node.insert(0, node)
    model.opset_import.append(helper.make_opsetid("com.somebody", 1))
    return model


def _subgraph(tensor: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [SIZE])],
    )
    tensor.name = "inner"
    branch.initializer.append(tensor)
    other = helper.make_graph(
        [helper.make_node("Constant", [], ["out"], value_floats=[0.0] * SIZE)],
        "other",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [SIZE])],
    )
    model = _base(
        helper.make_node("If", ["yes"], ["bias"], name="if", then_branch=branch, else_branch=other)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones((), dtype=bool), "yes"))
    return model


def _function(tensor: TensorProto) -> onnx.ModelProto:
    model = _base(helper.make_node("Give", [], ["bias"], name="give", domain="local"))
    body = [helper.make_node("Constant", [], ["out"], name="made", value=tensor)]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("local", "Give", [], ["out"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def _training(tensor: TensorProto) -> onnx.ModelProto:
    model = _base()
    part = model.training_info.add()
    part.algorithm.name = "train"
    tensor.name = "rate"
    part.algorithm.initializer.append(tensor)
    return model


SITES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "initializer": _dense,
    "sparse initializer": _sparse,
    "Constant": _constant,
    "sparse Constant": _sparse_constant,
    "attribute": _attribute,
    "subgraph": _subgraph,
    "function": _function,
    "training": _training,
}
READABLE = ("initializer", "Constant", "subgraph", "function")
"""Where good external data are read, too."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with good data, links and special files; a file of somebody else beside it."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    secret = np.full(SIZE, 7.0, dtype=np.float32).tobytes()
    for name in ("outside.bin", "hidden/outside.bin", "shared.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(secret)
    good = np.arange(SIZE, dtype=np.float32).tobytes()
    (folder / "data.bin").write_bytes(good)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "linked").symlink_to(tmp_path / "hidden")
    os.link(tmp_path / "shared.bin", folder / "hard.bin")
    os.mkfifo(folder / "fifo")
    _device(folder / "device")
    entries = {"location": "data.bin", "checksum": hashlib.sha1(good).hexdigest()}
    for site in READABLE:
        model = SITES[site](_external(folder, entries, dims=(SIZE,)))
        (folder / f"good {site}.onnx").write_bytes(model.SerializeToString())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.bin")}
    yield folder
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.bin")} == before


def _device(path: Path) -> None:
    """A device, or where nobody may make one, a link to one."""
    try:
        os.mknod(path, 0o20644, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def _cases(folder: Path) -> Iterator[Case]:
    for site, build in SITES.items():
        for what, entries in ENTRIES.items():
            file = f"{site}, {what}.onnx"
            tensor = _external(folder, entries, dims=(SIZE,))
            (folder / file).write_bytes(build(tensor).SerializeToString())
            yield Case(
                name=file, subject="onnx_load", folder=folder, file=file, target=file,
                good="good initializer.onnx", words=("external data of",),
            )  # fmt: skip


@pytest.mark.parametrize(
    "subject",
    [
        "onnx_load",
        pytest.param("onnx_load_ir", marks=pytest.mark.slow),
        pytest.param("onnx_specs", marks=pytest.mark.slow),
    ],
)
def test_external_data(subject: str, campaign: Campaign, folder: Path) -> None:
    """Refused before anybody opens it, in whichever way the model is read."""
    cases = [replace(case, subject=subject) for case in _cases(folder)]
    campaign.run(cases, what=f"M3 external data, {subject}", least=160)


@pytest.mark.parametrize("site", READABLE)
def test_good_external_data_are_read(site: str, folder: Path) -> None:
    """With a right checksum, at every place that libraries read."""
    model = onnxio.load_model(folder / f"good {site}.onnx")
    assert np.arange(SIZE, dtype=np.float32).tobytes() in model.SerializeToString()
    assert b"data.bin" not in model.SerializeToString()
    onnxio.save_ir(onnxio.load_ir(folder / f"good {site}.onnx"), folder / "out.onnx")
    assert b"data.bin" not in (folder / "out.onnx").read_bytes()
    assert np.arange(SIZE, dtype=np.float32).tobytes() in (folder / "out.onnx").read_bytes()
