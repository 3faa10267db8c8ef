"""Sign bundles where they are made, and say who signed one.

The signature is made by model-signing, the reference implementation of OpenSSF Model Signing, so
its ``model_signing verify key`` takes a signed bundle too. It is given the hashes that were checked
here, and no list of paths to ignore. ``docs/signing.md`` says what a signature covers.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs
from equipoise.bundle.archive import MOST_BYTES, write_archive
from equipoise.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest
from equipoise.bundle.parsing import check_manifest, manifest_bytes
from equipoise.bundle.reading import Bundle, open_bundle
from equipoise.bundle.signature import check_serial, verify_signature
from equipoise.errors import InputError, OutputError, SignatureError, UsageError

_CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_KEY: Final = (
    "Make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem"
)
_SERIALIZATION: Final = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}


@dataclass(frozen=True, kw_only=True)
class SignConfig:
    """How to sign.

    Attributes:
        key: Private key on P-256, P-384 or P-521, in PEM.
        password: Its password; None for a key without one.
        serial: Serial of the signed bundle: not below the one it has. One more than that when None.
    """

    key: Path
    password: bytes | None = None
    serial: int | None = None


@dataclass(frozen=True, kw_only=True)
class SignRecord:
    """What was signed.

    Attributes:
        bundle: The bundle.
        name: Its name.
        serial: Its serial.
        files: Number of files that the signature covers.
        key: Fingerprint of the key.
    """

    bundle: str
    name: str
    serial: int
    files: int
    key: str


@dataclass(frozen=True, kw_only=True)
class TrustConfig:
    """Whom to trust.

    Attributes:
        keys: Files with a public key each, in PEM; without any, hashes alone are checked.
        revoked: Fingerprints of keys that are trusted no longer.
        newest: Highest serial that was seen; a bundle below it is refused.
    """

    keys: Sequence[Path] = ()
    revoked: Collection[str] = ()
    newest: int = 0


@dataclass(frozen=True, kw_only=True)
class TrustRecord:
    """What was found of a bundle whose files are what its manifest says.

    Attributes:
        bundle: The bundle.
        name: Its name.
        serial: Its serial.
        files: Number of its files, the manifest included and the signature not.
        size_bytes: Bytes of the files that the manifest lists.
        signed: Whether there is a signature; it says nothing unless a key is trusted.
        key: Fingerprint of the trusted key that signed; None where nobody is trusted.
    """

    bundle: str
    name: str
    serial: int
    files: int
    size_bytes: int
    signed: bool
    key: str | None


def sign_bundle(path: Path, config: SignConfig) -> SignRecord:
    """Sign the bundle at ``path``, a directory or an archive; it is replaced whole or not at all.

    Every file is checked against its hash as it is copied. A signature that is there is replaced.

    Raises:
        IntegrityError: It is no bundle, or a file is not what its hash says.
        UsageError: The serial would fall.
        InputError: The key cannot be used.
        OutputError: The bundle cannot be written, or does not fit an archive any more.
        MissingExtraError: model-signing is not installed.
    """
    place = path.resolve()
    public = _public_half(config)
    with open_bundle(place) as bundle:
        signed = replace(bundle.manifest, serial=_serial(bundle.manifest, config.serial))
        check_manifest(signed, where=str(path))
        text = manifest_bytes(signed)
        hashes = _hashes(bundle, text)
        signature = _signature(signed.name, hashes, config=config)
        fingerprint = verify_signature(signature, hashes=hashes, keys=[public])
        _write(place, bundle, own={MANIFEST_FILE: text, SIGNATURE_FILE: signature})
    return SignRecord(
        bundle=str(path), name=signed.name, serial=signed.serial, files=len(hashes), key=fingerprint
    )


def verify_bundle(path: Path, trust: TrustConfig) -> TrustRecord:
    """Check every hash of the bundle at ``path``, and who signed it where somebody is trusted.

    Raises:
        IntegrityError: It is no bundle, or a file is not what its hash says.
        SignatureError: It is not signed by a trusted key, or is older than one that was seen.
        InputError: There is no such file with a key.
        UsageError: Keys are revoked or a serial is asked for, and nobody is trusted.
        MissingExtraError: cryptography is not installed.
    """
    if not trust.keys and (trust.revoked or trust.newest):
        raise UsageError(
            "--revoked and --newest need --trust: without a trusted key anyone can write anything"
        )
    keys = [_key_bytes(key) for key in trust.keys]
    with open_bundle(path) as bundle:
        signer = _signer(bundle, keys, revoked=trust.revoked) if keys else None
        check_serial(bundle.manifest.serial, seen=trust.newest)
        bundle.verify()
        manifest = bundle.manifest
        return TrustRecord(
            bundle=str(path),
            name=manifest.name,
            serial=manifest.serial,
            files=len(manifest.files) + 1,
            size_bytes=sum(entry.size_bytes for entry in manifest.files.values()),
            signed=bundle.signature is not None,
            key=signer,
        )


def _signer(bundle: Bundle, keys: Sequence[bytes], *, revoked: Collection[str]) -> str:
    if bundle.signature is None:
        raise SignatureError(
            f"{bundle.where} is not signed: it has no {SIGNATURE_FILE}",
            hint="Sign it with `equipoise sign`, where it was made.",
            kind="missing",
        )
    try:
        return verify_signature(
            bundle.signature, hashes=bundle.hashes(), keys=keys, revoked=revoked
        )
    except SignatureError as error:
        where = f"{bundle.where}: {error.message}"
        raise SignatureError(where, hint=error.hint, kind=error.kind) from error


def _serial(manifest: Manifest, wanted: int | None) -> int:
    """The serial to sign with: the given one if it does not fall, or the next."""
    if wanted is None:
        return manifest.serial + 1
    if wanted < manifest.serial:
        raise UsageError(
            f"--serial {wanted} is below {manifest.serial}, the serial that {manifest.name} has",
            hint=f"Devices refuse a serial that falls. Give {manifest.serial} to keep it, or more.",
        )
    return wanted


def _hashes(bundle: Bundle, manifest: bytes) -> dict[str, str]:
    """Name -> SHA-256 of every file, with ``manifest`` in place of the bundle's own."""
    return {**bundle.hashes(), MANIFEST_FILE: hashlib.sha256(manifest).hexdigest()}


def _key_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror}") from error


def _public_half(config: SignConfig) -> bytes:
    """The public key of ``config.key`` in PEM. Raises InputError for a key that cannot sign."""
    serialization = extras.require("cryptography.hazmat.primitives.serialization")
    public = _private(config, serialization).public_key()
    curve = getattr(getattr(public, "curve", None), "name", type(public).__name__.lstrip("_"))
    if curve not in _CURVES:
        raise InputError(
            f"the key {config.key} is of the kind {curve}; keys on P-256, P-384 and P-521 can sign",
            hint=_MAKE_KEY,
        )
    pem: bytes = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _private(config: SignConfig, serialization: Any) -> Any:
    """The private key. Raises InputError that says what is wrong with it or its password."""
    unsupported = extras.require("cryptography.exceptions").UnsupportedAlgorithm
    data = _key_bytes(config.key)
    if b"PUBLIC KEY" in data or b"BEGIN CERTIFICATE" in data:
        raise InputError(
            f"the key {config.key} is a public key; the private one signs",
            hint="Give the private key, and the public one to devices.",
        )
    try:
        return serialization.load_pem_private_key(data, config.password)
    except TypeError as error:  # a password is missing, or is too much
        needs = config.password is None
        raise InputError(
            f"the key {config.key} has {'a' if needs else 'no'} password",
            hint=f"{'Give' if needs else 'Leave out'} --password-env.",
        ) from error
    except (ValueError, unsupported) as error:
        locked = config.password is not None
        raise InputError(
            f"the key {config.key} cannot be read as a private key in PEM"
            + (", or its password is another" if locked else ""),
            hint=_MAKE_KEY,
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Hashes in place of model-signing's own walk through a directory: those that were checked.

    It has the one method of ``model_signing.hashing.Config`` that signing calls.
    """

    name: str
    hashes: Mapping[str, str]

    def hash(self, *_: object, **__: object) -> Any:
        """The hashes as what model-signing signs."""
        manifest = extras.require("model_signing.manifest")
        kind = manifest.SerializationType.from_args(_SERIALIZATION)
        digest = manifest.hashing.Digest
        items = [
            kind.new_item(name, digest("sha256", bytes.fromhex(value)))
            for name, value in self.hashes.items()
        ]
        return manifest.Manifest(self.name, items, kind)


def _signature(name: str, hashes: Mapping[str, str], *, config: SignConfig) -> bytes:
    """The content of ``model.sig``."""
    signing = extras.require("model_signing.signing")
    signer = signing.Config().set_hashing_config(_Checked(name=name, hashes=hashes))
    signer.use_elliptic_key_signer(private_key=config.key, password=config.password)
    with fs.scratch_directory() as folder:
        signer.sign(folder, folder / SIGNATURE_FILE)
        return (folder / SIGNATURE_FILE).read_bytes()


def _write(path: Path, bundle: Bundle, *, own: Mapping[str, bytes]) -> None:
    """Replace the bundle by itself with the files ``own``; the manifest comes first, as ever."""
    names = [MANIFEST_FILE, *sorted({*bundle.manifest.files, SIGNATURE_FILE})]
    contents = ((name, own[name] if name in own else bundle.read(name)) for name in names)
    if path.is_dir():
        _write_directory(path, contents)
    else:
        _check_fits(path, more=sum(map(len, own.values())))
        with fs.replacing(path) as temporary, temporary.open("wb") as file:
            write_archive(
                file, ((n, len(data), zlib.crc32(data), iter([data])) for n, data in contents)
            )


def _write_directory(path: Path, contents: Iterator[tuple[str, bytes]]) -> None:
    with fs.staged_directory(path) as staging:
        for name, data in contents:
            fs.make_directory((staging / name).parent)
            with fs.appending(staging / name) as file:
                file.write(data)


def _check_fits(path: Path, *, more: int) -> None:
    """Refuse an archive that would outgrow its offsets of 32 bits."""
    headers = 1024
    if path.stat().st_size + more + headers > MOST_BYTES:
        raise OutputError(
            f"{path} has no room for a signature: an archive has at most {MOST_BYTES:,} bytes",
            hint="Pack the bundle as a directory, and sign that.",
        )
