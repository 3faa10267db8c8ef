"""The manifest of a bundle, format 2: what is in it, byte for byte, and what each engine needs.

The text is canonical: it is what :func:`equipoise.record.dumps` writes of it, so one manifest has
one spelling, one hash, and one meaning for every reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.spec import TensorSpec

FORMAT: Final = 2
MANIFEST_FILE: Final = "manifest.json"
SIGNATURE_FILE: Final = "model.sig"
ENGINES: Final = "engines"
"""The directory that holds one directory for each engine."""

Precision = Literal["float32", "float16", "bfloat16", "float8", "int8", "int4", "mixed", "unknown"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle.

    Attributes:
        size_bytes: Its bytes, known before it is read.
        sha256: Their SHA-256, in lower-case hexadecimal.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a device has to have for an engine; what is empty is not asked for.

    Attributes:
        platform: System and architecture: ``linux-x86_64``.
        any_cpu_flag: CPU features, one of which is enough: ``avx512_vnni``, ``asimddp``.
        runtime_version: Version of the runtime that the engine holds for.
        later_versions: Whether it holds for later versions too, as far as the runtime allows.
        compute_capabilities: Of NVIDIA GPUs, such as ``8.6``.
        later_gpus: Whether it holds for GPUs of later compute capabilities too.
    """

    platform: str = ""
    any_cpu_flag: tuple[str, ...] = ()
    runtime_version: str = ""
    later_versions: bool = False
    compute_capabilities: tuple[str, ...] = ()
    later_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine of a bundle.

    Attributes:
        name: Its name in the bundle, and of its directory below ``engines/``.
        file: The file that its runtime opens: ``engines/int8/engine.onnx``.
        files: All of its files, sorted, that one among them.
        runtime: The runtime that opens it.
        providers: Where it runs; the runtime's own CPU when empty.
        target: Target that it was made for; empty for none in particular.
        precision: Of its weights.
        threads: Threads per operator that it was measured with.
        hint: What it was built to be fast at.
        exact_integers: Whether it has to add int8 products in 32 bits on CPUs without VNNI.
        size_bytes: Bytes of its files.
        needs: What a device has to have.
        golden_from: Where its golden outputs come from: it was run where the bundle was packed, or
            it could not be, and they are those of the float reference.
        golden_tolerance: Output -> largest absolute difference from the golden outputs that a
            device may show. Empty when it was not run where it was packed and nobody stated one.
        batching: Whether samples run together were shown to give what they give alone, as close
            as two float32 kernels are to each other.
        fallback: Whether it is the float engine that is there for devices that nothing else fits.
    """

    name: str
    file: str
    files: tuple[str, ...]
    runtime: str
    providers: tuple[str, ...] = ()
    target: str = ""
    precision: Precision = "unknown"
    threads: int = 1
    hint: Literal["latency", "throughput"] = "latency"
    exact_integers: bool = False
    size_bytes: int
    needs: Needs = field(default_factory=Needs)
    golden_from: Literal["engine", "reference"] = "engine"
    golden_tolerance: dict[str, float] = field(default_factory=dict)
    batching: bool = False
    fallback: bool = False


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The data that set the ranges of integers.

    Attributes:
        fingerprint: SHA-256 of the calibration rows.
        samples: Their number.
        data: The data, as the user named it.
    """

    fingerprint: str
    samples: int
    data: str


@dataclass(frozen=True, kw_only=True)
class Licences:
    """Licences as SPDX expressions; an empty one was not stated.

    Attributes:
        model: Of the model in the bundle.
        weights_from: Of the weights that it was made from.
        data: Of the data that it was trained, calibrated and judged on.
    """

    model: str = ""
    weights_from: str = ""
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        format: Version of this form.
        name: What it is called; a device keeps the highest serial of each name.
        serial: Rises with every release of that name.
        engines: In order of preference, a float fallback last.
        inputs: Input specs, the same for every engine.
        outputs: Output specs.
        files: Name -> size and hash of every file but the manifest and the signature.
        task: ``token-classification``, ``sequence-classification`` or empty.
        labels: Class names in index order; may be empty.
        tokenizer: File name of the tokenizer; None without text.
        max_length: Most tokens per text.
        preprocessing: What is done to a picture first; None without pictures, and where the
            source does not say or says it in a form that cannot be told here.
        calibration: What set the ranges of integers; None where there was none, or it is not known.
        licences: What was stated about licences.
        versions: Package -> version of what made the bundle.
    """

    format: int = FORMAT
    name: str
    serial: int = 0
    engines: tuple[Engine, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileEntry] = field(default_factory=dict)
    task: str = ""
    labels: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_length: int = 512
    preprocessing: ImagePreprocessing | None = None
    calibration: Calibration | None = None
    licences: Licences = field(default_factory=Licences)
    versions: dict[str, str] = field(default_factory=dict)

    def engine(self, name: str) -> Engine | None:
        """The engine called ``name``; None when there is none."""
        return next((engine for engine in self.engines if engine.name == name), None)
