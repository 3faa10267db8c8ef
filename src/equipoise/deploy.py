"""Run a bundle on the device it was made for. Needs NumPy and the engine's runtime alone.

A picture that has to be resized needs Pillow besides, and a signature the package cryptography.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from equipoise.bundle.golden import GOLDEN_FILE, Golden, parse_golden
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.signature import check_serial
from equipoise.data.images import prepared, takes_picture
from equipoise.errors import IncompatibleError, InputError, ParityError, UsageError
from equipoise.runtimes.base import Closing
from equipoise.serving.batching import batch_dimension, run_together
from equipoise.serving.opening import LoadSettings, Running, open_running
from equipoise.serving.selftest import OutputCheck, SelfTest, run_selftest
from equipoise.serving.serials import keep_seen
from equipoise.serving.stats import MASK, SHIFT, UNTIMED, Recorder, SessionStats
from equipoise.spec import Array, Feeds, TensorSpec

__all__ = ["BundleSession", "OutputCheck", "SelfTest", "SessionStats", "load"]

_clock = time.perf_counter_ns
_MOST_ROWS: Final = 64
"""Rows that are run together; more seldom gain, and take memory."""

Keys = Sequence[str | Path | bytes] | str | Path | bytes


class _Closed:
    """What runs when nothing does any more."""

    def run(self, *_: object, **__: object) -> NoReturn:
        raise UsageError("this session is closed", hint="Load the bundle again.")


class BundleSession(Closing):
    """An open bundle. A context manager; threads may share it, and asyncio tasks.

    Args:
        running: The bundle with the engine that was opened.
        settings: How it was loaded, and how another will be that replaces it.
    """

    def __init__(self, running: Running, settings: LoadSettings) -> None:
        self._running: Running | None = running
        self._live: Running | _Closed = running
        self._settings = settings
        self._recorder = Recorder()
        self._ring, self._number = self._recorder.ring, self._recorder.number
        self._failed = self._recorder.failed
        self._reloading = threading.Lock()
        self._reloads = 0

    def _open(self) -> Running:
        """What runs now: one object, so that engine and manifest belong together."""
        running = self._running
        return running if running is not None else _Closed().run()

    @property
    def directory(self) -> Path:
        """Where the bundle lies, a directory or an archive."""
        return Path(self._open().bundle.where)

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""
        return self._open().bundle.manifest

    @property
    def engine(self) -> Engine:
        """The engine that runs."""
        return self._open().engine

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs."""
        return self._open().session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs."""
        return self._open().session.outputs

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once: named arrays in, named arrays out.

        Args:
            feeds: One array per input, batch dimension first.
            out: Buffers for outputs, by name.

        Raises:
            InputError: An array does not fit; names it and what is allowed.
            BackendError: The runtime failed.
            UsageError: The session is closed.
        """
        # What Recorder.took does, without the call: a small model runs for four microseconds.
        live, number = self._live, self._number()
        try:
            if number & UNTIMED:
                return live.run(feeds) if out is None else live.run(feeds, out=out)
            begin = _clock()
            found = live.run(feeds, out=out)
        except Exception:
            self._failed()
            raise
        self._ring[(number >> SHIFT) & MASK] = _clock() - begin
        return found

    def run_batch(
        self, feeds: Sequence[Feeds], *, most: int = _MOST_ROWS
    ) -> list[dict[str, Array]]:
        """Run samples, those of equal shapes together where that was shown to give the same.

        All of them by one bundle, even if another takes its place meanwhile. They are run one by
        one where the model has no dynamic batch dimension, and where the bundle does not say of its
        engine that batches give what samples give alone: one that takes its ranges from what it is
        given, as dynamic quantisation does, gives something else.

        Args:
            feeds: Named arrays of each sample, batch dimension first.
            most: Rows that are run together.

        Returns:
            Named arrays for each sample, in their order.

        Raises:
            As :meth:`run`; UsageError for ``most`` below 1.
        """
        if most < 1:
            raise UsageError(f"most is {most}; it has to be at least 1")
        running = self._open()
        session = running.session

        def run(sample: Feeds) -> dict[str, Array]:
            return self._counted(running, sample)

        if not (running.engine.batching and batch_dimension(session.inputs, session.outputs)):
            return [run(sample) for sample in feeds]
        return run_together(feeds, inputs=session.inputs, run=run, most=most)

    def _counted(self, running: Running, feeds: Feeds) -> dict[str, Array]:
        """As :meth:`run`, by a bundle that is held."""
        begin = _clock()
        try:
            found = running.run(feeds)
        except Exception:
            self._recorder.number()
            self._recorder.failed()
            raise
        self._recorder.took(_clock() - begin)
        return found

    async def run_async(
        self, feeds: Feeds, *, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """As :meth:`run`, in a thread; several may be in flight. Raises as it does."""
        import asyncio  # it takes a tenth of a second, and few devices use it

        return await asyncio.to_thread(self.run, feeds, out=out)

    def stats(self) -> SessionStats:
        """Requests, errors and latencies since the bundle was loaded."""
        running = self._open()
        return self._recorder.stats(
            engine=running.engine.name,
            serial=running.bundle.manifest.serial,
            reloads=self._reloads,
        )

    def preprocess(self, image: Array) -> dict[str, Array]:
        """A picture as what :meth:`run` takes.

        Args:
            image: RGB, uint8 [height, width, 3], of any size.

        Raises:
            InputError: The bundle does not say how pictures are prepared, or has other inputs.
            DataError: The picture has another dtype or shape.
            MissingExtraError: It has to be resized, and Pillow is not installed.
        """
        running = self._open()
        preprocessing, inputs = running.bundle.manifest.preprocessing, running.session.inputs
        if len(inputs) != 1 or not takes_picture(inputs[0], preprocessing):
            raise InputError(
                f"the bundle {running.bundle.where} does not say how a picture becomes its inputs:"
                f" {'; '.join(map(str, inputs))}",
                hint="Prepare the arrays as for the PyTorch model, and give them to run.",
            )
        spec = inputs[0]
        return {spec.name: prepared(image, spec, preprocessing=preprocessing)}

    def read(self, name: str) -> bytes:
        """The bytes of a document of the bundle, which are what its hash says.

        Args:
            name: Such as ``tokenizer.json`` or ``parity.json``.

        Raises:
            IntegrityError: There is no such file, or it has changed.
        """
        return self._open().bundle.read(name)

    def golden(self) -> tuple[Golden, ...]:
        """The golden vectors of the bundle. Raises IntegrityError when it has none."""
        return _golden(self._open())

    def selftest(self) -> SelfTest:
        """Run the golden inputs on this device and compare with the golden outputs."""
        return _selftest(self._open())

    def reload(self, path: str | Path) -> None:
        """Replace the bundle by another one while threads go on running it.

        The new one is verified, opened and tested on its golden vectors first. Then every run that
        begins takes it, and the old engine is closed when its last run has ended. On any error the
        old one goes on as before.

        Args:
            path: The new bundle. It is loaded as the first one was: the same trusted keys, serials
                and threads, and the same name of the engine where one was asked for.

        Raises:
            IntegrityError: It is no bundle, is changed or not signed, or its serial is lower.
            IncompatibleError: It has other inputs or outputs, or none of its engines runs here.
            ParityError: It fails its self-test on this device.
        """
        with self._reloading:
            old = self._open()
            new = open_running(path, self._settings)
            try:
                _check_replaces(old, new)
                _keep_serial(new, self._settings)
            except BaseException:
                new.close()
                raise
            self._running = self._live = new
            self._reloads += 1

    def close(self) -> None:
        """Free the engine, once runs that have begun are over. Closing twice is no error."""
        with self._reloading:
            self._live, self._running = _Closed(), None


def _golden(running: Running) -> tuple[Golden, ...]:
    data = running.bundle.read(GOLDEN_FILE)
    return parse_golden(data, where=f"{running.bundle.where}/{GOLDEN_FILE}")


def _selftest(running: Running) -> SelfTest:
    # Through the lock of a session that one thread alone may run.
    return run_selftest(running.run, _golden(running), engine=running.engine)


def _check_replaces(old: Running, new: Running) -> None:
    manifest = new.bundle.manifest
    check_serial(manifest.serial, seen=old.bundle.manifest.serial)
    before = (old.session.inputs, old.session.outputs)
    if (new.session.inputs, new.session.outputs) != before:
        specs = (*new.session.inputs, *new.session.outputs)
        raise IncompatibleError(
            f"{new.bundle.where} has other inputs or outputs than the bundle that runs:"
            f" {'; '.join(map(str, specs))}; they were"
            f" {'; '.join(map(str, (*before[0], *before[1])))}",
            hint="Load it as a session of its own.",
        )
    test = _selftest(new)
    if not test.passed:
        raise ParityError(
            f"{new.bundle.where}: {test}",
            hint="It was not put in place; the bundle that ran before still does.",
        )


def _keep_serial(running: Running, settings: LoadSettings) -> None:
    if settings.serials is not None:
        manifest = running.bundle.manifest
        keep_seen(settings.serials, name=manifest.name, serial=manifest.serial)


def load(  # noqa: PLR0913  every one is a setting of a device
    bundle: str | Path,
    *,
    threads: int | None = None,
    engine: str = "",
    trust: Keys = (),
    revoked: Sequence[str] = (),
    serials: str | Path | None = None,
    check: bool = True,
) -> BundleSession:
    """Open a bundle, and the first of its engines that fits this device.

    Args:
        bundle: The directory or ``.zip`` that ``equipoise tune`` or ``equipoise pack`` wrote.
        threads: Threads per operator; as measured when None.
        engine: Name of the engine to open, instead of the first that fits.
        trust: Public keys, each a path or the bytes of a PEM file. One of them has to have signed
            the bundle; without any, signatures are not looked at.
        revoked: Fingerprints of keys that are no longer trusted, whatever ``trust`` says.
        serials: File in which the highest serial of each bundle is kept, made if it is missing: an
            older bundle is refused.
        check: Compare the SHA-256 of every file. Turn off only where that was done already.

    Raises:
        IntegrityError: It is no bundle, or a file is not what its hash says; a SignatureError where
            it is not signed by a trusted key, or older than one that was run here.
        IncompatibleError: It is of another format, or none of its engines runs here: says for each
            why not.
        InputError: A key cannot be read.
        UsageError: There is no such engine, or ``trust`` without ``check``.
    """
    keys = (trust,) if isinstance(trust, str | Path | bytes) else tuple(trust)
    if keys and not check:
        raise UsageError("trust without check: a signature vouches for hashes, which are compared")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; it has to be at least 1")
    settings = LoadSettings(
        threads=threads,
        engine=engine,
        trust=tuple(map(_key, keys)),
        revoked=tuple(revoked),
        serials=Path(serials) if serials is not None else None,
        check=check,
    )
    running = open_running(bundle, settings)
    try:
        _keep_serial(running, settings)
    except BaseException:
        running.close()
        raise
    return BundleSession(running, settings)


def _key(key: str | Path | bytes) -> bytes:
    if isinstance(key, bytes):
        return key
    try:
        return Path(key).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the public key {key}: {error.strerror}") from error
