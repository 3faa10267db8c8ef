"""Calibration: what the activations of a float model do on real samples.

One sample at a time, one pass for each group of tensors that fits into memory. What is kept does
not grow with the number of samples, however their shapes differ: extremes, means, a histogram and
the figures of each channel. Which range follows from them is a question for ``ranges``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from equipoise import extras, onnxio
from equipoise.data.store import Rows
from equipoise.errors import RecipeError
from equipoise.quantize.accumulate import AccumulateSettings, Accumulator
from equipoise.quantize.nodes import rounded_activations
from equipoise.quantize.observe import ObserveSettings, observe_rows
from equipoise.quantize.statistics import Statistics, TensorStatistics, write_statistics
from equipoise.quantize.structure import load_structure
from equipoise.spec import Array
from equipoise.targets.profile import Int8Scheme

FEW_SAMPLES: Final = 32
"""Below this a range has seen too little; vendors ask for 64 to 512."""

_NAMED: Final = 3
_CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What to calibrate.

    Attributes:
        model: Float ONNX file.
        samples: Directory of calibration inputs, written by ``data.store``.
        threads: Threads per operator.
        tensors: Names of the activations to calibrate; all float activations when empty.
        scheme: Leave out the activations that this scheme would never round.
        settings: How statistics are taken.
        group_bytes: Bytes of activations held at a time. A model whose activations take more on its
            largest sample is run over the samples several times. None: see ``ObserveSettings``.
    """

    model: Path
    samples: Path
    threads: int = 1
    tensors: tuple[str, ...] = ()
    scheme: Int8Scheme | None = None
    settings: AccumulateSettings = field(default_factory=AccumulateSettings)
    group_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrateRecord:
    """What calibration saw.

    Attributes:
        samples: Number of samples.
        tensors: Number of activations.
        notes: What a user should know about the samples, in words.
    """

    samples: int
    tensors: int
    notes: tuple[str, ...] = ()


def calibrate(config: CalibrateConfig, *, output: Path) -> CalibrateRecord:
    """Run the model on the samples and write the statistics of its activations.

    Raises:
        SourceError: The model is no ONNX file.
        RecipeError: It has no such float activation as was asked for, or none at all.
        DataError: There are no samples.
        InputError: The samples do not fit the model.
        OutputError: ``output`` cannot be written.
    """
    rows = Rows(config.samples)
    structure = load_structure(config.model)
    names = _wanted(config.tensors, _present(structure, config.scheme))
    calibration = _Calibration(structure, names, settings=config.settings, samples=len(rows))
    del structure
    observe_rows(
        config.model,
        rows,
        names=names,
        receive=calibration.add,
        settings=ObserveSettings(threads=config.threads, group_bytes=config.group_bytes),
    )
    statistics = calibration.statistics()
    write_statistics(output, statistics)
    notes = (*_sample_notes(rows), *_constant_notes(statistics))
    return CalibrateRecord(samples=len(rows), tensors=len(names), notes=notes)


class _Calibration:
    """Accumulators of all activations, and what they held at half of the samples."""

    def __init__(
        self, model: Any, names: Sequence[str], *, settings: AccumulateSettings, samples: int
    ) -> None:
        convolved = _convolved(model)
        self._running = {
            name: Accumulator(settings, rank_3_axis=1 if name in convolved else 2) for name in names
        }
        self._samples, self._half_samples = samples, samples // 2
        self._half: dict[str, TensorStatistics] = {}

    def add(self, index: int, values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            self._running[name].add(array)
            if index + 1 == self._half_samples:
                self._half[name] = self._running[name].statistics()

    def statistics(self) -> Statistics:
        return Statistics(
            tensors={name: running.statistics() for name, running in self._running.items()},
            half=self._half,
            samples=self._samples,
            half_samples=self._half_samples,
        )


def _convolved(model: Any) -> set[str]:
    """What convolutions read and write; their channels are axis 1 whatever the rank."""
    nodes = [node for node in model.graph.node if node.op_type in _CONVOLUTIONS]
    return {name for node in nodes for name in (node.input[0], *node.output)}


def _present(structure: Any, scheme: Int8Scheme | None) -> tuple[str, ...]:
    present = float_activations(structure)
    if scheme is None:
        return present
    onnxio.name_nodes(structure)
    rounded = rounded_activations(structure, scheme)
    # Without any, what quantising says is of more use than that nothing could be calibrated.
    return tuple(name for name in present if name in rounded) or present


def _wanted(asked: Sequence[str], present: tuple[str, ...]) -> tuple[str, ...]:
    """The names to calibrate, in the order of the graph."""
    for name in asked:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            raise RecipeError(
                f"the model has no float activation {name!r} among its {len(present)}",
                hint=f"Did you mean {near[0]!r}?" if near else "Constants need no calibration.",
            )
    if not present:
        raise RecipeError(
            "the model has no float32 activation to calibrate",
            hint="Calibrate the float32 model, before any conversion to another type.",
        )
    chosen = set(asked) or set(present)
    return tuple(name for name in present if name in chosen)


def _sample_notes(rows: Rows) -> tuple[str, ...]:
    if len(rows) > 1 and _all_equal(rows):
        return (f"all {len(rows)} calibration samples are the same",)
    if len(rows) < FEW_SAMPLES:
        return (
            f"{len(rows)} calibration samples are few: ranges are known badly below {FEW_SAMPLES}",
        )
    return ()


def _all_equal(rows: Rows) -> bool:
    first = rows[0]
    return all(row[name].tobytes() == first[name].tobytes() for row in rows for name in first)


def _constant_notes(statistics: Statistics) -> tuple[str, ...]:
    """Activations of many values that are all one: dead, or fed with constant data."""
    constant = [
        name
        for name, tensor in statistics.tensors.items()
        if tensor.low == tensor.high and tensor.count > statistics.samples and not tensor.masked
    ]
    if not constant:
        return ()
    shown = ", ".join(constant[:_NAMED]) + (", ..." if len(constant) > _NAMED else "")
    many = f"{len(constant)} of {len(statistics.tensors)} activations"
    return (f"{many} have one value in all samples, for data or weights that are dead: {shown}",)


def float_activations(model: Any) -> tuple[str, ...]:
    """Names of the float32 inputs and intermediate values of the main graph.

    Args:
        model: ``onnx.ModelProto``; its weights may lack their values.
    """
    types = onnxio.value_types(model)
    produced = [name for node in model.graph.node for name in node.output if name]
    constants = onnxio.initializers(model)
    inputs = [value.name for value in model.graph.input if value.name not in constants]
    wanted = extras.require("onnx").TensorProto.FLOAT
    return tuple(name for name in [*inputs, *produced] if types.get(name) == wanted)
