"""The export stage: a source to an ONNX file that is proved equal to it.

Two exporters are tried in turn, torch.export ("dynamo") and then TorchScript. The first whose file
gives the numbers of PyTorch, at batch 1 and at another batch, is kept. No parity, no file.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.data.store import Rows, equal_shapes, stack
from equipoise.errors import EquipoiseError, ParityError, SourceError
from equipoise.export.source import Source
from equipoise.export.torch_model import NamedModule, load_module
from equipoise.parity.compare import Comparison, OutputParity, require_finite
from equipoise.parity.tolerance import Tolerance, check_parity, tolerances
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, TensorSpec

MODEL_FILE: Final = "model.onnx"
_PARITY_SAMPLES: Final = 16
_PARITY_BATCH: Final = 3
_TRACE_BATCH: Final = 2
_REASON_LENGTH: Final = 300
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export.

    Attributes:
        source: The trained model.
        samples: Directory of inputs, written by ``data.store``; the first 16 prove parity.
        inputs: Specs of the inputs; named dimensions become dynamic.
        opset: ONNX opset that the target wants.
    """

    source: Source
    samples: Path
    inputs: tuple[TensorSpec, ...]
    opset: int = 20


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What was exported.

    Attributes:
        exporter: ``dynamo``, ``torchscript``, or ``none`` for a source that is ONNX already.
        opset: Opset read back from the file.
        ir_version: IR version read back from the file.
        inputs: Specs of the file's inputs.
        outputs: Specs of its outputs.
        tolerances: Allowed difference per output, from the model's float32 noise floor.
        parity: Comparison with the source at batch 1.
        batch_parity: The same at another batch; empty when no two samples have equal shapes.
        notes: One line per exporter that was tried.
    """

    exporter: str
    opset: int
    ir_version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerances: tuple[Tolerance, ...]
    parity: tuple[OutputParity, ...]
    batch_parity: tuple[OutputParity, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Proof:
    """Real samples, what the source makes of them, and how close is equal."""

    singles: tuple[dict[str, Array], ...]
    batch: dict[str, Array] | None
    expected: tuple[dict[str, Array], ...]
    expected_batch: dict[str, Array] | None
    tolerances: tuple[Tolerance, ...]


def export(config: ExportConfig, *, output: Path) -> ExportRecord:
    """Export ``config.source`` to ``output/model.onnx``.

    Raises:
        SourceError: The source cannot be built, or no exporter can take it.
        ParityError: An exporter wrote a file, but none gives the numbers of the source.
        NonFiniteError: The source itself gives NaN or infinity.
    """
    if config.source.kind == "onnx":
        return _take_onnx(config, output=output)
    model = NamedModule(
        load_module(config.source),
        names=[spec.name for spec in config.inputs],
        source=config.source.name,
    )
    singles, batch = _proof_samples(config.samples)
    proof = _prove_with(model, singles, batch)
    return _first_that_agrees(model, config, proof, output=output)


def _first_that_agrees(
    model: NamedModule, config: ExportConfig, proof: _Proof, *, output: Path
) -> ExportRecord:
    notes: list[str] = []
    failure: EquipoiseError | None = None
    for name, exporter in (("dynamo", _dynamo), ("torchscript", _torchscript)):
        path = output / MODEL_FILE
        try:
            _export_with(exporter, model, config, proof, path=path)
            found = _verified(path, proof, exporter=name, notes=notes)
        except (SourceError, ParityError) as error:
            fs.remove(path)
            notes.append(f"{name}: {error.message[:_REASON_LENGTH]}")
            failure = error if failure is None or isinstance(error, ParityError) else failure
        else:
            return found
    raise type(failure or SourceError(""))(
        f"{config.source.name} could not be exported. " + " | ".join(notes),
        hint="Nothing was written.",
    )


def _proof_samples(samples: Path) -> tuple[tuple[dict[str, Array], ...], dict[str, Array] | None]:
    """The first samples, and a batch of those that share the commonest shape."""
    rows = Rows(samples)
    singles = tuple(rows[i] for i in range(min(len(rows), _PARITY_SAMPLES)))
    alike = equal_shapes(rows, most=_PARITY_BATCH)
    return singles, stack(rows, alike) if len(alike) > 1 else None


def _prove_with(
    model: NamedModule, singles: tuple[dict[str, Array], ...], batch: dict[str, Array] | None
) -> _Proof:
    expected = tuple(model.run(feeds) for feeds in singles)
    _require_repeatable(model, singles[0], expected[0])
    for index, outputs in enumerate(expected):
        require_finite(outputs, sample=index, what="PyTorch")
    double = NamedModule(
        copy.deepcopy(model.module).double(), names=model.names, source="float64 copy"
    )
    exact = [double.run(feeds, double=True) for feeds in singles]
    return _Proof(
        singles=singles,
        batch=batch,
        expected=expected,
        expected_batch=model.run(batch) if batch else None,
        tolerances=tolerances(expected, exact),
    )


def _require_repeatable(
    model: NamedModule, feeds: dict[str, Array], first: dict[str, Array]
) -> None:
    """A model that draws random numbers has no right answer to be equal to."""
    for name, again in model.run(feeds).items():
        if not np.allclose(again, first[name], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ParityError(
                f"output {name!r} of the source differs between two runs on the same sample",
                hint="Turn off dropout and random numbers in forward.",
            )


def _verified(path: Path, proof: _Proof, *, exporter: str, notes: Sequence[str]) -> ExportRecord:
    """Compare the file with the proof; describe it if it agrees."""
    model = onnxio.load_model(path)
    with session_opener("onnxruntime")(path, settings=SessionSettings()) as session:
        inputs, outputs = session.inputs, session.outputs
        parity = Comparison()
        for feeds, wanted in zip(proof.singles, proof.expected, strict=True):
            parity.add(wanted, session.run(feeds))
        batched = Comparison()
        if proof.batch is not None and proof.expected_batch is not None:
            batched.add(proof.expected_batch, session.run(proof.batch))
    check_parity(parity.result(), proof.tolerances, what=f"{exporter}, batch 1")
    check_parity(batched.result(), proof.tolerances, what=f"{exporter}, a larger batch")
    return ExportRecord(
        exporter=exporter,
        opset=onnxio.opset_of(model),
        ir_version=model.ir_version,
        inputs=inputs,
        outputs=outputs,
        tolerances=proof.tolerances,
        parity=parity.result(),
        batch_parity=batched.result(),
        notes=(*notes, f"{exporter}: agrees with the source"),
    )


_Exporter = Callable[..., None]


def _export_with(
    exporter: _Exporter, model: NamedModule, config: ExportConfig, proof: _Proof, *, path: Path
) -> None:
    torch = extras.require("torch")
    feeds = proof.batch or _doubled(proof.singles[0])
    tensors = tuple(torch.from_numpy(feeds[name][:_TRACE_BATCH]) for name in model.names)
    wrapper = _wrap(model)
    with torch.inference_mode():
        names = list(model.call(tensors))
    try:
        with warnings.catch_warnings(), torch.no_grad(), fs.scratch_directory() as folder:
            warnings.simplefilter("ignore")
            raw = folder / MODEL_FILE
            exporter(wrapper, tensors, config=config, outputs=names, path=raw)
            onnxio.save_model(_released(raw), path)
    except EquipoiseError:
        raise
    except Exception as error:  # an exporter may raise anything that PyTorch can
        raise SourceError(_root_cause(error)) from error


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost cause: exporters wrap it in advice about themselves."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = _COLOUR.sub("", str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _doubled(feeds: dict[str, Array]) -> dict[str, Array]:
    """A batch of two: torch.export takes sizes 0 and 1 for constants."""
    return {name: np.concatenate([array, array]) for name, array in feeds.items()}


def _wrap(model: NamedModule) -> Any:
    """A module that takes tensors by position and returns a tuple: what exporters like best."""
    torch = extras.require("torch")

    class Positional(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            return tuple(model.call(tensors).values())

    return Positional().eval()


def _dynamo(
    module: Any, tensors: tuple[Any, ...], *, config: ExportConfig, outputs: list[str], path: Path
) -> None:
    torch = extras.require("torch")
    names = {dim for spec in config.inputs for dim in spec.shape if isinstance(dim, str)}
    dims = {name: torch.export.Dim(name) for name in sorted(names)}
    shapes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in config.inputs
    )
    program = torch.onnx.export(
        module,
        tensors,
        dynamo=True,
        dynamic_shapes=(shapes,),
        input_names=[spec.name for spec in config.inputs],
        output_names=outputs,
        opset_version=config.opset,
        verbose=False,
    )
    program.save(path)


def _torchscript(
    module: Any, tensors: tuple[Any, ...], *, config: ExportConfig, outputs: list[str], path: Path
) -> None:
    torch = extras.require("torch")
    axes: dict[str, dict[int, str]] = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in config.inputs
    }
    torch.onnx.export(
        module,
        tensors,
        str(path),
        dynamo=False,
        dynamic_axes=axes | {name: {0: "batch"} for name in outputs},
        input_names=[spec.name for spec in config.inputs],
        output_names=outputs,
        opset_version=config.opset,
    )


def _released(path: Path) -> Any:
    """The exported model without the exporter's stack traces and names of Python files."""
    ir: Any = extras.require("onnx_ir")
    passes: Any = extras.require("onnx_ir.passes.common")
    model = ir.load(path)
    passes.ClearMetadataAndDocStringPass()(model)
    return ir.to_proto(model)


def _take_onnx(config: ExportConfig, *, output: Path) -> ExportRecord:
    """Keep an ONNX source; its reference is itself without the runtime's graph rewriting."""
    if config.source.path is None:
        raise SourceError(f"{config.source.name}: an ONNX source needs a path")
    model = onnxio.load_model(config.source.path)
    path = output / MODEL_FILE
    onnxio.save_model(model, path)
    singles, batch = _proof_samples(config.samples)
    plain = SessionSettings(optimize="none")
    with session_opener("onnxruntime")(path, settings=plain) as session:
        _check_inputs(session.inputs, config)
        expected = tuple(session.run(feeds) for feeds in singles)
        fixed = any(isinstance(spec.shape[0], int) for spec in session.inputs if spec.shape)
        batch = None if fixed else batch
        expected_batch = session.run(batch) if batch else None
    for index, outputs in enumerate(expected):
        require_finite(outputs, sample=index, what=str(config.source.path))
    proof = _Proof(
        singles=singles,
        batch=batch,
        expected=expected,
        expected_batch=expected_batch,
        tolerances=_relative_tolerances(expected),
    )
    return _verified(path, proof, exporter="none", notes=())


def _relative_tolerances(expected: tuple[dict[str, Array], ...]) -> tuple[Tolerance, ...]:
    """Without a float64 model: the floor is sixteen units in the last place of the output."""
    scales = {
        name: max(float(np.abs(outputs[name]).max(initial=0.0)) for outputs in expected)
        for name in expected[0]
    }
    unit = float(np.finfo(np.float32).eps) * 16
    return tuple(
        Tolerance(output=name, floor=unit * scale, atol=32 * unit * max(scale, 1e-6))
        for name, scale in scales.items()
    )


def _check_inputs(inputs: tuple[TensorSpec, ...], config: ExportConfig) -> None:
    wanted, given = {spec.name for spec in inputs}, {spec.name for spec in config.inputs}
    if wanted != given:
        raise SourceError(
            f"{config.source.path} takes {sorted(wanted)}; the data has {sorted(given)}",
            hint="Rename the arrays in the data to the inputs of the model.",
        )
