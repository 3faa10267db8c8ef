"""Check who signed the files of a bundle: the side of the device, with ``cryptography`` alone.

The form is that of OpenSSF Model Signing 1.0 with an elliptic-curve key: a Sigstore bundle around
a DSSE envelope around an in-toto statement that names every file with its SHA-256. What is accepted
is narrower than what that project's own verifier takes; ``docs/signing.md`` lists where.

Every refusal is a SignatureError with one of these kinds:

    missing     there is no signature, or nobody is trusted
    key         a key that is given as trusted is no public key on an accepted curve, or one that
                is given as revoked is no fingerprint
    malformed   the signature is not of the form
    policy      it is of the form, with settings or in a mode that are not accepted
    untrusted   another key made it
    revoked     a key on the deny list made it
    invalid     the key that it names did not sign these bytes
    mismatch    it is in order, and signs other files than these
    rollback    the bundle is older than one that was seen
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras, record
from equipoise.errors import SignatureError

MOST_BYTES: Final = 4 << 20
"""A file takes some 300 bytes of a signature, so this is room for more than ten thousand."""

_MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_HASH_OF_CURVE: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COPY_AGAIN: Final = "Copy the bundle again from where it was signed; do not run it."
_SIGN_AGAIN: Final = "Sign it with `equipoise sign`, where it was made."


@dataclass(frozen=True, kw_only=True)
class _Envelope:
    """What stands in a signature before anything of it is believed.

    Attributes:
        hint: Fingerprint of the key that it says it is from.
        payload: The in-toto statement, as it was signed.
        signature: ECDSA signature in DER.
    """

    hint: str
    payload: bytes
    signature: bytes


def verify_signature(
    signature: bytes,
    *,
    hashes: Mapping[str, str],
    keys: Sequence[bytes],
    revoked: Collection[str] = (),
) -> str:
    """Check that a trusted key signed exactly these files.

    Args:
        signature: Content of ``model.sig``.
        hashes: File name -> SHA-256 in hexadecimal, of every file of the bundle but the signature.
            They have to come from the bytes that will be used.
        keys: Public keys that are trusted, each in PEM, on P-256, P-384 or P-521.
        revoked: Fingerprints of keys that are no longer trusted, even where ``keys`` has them.

    Returns:
        The fingerprint of the key that signed; see :func:`key_fingerprint`.

    Raises:
        SignatureError: It does not vouch for them; its kind says in which way.
        MissingExtraError: cryptography is not installed.
    """
    trusted = _trusted(keys)
    envelope = _read_envelope(signature)
    _check_trust(envelope.hint, trusted, revoked)
    _check_bytes(envelope, trusted[envelope.hint])
    _check_same(_signed_files(envelope.payload), hashes)
    return envelope.hint


def check_serial(serial: int, *, seen: int) -> None:
    """Refuse a bundle that is older than one this device has run; a signature stays valid forever.

    Raises:
        SignatureError: ``serial`` is below ``seen``.
    """
    if serial < seen:
        raise SignatureError(
            f"the bundle has serial {serial}; one with serial {seen} was seen here",
            hint="Install the newest bundle. To go back on purpose, sign the old one with a new"
            " serial.",
            kind="rollback",
        )


def key_fingerprint(pem: bytes) -> str:
    """Fingerprint of a public key: SHA-256, in hexadecimal, of its PEM form as OpenSSL writes it.

    Raises:
        SignatureError: It is no public key on an accepted curve.
        MissingExtraError: cryptography is not installed.
    """
    return _load(pem)[0]


def _trusted(keys: Sequence[bytes]) -> dict[str, Any]:
    if not keys:
        raise SignatureError(
            "no trusted key was given, so no signature can be accepted",
            hint="Give the public key of whoever signs your bundles.",
            kind="missing",
        )
    return dict(map(_load, keys))


def _load(pem: bytes) -> tuple[str, Any]:
    """Fingerprint and key."""
    serialization = extras.require("cryptography.hazmat.primitives.serialization")
    unsupported = extras.require("cryptography.exceptions").UnsupportedAlgorithm
    if pem.count(b"-----BEGIN ") != 1:
        raise _wrong_key("a file holds one, and no other than that")
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, unsupported) as error:
        raise _wrong_key("it cannot be read as a public key in PEM") from error
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in _HASH_OF_CURVE:
        raise _wrong_key(f"it is of the kind {curve.lstrip('_')}")
    written = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(written).hexdigest(), key


def _wrong_key(why: str) -> SignatureError:
    return SignatureError(
        f"a trusted key has to be a public key on P-256, P-384 or P-521, in PEM; {why}",
        hint="Write the public half with: openssl pkey -in KEY.pem -pubout -out PUBLIC.pem",
        kind="key",
    )


def _malformed(why: str) -> SignatureError:
    return SignatureError(f"the signature is malformed: {why}", hint=_COPY_AGAIN, kind="malformed")


def _policy(why: str) -> SignatureError:
    return SignatureError(f"the signature is not accepted: {why}", hint=_SIGN_AGAIN, kind="policy")


def _parse(data: bytes, what: str) -> record.Json:
    try:
        return record.parse(data.decode())
    except ValueError as error:
        raise _malformed(f"{what} is no JSON") from error


def _fields(value: record.Json, names: str, what: str) -> list[record.Json]:
    """Values of an object that has these keys, and no other."""
    wanted = names.split()
    if not isinstance(value, dict) or set(value) != set(wanted):
        raise _malformed(f"{what} has to have the keys {', '.join(wanted)}, and no other")
    return [value[name] for name in wanted]


def _only(value: record.Json, what: str) -> record.Json:
    if not isinstance(value, list) or len(value) != 1:
        raise _malformed(f"it has to have exactly one {what}")
    return value[0]


def _bytes(value: record.Json, what: str) -> bytes:
    """Bytes of base64 in the one form that encodes them: bits that decode to nothing are zero."""
    try:
        data = base64.b64decode(str(value), validate=True)
    except ValueError as error:
        raise _malformed(f"{what} is no base64") from error
    if not data or base64.b64encode(data).decode() != value:
        raise _malformed(f"{what} is empty, or is no canonical base64")
    return data


def _read_envelope(signature: bytes) -> _Envelope:
    if not signature:
        raise SignatureError("the signature is empty", hint=_SIGN_AGAIN, kind="missing")
    if len(signature) > MOST_BYTES:
        raise _malformed(f"it has {len(signature):,} bytes; at most {MOST_BYTES:,} are read")
    names = "mediaType verificationMaterial dsseEnvelope"
    media_type, material, envelope = _fields(_parse(signature, "it"), names, "it")
    if media_type != _MEDIA_TYPE:
        raise _malformed(f"its mediaType is not {_MEDIA_TYPE}")
    names = "payload payloadType signatures"
    payload, payload_type, signatures = _fields(envelope, names, "its envelope")
    if payload_type != _PAYLOAD_TYPE:
        raise _malformed(f"its payloadType is not {_PAYLOAD_TYPE}")
    one, key_id = _fields(_only(signatures, "signature"), "sig keyid", "its signature")
    if key_id != "":
        raise _malformed("its keyid is not empty")
    return _Envelope(
        hint=_hint(material),
        payload=_bytes(payload, "its payload"),
        signature=_bytes(one, "its sig"),
    )


def _hint(material: record.Json) -> str:
    """Fingerprint of the key in the verification material."""
    if isinstance(material, dict) and material.keys() & {"certificate", "x509CertificateChain"}:
        raise _policy("it was made with a certificate, and keys alone are trusted here")
    key, entries = _fields(material, "publicKey tlogEntries", "its verification material")
    if entries != []:
        raise _malformed("it has entries of a transparency log, which go with certificates")
    (hint,) = _fields(key, "hint", "its public key")
    if not isinstance(hint, str) or not _SHA256.fullmatch(hint):
        raise _malformed("its hint is not the fingerprint of a key")
    return hint


def _check_trust(fingerprint: str, trusted: Mapping[str, Any], revoked: Collection[str]) -> None:
    if fingerprint in map(_denied, revoked):
        raise SignatureError(
            f"the key {fingerprint} that signed is revoked",
            hint="Install a bundle that a key in use has signed.",
            kind="revoked",
        )
    if fingerprint not in trusted:
        raise SignatureError(
            f"signed with the key {fingerprint}; trusted: {', '.join(trusted)}",
            hint="Do not run it, unless you know that key: then trust it too.",
            kind="untrusted",
        )


def _denied(fingerprint: str) -> str:
    """A fingerprint of the deny list; one with a slip in it would deny nothing."""
    if not _SHA256.fullmatch(fingerprint.lower()):
        raise SignatureError(
            f"{fingerprint!r:.80} on the list of revoked keys is no fingerprint",
            hint="A fingerprint is the SHA-256 of the public key in PEM: 64 hexadecimal digits.",
            kind="key",
        )
    return fingerprint.lower()


def _check_bytes(envelope: _Envelope, key: Any) -> None:
    """ECDSA over the pre-authentication encoding, with the hash that belongs to the curve.

    DSSE 1.0.0, https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md: the encoding is
    ``DSSEv1 <length of type> <type> <length of payload> <payload>``, lengths in bytes.
    """
    ec = extras.require("cryptography.hazmat.primitives.asymmetric.ec")
    algorithms = extras.require("cryptography.hazmat.primitives.hashes")
    wrong = extras.require("cryptography.exceptions").InvalidSignature
    digest = getattr(algorithms, _HASH_OF_CURVE[key.curve.name])()
    head = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(envelope.payload)} "
    try:
        key.verify(envelope.signature, head.encode() + envelope.payload, ec.ECDSA(digest))
    except wrong as error:
        raise SignatureError(
            f"the key {envelope.hint} did not sign this: the signature was changed or is another's",
            hint=_COPY_AGAIN,
            kind="invalid",
        ) from error


def _signed_files(payload: bytes) -> dict[str, str]:
    """File name -> SHA-256, of a statement that a trusted key has signed."""
    names = "_type subject predicateType predicate"
    statement = _parse(payload, "what it signs")
    if isinstance(statement, dict) and statement.get("predicateType") != _PREDICATE_TYPE:
        raise _policy(f"its predicateType is not {_PREDICATE_TYPE}")
    kind, subjects, _, predicate = _fields(statement, names, "what it signs")
    if kind != _STATEMENT_TYPE:
        raise _malformed(f"the _type of what it signs is not {_STATEMENT_TYPE}")
    serialization, resources = _fields(predicate, "serialization resources", "its predicate")
    _check_serialization(serialization)
    files = _files(resources)
    name, digest = _fields(_only(subjects, "subject"), "name digest", "its subject")
    if not isinstance(name, str):
        raise _malformed("its subject has no name")
    root = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    if digest != {"sha256": root}:
        raise _malformed("the digest of its subject is not that of its files")
    return files


def _check_serialization(found: record.Json) -> None:
    if not isinstance(found, dict):
        raise _malformed("it does not say how files were hashed")
    if found.get("ignore_paths", []) != []:
        raise _policy("it leaves out some paths, so files there could be changed")
    if found.get("allow_symlinks") is not False:
        raise _policy("it allows links, which can be changed without it")
    rest = {k: v for k, v in found.items() if k not in {"ignore_paths", "allow_symlinks"}}
    if rest != {"method": "files", "hash_type": "sha256"}:
        raise _policy("files have to be hashed whole, with SHA-256")


def _files(resources: record.Json) -> dict[str, str]:
    """Name -> SHA-256, in the order of the statement, which is that of the root digest."""
    if not isinstance(resources, list):
        raise _malformed("its resources are no list")
    files: dict[str, str] = {}
    for resource in resources:
        name, algorithm, digest = _fields(resource, "name algorithm digest", "a resource")
        if algorithm != "sha256":
            raise _policy(f"the file {name!r:.60} is hashed with {algorithm!r:.20}, not sha256")
        if not isinstance(name, str) or name in files:
            raise _malformed(f"a file is named twice or has no name: {name!r:.60}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _malformed(f"the hash of {name!r:.60} is no SHA-256")
        files[name] = digest
    return files


def _check_same(signed: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Raise unless these are the same files with the same hashes, no more and no fewer."""
    for verb, names in (
        ("does not cover", set(hashes) - set(signed)),
        ("covers a file that is not there:", set(signed) - set(hashes)),
        ("covers other bytes of", {n for n in signed if hashes.get(n, signed[n]) != signed[n]}),
    ):
        if names:
            raise SignatureError(
                f"the signature {verb} {min(names)}", hint=_COPY_AGAIN, kind="mismatch"
            )
