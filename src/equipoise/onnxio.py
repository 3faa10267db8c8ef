"""Reading and saving ONNX models: the one way in and the one way out.

A model below 1.8 GB is one file; a larger one keeps its weights in one file beside it, because
protobuf stops at 2 GiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs
from equipoise.errors import SourceError
from equipoise.spec import TensorSpec

_SINGLE_FILE_LIMIT_BYTES: Final = 1_800_000_000
_SHAPE_TENSOR_BYTES: Final = 4096


def load_model(path: Path) -> Any:
    """Read an ``onnx.ModelProto`` with its external data.

    Raises:
        SourceError: There is no such file, or it is no ONNX model.
    """
    onnx = extras.require("onnx")
    if not path.is_file():
        raise SourceError(f"no such ONNX file: {path}")
    try:
        model = onnx.load(path)
        if _checkable(model):
            onnx.checker.check_model(model)
    except Exception as error:  # onnx and protobuf raise six unrelated types here
        raise _not_onnx(path, error) from error
    if not model.graph.output:
        raise _not_onnx(path, "its graph has no output")
    return model


def _checkable(model: Any) -> bool:
    """The checker takes no proto above the protobuf limit and no operator of a vendor's domain."""
    standard = {"", "ai.onnx", "ai.onnx.ml"}
    only_standard = all(node.domain in standard for node in model.graph.node)
    return only_standard and bool(model.ByteSize() < _SINGLE_FILE_LIMIT_BYTES)


def _not_onnx(path: Path, why: object) -> SourceError:
    first = str(why).strip().partition("\n")[0]
    return SourceError(
        f"{path} is not a valid ONNX model: {first}",
        hint="Give a file that onnx.checker accepts, or the PyTorch source it came from.",
    )


def save_model(model: Any, path: Path) -> None:
    """Write ``model`` to ``path``, deterministically; external data in ``<name>.data`` if large.

    Raises:
        OutputError: The place cannot be written.
    """
    if model.ByteSize() < _SINGLE_FILE_LIMIT_BYTES:
        fs.write_bytes(path, model.SerializeToString(deterministic=True))
        return
    onnx = extras.require("onnx")
    with fs.replacing(path) as temporary:
        onnx.save_model(model, temporary, save_as_external_data=True, location=f"{path.name}.data")
        fs.copy_file(temporary.with_name(f"{path.name}.data"), path.with_name(f"{path.name}.data"))


def initializers(model: Any) -> dict[str, Any]:
    """Name -> TensorProto of every constant of the main graph."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def consumers(model: Any) -> dict[str, list[Any]]:
    """Tensor name -> nodes of the main graph that read it."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def value_types(model: Any) -> dict[str, int]:
    """Name -> element type of the inputs, outputs and intermediate values of the main graph.

    Inferred on a copy without the large weights: inference needs their shapes alone, and copying
    them thrice is most of the memory of a small job.
    """
    onnx = extras.require("onnx")
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    for part in ("node", "input", "output", "value_info"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        small = tensor.ByteSize() < _SHAPE_TENSOR_BYTES
        copied = {"name": tensor.name, "data_type": tensor.data_type, "dims": tensor.dims}
        light.graph.initializer.append(tensor if small else onnx.TensorProto(**copied))
    inferred = onnx.shape_inference.infer_shapes(light).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def opset_of(model: Any) -> int:
    """Version of the standard operator set that ``model`` imports."""
    return next(int(o.version) for o in model.opset_import if o.domain in {"", "ai.onnx"})


def file_bytes(path: Path) -> int:
    """Bytes on disk of a model and of the external data beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def graph_specs(model: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and of the outputs of ``model``."""
    constants = initializers(model)
    inputs = (value for value in model.graph.input if value.name not in constants)
    return tuple(map(value_spec, inputs)), tuple(map(value_spec, model.graph.output))


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
