"""Reading and saving ONNX models: the one way in and the one way out.

A model below 1.8 GB is one file; a larger one keeps its weights in one file beside it,
``<name>.data``, because protobuf stops at 2 GiB. Every model is checked by its path before it is
used: a data file outside the model's folder is refused before anybody opens it, then come
``onnx.checker`` and what it does not look at, structure and numbers (``lint``).

``load_model`` gives a protobuf with all weights in memory; ``load_ir`` a graph whose external
weights stay on disk until somebody asks for them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs
from equipoise.errors import IncompatibleError, SourceError
from equipoise.lint.external import locate
from equipoise.lint.numbers import check_numbers
from equipoise.lint.structure import check_outputs, check_structure, without_weights
from equipoise.lint.tensors import constants_of, is_external, scopes
from equipoise.spec import TensorSpec

_SINGLE_FILE_LIMIT_BYTES: Final = 1_800_000_000
_SHAPE_TENSOR_BYTES: Final = 4096
_MOST_SAID: Final = 400
_STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_VENDORS: Final = re.compile(r"No Op registered|No opset import for domain '[^']")
_FUNCTIONS_IR_VERSION: Final = 8
"""Model-local functions came with IR version 8."""


def load_model(path: Path) -> Any:
    """Read an ``onnx.ModelProto`` with its external data, all of it in memory.

    Raises:
        SourceError: There is no such file, or it is no ONNX model, or its external data is missing,
            too short, a link, or outside the model's folder.
        NonFiniteError: Its numbers are none that can be computed with.
    """
    model = load_graph(path)
    helper: Any = extras.require("onnx.external_data_helper")
    try:
        helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # the disk, or data that changed since it was checked
        raise _not_onnx(path, error) from error
    return model


def load_ir(path: Path) -> Any:
    """Read an ``onnx_ir.Model`` whose external weights stay on disk, mapped on demand.

    It needs its data file for as long as it lives. Memory is that of the file without its data.

    Raises:
        SourceError: As :func:`load_model`.
    """
    ir: Any = extras.require("onnx_ir")
    proto = load_graph(path)
    _embed_constants(proto, path.parent)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # a construct that onnx_ir has no form for
        raise _not_onnx(path, error) from error
    ir.external_data.set_base_dir(model.graph, path.parent.absolute())
    return model


def load_graph(path: Path) -> Any:
    """Read an ``onnx.ModelProto`` without its external data, after every check that there is.

    Raises:
        SourceError: As :func:`load_model`.
        NonFiniteError: Its numbers are none that can be computed with.
    """
    onnx = extras.require("onnx")
    if not path.is_file():
        raise SourceError(f"no such ONNX file: {path}")
    try:
        model = onnx.load(path, load_external_data=False)
        scopes = locate(path, model)
        check_structure(path, model, scopes)
        _check_by_path(path, model)
        check_outputs(path, model)
    except SourceError:
        raise
    except Exception as error:  # onnx and protobuf raise six unrelated types here
        raise _not_onnx(path, error) from error
    for scope in scopes:
        check_numbers(path, scope)
    return model


def _check_by_path(path: Path, model: Any) -> None:
    """Run ``onnx.checker``; by path it takes any size, and looks where external data lies.

    A vendor's file may hold operators that no schema here knows, or whose domain it does not
    import, as ONNX Runtime's own optimiser writes them. The checker looks at the weights before the
    nodes, so they are checked all the same.
    """
    onnx = extras.require("onnx")
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        domains = {part.domain for part in (*model.opset_import, *model.graph.node)}
        if not (domains - _STANDARD_DOMAINS and _VENDORS.search(str(error))):
            raise


def _weights(model: Any) -> Iterator[Any]:
    """Initializers of the main graph and of those in it, as TensorProtos."""
    main = next(scopes(model))
    return (tensor for graph in main for tensor in graph.initializer)


def _embed_constants(model: Any, folder: Path) -> None:
    """Read external constants of nodes: only initializers can be written out again."""
    helper: Any = extras.require("onnx.external_data_helper")
    for graphs in scopes(model):
        for constant in constants_of(graphs):
            if constant.node and is_external(constant.tensor):
                helper.load_external_data_for_tensor(constant.tensor, str(folder))


def _not_onnx(path: Path, why: object) -> SourceError:
    said = " ".join(str(why).split())[:_MOST_SAID] or type(why).__name__
    return SourceError(
        f"{path} is not a valid ONNX model: {said}",
        hint="Give a file that onnx.checker accepts, or the PyTorch source it came from.",
    )


def save_model(model: Any, path: Path) -> None:
    """Write ``model`` to ``path``, deterministically; its weights in ``<name>.data`` if large.

    Raises:
        OutputError: The place cannot be written.
    """
    if sum(tensor.ByteSize() for tensor in _weights(model)) < _SINGLE_FILE_LIMIT_BYTES:
        _write_single(model, path)
    else:
        save_ir(extras.require("onnx_ir").from_proto(model), path)


def save_ir(model: Any, path: Path) -> None:
    """Write an ``onnx_ir.Model`` to ``path``, as :func:`save_model` does, one weight at a time.

    External weights of a small model are read into ``model``, which then needs its old data file
    no more. A large model that is written over the file it came from has to be loaded anew.

    Raises:
        OutputError: The place cannot be written.
    """
    ir: Any = extras.require("onnx_ir")
    if ir_weight_bytes(model) < _SINGLE_FILE_LIMIT_BYTES:
        _write_single(ir.to_proto(ir.external_data.load_to_model(model)), path)
        return
    data = _data_file(path)
    with fs.replacing(path) as file, fs.replacing(data) as weights:
        ir.save(model, file, external_data=data.name, size_threshold_bytes=_SHAPE_TENSOR_BYTES)
        fs.move_into_place(file.with_name(data.name), weights)


def copy_model(source: Path, path: Path) -> None:
    """Copy a checked model; external data gets the name that goes with ``path``.

    Raises:
        OutputError: The place cannot be written.
    """
    if _data_file(source).is_file():
        save_ir(load_ir(source), path)
    else:
        fs.copy_file(source, path)
        fs.remove(_data_file(path))


def ir_weight_bytes(model: Any) -> int:
    """Bytes of all initializers of an ``onnx_ir.Model``, none of them read."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return sum(int(value.const_value.nbytes) for value in values if value.const_value is not None)


def _write_single(proto: Any, path: Path) -> None:
    """One file; data that a larger model of this name left beside it goes."""
    fs.write_bytes(path, proto.SerializeToString(deterministic=True))
    fs.remove(_data_file(path))


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def lower_ir_version(model: Any, *, largest: int | None = None) -> int:
    """Give ``model`` the lowest IR version that its operator sets need.

    Old runtimes refuse a model for its IR version alone, whatever is in it.

    Args:
        model: ``onnx_ir.Model``, changed in place.
        largest: Largest IR version that the target reads.

    Returns:
        The IR version.

    Raises:
        IncompatibleError: The operator sets need a later one than ``largest``.
    """
    helper: Any = extras.require("onnx.helper")
    opsets = [helper.make_opsetid(name, n) for name, n in model.opset_imports.items()]
    needed = int(helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    needed = max(needed, _FUNCTIONS_IR_VERSION) if model.functions else needed
    if largest is not None and needed > largest:
        raise IncompatibleError(
            f"opset {model.opset_imports.get('')} needs ONNX IR version {needed};"
            f" the target reads at most {largest}",
            hint="Export with a lower opset.",
        )
    model.ir_version = needed
    return needed


def initializers(model: Any) -> dict[str, Any]:
    """Name -> TensorProto of every constant of the main graph."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def copied(model: Any) -> Any:
    """A copy of an ``onnx.ModelProto``."""
    copy = extras.require("onnx").ModelProto()
    copy.CopyFrom(model)
    return copy


def name_nodes(model: Any) -> None:
    """Give each node of the main graph a name of its own, in place: ``MatMul_17`` by its place."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = {""}
    for index, node in enumerate(model.graph.node):
        if node.name in seen:
            numbers = itertools.count(index)
            names = (f"{node.op_type}_{number}" for number in numbers)
            node.name = next(name for name in names if name not in taken)
            taken.add(node.name)
        seen.add(node.name)


def attribute(node: Any, name: str, default: Any) -> Any:
    """Value of an attribute of a ``NodeProto``; ``default`` where it has none of that name."""
    helper = extras.require("onnx").helper
    found = [a for a in node.attribute if a.name == name]
    return helper.get_attribute_value(found[0]) if found else default


def consumers(model: Any) -> dict[str, list[Any]]:
    """Tensor name -> nodes of the main graph that read it."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def value_types(model: Any) -> dict[str, int]:
    """Name -> element type of the inputs, outputs and intermediate values of the main graph.

    Inferred on a copy without the large weights.
    """
    light = without_weights(model)
    light.graph.value_info.extend(model.graph.value_info)
    inferred = extras.require("onnx").shape_inference.infer_shapes(light).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def opset_of(model: Any) -> int:
    """Version of the standard operator set that ``model`` imports."""
    return next(int(o.version) for o in model.opset_import if o.domain in {"", "ai.onnx"})


def file_bytes(path: Path) -> int:
    """Bytes on disk of a model and of the external data beside it."""
    data = _data_file(path)
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def graph_specs(model: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and of the outputs of ``model``."""
    constants = initializers(model)
    inputs = (value for value in model.graph.input if value.name not in constants)
    return tuple(map(value_spec, inputs)), tuple(map(value_spec, model.graph.output))


def file_specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and of the outputs of a file, after every check; no weight is read.

    Raises:
        SourceError: As :func:`load_model`.
    """
    return graph_specs(load_graph(path))


def value_spec(value: Any) -> TensorSpec:
    """The spec of an ``onnx.ValueInfoProto``; a size without a name is called by its place."""
    onnx = extras.require("onnx")
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(name=value.name, dtype=str(dtype), shape=shape)


def ir_specs(model: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and of the outputs of an ``onnx_ir.Model``."""
    constants = model.graph.initializers
    inputs = (value for value in model.graph.inputs if value.name not in constants)
    return tuple(map(_ir_spec, inputs)), tuple(map(_ir_spec, model.graph.outputs))


def _ir_spec(value: Any) -> TensorSpec:
    shape = tuple(
        dim if isinstance(dim, int) else dim.value or f"{value.name}_dim{axis}"
        for axis, dim in enumerate(value.shape or ())
    )
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)


def remove_initializer(model: Any, name: str) -> None:
    """Remove a constant, and the input of its name that IR versions up to 3 had."""
    for part in (model.graph.initializer, model.graph.input):
        for value in [value for value in part if value.name == name]:
            part.remove(value)


def raise_opset(model: Any, opset: int) -> Any:
    """``model`` with at least this version of the standard operators.

    The large weights stay out of the converter, which copies what it gets several times and stops
    at 2 GiB.

    Raises:
        SourceError: The converter cannot take the model.
    """
    present = opset_of(model)
    if present >= opset:
        return model
    onnx = extras.require("onnx")
    light, weights = _without_weights(model)
    try:
        raised = onnx.version_converter.convert_version(light, opset)
    except Exception as error:  # the converter raises bare C++ exceptions
        raise SourceError(
            f"the model has opset {present}; {opset} is needed, and converting it failed: {error}",
            hint="Export the model again with a newer opset.",
        ) from error
    for tensor in weights:
        remove_initializer(raised, tensor.name)
    raised.graph.initializer.extend(weights)
    return raised


def _without_weights(model: Any) -> tuple[Any, list[Any]]:
    """A copy with inputs in the place of the large constants, and those constants."""
    onnx = extras.require("onnx")
    weights = [t for t in model.graph.initializer if t.ByteSize() > _SHAPE_TENSOR_BYTES]
    held = {tensor.name for tensor in weights}
    light = copied(model)
    small = [tensor for tensor in light.graph.initializer if tensor.name not in held]
    del light.graph.initializer[:]
    light.graph.initializer.extend(small)
    declared = {value.name for value in light.graph.input}
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in weights
        if tensor.name not in declared
    )
    return light, weights
