"""Write engines that were run as one bundle, with everything that is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import record
from equipoise.assembly.parts import GOLDEN_SAMPLES, Ran, Specs
from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import ENGINES, Calibration, Licences, Manifest
from equipoise.bundle.sbom import SBOM_FILE, sbom
from equipoise.bundle.writer import write_bundle
from equipoise.data.store import Rows
from equipoise.errors import InputError
from equipoise.parity.record import ParityRecord
from equipoise.pipeline import Pipeline
from equipoise.report.card import CARD_FILE, model_card
from equipoise.serving.opening import fits
from equipoise.spec import TensorSpec

PARITY_FILE: Final = "parity.json"
RECIPE_FILE: Final = "recipe.json"
_TOKENIZER_FILE: Final = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a manifest says of all engines together.

    Attributes:
        name: Name of the bundle.
        serial: Its serial.
        licences: What was stated about licences.
        calibration: What set the ranges of integers.
        versions: Package -> version of what made it.
    """

    name: str
    serial: int = 0
    licences: Licences = field(default_factory=Licences)
    calibration: Calibration | None = None
    versions: dict[str, str] = field(default_factory=dict)


def write_parts(pipeline: Pipeline, ran: Sequence[Ran], *, output: Path, about: About) -> Manifest:
    """Write the bundle of engines that were run, in their order.

    Raises:
        InputError: The engines take or give different things.
        OutputError: The place cannot be written, or holds something else.
    """
    tokenizer = pipeline.job.data.tokenizer
    specs = joined_specs(ran)
    manifest = Manifest(
        name=about.name,
        serial=about.serial,
        engines=tuple(each.engine for each in ran),
        inputs=specs.inputs,
        outputs=specs.outputs,
        task=pipeline.job.source.task,
        labels=pipeline.data.record.labels,
        tokenizer=_TOKENIZER_FILE if tokenizer else None,
        max_length=pipeline.job.data.max_length,
        preprocessing=pipeline.exported.record.preprocessing,
        calibration=about.calibration,
        licences=about.licences,
        versions=about.versions,
    )
    copies = {
        f"{ENGINES}/{each.part.name}/{name}": path
        for each in ran
        for name, path in each.part.files.items()
    }
    if tokenizer:
        copies[_TOKENIZER_FILE] = tokenizer
    return write_bundle(
        output,
        manifest,
        copies=copies,
        documents=_documents(pipeline, ran),
        derived={CARD_FILE: lambda known: _card(known, ran), SBOM_FILE: sbom},
    )


def _documents(pipeline: Pipeline, ran: Sequence[Ran]) -> dict[str, bytes]:
    rows, reference = Rows(pipeline.evaluation), Rows(pipeline.reference.files)
    vectors = [
        Golden(
            inputs=rows[i],
            reference=reference[i],
            outputs={each.part.name: each.outputs[i] for each in ran if each.outputs},
        )
        for i in range(min(GOLDEN_SAMPLES, len(rows)))
    ]
    recipes = {each.part.name: each.part.recipe for each in ran if each.part.recipe is not None}
    return {
        GOLDEN_FILE: golden_bytes(vectors),
        PARITY_FILE: record.dumps(_parities(ran)).encode(),
        RECIPE_FILE: record.dumps(recipes).encode(),
    }


def _parities(ran: Sequence[Ran]) -> dict[str, ParityRecord]:
    return {each.part.name: each.parity for each in ran if each.parity is not None}


def _card(manifest: Manifest, ran: Sequence[Ran]) -> bytes:
    recipes = {each.part.name: each.part.recipe.summary for each in ran if each.part.recipe}
    return model_card(manifest, parity=_parities(ran), recipes=recipes).encode()


def joined_specs(ran: Sequence[Ran]) -> Specs:
    """Specs that every engine fits: a size that is fixed in one and open in another is open.

    Raises:
        InputError: The engines take or give different things, or none says what.
    """
    known = [each for each in ran if each.specs is not None]
    if not known:
        raise InputError(
            "none of the engines can be opened here, and none says what it takes",
            hint="Add an engine that runs on this machine, such as --float-fallback.",
        )
    first = known[0].specs
    assert first is not None  # noqa: S101  of those that are known
    joined = first
    for each in known[1:]:
        assert each.specs is not None  # noqa: S101  as above
        joined = Specs(
            inputs=_joined(joined.inputs, each.specs.inputs, name=each.part.name),
            outputs=_joined(joined.outputs, each.specs.outputs, name=each.part.name),
        )
    return joined


def _joined(
    left: tuple[TensorSpec, ...], right: tuple[TensorSpec, ...], *, name: str
) -> tuple[TensorSpec, ...]:
    widened = tuple(map(_wider, left, right))
    alike = len(left) == len(right) and all(map(fits, right, widened))
    if not alike:
        raise InputError(
            f"the engine {name!r} has {'; '.join(map(str, right))}; the others have"
            f" {'; '.join(map(str, left))}",
            hint="Engines of one bundle take and give the same tensors in the same order.",
        )
    return widened


def _wider(left: TensorSpec, right: TensorSpec) -> TensorSpec:
    shape = tuple(
        mine if isinstance(mine, str) or mine == other or not isinstance(other, str) else other
        for mine, other in zip(left.shape, right.shape, strict=False)
    )
    return replace(left, shape=shape) if len(left.shape) == len(right.shape) else left


def exported_parity(pipeline: Pipeline) -> ParityRecord:
    """The parity of the float model that engines were made from; no engine is in it yet."""
    exported = pipeline.exported.record
    return ParityRecord(
        reference=pipeline.reference.record.by,
        exporter=exported.exporter,
        samples=0,
        tolerances=exported.proof.tolerances,
        exported=exported.verified.parity,
        engine=(),
        engine_batch=(),
    )
