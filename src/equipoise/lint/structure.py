"""Structure of an ONNX model that onnx.checker and ONNX Runtime let pass, or stumble over later."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.errors import SourceError
from equipoise.lint.external import Scope, tensor_bytes
from equipoise.lint.tensors import Constant, called, is_external

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_NAME: Final = 4096
_MOST_BYTES: Final = 1 << 40
"""Most bytes of an input or output with sizes as they are given; a dynamic one counts as 1."""

_SHAPE_TENSOR_BYTES: Final = 4096
_STRING: Final = 8  # TensorProto.STRING
_FIELDS: Final = (
    "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data",
)  # fmt: skip
_HINT: Final = "Export the model again, with names and sizes that describe it."


def check_structure(path: Path, model: Any, scopes: list[Scope]) -> None:
    """Check names, opsets, inputs, outputs and the data of constants.

    Args:
        path: The file that it was read from.
        model: ``onnx.ModelProto`` without its external data.
        scopes: Its parts.

    Raises:
        SourceError: Names the input, output, node or constant, and what is wrong with it.
    """
    problems = (
        _problems_of_opsets(model),
        _problems_of_names(scopes),
        _problems_of_values(model.graph),
        _problems_of_constants(scopes),
    )
    for found in problems:
        for problem in found:
            raise SourceError(f"{path} is not a valid ONNX model: {problem}", hint=_HINT)


def check_outputs(path: Path, model: Any) -> None:
    """Check that the graph gives what its outputs are said to be, as far as sizes can be inferred.

    ONNX Runtime warns of that alone; a buffer of the size that was told would be too small.

    Raises:
        SourceError: Names the output, what it is said to be, and what the nodes give.
    """
    onnx = extras.require("onnx")
    light = without_weights(model)
    for value in light.graph.output:
        value.ClearField("type")
    try:
        inferred = onnx.shape_inference.infer_shapes(light).graph.output
    except Exception:  # noqa: BLE001  what cannot be inferred is left to the runtime
        return
    for told, found in zip(model.graph.output, inferred, strict=True):
        said, given = _sizes(told), _sizes(found)
        pairs = zip(said, given, strict=False)
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        known = found.type.tensor_type.HasField("shape") and told.type.tensor_type.HasField("shape")
        if known and (differ or len(said) != len(given)):
            raise SourceError(
                f"{path}: the output {told.name!r:.200} is said to have the sizes {said}; its nodes"
                f" give {given}",
                hint=_HINT,
            )


def _sizes(value: Any) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]


def without_weights(model: Any) -> Any:
    """A copy of ``model`` with empty tensors in the place of large ones, and no value_info.

    Inference needs their shapes alone, and copying them is most of the memory of a small job.
    """
    onnx = extras.require("onnx")
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    for part in ("node", "input", "output"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        small = tensor.ByteSize() < _SHAPE_TENSOR_BYTES and not is_external(tensor)
        kept = {"name": tensor.name, "data_type": tensor.data_type, "dims": tensor.dims}
        light.graph.initializer.append(tensor if small else onnx.TensorProto(**kept))
    return light


def _problems_of_opsets(model: Any) -> Iterator[str]:
    seen: dict[str, int] = {}
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if seen.setdefault(domain, opset.version) != opset.version:
            yield f"it imports two opsets of {domain or 'ai.onnx'!r:.200}"


def _problems_of_names(scopes: list[Scope]) -> Iterator[str]:
    """Of nodes and of what they give; what they read is one of these or dangling."""
    for scope in scopes:
        for constant, _ in scope.held:
            yield from _problems_of_name(constant.name, constant.what)
        for graph in scope.graphs:
            for node in graph.node:
                for name in (node.name, *node.output):
                    yield from _problems_of_name(name, f"output of {called(node)}")


def _problems_of_name(name: str, what: str) -> Iterator[str]:
    if len(name) > _LONGEST_NAME:
        yield f"the name of the {what:.200} has {len(name)} characters; {_LONGEST_NAME} are allowed"
    if _CONTROLS.search(name):
        yield f"the name of the {what:.200} has control characters in it: {name!r:.200}"


def _problems_of_values(graph: Any) -> Iterator[str]:
    if not graph.output:
        yield "its graph has no output"
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for name, times in Counter(value.name for value in values).items():
            if times > 1:
                yield f"it has the {kind} {name!r:.200} {times} times"
        for value in values:
            what = f"{kind} {value.name!r:.200}"
            yield from _problems_of_name(value.name, what)
            yield from (f"the {what} {problem}" for problem in _problems_of_value(value))


def _problems_of_value(value: Any) -> Iterator[str]:
    dtypes: Any = extras.require("onnx").helper
    if value.type.WhichOneof("value") not in {None, "tensor_type"}:
        yield f"is a {value.type.WhichOneof('value').removesuffix('_type')}; a tensor is needed"
        return
    sizes = [size for size in _sizes(value) if isinstance(size, int)]
    try:
        dtype = dtypes.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    except (KeyError, TypeError):
        yield f"has the type {value.type.tensor_type.elem_type}, which there is none of"
        return
    if any(size < 0 for size in sizes):
        yield f"has the sizes {_sizes(value)}; one that may differ needs a name"
    elif math.prod(sizes) * dtype.itemsize > _MOST_BYTES:
        yield f"has the sizes {_sizes(value)}, which no memory holds"


def _problems_of_constants(scopes: list[Scope]) -> Iterator[str]:
    for scope in scopes:
        for constant, place in scope.held:
            if place is None:
                yield from _problems_of_constant(constant)


def _problems_of_constant(constant: Constant) -> Iterator[str]:
    """Its data are all there, once, and no more than its shape takes."""
    tensor = constant.tensor
    try:
        expected = tensor_bytes(tensor)
    except ValueError as error:
        yield f"the {constant.what:.300}: {error}"
        return
    fields = [name for name in _FIELDS if len(getattr(tensor, name))]
    held = len(tensor.raw_data)
    if fields and held:
        yield f"the {constant.what:.300} has its data twice, in raw_data and in {fields[0]}"
    elif held and tensor.data_type != _STRING and held != expected:
        yield f"the {constant.what:.300} has {held} bytes of data; its shape takes {expected}"
    elif fields:
        count = len(getattr(tensor, fields[0]))
        needed = _entries(tensor, expected)
        if count != needed:
            yield f"the {constant.what:.300} has {count} values; its shape takes {needed}"


def _entries(tensor: Any, expected_bytes: int) -> int:
    """Entries in a field of data by type: small types pack into bytes, complex ones are two."""
    elements: int = math.prod(tensor.dims)
    if tensor.data_type in {14, 15}:  # COMPLEX64, COMPLEX128
        return 2 * elements
    return expected_bytes if tensor.data_type in {21, 22, 23, 25, 26} else elements
