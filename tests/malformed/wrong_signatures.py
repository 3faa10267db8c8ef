"""Signatures that are wrong, each with the kind of error that says in which way."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.malformed.forging import (
    MEDIA_TYPE,
    PAYLOAD_TYPE,
    Signed,
    certificate_for,
    dumped,
    hint_of,
    of_resources,
    resources,
    sealed,
    statement,
    without_signature,
)

from equipoise.bundle.signature import MOST_BYTES


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A signature that has to be refused.

    Attributes:
        name: What is wrong with it.
        data: The file.
        kind: Kind of the error.
    """

    name: str
    data: bytes
    kind: str


def texts(signed: Signed) -> Iterator[Wrong]:
    """What is no signature file at all."""
    yield Wrong(name="empty", data=b"", kind="missing")
    others = {
        "white space": b" \n", "null": b"null", "a list": b"[]", "no keys": b"{}", "a word": b"x",
        "NaN": b"NaN", "100,000 brackets": b"[" * 100_000, "no UTF-8": b"\xff\xfe{}",
        "UTF-16": signed.signature.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + signed.signature,
        "a NUL at the end": signed.signature + b"\0",
        "another signature behind it": signed.signature * 2,
        "too long": signed.signature + b" " * MOST_BYTES,
        "a number of 5,000 digits": b'{"mediaType":' + b"9" * 5000 + b"}",
        "mediaType twice": signed.signature.replace(b"{", b'{"mediaType":"x",', 1),
        "payload twice": signed.signature.replace(b'"payload"', b'"payload":"eA==","payload"', 1),
    }  # fmt: skip
    yield from (Wrong(name=n, data=data, kind="malformed") for n, data in others.items())


def envelopes(signed: Signed) -> Iterator[Wrong]:
    """Signature files of another form."""

    def changed(name: str, kind: str, change: Callable[[dict[str, Any]], object]) -> Wrong:
        outer = signed.outer()
        change(outer)
        return Wrong(name=name, data=dumped(outer), kind=kind)

    sig = signed.outer()["dsseEnvelope"]["signatures"][0]["sig"]
    der = base64.b64decode(sig)
    other = sealed(signed.statement(), signed.other)["dsseEnvelope"]["signatures"][0]
    for media in (
        "application/vnd.dev.sigstore.bundle+json;version=0.1",
        "application/vnd.dev.sigstore.bundle+json;version=0.2",
        "application/vnd.dev.sigstore.bundle+json;version=0.3",
        MEDIA_TYPE.upper(),
    ):
        yield changed(f"media type {media}", "malformed", lambda o, m=media: o.update(mediaType=m))
    yield changed(
        "payloadType swapped", "malformed",
        lambda o: o["dsseEnvelope"].update(payloadType="application/json"),
    )  # fmt: skip
    for name, listed in {
        "no signature": [],
        "the same signature twice": [{"sig": sig, "keyid": ""}] * 2,
        "another's signature second": [{"sig": sig, "keyid": ""}, other],
        "another's signature first": [other, {"sig": sig, "keyid": ""}],
    }.items():
        yield changed(name, "malformed", lambda o, s=listed: o["dsseEnvelope"].update(signatures=s))
    for name, text, kind in (
        ("signature of another", other["sig"], "invalid"),
        ("signature is empty", "", "malformed"),
        ("signature in lines", f"{sig[:40]}\n{sig[40:]}", "malformed"),
        ("signature with a space", f"{sig} ", "malformed"),
        ("signature in hexadecimal", der.hex(), ""),  # base64 of something, or none, by its length
        ("signature with more behind it", base64.b64encode(der + b"\0").decode(), "invalid"),
        ("signature as two numbers", base64.b64encode(_raw(der)).decode(), "invalid"),
        ("signature of zeros", base64.b64encode(encode_dss_signature(0, 0)).decode(), "invalid"),
    ):
        yield changed(
            name, kind, lambda o, t=text: o["dsseEnvelope"]["signatures"][0].update(sig=t)
        )
    yield changed(
        "signature with a keyid", "malformed",
        lambda o: o["dsseEnvelope"]["signatures"][0].update(keyid="k1"),
    )  # fmt: skip
    hints = {
        "hint of another key": hint_of(signed.other),
        "hint in capitals": hint_of(signed.key).upper(),
    }
    for name, hint in {**hints, "empty hint": "", "short hint": "ab", "no text as hint": 5}.items():
        yield changed(
            name, "untrusted" if name == "hint of another key" else "malformed",
            lambda o, h=hint: o["verificationMaterial"].update(publicKey={"hint": h}),
        )  # fmt: skip
    yield changed("no hint", "malformed", lambda o: o["verificationMaterial"].update(publicKey={}))
    yield changed(
        "a key beside its hint", "malformed",
        lambda o: o["verificationMaterial"]["publicKey"].update(rawBytes="eA=="),
    )  # fmt: skip
    yield changed(
        "entries of a log", "malformed",
        lambda o: o["verificationMaterial"].update(tlogEntries=[{"logIndex": "1"}]),
    )  # fmt: skip
    yield changed(
        "a Sigstore certificate", "policy",
        lambda o: o.update(
            verificationMaterial={"certificate": {"rawBytes": "MIIB"}, "tlogEntries": []}
        ),
    )  # fmt: skip
    yield changed(
        "a Sigstore message signature", "malformed",
        lambda o: o.update(messageSignature=o.pop("dsseEnvelope")),
    )  # fmt: skip
    for name, place in (
        ("the file", lambda o: o),
        ("its envelope", lambda o: o["dsseEnvelope"]),
        ("its material", lambda o: o["verificationMaterial"]),
    ):
        yield changed(
            f"an unknown key in {name}", "malformed", lambda o, p=place: p(o).update(unknown=1)
        )


def _raw(der: bytes) -> bytes:
    first, second = decode_dss_signature(der)
    return first.to_bytes(32, "big") + second.to_bytes(32, "big")


def statements(signed: Signed) -> Iterator[Wrong]:
    """Statements that the trusted key has signed, and that are not accepted."""
    files, key = signed.hashes, signed.key

    def said(name: str, kind: str, what: Any, **more: Any) -> Wrong:
        return Wrong(name=name, data=dumped(sealed(what, key, **more)), kind=kind)

    good = statement(files)
    compat = {
        "_type": good["_type"],
        "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(files.items())],
        "predicateType": "https://model_signing/Digests/v0.1",
        "predicate": {"unused": "Unused, just passed due to API"},
    }
    payload = dumped(good)
    buggy = f"DSSEV1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} {payload!r}".encode()
    yield said("the form of v0.2", "policy", compat)
    yield said("the encoding of v0.2", "invalid", payload, encoded=buggy)
    yield said("signed under another payloadType", "malformed", good, payload_type="text/plain")
    yield said("hashed with SHA-512 for P-256", "invalid", good, digest=hashes.SHA512())
    yield said("signed without its encoding", "invalid", good, encoded=payload)
    yield Wrong(
        name="signed by another key", data=dumped(sealed(good, signed.other)), kind="untrusted"
    )
    forged = sealed(good, signed.other)
    forged["verificationMaterial"]["publicKey"]["hint"] = hint_of(key)
    yield Wrong(name="signed by another key under the hint", data=dumped(forged), kind="invalid")
    yield said("what it signs is no JSON", "malformed", b"{")
    yield said("what it signs is a list", "malformed", [good])
    yield said("what it signs is no UTF-8", "malformed", b"\xff" + payload)
    yield said("what it signs is deep brackets", "malformed", b"[" * 100_000)
    twice = payload.replace(b'"predicate":', b'"predicate": {}, "predicate":', 1)
    yield said("predicate twice", "malformed", twice)
    yield said("another _type", "malformed", {**good, "_type": "https://in-toto.io/Statement/v0.1"})
    yield said("another predicateType", "policy", {**good, "predicateType": "https://slsa.dev/v1"})
    yield said("an unknown key", "malformed", {**good, "extra": 1})
    predicate = {**good["predicate"], "extra": 1}
    yield said("an unknown key in the predicate", "malformed", {**good, "predicate": predicate})
    subject = good["subject"][0]
    for name, subjects in {
        "no subject": [],
        "two subjects": [subject, subject],
        "another root": [{"name": "small", "digest": {"sha256": "0" * 64}}],
        "root with SHA-512 too": [{**subject, "digest": {**subject["digest"], "sha512": "0"}}],
        "subject without digest": [{"name": "small"}],
        "subject with a number as name": [{**subject, "name": 7}],
    }.items():
        yield said(name, "malformed", {**good, "subject": subjects})
    for name, changes in {
        "shards": {"method": "shards", "shard_size": 1_000_000_000},
        "BLAKE2": {"hash_type": "blake2b"},
        "BLAKE3": {"hash_type": "blake3"},
        "links allowed": {"allow_symlinks": True},
        "links allowed by a number": {"allow_symlinks": 0},
        "links allowed by a word": {"allow_symlinks": "false"},
        "links allowed by null": {"allow_symlinks": None},
        "ignores .git": {"ignore_paths": [".git"]},
        "ignores model.sig": {"ignore_paths": ["model.sig"]},
        "ignores nothing by null": {"ignore_paths": None},
        "an unknown setting": {"threads": 2},
    }.items():
        yield said(name, "policy", statement(files, **changes))
    yield from resource_cases(files, said)


def resource_cases(files: dict[str, str], said: Callable[..., Wrong]) -> Iterator[Wrong]:
    """Lists of files that are not those of the bundle."""
    listed = resources(files)

    def changed(what: str, error: str, **changes: Any) -> Wrong:
        return said(what, error, of_resources([{**listed[0], **changes}, *listed[1:]]))

    one = listed[0]["name"]
    yield said("no files", "mismatch", of_resources([]))
    yield said("a file less", "mismatch", of_resources(listed[1:]))
    more = {"name": "zzz", "digest": "0" * 64, "algorithm": "sha256"}
    yield said("a file more", "mismatch", of_resources([*listed, more]))
    yield said("a file twice", "malformed", of_resources([*listed, listed[-1]]))
    lie = {**listed[-1], "digest": "0" * 64}
    yield said("a file twice with two hashes", "malformed", of_resources([*listed, lie]))
    yield changed("a file renamed", "mismatch", name="other.onnx")
    yield changed("a file in capitals", "mismatch", name=one.upper())
    yield changed("a file with ./ before it", "mismatch", name=f"./{one}")
    yield changed("a file with // in it", "mismatch", name=one.replace("/", "//", 1))
    yield changed("a file from outside", "mismatch", name=f"../bundle/{one}")
    yield changed("a file with another hash", "mismatch", digest="0" * 64)
    swapped = [{**a, "digest": b["digest"]} for a, b in zip(listed, listed[::-1], strict=True)]
    yield said("hashes of files swapped", "mismatch", of_resources(swapped))
    yield changed("SHA-512", "policy", algorithm="sha512", digest="0" * 128)
    yield changed("BLAKE2 of a file", "policy", algorithm="blake2b")
    yield changed("SHA256 in capitals", "policy", algorithm="SHA256")
    yield changed("a hash in capitals", "malformed", digest=listed[0]["digest"].upper())
    yield changed("a short hash", "malformed", digest="00")
    yield changed("a name that is a number", "malformed", name=7)
    yield changed("half of a surrogate pair", "mismatch", name="\ud800")
    yield changed("an unknown key in a resource", "malformed", size=3)
    good = of_resources(listed)
    good["predicate"]["resources"] = {"a": listed[0]}
    yield said("files that are no list", "malformed", good)


def structure(signed: Signed) -> Iterator[Wrong]:
    """Every value of the file, and of what it signs, replaced by others and left out."""
    for place, value in nodes(signed.outer()):
        for name, changed in replacements(signed.outer(), place, value):
            yield Wrong(name=f"file: {name}", data=dumped(changed), kind="")
    for place, value in nodes(signed.statement()):
        if place != ("subject", 0, "name"):  # which is for information only
            for name, changed in replacements(signed.statement(), place, value):
                yield Wrong(
                    name=f"statement: {name}", data=dumped(sealed(changed, signed.key)), kind=""
                )


def nodes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield place, value
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, child in pairs:
        yield from nodes(child, (*place, key))


def replacements(whole: Any, place: tuple[Any, ...], old: Any) -> Iterator[tuple[str, Any]]:
    odd = (None, True, False, 0, -1, 1.5, 10**400, "", "x", "\0", "\ud800", [], {}, [[]], [{}])
    for new in odd:
        if json.dumps(new) != json.dumps(old):
            yield f"{place} is {json.dumps(new):.20}", _put(copy.deepcopy(whole), place, new)
    if place:
        left = copy.deepcopy(whole)
        del _at(left, place[:-1])[place[-1]]
        yield f"{place} left out", left


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def _put(whole: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    _at(whole, place[:-1])[place[-1]] = new
    return whole


def certificates(signed: Signed, folder: Path) -> Iterator[Wrong]:
    """What model-signing makes in its certificate mode; the authority's is ``folder/ca.pem``."""
    now, day = datetime.now(UTC), timedelta(days=1)
    code, web = ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.SERVER_AUTH
    ours, another = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    for file, key in (("ca.pem", ours), ("another.pem", another)):
        of_authority = ("the authority", key)
        made = certificate_for(*of_authority, by=of_authority, days=(now - 9 * day, now + 9 * day))
        (folder / file).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    for name, subject, days, usage, key in (
        ("in order", "us", (now - day, now + day), code, ours),
        ("expired", "us", (now - 3 * day, now - day), code, ours),
        ("of the future", "us", (now + day, now + 3 * day), code, ours),
        ("for web servers", "www.example.org", (now - day, now + day), web, ours),
        ("of another team", "them", (now - day, now + day), code, ours),
        ("of another authority", "us", (now - day, now + day), code, another),
    ):
        leaf = certificate_for(
            subject, signed.key, by=("the authority", key), days=days, usage=usage
        )
        (folder / "leaf.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
        data = _with_certificate(signed, folder, "ca.pem" if key is ours else "another.pem")
        yield Wrong(name=f"certificate {name}", data=data, kind="policy")


def _with_certificate(signed: Signed, folder: Path, authority: str) -> bytes:
    from model_signing import hashing, signing

    config = signing.Config().use_certificate_signer(
        private_key=signed.folder / "key.pem",
        signing_certificate=folder / "leaf.pem",
        certificate_chain=[folder / authority],
    )
    plain = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    config.set_hashing_config(plain).sign(without_signature(signed), folder / "c.sig")
    return (folder / "c.sig").read_bytes()


def crafted(signed: Signed) -> list[Wrong]:
    return [*texts(signed), *envelopes(signed), *statements(signed)]
