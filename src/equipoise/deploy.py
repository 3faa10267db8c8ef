"""Run a bundle on the device it was made for. Needs NumPy and the engine's runtime alone.

A picture that has to be resized needs Pillow besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.bundle.golden import GOLDEN_FILE, Golden, read_golden
from equipoise.bundle.manifest import Manifest, read_manifest, verify
from equipoise.data.images import apply
from equipoise.errors import InputError
from equipoise.runtimes.base import Closing
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds, TensorSpec


@dataclass(frozen=True, kw_only=True)
class OutputCheck:
    """How one output did on the golden vectors of this device.

    Attributes:
        name: Output tensor.
        max_abs: Largest absolute difference from the golden outputs.
        allowed: Largest difference that is allowed.
    """

    name: str
    max_abs: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.max_abs <= self.allowed


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Golden vectors against the engine, on this device.

    Attributes:
        samples: Number of golden samples.
        outputs: One entry per output.
    """

    samples: int
    outputs: tuple[OutputCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.passed for output in self.outputs)

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        checks = "; ".join(
            f"{o.name} differs by at most {o.max_abs:.3g} (allowed {o.allowed:.3g})"
            for o in self.outputs
        )
        return f"self-test {word} on {self.samples} golden samples: {checks}"


class BundleSession(Closing):
    """An open bundle. A context manager.

    Args:
        directory: The bundle.
        manifest: Its manifest.
        threads: Threads per operator; as measured when None.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None) -> None:
        self.directory = directory
        self.manifest = manifest
        settings = SessionSettings(threads=threads or manifest.engine.threads, spin=True)
        open_session = session_opener(manifest.engine.runtime)
        self._session = open_session(directory / manifest.engine.file, settings=settings)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs."""
        return self.manifest.outputs

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once: named arrays in, named arrays out.

        Args:
            feeds: One array per input, batch dimension first.
            out: Buffers for outputs, by name.

        Raises:
            InputError: An array does not fit; names it and what is allowed.
            BackendError: The runtime failed.
        """
        return self._session.run(feeds, out=out)

    def preprocess(self, image: Array) -> dict[str, Array]:
        """A picture as what :meth:`run` takes.

        Args:
            image: RGB, uint8 [height, width, 3], of any size.

        Raises:
            InputError: The bundle does not say how pictures are prepared, or has other inputs.
            DataError: The picture has another dtype or shape.
            MissingExtraError: It has to be resized, and Pillow is not installed.
        """
        preprocessing = self.manifest.preprocessing
        if preprocessing is None or len(self.inputs) != 1:
            raise InputError(
                f"the bundle {self.directory} does not say how a picture becomes its inputs:"
                f" {'; '.join(map(str, self.inputs))}",
                hint="Prepare the arrays as for the PyTorch model, and give them to run.",
            )
        spec = self.inputs[0]
        return {spec.name: apply(image, preprocessing).astype(spec.dtype, copy=False)}

    def golden(self) -> tuple[Golden, ...]:
        """The golden vectors of the bundle."""
        return read_golden(self.directory / GOLDEN_FILE)

    def selftest(self) -> SelfTest:
        """Run the golden inputs on this device and compare with the golden outputs."""
        vectors = self.golden()
        worst = dict.fromkeys(self.manifest.golden_tolerance, 0.0)
        for vector in vectors:
            outputs = self.run(vector.inputs)
            for name in worst:
                difference = np.abs(
                    outputs[name].astype(np.float64) - vector.outputs[name].astype(np.float64)
                )
                worst[name] = float(np.maximum(worst[name], difference.max(initial=0.0)))
        return SelfTest(
            samples=len(vectors),
            outputs=tuple(
                OutputCheck(name=n, max_abs=d, allowed=self.manifest.golden_tolerance[n])
                for n, d in worst.items()
            ),
        )

    def close(self) -> None:
        """Free the engine."""
        self._session.close()


def load(bundle: str | Path, *, threads: int | None = None, check: bool = True) -> BundleSession:
    """Open a bundle.

    Args:
        bundle: The directory that ``equipoise tune`` wrote.
        threads: Threads per operator; as measured when None.
        check: Verify the SHA-256 of every file first. Turn off only where that was done already.

    Raises:
        IntegrityError: It is no bundle, or a file is not what its hash says.
        IncompatibleError: It is of a later format, or its runtime is not installed.
    """
    directory = Path(bundle)
    manifest = read_manifest(directory)
    if check:
        verify(directory, manifest)
    return BundleSession(directory, manifest, threads=threads)
