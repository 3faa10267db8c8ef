"""The stage of fixed shapes: named dimensions get one size, and what depended on them folds.

Microcontrollers, most NPUs and some compilers take no dynamic dimension at all; elsewhere the
arithmetic on shapes that a fixed size saves is a good part of a small model's nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, onnxio
from equipoise.errors import UsageError, unknown_name
from equipoise.graph.clean import run_pass
from equipoise.spec import TensorSpec

MODEL_FILE: Final = "model.onnx"
_ROUNDS: Final = 16
"""Each round folds what the shapes of the last one made constant; real models settle in four."""


@dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """What to fix.

    Attributes:
        model: ONNX file.
        sizes: Dynamic dimension -> size. Example: ``{"batch": 1, "sequence": 128}``.
    """

    model: Path
    sizes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class StaticRecord:
    """Attributes: inputs, outputs: Specs of the file that was written."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def static_stage(config: StaticConfig, *, output: Path) -> StaticRecord:
    """Fix dimensions of ``config.model`` and write ``output/model.onnx``.

    Raises:
        SourceError: The model is no ONNX file, or a pass cannot take it.
        UsageError: ``config.sizes`` names no dimension of its inputs, or has a size below one.
    """
    model = onnxio.load_ir(config.model)
    fix_dimensions(model, config.sizes)
    onnxio.save_ir(model, output / MODEL_FILE)
    inputs, outputs = onnxio.ir_specs(model)
    return StaticRecord(inputs=inputs, outputs=outputs)


def fix_dimensions(model: Any, sizes: Mapping[str, int]) -> None:
    """Give dynamic dimensions of the inputs of ``model`` one size each, in place.

    Outputs follow: a dimension that depends on fixed ones alone becomes a number, also when it is
    an expression such as ``batch*sequence``. One that depends on values, as of NonZero, stays.

    Args:
        model: ``onnx_ir.Model``.
        sizes: Dynamic dimension -> size. A dimension without a name is called by its place, such
            as ``x_dim0``, as in :func:`equipoise.onnxio.graph_specs`.

    Raises:
        UsageError: A name that no input has, or a size below one.
        SourceError: A pass cannot take the model.
    """
    _check_sizes(model, sizes)
    _name_inputs(model)
    for value in _values(model):
        if value.shape is not None:
            value.shape = _fixed_shape(value.shape, sizes)
    left = -1
    for _ in range(_ROUNDS):
        before, left = left, _settle(model)
        if left == before:
            break


def _check_sizes(model: Any, sizes: Mapping[str, int]) -> None:
    inputs, _ = onnxio.ir_specs(model)
    known = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    for name, size in sizes.items():
        if name not in known:
            raise unknown_name("dynamic dimension", name, known or {"none"})
        if size < 1:
            raise UsageError(f"dimension {name!r} cannot be {size}; a size is at least 1")


def _name_inputs(model: Any) -> None:
    """Unnamed dimensions of inputs get the names that specs give them."""
    ir: Any = extras.require("onnx_ir")
    inputs, _ = onnxio.ir_specs(model)
    specs = {spec.name: spec for spec in inputs}
    for value in model.graph.inputs:
        if value.name in specs and value.shape is not None:
            value.shape = ir.Shape(specs[value.name].shape)


def _values(model: Any) -> list[Any]:
    """Every value of the model, those of subgraphs included."""
    return [
        value
        for graph in model.graphs()
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs))
    ]


def _fixed_shape(shape: Any, sizes: Mapping[str, int]) -> Any:
    ir: Any = extras.require("onnx_ir")
    return ir.Shape([_fixed(dim, sizes) for dim in shape])


def _fixed(dim: Any, sizes: Mapping[str, int]) -> Any:
    """``dim`` with known sizes put in; a name that is no expression stays as it is."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    if dim.value in sizes:
        return sizes[dim.value]
    try:
        return dim.evaluate(sizes) if dim.free_symbols() & set(sizes) else dim
    except ValueError:  # "x.shape[0]": exporters may name a dimension anything
        return dim


def _settle(model: Any) -> int:
    """Infer shapes and fold what they make constant; return how many nodes and unknowns remain."""
    passes: Any = extras.require("onnx_ir.passes.common")
    wanted = [value.shape for value in model.graph.outputs]
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    inferred = [value.shape for value in model.graph.outputs]
    for name in ("fold", "lift", "identities", "dead"):
        run_pass(name, model)
    for value, old, new in zip(model.graph.outputs, wanted, inferred, strict=True):
        value.shape = _merged(old, new)
    shapes = [value.shape for value in _values(model)]
    unknown = sum(shape is None or not shape.is_static() for shape in shapes)
    return len(shapes) + unknown


def _merged(old: Any, new: Any) -> Any:
    """The names of ``old`` where ``new`` has no number."""
    if old is None or new is None:
        return new if old is None else old
    ir: Any = extras.require("onnx_ir")
    pairs = zip(old, new, strict=True)
    return ir.Shape([after if isinstance(after, int) else before for before, after in pairs])
