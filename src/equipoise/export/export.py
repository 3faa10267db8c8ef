"""The export stage: a source to an ONNX file that is proved equal to it.

A ladder of exporters, each in a child process with a time limit; the first whose file gives the
numbers of PyTorch at every size is kept. No parity, no file. This process imports no PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

from equipoise import fs, isolation, record
from equipoise.errors import (
    BackendError,
    EquipoiseError,
    IncompatibleError,
    ParityError,
    ResourceError,
    SourceError,
    unknown_name,
)
from equipoise.export.blame import BlameConfig, Departure
from equipoise.export.config import PROOF_DIRECTORY, ExportConfig, ExportRecord
from equipoise.export.exporters import RUNGS
from equipoise.export.onnx_source import take_onnx
from equipoise.export.rung import MODEL_FILE, RungConfig, RungRecord
from equipoise.parity.proof import VerifyConfig, VerifyRecord, has_proof, read_proof

_RUN_RUNG: Final = "equipoise.export.rung:run_rung"
_VERIFY: Final = "equipoise.parity.proof:verify"
_FIND_DEPARTURE: Final = "equipoise.export.blame:find_departure"
R = TypeVar("R")


def export(config: ExportConfig, *, output: Path) -> ExportRecord:
    """Export ``config.source`` to ``output/model.onnx``, with its proof in ``output/proof``.

    Raises:
        UsageError: There is no such exporter, or no such dimension.
        SourceError: The source cannot be built, or no exporter can take it.
        ParityError: An exporter wrote a file, but none gives the numbers of the source.
        IncompatibleError: No exporter can give the opset.
        NonFiniteError: The source itself gives NaN or infinity.
    """
    if config.exporter and config.exporter not in RUNGS:
        raise unknown_name("exporter", config.exporter, RUNGS)
    if config.source.kind == "onnx":
        return take_onnx(config, output=output)
    return _climb(config, output=output)


def _climb(config: ExportConfig, *, output: Path) -> ExportRecord:
    """Try the rungs in turn. What fails before the proof is there is the source's own fault."""
    notes: list[str] = []
    failures: list[EquipoiseError] = []
    for rung in [config.exporter] if config.exporter else RUNGS:
        try:
            return _try_rung(rung, config, output=output, notes=notes)
        except (SourceError, ParityError, IncompatibleError, BackendError, ResourceError) as error:
            if not has_proof(output / PROOF_DIRECTORY):
                raise
            fs.remove(output / MODEL_FILE)
            fs.remove(output / f"{MODEL_FILE}.data")
            notes.append(f"{rung}: {_first_line(error)}")
            failures.append(error)
    fs.remove(output / PROOF_DIRECTORY)
    raise _refusal(config, notes, failures)


def _try_rung(rung: str, config: ExportConfig, *, output: Path, notes: list[str]) -> ExportRecord:
    proof = output / PROOF_DIRECTORY
    settings = RungConfig(
        source=config.source,
        rung=rung,
        proof=proof,
        samples=config.samples,
        inputs=config.inputs,
        shapes=config.shapes,
        opset=config.opset,
        max_ir_version=config.max_ir_version,
        release=config.release,
    )
    limit_s = config.rung_time_limit_s
    made = _in_child(_RUN_RUNG, settings, returns=RungRecord, output=output, limit_s=limit_s)
    verified = _verified(output / MODEL_FILE, settings, limit_s=limit_s)
    return ExportRecord(
        exporter=rung,
        proof=read_proof(proof),
        verified=verified,
        cleaned=made.cleaned,
        preprocessing=made.preprocessing,
        notes=(*notes, f"{rung}: agrees with the source at every size; kept"),
    )


def _verified(model: Path, settings: RungConfig, *, limit_s: float) -> VerifyRecord:
    """Parity of a file with the proof. A departure in the numbers is traced to its node."""
    config = VerifyConfig(model=model, proof=settings.proof, sizes={})
    try:
        return _in_child(
            _VERIFY, config, returns=VerifyRecord, output=model.parent, limit_s=limit_s
        )
    except ParityError as error:
        blame = BlameConfig(model=model, rung=settings)
        where = _blamed(blame, limit_s=limit_s) if type(error) is ParityError else None
        if where is None:
            raise
        raise ParityError(f"{error.message}; {where}", hint=error.hint) from error


def _blamed(config: BlameConfig, *, limit_s: float) -> str | None:
    """The first node that departs, in words; None where it cannot be found."""
    try:
        with fs.scratch_directory() as folder:
            found = _in_child(
                _FIND_DEPARTURE, config, returns=Departure, output=folder, limit_s=limit_s
            )
    except EquipoiseError:
        return None
    return found.in_words() or None


def _refusal(
    config: ExportConfig, notes: list[str], failures: list[EquipoiseError]
) -> EquipoiseError:
    """One error for the whole ladder: of the kind that says most, with a line per rung."""
    kinds = (ParityError, IncompatibleError, SourceError, EquipoiseError)
    worst = next(f for kind in kinds for f in failures if isinstance(f, kind))
    hint = "Nothing was written."
    return type(worst)(
        "\n  ".join([f"{config.source.name} could not be exported:", *notes]),
        hint=f"{worst.hint} {hint}".strip(),
    )


def _first_line(error: EquipoiseError) -> str:
    lines = [line for line in error.message.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"


def _in_child(
    function: str, config: object, *, returns: type[R], output: Path, limit_s: float
) -> R:
    text = isolation.run_isolated(
        function, config, output=output, on_progress=_ignore, time_limit_s=limit_s
    )
    return record.loads(returns, text, where=function, error=BackendError)


def _ignore(done: int, total: int) -> None:
    """The bar shows rungs, not what happens inside one."""
