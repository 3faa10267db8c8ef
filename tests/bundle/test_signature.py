"""Signing bundles, and the signature on the side of the device. Wrong ones: tests/malformed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tests.malformed.forging import (
    hint_of,
    private_pem,
    public_pem,
    write_small_bundle,
)

from equipoise.bundle.reading import open_bundle
from equipoise.bundle.signature import check_serial, key_fingerprint, verify_signature
from equipoise.errors import InputError, IntegrityError, OutputError, SignatureError, UsageError
from equipoise.signing import SignConfig, TrustConfig, sign_bundle, verify_bundle

FORMS = ("bundle", "bundle.zip")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Private keys of every kind, by name; the public ones beside them."""
    folder = tmp_path_factory.mktemp("keys")
    made = {
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in made.items():
        (folder / f"{name}.pem").write_bytes(private_pem(key))
        (folder / f"{name}.public").write_bytes(public_pem(key))
    pkcs8, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    locked = serialization.BestAvailableEncryption(b"secret")
    (folder / "locked.pem").write_bytes(made["p256"].private_bytes(pem, pkcs8, locked))
    old = serialization.PrivateFormat.TraditionalOpenSSL
    plain = made["p256"].private_bytes(pem, old, serialization.NoEncryption())
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    (folder / "sec1.pem").write_bytes(parameters + plain)
    (folder / "garbage.pem").write_bytes(b"no key at all")
    return {path.stem: path for path in folder.glob("*.pem")}


def public_of(key: Path) -> Path:
    return key.with_suffix(".public")


def made(folder: Path, form: str) -> Path:
    write_small_bundle(folder / form)
    return folder / form


def content(path: Path) -> dict[str, str]:
    """Every file of a directory or archive with the SHA-256 of what is on disk."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["p256", "p384", "p521", "sec1"])
def test_a_signed_bundle_verifies(
    form: str, name: str, keys: dict[str, Path], tmp_path: Path
) -> None:
    """In both forms, with keys on every curve, and in the older form of openssl ecparam."""
    bundle = made(tmp_path, form)
    done = sign_bundle(bundle, SignConfig(key=keys[name]))
    public = public_of(keys["p256" if name == "sec1" else name])
    found = verify_bundle(bundle, TrustConfig(keys=(public,)))
    assert found.key == done.key == hashlib.sha256(public.read_bytes()).hexdigest()
    assert found.serial == done.serial == 1
    assert found.files == done.files == 3
    assert found.signed


@pytest.mark.parametrize("name", ["p256", "p384", "p521"])
def test_model_signing_verifies_it_too(name: str, keys: dict[str, Path], tmp_path: Path) -> None:
    """The library's own verifier, on the signed directory without its signature."""
    from model_signing import verifying

    bundle = made(tmp_path, "bundle")
    sign_bundle(bundle, SignConfig(key=keys[name]))
    shutil.move(bundle / "model.sig", tmp_path / "model.sig")
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_of(keys[name]))
    config.verify(bundle, tmp_path / "model.sig")
    (bundle / "labels.txt").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"labels\.txt"):
        config.verify(bundle, tmp_path / "model.sig")


def test_its_command_line_verifies_it_in_place(keys: dict[str, Path], tmp_path: Path) -> None:
    """With its own signature ignored, as docs/signing.md says."""
    bundle = made(tmp_path, "bundle")
    sign_bundle(bundle, SignConfig(key=keys["p256"]))
    command = [
        sys.executable, "-m", "model_signing", "verify", "key", bundle,
        "--signature", bundle / "model.sig", "--ignore-paths", bundle / "model.sig",
        "--no-ignore-git-paths", "--public_key", public_of(keys["p256"]),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_model_signing_signs_is_accepted(keys: dict[str, Path], tmp_path: Path) -> None:
    """With no path ignored: its defaults leave out whatever lies under .git."""
    from model_signing import hashing, signing

    bundle = made(tmp_path, "bundle")
    public = public_of(keys["p256"]).read_bytes()
    config = signing.Config().use_elliptic_key_signer(private_key=keys["p256"])
    with open_bundle(bundle) as opened:
        hashes = opened.hashes()
    config.sign(bundle, tmp_path / "defaults.sig")
    with pytest.raises(SignatureError, match="leaves out some paths") as caught:
        verify_signature((tmp_path / "defaults.sig").read_bytes(), hashes=hashes, keys=[public])
    assert caught.value.kind == "policy"
    plain = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    config.set_hashing_config(plain).sign(bundle, tmp_path / "plain.sig")
    signature = (tmp_path / "plain.sig").read_bytes()
    assert verify_signature(signature, hashes=hashes, keys=[public]) == key_fingerprint(public)


def test_one_of_several_trusted_keys(keys: dict[str, Path], tmp_path: Path) -> None:
    """The one that signed is named; a new key can be trusted before the old one goes."""
    bundle = made(tmp_path, "bundle")
    done = sign_bundle(bundle, SignConfig(key=keys["p384"]))
    trusted = tuple(public_of(keys[name]) for name in ("p256", "p384", "p521"))
    assert verify_bundle(bundle, TrustConfig(keys=trusted)).key == done.key
    with pytest.raises(SignatureError, match="is revoked") as caught:
        verify_bundle(bundle, TrustConfig(keys=trusted, revoked=(done.key,)))
    assert caught.value.kind == "revoked"
    assert str(bundle) in caught.value.message


@pytest.mark.parametrize("form", FORMS)
def test_the_serial_rises_unless_it_is_given(
    form: str, keys: dict[str, Path], tmp_path: Path
) -> None:
    """The next one by default; any higher one, or the same one, when asked for; never a lower."""
    bundle = made(tmp_path, form)
    wanted = [(None, 1), (None, 2), (7, 7), (7, 7), (None, 8)]
    for given, expected in wanted:
        config = SignConfig(key=keys["p256"], serial=given)
        assert sign_bundle(bundle, config).serial == expected
        with open_bundle(bundle) as opened:
            assert opened.manifest.serial == expected
    before = content(bundle)
    with pytest.raises(UsageError, match="--serial 3 is below 8"):
        sign_bundle(bundle, SignConfig(key=keys["p256"], serial=3))
    assert content(bundle) == before


def test_only_the_serial_of_the_manifest_changes(keys: dict[str, Path], tmp_path: Path) -> None:
    """And with the serial kept, nothing but the signature is new."""
    bundle = made(tmp_path, "bundle")
    before = content(bundle)
    sign_bundle(bundle, SignConfig(key=keys["p256"], serial=0))
    after = content(bundle)
    assert after.pop(str(bundle / "model.sig"))
    assert after == before
    sign_bundle(bundle, SignConfig(key=keys["p256"]))
    changed = {
        Path(name).name for name, value in content(bundle).items() if after.get(name) != value
    }
    assert changed == {"manifest.json", "model.sig"}


def test_a_serial_that_no_manifest_can_hold(keys: dict[str, Path], tmp_path: Path) -> None:
    """Refused before anything is written."""
    bundle = made(tmp_path, "bundle")
    before = content(bundle)
    with pytest.raises(IntegrityError, match="serial"):
        sign_bundle(bundle, SignConfig(key=keys["p256"], serial=2**63))
    assert content(bundle) == before


@pytest.mark.parametrize(
    ("name", "password", "words"),
    [
        ("rsa", None, "RSAPublicKey.*P-256, P-384 and P-521"),
        ("ed25519", None, "Ed25519PublicKey.*P-256"),
        ("secp256k1", None, "secp256k1"),
        ("garbage", None, "cannot be read as a private key"),
        ("locked", None, "has a password"),
        ("locked", b"wrong", "or its password is another"),
        ("p256", b"secret", "has no password"),
    ],
)
def test_a_key_that_cannot_sign(
    name: str, password: bytes | None, words: str, keys: dict[str, Path], tmp_path: Path
) -> None:
    """Named with what is wrong; the bundle stays as it is."""
    bundle = made(tmp_path, "bundle")
    before = content(bundle)
    with pytest.raises(InputError, match=words) as caught:
        sign_bundle(bundle, SignConfig(key=keys[name], password=password))
    assert keys[name].name in caught.value.message
    assert caught.value.hint
    assert content(bundle) == before


def test_a_public_key_a_missing_key_and_a_locked_one(keys: dict[str, Path], tmp_path: Path) -> None:
    """The public half cannot sign; a password opens a locked key."""
    bundle = made(tmp_path, "bundle")
    with pytest.raises(InputError, match="is a public key"):
        sign_bundle(bundle, SignConfig(key=public_of(keys["p256"])))
    with pytest.raises(InputError, match="cannot read the key"):
        sign_bundle(bundle, SignConfig(key=tmp_path / "no.pem"))
    done = sign_bundle(bundle, SignConfig(key=keys["locked"], password=b"secret"))
    assert done.key == key_fingerprint(public_of(keys["p256"]).read_bytes())


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_bundle_is_not_signed(form: str, keys: dict[str, Path], tmp_path: Path) -> None:
    """A signature would vouch for the damage."""
    bundle = made(tmp_path, form)
    file = bundle / "labels.txt" if bundle.is_dir() else bundle
    file.write_bytes(file.read_bytes().replace(b"a\nb\n", b"a\nB\n"))
    before = content(bundle)
    with pytest.raises(IntegrityError):
        sign_bundle(bundle, SignConfig(key=keys["p256"]))
    assert content(bundle) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_that_cannot_be_replaced_stays(
    form: str, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or not at all: a full disk in the middle leaves the bundle as it was, and no rest."""
    bundle = made(tmp_path, form)
    before = content(bundle)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equipoise.fs.os.fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        sign_bundle(bundle, SignConfig(key=keys["p256"]))
    assert content(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == [form]


def test_a_bundle_behind_a_link_is_signed_where_it_is(
    keys: dict[str, Path], tmp_path: Path
) -> None:
    """The link stays one."""
    bundle = made(tmp_path, "bundle")
    (tmp_path / "latest").symlink_to(bundle)
    sign_bundle(tmp_path / "latest", SignConfig(key=keys["p256"]))
    assert (tmp_path / "latest").is_symlink()
    assert (bundle / "model.sig").is_file()


def test_without_trust_hashes_alone_are_checked(tmp_path: Path) -> None:
    """And the record says that no key was seen."""
    bundle = made(tmp_path, "bundle")
    found = verify_bundle(bundle, TrustConfig())
    assert (found.signed, found.key) == (False, None)
    (bundle / "labels.txt").write_bytes(b"a\nc\n")
    with pytest.raises(IntegrityError, match=r"labels\.txt"):
        verify_bundle(bundle, TrustConfig())


@pytest.mark.parametrize("config", [TrustConfig(revoked=("0" * 64,)), TrustConfig(newest=1)])
def test_a_policy_without_trust_is_an_error(config: TrustConfig, tmp_path: Path) -> None:
    """A deny list and a serial mean nothing when anyone can write the bundle."""
    with pytest.raises(UsageError, match="need --trust"):
        verify_bundle(made(tmp_path, "bundle"), config)


def test_a_serial_that_was_seen_may_come_again() -> None:
    """Equal is the same bundle; lower is an older one."""
    check_serial(3, seen=3)
    check_serial(4, seen=3)
    with pytest.raises(SignatureError, match="serial 2; one with serial 3") as caught:
        check_serial(2, seen=3)
    assert caught.value.kind == "rollback"
    assert caught.value.exit_code == 4


def test_a_fingerprint_does_not_depend_on_how_the_file_is_written() -> None:
    """Other line ends, words around the key: the same key, the same fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = public_pem(key)
    assert key_fingerprint(pem) == hint_of(key)
    assert key_fingerprint(b"the key of our release team\n" + pem) == hint_of(key)
    assert key_fingerprint(pem.replace(b"\n", b"\r\n")) == hint_of(key)


DEVICE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("model_signing", "sigstore", "OpenSSL", "numpy", "google"):
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import json
from equipoise.bundle.signature import verify_signature

signature, public = (open(path, "rb").read() for path in sys.argv[1:3])
print(verify_signature(signature, hashes=json.loads(sys.argv[3]), keys=[public]))
print(sorted(name for name in sys.modules if name.startswith("equipoise.")))
"""


def test_a_device_needs_cryptography_alone(keys: dict[str, Path], tmp_path: Path) -> None:
    """Neither model-signing nor NumPy, and three small modules of equipoise."""
    bundle = made(tmp_path, "bundle")
    done = sign_bundle(bundle, SignConfig(key=keys["p256"]))
    with open_bundle(bundle) as opened:
        hashes = json.dumps(opened.hashes())
    command = [
        sys.executable, "-c", DEVICE, bundle / "model.sig", public_of(keys["p256"]), hashes,
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert child.returncode == 0, child.stderr
    fingerprint, modules = child.stdout.splitlines()
    assert fingerprint == done.key
    ours = {"bundle", "bundle.signature", "errors", "extras", "record"}
    assert modules == str(sorted(f"equipoise.{name}" for name in ours))
