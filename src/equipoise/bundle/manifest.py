"""The manifest of a bundle, and the check that a bundle is what its manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import DataError, IntegrityError
from equipoise.spec import TensorSpec
from equipoise.vouching import check_files, check_format, files_below

MANIFEST_FILE: Final = "manifest.json"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine of a bundle.

    Attributes:
        file: Its file name.
        runtime: The runtime that opens it.
        threads: Threads it was measured with.
        size_bytes: Bytes on disk.
    """

    file: str
    runtime: str
    threads: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        format: Version of this form.
        name: The source it was made from, as the user named it.
        target: Target profile it was made for.
        engine: Its engine.
        inputs: Input specs of the engine.
        outputs: Output specs of the engine.
        files: File name -> SHA-256 of every other file of the bundle.
        golden_tolerance: Output -> largest absolute difference that a device may show from the
            golden outputs: the float tolerance of the model plus the difference of the engine
            from its reference on the same inputs.
        task: ``token-classification``, ``sequence-classification`` or empty.
        labels: Class names in index order; may be empty.
        tokenizer: File name of the tokenizer; None without text.
        max_length: Most tokens per text.
        preprocessing: What is done to a picture first; None without pictures, and where the
            source does not say or says it in a form that cannot be told here.
        versions: Package -> version of what made the bundle.
    """

    format: int = FORMAT
    name: str
    target: str
    engine: Engine
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, str]
    golden_tolerance: dict[str, float]
    task: str = ""
    labels: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_length: int = 512
    preprocessing: ImagePreprocessing | None = None
    versions: dict[str, str]


def read_manifest(directory: Path) -> Manifest:
    """Read ``manifest.json`` of a bundle.

    Raises:
        IntegrityError: It is missing, or is no manifest.
        IncompatibleError: It is of a later format.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise IntegrityError(
            f"{directory} is no bundle: it has no {MANIFEST_FILE}",
            hint="Give the bundle directory that equipoise tune wrote.",
        )
    text = fs.read_text(path, error=IntegrityError)
    check_format(text, path, newest=FORMAT)
    try:
        return record.loads(Manifest, text, where=str(path), error=IntegrityError)
    except DataError as error:  # steps of preprocessing that contradict each other
        raise IntegrityError(f"{path}: {error.message}") from error


def verify(directory: Path, manifest: Manifest) -> None:
    """Check that ``directory`` holds exactly the files of ``manifest``, byte for byte.

    Raises:
        IntegrityError: Names the file that is missing, extra, a link, or different.
    """
    present = files_below(directory) - {MANIFEST_FILE}
    hint = "Copy the bundle again; do not run it."
    check_files(directory, manifest.files, present=present, hint=hint)
