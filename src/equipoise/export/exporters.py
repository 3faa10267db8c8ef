"""The rungs of the ladder: ways from a PyTorch module to an ONNX graph, best first.

What one cannot take, another
often can; parity, not faith, picks the one that counts.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras, fs
from equipoise.errors import EquipoiseError, SourceError
from equipoise.sources.torch_model import NamedModule
from equipoise.spec import Array, TensorSpec

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_MOST_WORDS: Final = 300
_PLAIN_FORMS: Final = {
    "set_attn_implementation": "eager",
    "set_experts_implementation": "batched_mm",
}
"""Setters of transformers' models -> the form that is plain tensor arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What every rung is given.

    Attributes:
        module: The module, in evaluation mode.
        feeds: Example inputs at the traced sizes.
        inputs: Input specs; a name is a dimension that has to be dynamic.
        opset: The opset to ask for.
    """

    module: NamedModule
    feeds: dict[str, Array]
    inputs: tuple[TensorSpec, ...]
    opset: int

    @property
    def names(self) -> list[str]:
        """Input names in order."""
        return [spec.name for spec in self.inputs]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a rung gives.

    Attributes:
        model: The graph, an ``onnx_ir.Model``.
        program: The ``torch.export.ExportedProgram`` it was translated from; None for a trace.
            Its nodes and the values of the graph have the same names.
    """

    model: Any
    program: Any


def export_with(rung: str, trace: Trace) -> Exported:
    """Export with the named rung.

    Raises:
        SourceError: The exporter failed; the message is the first line of the innermost cause.
    """
    torch = extras.require("torch")
    tensors = tuple(torch.from_numpy(trace.feeds[name]) for name in trace.names)
    with torch.inference_mode():
        outputs = list(trace.module.call(tensors))
    wrapper = _positional(trace.module)
    try:
        with _quiet(), torch.no_grad():
            return RUNGS[rung](wrapper, tensors, trace=trace, outputs=outputs)
    except EquipoiseError:
        raise
    except Exception as error:  # an exporter may raise anything that PyTorch can
        raise SourceError(_root_cause(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and print about themselves; what matters is in the parity record."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _root_cause(error: BaseException) -> str:
    """What the innermost cause says first: exporters wrap it in advice about themselves."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}"[:_MOST_WORDS]


def _positional(model: NamedModule) -> Any:
    """A module that takes tensors by position and returns a tuple: what exporters like best."""
    torch = extras.require("torch")

    class Positional(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            return tuple(model.call(tensors).values())

    return Positional().eval()


def _dynamic_shapes(inputs: Sequence[TensorSpec], *, value: Callable[[str], Any]) -> Any:
    """``torch.export``'s form: per input, axis -> what stands for a dynamic size."""
    axes = (
        {axis: value(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in inputs
    )
    return (tuple(axes),)


def _dynamo(module: Any, tensors: tuple[Any, ...], *, trace: Trace, outputs: list[str]) -> Exported:
    """``torch.export`` and the default translation. Names stand for ``Dim.AUTO``.

    A ``Dim`` object would refuse every relation that the model has between its sizes; what AUTO
    quietly freezes is found by running the file.
    """
    program = extras.require("torch").onnx.export(
        module,
        tensors,
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(trace.inputs, value=str),
        input_names=trace.names,
        output_names=outputs,
        opset_version=trace.opset,
        verbose=False,
    )
    return Exported(model=program.model, program=program.exported_program)


def _dynamo_eager(
    module: Any, tensors: tuple[Any, ...], *, trace: Trace, outputs: list[str]
) -> Exported:
    """The same with attention written out.

    The fused attention of PyTorch reports other strides than it has when a bias is added to the
    scores, as Swin, BEiT and T5 do, and its translation then fails. The grouped products of
    mixtures of experts have no translation.
    """
    with _plain_forms(trace.module.module):
        return _dynamo(module, tensors, trace=trace, outputs=outputs)


def _dynamo_decomposed(
    module: Any, tensors: tuple[Any, ...], *, trace: Trace, outputs: list[str]
) -> Exported:
    """Attention written out, and every operator that has a decomposition taken apart."""
    torch = extras.require("torch")
    shapes = _dynamic_shapes(trace.inputs, value=lambda _: torch.export.Dim.AUTO)
    with _plain_forms(trace.module.module):
        program = torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
        found = torch.onnx.export(
            program.run_decompositions(),
            dynamo=True,
            input_names=trace.names,
            output_names=outputs,
            opset_version=trace.opset,
            verbose=False,
        )
    _name_dimensions(found.model, trace.inputs)
    return Exported(model=found.model, program=found.exported_program)


@contextlib.contextmanager
def _plain_forms(module: Any) -> Iterator[None]:
    """Attention and experts by matrix products: of transformers' models, and of PyTorch itself."""
    attention: Any = extras.require("torch.nn.attention")
    for inner in module.modules():
        for setter, plain in _PLAIN_FORMS.items():
            choose = getattr(inner, setter, None)
            # A model that has no other form than its own refuses the choice.
            with contextlib.suppress(ValueError, AttributeError, NotImplementedError):
                if choose is not None:
                    choose(plain)
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        yield


def _name_dimensions(model: Any, inputs: Sequence[TensorSpec]) -> None:
    """Give the symbols of the graph (``s0``) the names that were asked for."""
    ir: Any = extras.require("onnx_ir")
    names = {
        str(symbol): dim
        for value, spec in zip(model.graph.inputs, inputs, strict=True)
        for symbol, dim in zip(value.shape, spec.shape, strict=True)
        if isinstance(dim, str) and not isinstance(symbol, int)
    }
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else names.get(str(d), str(d)) for d in value.shape]
            )


def _torchscript(
    module: Any, tensors: tuple[Any, ...], *, trace: Trace, outputs: list[str]
) -> Exported:
    """The exporter by tracing. Deprecated, and still the one that takes some models."""
    ir: Any = extras.require("onnx_ir")
    axes: dict[str, dict[int, str]] = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in trace.inputs
    }
    batched = any("batch" in named.values() for named in axes.values())
    with fs.scratch_directory() as folder:
        path = folder / "model.onnx"
        extras.require("torch").onnx.export(
            module,
            tensors,
            str(path),
            dynamo=False,
            dynamic_axes=axes | {name: {0: "batch"} for name in outputs if batched},
            input_names=trace.names,
            output_names=outputs,
            opset_version=trace.opset,
        )
        model = ir.load(path)
        ir.external_data.load_to_model(model)
        return Exported(model=model, program=None)


Rung = Callable[..., Exported]
RUNGS: Final[dict[str, Rung]] = {
    "dynamo": _dynamo,
    "dynamo-eager": _dynamo_eager,
    "dynamo-decomposed": _dynamo_decomposed,
    "torchscript": _torchscript,
}
"""Name -> exporter, in the order they are tried."""
