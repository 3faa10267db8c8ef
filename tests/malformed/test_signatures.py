"""M10: signatures that are wrong in every way; each is refused with one kind of error.

test_model_signing.py gives the same cases to model-signing, whose form it is.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.malformed.counting import Campaign, Case, Outcome
from tests.malformed.forging import (
    Signed,
    certificate_for,
    dumped,
    flipped,
    hint_of,
    library_accepts,
    private_pem,
    public_pem,
    sealed,
    sign_small_bundle,
    statement,
    write_small_bundle,
)
from tests.malformed.worker import Guard
from tests.malformed.wrong_signatures import Wrong, certificates, crafted, structure

from equipoise.bundle.reading import open_bundle
from equipoise.bundle.signature import key_fingerprint, verify_signature
from equipoise.errors import EquipoiseError, IntegrityError, SignatureError
from equipoise.signing import SignConfig, TrustConfig, sign_bundle, verify_bundle

KINDS = {
    "missing", "key", "malformed", "policy", "untrusted", "revoked", "invalid", "mismatch",
    "rollback",
}  # fmt: skip


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return sign_small_bundle(tmp_path_factory.mktemp("signed"))


class Watch(Guard):
    """A guard for directories that are held open: a name without a path is opened below one."""

    def _opened(self, path: object, flags: int) -> None:
        if not isinstance(path, str) or "/" in path or path in {".", ".."}:
            super()._opened(path, flags)


@dataclass
class Tally:
    """What became of all cases of this module."""

    guard: Guard
    outcome: Outcome = field(default_factory=Outcome)

    def run(self, name: str, attempt: Callable[[], object], *, kind: str = "", root: Path) -> str:
        """Run one case; return the kind of its error."""
        case = Case(name=name, subject="signature", folder=root, file="model.sig", target=".")
        verdict, said, found = "silent", "accepted", ""
        self.guard.root, self.guard.seen, self.guard.on = str(root.resolve()), [], True
        try:
            attempt()
        except EquipoiseError as error:
            found = getattr(error, "kind", "")
            verdict, said = _judged(error, kind), f"{type(error).__name__} {found}: {error}"
        except Exception as error:  # noqa: BLE001 - what must not be, counted
            verdict, said = "crashed", repr(error)
        finally:
            self.guard.on = False
        if self.guard.seen:
            verdict, said = "escaped", self.guard.seen[0]
        self.outcome.add(case, verdict, said)
        return found


def _judged(error: EquipoiseError, kind: str) -> str:
    """``typed`` for the error that it should be; the kind ``files`` is any error of exit code 4."""
    if kind == "files":
        return "typed" if type(error) in {IntegrityError, SignatureError} else "crashed"
    found = getattr(error, "kind", "")
    fits = type(error) is SignatureError and found in KINDS and kind in {"", found}
    return "typed" if fits and error.exit_code == 4 and error.message and error.hint else "crashed"


@pytest.fixture(scope="module")
def counted(signed: Signed) -> Tally:
    signed.check(signed.signature)  # imports are done before anything is watched
    return Tally(Watch())


@pytest.fixture
def tally(counted: Tally) -> Iterator[Tally]:
    """The tally of the module, with an outcome of this test alone."""
    before, counted.outcome = counted.outcome, Outcome()
    yield counted
    mine, counted.outcome = counted.outcome, before
    counted.outcome.counts += mine.counts
    mine.check(least=1)
    assert mine.counts["typed"] == mine.run


def refuse_all(tally: Tally, cases: list[Wrong], signed: Signed) -> None:
    for case in cases:
        tally.run(
            case.name, lambda c=case: signed.check(c.data), kind=case.kind, root=signed.folder
        )


# The tests.


def test_what_is_right_is_accepted(signed: Signed) -> None:
    """By us and by model-signing: the signature of `equipoise sign`, and the one made by hand."""
    for data in (signed.signature, dumped(sealed(signed.statement(), signed.key))):
        assert signed.check(data) == hint_of(signed.key)
        assert library_accepts(data, signed)
    listed = statement(signed.hashes, ignore_paths=[])
    assert signed.check(dumped(sealed(listed, signed.key))) == hint_of(signed.key)


def test_the_twin_of_a_signature_vouches_for_the_same(signed: Signed) -> None:
    """ECDSA accepts (r, n - s) beside (r, s). It cannot be made for other files."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    outer = signed.outer()
    one = outer["dsseEnvelope"]["signatures"][0]
    first, second = decode_dss_signature(base64.b64decode(one["sig"]))
    one["sig"] = base64.b64encode(encode_dss_signature(first, order - second)).decode()
    assert signed.check(dumped(outer)) == hint_of(signed.key)


def test_cut_before_every_byte(signed: Signed, tally: Tally) -> None:
    """A file that was not written to its end."""
    whole = signed.signature
    cut = [Wrong(name=f"cut at {n}", data=whole[:n], kind="") for n in range(len(whole))]
    assert len(cut) > 1500
    refuse_all(tally, cut, signed)


def test_every_bit(signed: Signed, tally: Tally) -> None:
    """Every single bit turned over."""
    whole = signed.signature
    bits = range(8 * len(whole))
    refuse_all(
        tally, [Wrong(name=f"bit {n}", data=flipped(whole, n), kind="") for n in bits], signed
    )


def test_made_by_hand(signed: Signed, tally: Tally) -> None:
    """Each with the kind that says what is wrong."""
    cases = crafted(signed)
    assert len({case.name for case in cases}) == len(cases) > 90
    refuse_all(tally, cases, signed)


def test_every_value_replaced(signed: Signed, tally: Tally) -> None:
    """By null, numbers, texts, lists, objects, and nothing: of the file and of what it signs."""
    cases = list(structure(signed))
    assert len(cases) > 550
    refuse_all(tally, cases, signed)


def test_certificates(signed: Signed, tally: Tally, tmp_path: Path) -> None:
    """None is accepted, in order or not: a key is pinned, and a certificate pins a name."""
    refuse_all(tally, list(certificates(signed, tmp_path)), signed)


def test_other_curves(signed: Signed, tally: Tally) -> None:
    """P-384 and P-521 with the hash of the curve; with another hash they are refused."""
    right = {ec.SECP384R1: hashes.SHA384(), ec.SECP521R1: hashes.SHA512()}
    for curve, digest in right.items():
        key = ec.generate_private_key(curve())
        mine = replace(signed, key=key)
        data = dumped(sealed(mine.statement(), key, digest=digest))
        assert mine.check(data) == hint_of(key)
        wrong = dumped(sealed(mine.statement(), key, digest=hashes.SHA256()))
        tally.run(
            f"{curve.name} with SHA-256", lambda m=mine, w=wrong: m.check(w), kind="invalid",
            root=signed.folder,
        )  # fmt: skip


def trusted_keys(signed: Signed) -> dict[str, list[bytes]]:
    certificate = certificate_for(
        "signer", signed.key, by=("signer", signed.key), usage=ExtendedKeyUsageOID.CODE_SIGNING,
        days=(datetime.now(UTC), datetime.now(UTC) + timedelta(days=1)),
    )  # fmt: skip
    public = signed.public
    return {
        "nothing": [b""],
        "no PEM": [b"trust me"],
        "cut": [public[: len(public) // 2]],
        "RSA": [public_pem(rsa.generate_private_key(public_exponent=65537, key_size=2048))],
        "Ed25519": [public_pem(ed25519.Ed25519PrivateKey.generate())],
        "secp256k1": [public_pem(ec.generate_private_key(ec.SECP256K1()))],
        "P-224": [public_pem(ec.generate_private_key(ec.SECP224R1()))],
        "the private key": [private_pem(signed.key)],
        "two keys in one file": [public + public_pem(signed.other)],
        "a certificate": [certificate.public_bytes(serialization.Encoding.PEM)],
        "a good one and a bad one": [public, b"trust me"],
    }


def test_trusted_keys_that_are_none(signed: Signed, tally: Tally) -> None:
    """Whoever trusts a file that is no key trusts nobody, and hears of it."""
    for name, keys in trusted_keys(signed).items():
        tally.run(
            f"trusted: {name}",
            lambda k=keys: verify_signature(signed.signature, hashes=signed.hashes, keys=k),
            kind="key",
            root=signed.folder,
        )
    tally.run(
        "trusted: nobody",
        lambda: verify_signature(signed.signature, hashes=signed.hashes, keys=[]),
        kind="missing",
        root=signed.folder,
    )


def test_revoked_keys(signed: Signed, tally: Tally) -> None:
    """A deny list is stronger than trust, in either case of letters; a slip in it is an error."""
    fingerprint = key_fingerprint(signed.public)
    for name, revoked, kind in (
        ("revoked", {fingerprint}, "revoked"),
        ("revoked in capitals", {fingerprint.upper()}, "revoked"),
        ("revoked among others", {"0" * 64, fingerprint}, "revoked"),
        ("a revoked key that is no fingerprint", {fingerprint[:-1]}, "key"),
        ("revoked as one text", fingerprint, "key"),
    ):
        tally.run(
            name,
            lambda r=revoked: verify_signature(
                signed.signature, hashes=signed.hashes, keys=[signed.public], revoked=r
            ),
            kind=kind,
            root=signed.folder,
        )
    other = key_fingerprint(public_pem(signed.other))
    assert verify_signature(
        signed.signature, hashes=signed.hashes, keys=[signed.public], revoked={other}
    )


# Bundles on disk.


def _add(name: str) -> Callable[[Path], object]:
    def add(bundle: Path) -> None:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"x")

    return add


def _link(bundle: Path) -> None:
    shutil.move(bundle / "labels.txt", bundle.parent / "labels.txt")
    (bundle / "labels.txt").symlink_to(bundle.parent / "labels.txt")


def _older(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["serial"] -= 1
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (bundle / "manifest.json").write_text(text)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no signature": ("missing", lambda b: (b / "model.sig").unlink()),
    "an empty signature": ("missing", lambda b: (b / "model.sig").write_bytes(b"")),
    "a directory as signature": ("files", lambda b: _as_directory(b / "model.sig")),
    "another serial in the manifest": ("files", _older),
    "a file more": ("files", _add("more.txt")),
    "a file in .git": ("files", _add(".git/x")),
    "a .gitattributes": ("files", _add(".gitattributes")),
    "a file in .github": ("files", _add(".github/workflows/x.yml")),
    "an ignored name": ("files", _add("__pycache__/x.pyc")),
    "a second signature": ("files", _add("model.sig.old")),
    "an empty directory": ("files", lambda b: (b / "empty").mkdir()),
    "a file less": ("files", lambda b: (b / "labels.txt").unlink()),
    "a file renamed": ("files", lambda b: (b / "labels.txt").rename(b / "names.txt")),
    "a file changed": ("files", lambda b: (b / "labels.txt").write_bytes(b"a\nc\n")),
    "a link": ("files", _link),
    "a hard link": ("files", lambda b: (b.parent / "l").hardlink_to(b / "labels.txt")),
}


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def trust(signed: Signed, **changes: Any) -> TrustConfig:
    return TrustConfig(keys=(signed.folder / "public.pem",), **changes)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bundles(name: str, signed: Signed, tally: Tally, tmp_path: Path) -> None:
    """Before a byte of an engine is used. What the signature covers is what is there."""
    shutil.copytree(signed.bundle, tmp_path / "bundle")
    kind, damage = DAMAGES[name]
    damage(tmp_path / "bundle")
    shutil.copy(signed.folder / "public.pem", tmp_path)
    config = TrustConfig(keys=(tmp_path / "public.pem",))
    tally.run(name, lambda: verify_bundle(tmp_path / "bundle", config), kind=kind, root=tmp_path)


def test_another_bundles_signature(signed: Signed, tally: Tally, tmp_path: Path) -> None:
    """Of the same signer and with the same names: in a directory and in an archive."""
    for name in ("other", "other.zip"):
        write_small_bundle(tmp_path / name, content=b"another")
        sign_bundle(tmp_path / name, SignConfig(key=signed.folder / "key.pem"))
        with open_bundle(tmp_path / name) as bundle:
            theirs = bundle.hashes()
        tally.run(
            name,
            lambda h=theirs: verify_signature(signed.signature, hashes=h, keys=[signed.public]),
            kind="mismatch",
            root=tmp_path,
        )


def test_an_older_bundle(signed: Signed, tally: Tally, tmp_path: Path) -> None:
    """Its signature is right for ever, so its serial has to be held against one that was seen."""
    shutil.copytree(signed.bundle, tmp_path / "bundle")
    shutil.copy(signed.folder / "public.pem", tmp_path)
    keys = (tmp_path / "public.pem",)
    assert verify_bundle(tmp_path / "bundle", TrustConfig(keys=keys, newest=1)).serial == 1
    config = TrustConfig(keys=keys, newest=2)
    tally.run(
        "older serial",
        lambda: verify_bundle(tmp_path / "bundle", config),
        kind="rollback",
        root=tmp_path,
    )


def test_the_old_signature_beside_a_new_serial(
    signed: Signed, tally: Tally, tmp_path: Path
) -> None:
    """The serial is in the manifest, which is signed."""
    shutil.copytree(signed.bundle, tmp_path / "bundle")
    sign_bundle(tmp_path / "bundle", SignConfig(key=signed.folder / "key.pem", serial=9))
    (tmp_path / "bundle/model.sig").write_bytes(signed.signature)
    shutil.copy(signed.folder / "public.pem", tmp_path)
    config = TrustConfig(keys=(tmp_path / "public.pem",))
    tally.run(
        "old signature", lambda: verify_bundle(tmp_path / "bundle", config), kind="mismatch",
        root=tmp_path,
    )  # fmt: skip


def test_modes_are_not_signed_and_change_nothing(signed: Signed, tmp_path: Path) -> None:
    """A file that may be executed has the same bytes; nothing of a bundle is executed."""
    shutil.copytree(signed.bundle, tmp_path / "bundle")
    (tmp_path / "bundle/labels.txt").chmod(0o777)
    found = verify_bundle(tmp_path / "bundle", trust(signed))
    assert replace(found, bundle="") == replace(
        verify_bundle(signed.bundle, trust(signed)), bundle=""
    )


def test_one_spelling_of_base64(signed: Signed, tally: Tally) -> None:
    """Bits that decode to nothing have to be zero; model-signing does not look at them."""
    key = signed.key
    padded = 0
    while padded < 2:  # a signature of 70 to 72 bytes, by chance
        made = sealed(signed.statement(), key)
        one = made["dsseEnvelope"]["signatures"][0]
        sig = one["sig"]
        if not sig.endswith("="):
            continue
        padded += 1
        place = sig.index("=") - 1
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = letters[letters.index(sig[place]) + 1]
        one["sig"] = f"{sig[:place]}{other}{sig[place + 1 :]}"
        assert base64.b64decode(one["sig"]) == base64.b64decode(sig)
        assert library_accepts(dumped(made), signed)
        tally.run(
            f"another spelling {padded}", lambda m=made: signed.check(dumped(m)), kind="malformed",
            root=signed.folder,
        )  # fmt: skip


def test_the_family_is_counted(counted: Tally, campaign: Campaign) -> None:
    """The last test of the module says what all of them came to."""
    campaign.lines.append(counted.outcome.line("M10 signatures"))
    assert counted.outcome.counts["typed"] == counted.outcome.run
