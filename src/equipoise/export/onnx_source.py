"""A source that is ONNX already: cleaned, and proved against itself as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from equipoise import onnxio
from equipoise.data.store import Rows
from equipoise.errors import BackendError, SourceError, UsageError
from equipoise.export.config import PROOF_DIRECTORY, ExportConfig, ExportRecord
from equipoise.export.rung import MODEL_FILE
from equipoise.export.samples import random_rows
from equipoise.graph.clean import clean
from equipoise.parity.compare import require_finite
from equipoise.parity.proof import ProofRecord, VerifyConfig, verify, write_proof
from equipoise.parity.sizes import (
    dimension_names,
    feeds_of,
    in_words,
    natural_sizes,
    proving_sizes,
)
from equipoise.parity.tolerance import relative_tolerances
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds, TensorSpec, describe

_FLOOR_RUNS = 4
_MOST_ROWS = 16


def take_onnx(config: ExportConfig, *, output: Path) -> ExportRecord:
    """Clean ``config.source.path`` into ``output/model.onnx``.

    The reference is the file itself without the runtime's graph rewriting.

    Raises:
        SourceError: It is no ONNX file, or takes other inputs than the data has.
        UsageError: Another opset is asked for than the file has.
        NonFiniteError: It gives NaN or infinity.
        ParityError: The clean-up changed its numbers.
    """
    source = config.source.path
    if source is None:
        raise SourceError(f"{config.source.name}: an ONNX source needs a path")
    model = onnxio.load_ir(source)
    proof = _prove(config, source, directory=output / PROOF_DIRECTORY)
    cleaned = clean(model, release=config.release)
    onnxio.save_ir(model, output / MODEL_FILE)
    checked = VerifyConfig(model=output / MODEL_FILE, proof=output / PROOF_DIRECTORY, sizes={})
    verified = verify(checked, output=output)
    return ExportRecord(
        exporter="none",
        proof=proof,
        verified=verified,
        preprocessing=None,
        cleaned=cleaned,
        notes=("none: the source is ONNX already",),
    )


def _prove(config: ExportConfig, source: Path, *, directory: Path) -> ProofRecord:
    with session_opener("onnxruntime")(
        source, settings=SessionSettings(optimize="none")
    ) as session:
        rows, specs, made_by = _inputs(config, session.inputs)
        runs, feeds = _runs(rows, specs, config)
        expected = [_run(session, one, config) for one in feeds]
    with session_opener("onnxruntime")(source, settings=SessionSettings()) as session:
        again = [_run(session, one, config) for one in feeds[:_FLOOR_RUNS]]
    for sizes, outputs in zip(runs, expected, strict=True):
        require_finite(outputs, sample=in_words(sizes), what=str(source))
    proof = ProofRecord(
        inputs=specs,
        runs=tuple(runs),
        tolerances=relative_tolerances(expected, again),
        reference="float ONNX",
        made_by=made_by,
        floor_by="the runtime's rewriting of the graph, four units in the last place at the least",
    )
    write_proof(directory, proof, inputs=feeds, outputs=expected)
    return proof


def _run(session: Session, feeds: Feeds, config: ExportConfig) -> dict[str, Array]:
    try:
        return session.run(feeds)
    except BackendError as error:
        raise SourceError(
            f"{config.source.path} does not run on {', '.join(map(describe, feeds.values()))}:"
            f" {error.message}",
            hint="Give --sample FILE.npz with inputs that fit it.",
        ) from error


def _inputs(
    config: ExportConfig, inputs: Sequence[TensorSpec]
) -> tuple[Sequence[Mapping[str, Array]], tuple[TensorSpec, ...], str]:
    """Rows, their specs with the file's fixed sizes in them, and who made them."""
    for name in config.shapes.dynamic or ():
        if name not in dimension_names(inputs):
            known = ", ".join(dimension_names(inputs)) or "none"
            raise UsageError(
                f"{config.source.path} has no dynamic dimension {name!r}; it has {known}",
                hint="An ONNX file cannot be given one: export the PyTorch source again.",
            )
    if config.samples is None:
        return tuple(random_rows(inputs)), tuple(inputs), "the signature (random numbers)"
    _check_names(inputs, config)
    stored = Rows(config.samples)
    given = {spec.name: spec for spec in config.inputs}
    specs = tuple(_settled(spec, given[spec.name]) for spec in inputs)
    return [stored[i] for i in range(min(len(stored), _MOST_ROWS))], specs, "the data"


def _settled(spec: TensorSpec, given: TensorSpec) -> TensorSpec:
    """The file's spec, with the sizes of the data where those never differ."""
    if len(spec.shape) != len(given.shape):
        return spec
    shape = tuple(
        size if isinstance(size, int) or isinstance(dim, str) else dim
        for size, dim in zip(spec.shape, given.shape, strict=True)
    )
    return replace(spec, shape=shape)


def _runs(
    rows: Sequence[Mapping[str, Array]], specs: tuple[TensorSpec, ...], config: ExportConfig
) -> tuple[list[dict[str, int]], list[dict[str, Array]]]:
    names = dimension_names(specs)
    sizes = natural_sizes(specs, rows[0])
    wanted = [*proving_sizes(names, sizes)] if names else []
    wanted += [wanted[0] | one for one in config.shapes.also if names]
    feeds = [feeds_of(rows, specs, one, start=i) for i, one in enumerate(wanted)]
    return [*wanted, *(natural_sizes(specs, row) for row in rows)], [*feeds, *map(dict, rows)]


def _check_names(inputs: Sequence[TensorSpec], config: ExportConfig) -> None:
    wanted, given = {spec.name for spec in inputs}, {spec.name for spec in config.inputs}
    if wanted != given:
        raise SourceError(
            f"{config.source.path} takes {sorted(wanted)}; the data has {sorted(given)}",
            hint="Rename the arrays in the data to the inputs of the model.",
        )
