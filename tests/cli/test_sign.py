"""``equipoise sign`` and ``equipoise verify`` from the shell, with keys that openssl made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.malformed.forging import write_small_bundle

if shutil.which("openssl") is None:
    pytest.skip("openssl is not installed", allow_module_level=True)


def openssl(*arguments: object) -> None:
    command = ["openssl", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of docs/signing.md, made by the commands that stand there."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    openssl("genpkey", *curve, "-out", folder / "signing.pem")
    openssl("pkey", "-in", folder / "signing.pem", "-pubout", "-out", folder / "trusted.pem")
    lock = ("-aes-256-cbc", "-pass", "pass:secret")
    openssl("genpkey", *curve, *lock, "-out", folder / "locked.pem")
    openssl("genpkey", "-algorithm", "ED25519", "-out", folder / "ed25519.pem")
    return folder


@pytest.fixture(params=["bundle", "bundle.zip"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_small_bundle(tmp_path / request.param)
    return tmp_path / request.param


def test_sign_and_verify(equipoise, keys: Path, bundle: Path) -> None:
    """The lines say what was signed, by whom, and with which serial."""
    signed = equipoise("sign", bundle, "--key", keys / "signing.pem", "--serial", 5)
    assert signed.returncode == 0, signed.stderr
    assert "3 files" in signed.stdout
    found = equipoise("verify", bundle, "--trust", keys / "trusted.pem", "--newest", 5, "--json")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    record = json.loads(found.stdout)
    assert (record["serial"], record["files"], record["signed"]) == (5, 3, True)
    digest = subprocess.run(
        ["sha256sum", keys / "trusted.pem"], capture_output=True, text=True, check=True
    )
    assert record["key"] == digest.stdout.split()[0]
    assert record["key"] in signed.stdout


def test_without_trust_it_is_said_loudly(equipoise, keys: Path, tmp_path: Path) -> None:
    """On standard error, for a bundle without a signature and for one that nobody looked at."""
    write_small_bundle(tmp_path / "bundle")
    found = equipoise("verify", tmp_path / "bundle")
    assert found.returncode == 0
    assert "NOT SIGNED" in found.stderr
    assert "nobody is trusted" in found.stdout
    assert equipoise("sign", tmp_path / "bundle", "--key", keys / "signing.pem").returncode == 0
    found = equipoise("verify", tmp_path / "bundle", "--json")
    assert "NOT CHECKED" in found.stderr
    assert json.loads(found.stdout)["key"] is None


def test_what_is_refused_ends_with_its_code(equipoise, keys: Path, tmp_path: Path) -> None:
    """4 for what is not trusted, 3 for a key, 2 for options; the bundle named, no traceback."""
    bundle = tmp_path / "bundle"
    write_small_bundle(bundle)
    trusted = ("--trust", keys / "trusted.pem")
    unsigned = equipoise("verify", bundle, *trusted)
    assert (unsigned.returncode, unsigned.stdout) == (4, "")
    assert f"{bundle} is not signed" in unsigned.stderr
    signed = equipoise("sign", bundle, "--key", keys / "signing.pem", "--json")
    fingerprint = json.loads(signed.stdout)["key"]
    for code, words, arguments in (
        (4, "is revoked", ("verify", bundle, *trusted, "--revoked", fingerprint)),
        (4, "serial 1; one with serial 2", ("verify", bundle, *trusted, "--newest", 2)),
        (3, "Ed25519", ("sign", bundle, "--key", keys / "ed25519.pem")),
        (2, "below 1", ("sign", bundle, "--key", keys / "signing.pem", "--serial", 0)),
    ):
        found = equipoise(*arguments)
        assert found.returncode == code, (arguments, found.stderr)
        assert words in found.stderr
        assert "Traceback" not in found.stderr
        assert len(found.stderr.splitlines()) <= 5


def test_a_password_comes_from_the_environment(equipoise, keys: Path, tmp_path: Path) -> None:
    """By the name of a variable; nothing is asked for, and no option holds it."""
    write_small_bundle(tmp_path / "bundle")
    sign = ("sign", tmp_path / "bundle", "--key", keys / "locked.pem")
    found = equipoise(*sign, "--password-env", "NO_SUCH_VARIABLE")
    assert found.returncode == 2
    assert "NO_SUCH_VARIABLE" in found.stderr
    found = equipoise(*sign, "--password-env", "PW", env={**os.environ, "PW": "wrong"})
    assert found.returncode == 3
    assert "wrong" not in found.stderr
    found = equipoise(*sign, "--password-env", "PW", env={**os.environ, "PW": "secret"})
    assert found.returncode == 0, found.stderr
