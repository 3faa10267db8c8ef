"""Keys, a small bundle, and signatures made by hand, in order or not."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.reading import open_bundle
from equipoise.bundle.signature import verify_signature
from equipoise.bundle.writer import write_bundle
from equipoise.signing import SignConfig, sign_bundle
from equipoise.spec import TensorSpec

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
Key = ec.EllipticCurvePrivateKey


def private_pem(key: Any) -> bytes:
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def public_pem(key: Any) -> bytes:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, spki)


def hint_of(key: Any) -> str:
    return hashlib.sha256(public_pem(key)).hexdigest()


def write_small_bundle(path: Path, *, content: bytes = b"engine") -> None:
    """A bundle of three files."""
    file = "engines/int8/engine.onnx"
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    engine = Engine(
        name="int8", file=file, files=(file,), runtime="null", size_bytes=len(content),
        golden_tolerance={"x": 0.0},
    )  # fmt: skip
    manifest = Manifest(name="small", engines=(engine,), inputs=(spec,), outputs=(spec,))
    write_bundle(path, manifest, copies={}, documents={file: content, "labels.txt": b"a\nb\n"})


@dataclass(frozen=True)
class Signed:
    """A signed bundle, its key, and a key that nobody trusts."""

    folder: Path
    bundle: Path
    key: Key
    other: Key
    hashes: dict[str, str]
    signature: bytes

    @property
    def public(self) -> bytes:
        return public_pem(self.key)

    def check(self, signature: bytes) -> str:
        return verify_signature(signature, hashes=self.hashes, keys=[self.public])

    def outer(self) -> dict[str, Any]:
        """The signature as plain values."""
        found: dict[str, Any] = json.loads(self.signature)
        return found

    def statement(self) -> dict[str, Any]:
        """What it signs, as plain values."""
        return statement(self.hashes)


def resources(files: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "digest": digest, "algorithm": "sha256"}
        for name, digest in sorted(files.items())
    ]


def root(listed: list[dict[str, Any]]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in listed)).hexdigest()


def statement(files: dict[str, str], **serialization_changes: Any) -> dict[str, Any]:
    """A statement in order, but for ``serialization_changes``."""
    return of_resources(resources(files), **serialization_changes)


def of_resources(listed: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "small", "digest": {"sha256": root(listed)}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files", "hash_type": "sha256", "allow_symlinks": False, **changes,
            },
            "resources": listed,
        },
    }  # fmt: skip


def pae(payload: bytes, *, payload_type: str = PAYLOAD_TYPE) -> bytes:
    return f"DSSEv1 {len(payload_type)} {payload_type} {len(payload)} ".encode() + payload


def sealed(
    said: Any,
    key: Key,
    *,
    payload_type: str = PAYLOAD_TYPE,
    encoded: bytes | None = None,
    digest: Any = None,
    signature: bytes | None = None,
) -> dict[str, Any]:
    """A signature file over ``said``, which is JSON or bytes, as plain values."""
    payload = said if isinstance(said, bytes) else json.dumps(said).encode()
    made = key.sign(
        encoded or pae(payload, payload_type=payload_type), ec.ECDSA(digest or hashes.SHA256())
    )
    return {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint_of(key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(signature or made).decode(), "keyid": ""}],
        },
    }


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def sign_small_bundle(folder: Path) -> Signed:
    """A bundle in ``folder``, signed by a new key, and the keys beside it."""
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "key.pem").write_bytes(private_pem(key))
    (folder / "other.pem").write_bytes(private_pem(other))
    (folder / "public.pem").write_bytes(public_pem(key))
    write_small_bundle(folder / "bundle")
    sign_bundle(folder / "bundle", SignConfig(key=folder / "key.pem"))
    with open_bundle(folder / "bundle") as bundle:
        assert bundle.signature is not None
        return Signed(folder, folder / "bundle", key, other, bundle.hashes(), bundle.signature)


def certificate_for(
    name: str, key: Key, *, by: tuple[str, Key], days: tuple[datetime, datetime], usage: Any = None
) -> x509.Certificate:
    """A certificate for ``key``; of an authority when it has no ``usage``."""
    authority = usage is None
    uses = {
        "digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority,
        "content_commitment": False, "key_encipherment": False, "data_encipherment": False,
        "key_agreement": False, "encipher_only": False, "decipher_only": False,
    }  # fmt: skip
    subject, issuer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, by[0])
    )
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(days[0])
        .not_valid_after(days[1])
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**uses), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(by[1], hashes.SHA256())


def flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def without_signature(signed: Signed) -> Path:
    """The bundle without its signature, which is what model-signing is to look at."""
    tree = signed.folder / "tree" / "bundle"
    if not tree.exists():
        shutil.copytree(signed.bundle, tree)
        (tree / "model.sig").unlink()
    return tree


def library_accepts(signature: bytes, signed: Signed, *, authority: Path | None = None) -> bool:
    """What model-signing says, in key mode or with the certificate of an authority."""
    from model_signing import verifying

    file = signed.folder / "candidate.sig"
    file.write_bytes(signature)
    config = verifying.Config()
    if authority is None:
        config.use_elliptic_key_verifier(public_key=signed.folder / "public.pem")
    else:
        config.use_certificate_verifier(certificate_chain=[authority])
    try:
        config.verify(without_signature(signed), file)
    except Exception:  # noqa: BLE001 - it has no type of its own
        return False
    return True
