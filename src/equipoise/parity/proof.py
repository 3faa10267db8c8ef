"""Proof that an ONNX file gives the numbers of its source, at every size that it claims.

A proof is a directory: real inputs at several sizes, what the source makes of them, and how close
is equal. It is written once, by whoever can run the source, and any file is judged by it.

    proof.json    inputs, sizes of every run, tolerances
    inputs/       rows: the feeds of every run
    outputs/      rows: what the source gave
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import extras, fs, onnxio, record
from equipoise.data.store import Rows, write_rows
from equipoise.errors import (
    EquipoiseError,
    FrozenDimensionError,
    IntegrityError,
    ParityError,
    SourceError,
)
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.parity.sizes import in_words
from equipoise.parity.tolerance import Tolerance, check_parity
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds, TensorSpec

_FILE: Final = "proof.json"


@dataclass(frozen=True, kw_only=True)
class ProofRecord:
    """What a proof says beside its arrays.

    Attributes:
        inputs: Specs of the inputs; a name is a dimension that has to be dynamic.
        runs: Sizes of the dynamic dimensions in every run, the traced sizes first.
        tolerances: Allowed difference per output.
        reference: What computed the outputs: ``PyTorch`` or ``float ONNX``.
        made_by: Where the inputs come from, in words.
        floor_by: What the tolerances come from, in words.
    """

    inputs: tuple[TensorSpec, ...]
    runs: tuple[dict[str, int], ...]
    tolerances: tuple[Tolerance, ...]
    reference: str
    made_by: str
    floor_by: str


@dataclass(frozen=True, kw_only=True)
class SizeParity:
    """Parity at one combination of sizes.

    Attributes:
        sizes: Dynamic dimension -> size.
        runs: Number of runs of those sizes.
        outputs: One entry per output.
    """

    sizes: dict[str, int]
    runs: int
    outputs: tuple[OutputParity, ...]


def write_proof(
    directory: Path,
    proof: ProofRecord,
    *,
    inputs: Sequence[Feeds],
    outputs: Sequence[Mapping[str, Array]],
) -> None:
    """Write a proof, whole or not at all."""
    with fs.staged_directory(directory) as staging:
        write_rows(staging / "inputs", inputs)
        write_rows(staging / "outputs", outputs)
        fs.write_json(staging / _FILE, proof)


def read_proof(directory: Path) -> ProofRecord:
    """The record of the proof in ``directory``. Raises IntegrityError when there is none."""
    path = directory / _FILE
    text = fs.read_text(path, error=IntegrityError)
    return record.loads(ProofRecord, text, where=str(path), error=IntegrityError)


def has_proof(directory: Path) -> bool:
    """Whether a proof has been written there."""
    return (directory / _FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to verify.

    Attributes:
        model: ONNX file.
        proof: Directory of the proof.
        sizes: Dimensions that the file has fixed, with their sizes: only runs of those count.
    """

    model: Path
    proof: Path
    sizes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class VerifyRecord:
    """What was verified.

    Attributes:
        inputs: Specs of the file's inputs.
        outputs: Specs of its outputs.
        opset: Read back from the file.
        ir_version: Read back from the file.
        parity: One entry per combination of sizes, the traced one first.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    parity: tuple[SizeParity, ...]


def verify(config: VerifyConfig, *, output: Path) -> VerifyRecord:  # noqa: ARG001
    """Run ``config.model`` on every run of the proof and compare.

    Raises:
        FrozenDimensionError: A dimension that has to be dynamic is fixed; names it.
        ParityError: An output differs; names it, the sizes, the difference and what is allowed.
        SourceError: The file cannot be loaded or run.
    """
    proof = read_proof(config.proof)
    with session_opener("onnxruntime")(config.model, settings=SessionSettings()) as session:
        _check_inputs(session.inputs, proof, fixed=config.sizes)
        compared = _compare_all(session, config, proof)
        inputs, outputs = session.inputs, session.outputs
    if not compared:
        raise ParityError(f"at {in_words(config.sizes)} nothing was proved")
    for parity in compared:
        check_parity(parity.outputs, proof.tolerances, what=in_words(parity.sizes))
    opset, ir_version = _versions(config.model)
    return VerifyRecord(
        inputs=inputs, outputs=outputs, opset=opset, ir_version=ir_version, parity=compared
    )


def _check_inputs(
    inputs: Sequence[TensorSpec], proof: ProofRecord, *, fixed: Mapping[str, int]
) -> None:
    """The file takes the inputs of the proof, and no size that has to be free is fixed in it."""
    found = {spec.name: spec for spec in inputs}
    wanted = {spec.name: spec for spec in proof.inputs}
    if set(found) != set(wanted):
        raise ParityError(
            f"the file takes {sorted(found)}; the source takes {sorted(wanted)}",
            hint="An input that changes no output was dropped: leave it out of the data.",
        )
    for name, spec in wanted.items():
        for dim, size in zip(spec.shape, found[name].shape, strict=False):
            if isinstance(dim, str) and isinstance(size, int) and fixed.get(dim) != size:
                raise _frozen(dim, f"input {name!r} takes only {size}")


def _frozen(dim: str, why: str) -> FrozenDimensionError:
    return FrozenDimensionError(
        f"dimension {dim!r} was frozen by the export: {why}",
        hint=f"Leave {dim} out of --dynamic, or export one file per size with --buckets.",
    )


def _compare_all(
    session: Session, config: VerifyConfig, proof: ProofRecord
) -> tuple[SizeParity, ...]:
    inputs, outputs = Rows(config.proof / "inputs"), Rows(config.proof / "outputs")
    groups: dict[tuple[tuple[str, int], ...], tuple[Comparison, int]] = {}
    for index, sizes in enumerate(proof.runs):
        if any(sizes.get(dim, size) != size for dim, size in config.sizes.items()):
            continue
        key = tuple(sizes.items())
        comparison, count = groups.get(key, (Comparison(), 0))
        changed = [dim for dim, size in sizes.items() if size != proof.runs[0].get(dim)]
        found = _run(session, inputs[index], sizes, changed=changed)
        _check_shapes(found, outputs[index], sizes, changed=changed)
        comparison.add(outputs[index], found)
        groups[key] = comparison, count + 1
    return tuple(
        SizeParity(sizes=dict(key), runs=count, outputs=comparison.result())
        for key, (comparison, count) in groups.items()
    )


def _run(
    session: Session, feeds: Feeds, sizes: dict[str, int], *, changed: Sequence[str]
) -> dict[str, Array]:
    """Run once. What fails at another size than the traced one is a frozen dimension."""
    try:
        return session.run(feeds)
    except EquipoiseError as error:
        if not changed:
            raise SourceError(f"the exported file does not run: {error.message}") from error
        why = f"at {in_words(sizes)} it fails: {error.message}"
        raise _frozen(" or ".join(changed), why) from error


def _check_shapes(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    sizes: dict[str, int],
    *,
    changed: Sequence[str],
) -> None:
    """An output that keeps its shape when a size changes is a frozen dimension too."""
    for name in set(found) & set(expected) if changed else ():
        shape, wanted = found[name].shape, expected[name].shape
        if shape != wanted:
            why = f"at {in_words(sizes)}, output {name!r} has shape {shape}, not {wanted}"
            raise _frozen(" or ".join(changed), why)


def _versions(path: Path) -> tuple[int, int]:
    """Opset and IR version, read back from the file."""
    model = extras.require("onnx").load(path, load_external_data=False)
    return onnxio.opset_of(model), int(model.ir_version)
