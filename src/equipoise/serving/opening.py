"""From a path to a running engine: verified bytes, the engine that fits, an open session."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from equipoise import fs
from equipoise.bundle import signature
from equipoise.bundle.chooser import check_fits, none_fits
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.reading import Bundle, open_bundle
from equipoise.errors import IncompatibleError, IntegrityError, SignatureError, unknown_name
from equipoise.runtimes.device import this_device
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import bytes_opener, session_opener
from equipoise.serving.serials import check_seen
from equipoise.spec import Array, Feeds, TensorSpec


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How bundles are loaded.

    Attributes:
        threads: Threads per operator; as measured when None.
        engine: Name of the engine; the first that fits when empty.
        trust: Public keys in PEM, one of which has to have signed; none asks for no signature.
        revoked: Fingerprints of keys that no longer count.
        serials: File of the highest serials seen.
        check: Whether hashes are compared.
    """

    threads: int | None = None
    engine: str = ""
    trust: tuple[bytes, ...] = ()
    revoked: tuple[str, ...] = ()
    serials: Path | None = None
    check: bool = True


class Running:
    """An open bundle and its running engine.

    It closes itself when nobody holds it any more. So an engine that was replaced lives until its
    last run has ended, and no run has to count itself.

    Args:
        bundle: The open bundle.
        engine: What of it runs.
        session: The open engine.
        held: Closes the session, what it was opened from, and the bundle, in this order.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, *, session: Session, held: ExitStack
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.session = session
        self._held = held
        # The method itself where threads may share the session: a run costs one call less.
        self.run: Run = (
            session.run if getattr(session, "concurrent", False) else _Alone(session).run
        )

    def close(self) -> None:
        """Free the engine and let go of the files. Closing twice is no error."""
        self._held.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # an interpreter that ends may have lost its modules
            self.close()


class Run(Protocol):
    """Named arrays in, named arrays out; see :class:`equipoise.runtimes.protocol.Session`."""

    def __call__(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once."""


class _Alone:
    """A session that one thread at a time may run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        with self._lock:
            return self._session.run(feeds, out=out)


def open_running(path: str | Path, settings: LoadSettings) -> Running:
    """Open a bundle and the engine that fits this device.

    Raises:
        IntegrityError: It is no bundle, or not what its hashes say; a SignatureError where no
            trusted key has signed it, or it is older than what was seen.
        IncompatibleError: It is of another format, or none of its engines runs here.
        UsageError: It has no engine of the name that was asked for.
    """
    with ExitStack() as stack:
        bundle = stack.enter_context(open_bundle(path))
        check_origin(bundle, settings)
        engine, session = _open_engine(bundle, settings, stack=stack)
        return Running(bundle, engine, session=session, held=stack.pop_all())


def check_origin(bundle: Bundle, settings: LoadSettings) -> None:
    """Check who signed a bundle, and that it is not older than what this device has run.

    Raises:
        SignatureError: Nobody did, nobody who is trusted, or it is older.
    """
    if settings.trust:
        if bundle.signature is None:
            raise SignatureError(
                f"{bundle.where} is not signed, and only bundles of trusted keys may be loaded",
                hint="Sign it with `equipoise sign`, or get the signed one.",
                kind="missing",
            )
        hashes = bundle.hashes()
        signature.verify_signature(
            bundle.signature, hashes=hashes, keys=settings.trust, revoked=settings.revoked
        )
    if settings.serials is not None:
        manifest = bundle.manifest
        check_seen(settings.serials, name=manifest.name, serial=manifest.serial)


def _open_engine(
    bundle: Bundle, settings: LoadSettings, *, stack: ExitStack
) -> tuple[Engine, Session]:
    """The first engine that can be opened here; what it holds is put on ``stack``."""
    refused: dict[str, IncompatibleError] = {}
    for engine in _candidates(bundle.manifest, settings.engine):
        try:
            check_fits(engine, this_device())
            return engine, _opened(bundle, engine, settings=settings, stack=stack)
        except IncompatibleError as error:
            refused[engine.name] = error
    raise none_fits(bundle.where, refused)


def _candidates(manifest: Manifest, name: str) -> tuple[Engine, ...]:
    if not name:
        return manifest.engines
    engine = manifest.engine(name)
    if engine is None:
        raise unknown_name("engine", name, (engine.name for engine in manifest.engines))
    return (engine,)


def _opened(bundle: Bundle, engine: Engine, *, settings: LoadSettings, stack: ExitStack) -> Session:
    """A session of an engine, once every byte of the bundle is what its hash says."""
    if settings.check:
        bundle.verify(but=engine.files)
    with ExitStack() as attempt:
        session = attempt.enter_context(_session(bundle, engine, settings=settings, stack=attempt))
        check_specs(session, bundle.manifest, where=f"{bundle.where}: the engine {engine.name!r}")
        stack.push(attempt.pop_all())
    return session


def _session(
    bundle: Bundle, engine: Engine, *, settings: LoadSettings, stack: ExitStack
) -> Session:
    """Open the very bytes that were hashed: from memory, or from a directory of our own."""
    own = SessionSettings(
        threads=settings.threads or engine.threads,
        spin=True,
        providers=engine.providers,
        hint=engine.hint,
        exact_integers=engine.exact_integers,
    )
    opener = bytes_opener(engine.runtime) if len(engine.files) == 1 else None
    if opener is not None:
        with bundle.content(engine.file, check=settings.check) as content:
            return opener(content, settings=own, where=Path(bundle.where) / engine.file)
    folder = stack.enter_context(fs.scratch_directory())
    unpack(bundle, engine, folder=folder, check=settings.check)
    return session_opener(engine.runtime)(folder / engine.file, settings=own)


def unpack(bundle: Bundle, engine: Engine, *, folder: Path, check: bool = True) -> None:
    """Write the verified files of an engine below a private directory, under their names."""
    fs.make_directory((folder / engine.file).parent)
    for name in engine.files:
        fs.make_directory((folder / name).parent)
        with fs.appending(folder / name) as file:
            file.write(bundle.read(name, check=check))


def check_specs(session: Session, manifest: Manifest, *, where: str) -> None:
    """Check that an engine takes and gives what its manifest says.

    A size that the manifest leaves open may be fixed in an engine.

    Raises:
        IntegrityError: It does not; names the tensor.
    """
    for kind, found, listed in (
        ("input", session.inputs, manifest.inputs),
        ("output", session.outputs, manifest.outputs),
    ):
        if len(found) != len(listed):
            raise IntegrityError(f"{where} has {len(found)} {kind}s, not {len(listed)}")
        for own, said in zip(found, listed, strict=True):
            if not fits(own, said):
                raise IntegrityError(f"{where} has the {kind} {own}; the manifest says {said}")


def fits(own: TensorSpec, said: TensorSpec) -> bool:
    """Whether the spec of an engine is that of a manifest, or one with sizes fixed."""
    if (own.name, own.dtype, len(own.shape)) != (said.name, said.dtype, len(said.shape)):
        return False
    pairs = zip(own.shape, said.shape, strict=True)
    return all(mine == theirs or isinstance(theirs, str) for mine, theirs in pairs)
