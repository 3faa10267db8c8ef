"""The data stage: what the user named, as rows of arrays that every later stage reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.parts import Parts, drawn, training_parts
from equipoise.data.readers.base import DataSet, Sample, read
from equipoise.data.store import Rows, write_rows
from equipoise.data.text import OPTIONAL_INPUTS, TEXT_INPUTS
from equipoise.errors import DataError
from equipoise.spec import Array, TensorSpec, describe

_FEW: Final = 32
_LARGEST_CALIBRATION_SHARE: Final = 3


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What was prepared.

    Attributes:
        inputs: Specs of the inputs; named dimensions vary or may vary between samples.
        labels: Class names in index order; may be empty.
        calibration_samples: Number of calibration samples.
        evaluation_samples: Number of evaluation samples.
        warnings: What the user should know about the data.
        training_samples: Number of training samples; 0 where none were asked for.
        validation_samples: The same of validation samples.
    """

    inputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    calibration_samples: int
    evaluation_samples: int
    warnings: tuple[str, ...]
    training_samples: int = 0
    validation_samples: int = 0


def prepare_data(config: DataConfig, *, output: Path) -> DataRecord:
    """Write ``calibration``, ``evaluation`` and ``labels`` rows into ``output``.

    For training also ``training``, ``training_labels``, ``validation`` and ``validation_labels``,
    without the labels where the data has none.

    Raises:
        DataError: The data is missing, empty, not of the form it claims, or its calibration part
            does not fit its evaluation part.
    """
    found = read(config.data, config=config)
    own = bool(found.training) or config.train is not None
    wanted = own if config.for_training is None else config.for_training
    parts = training_parts(found, config) if wanted else None
    calibration, evaluation = _calibration(found, config, parts=parts)
    calibration = _without_extras(_drawn(calibration, config), config)
    evaluation = _without_extras(evaluation[: config.samples], config)
    _check_alike(calibration, evaluation)
    _check_finite(calibration, "calibration")
    _check_finite(evaluation, "evaluation")
    write_rows(output / "calibration", (sample.feeds for sample in calibration))
    write_rows(output / "evaluation", (sample.feeds for sample in evaluation))
    write_rows(output / "labels", _labels(evaluation))
    if parts is not None:
        _write_training(parts, config, output=output)
    return DataRecord(
        inputs=input_specs(Rows(output / "evaluation")),
        labels=found.labels,
        calibration_samples=len(calibration),
        evaluation_samples=len(evaluation),
        # Calibration looks at its samples itself; here they are weighed for what else uses them.
        warnings=(
            *found.warnings,
            *(parts.warnings if parts else ()),
            *(_warnings(calibration) if config.labelled else ()),
        ),
        training_samples=len(parts.training) if parts else 0,
        validation_samples=len(parts.validation) if parts else 0,
    )


def _calibration(
    found: DataSet, config: DataConfig, *, parts: Parts | None
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Samples to calibrate on, and those to evaluate on."""
    if config.calibration is not None:
        calibration = read(config.calibration, config=config).evaluation
        return calibration, parts.evaluation if parts else found.evaluation
    if parts is not None:
        return found.calibration or parts.training, parts.evaluation
    if not config.labelled:
        return found.evaluation, found.evaluation
    if found.calibration:
        return found.calibration, found.evaluation
    return _set_aside(found.evaluation, config)


def _labels(samples: Sequence[Sample]) -> Iterator[dict[str, Array]]:
    return ({"label": np.asarray(sample.label)} for sample in samples)


def _write_training(parts: Parts, config: DataConfig, *, output: Path) -> None:
    for name, samples in (("training", parts.training), ("validation", parts.validation)):
        kept = _without_extras(samples, config)
        _check_finite(kept, name)
        write_rows(output / name, (sample.feeds for sample in kept))
        if config.labelled:
            write_rows(output / f"{name}_labels", _labels(kept))


def _without_extras(samples: Sequence[Sample], config: DataConfig) -> Sequence[Sample]:
    """The samples without the text inputs that the model does not take."""
    if not config.accepted:
        return samples
    dropped = set(OPTIONAL_INPUTS) - set(config.accepted)
    return [
        replace(s, feeds={n: a for n, a in s.feeds.items() if n not in dropped}) for s in samples
    ]


def _set_aside(
    samples: Sequence[Sample], config: DataConfig
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """A random part for calibration, at most a third; the rest, in order, for evaluation."""
    count = min(config.calibration_samples, len(samples) // _LARGEST_CALIBRATION_SHARE)
    if not count:
        raise DataError(
            f"{config.data} has {len(samples)} samples: too few to set some aside for calibration",
            hint="Give calibration data of its own with --calibration.",
        )
    order = np.random.default_rng(config.seed).permutation(len(samples))
    aside = set(order[:count].tolist())
    return (
        [samples[i] for i in sorted(aside)],
        [samples[i] for i in range(len(samples)) if i not in aside],
    )


def _drawn(samples: Sequence[Sample], config: DataConfig) -> Sequence[Sample]:
    """``calibration_samples`` of the samples, drawn at random, in their order."""
    return drawn(samples, config.calibration_samples, seed=config.seed)


def _check_alike(calibration: Sequence[Sample], evaluation: Sequence[Sample]) -> None:
    if not calibration or not evaluation:
        empty = "evaluation" if calibration else "calibration"
        raise DataError(f"there is no {empty} sample at all: the data is empty")
    wanted, given = _signature(evaluation[0]), _signature(calibration[0])
    if wanted != given:
        raise DataError(
            f"calibration samples have {given}; evaluation samples have {wanted}",
            hint="Both must have the same names, dtypes and numbers of dimensions.",
        )


def _signature(sample: Sample) -> dict[str, str]:
    return {n: f"{a.dtype}, {a.ndim} dimensions" for n, a in sorted(sample.feeds.items())}


def _check_finite(samples: Iterable[Sample], part: str) -> None:
    for index, sample in enumerate(samples):
        for name, array in sample.feeds.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(
                    f"{part} sample {index}: {name!r} ({describe(array)}) holds NaN or infinity"
                )


def _warnings(calibration: Sequence[Sample]) -> tuple[str, ...]:
    warnings = []
    if len(calibration) < _FEW:
        warnings.append(
            f"only {len(calibration)} calibration samples: ranges from fewer than {_FEW} are weak"
        )
    for name, first in calibration[0].feeds.items():
        if first.dtype.kind == "f" and _constant([s.feeds[name] for s in calibration]):
            warnings.append(f"calibration input {name!r} is constant in every sample")
    return tuple(warnings)


def _constant(arrays: Sequence[Array]) -> bool:
    """Whether no sample varies within itself; of single values, whether all are the same."""
    if any(array.size > 1 for array in arrays):
        return all(array.size and (array == array.flat[0]).all() for array in arrays)
    return np.unique(np.concatenate([array.ravel() for array in arrays])).size == 1


def input_specs(rows: Rows) -> tuple[TensorSpec, ...]:
    """Specs of the inputs in ``rows``.

    The first dimension is ``batch``. A size that differs between rows is dynamic, and so are all
    of a text; sizes that always vary together share a name.
    """
    named: dict[tuple[int, ...], str] = {}
    specs = []
    for column in rows.header.columns:
        shapes = rows.shapes(column.name)
        shape: list[int | str] = ["batch"]
        for axis in range(1, column.rank):
            sizes = tuple(shapes[:, axis].tolist())
            text = column.name in TEXT_INPUTS and axis == 1
            if text or len(set(sizes)) > 1:
                name = "sequence" if text else f"{column.name}_dim{axis}"
                shape.append(named.setdefault(sizes, name))
            else:
                shape.append(sizes[0])
        specs.append(TensorSpec(name=column.name, dtype=column.dtype, shape=tuple(shape)))
    return tuple(specs)
