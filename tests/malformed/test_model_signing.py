"""The wrong signatures of M10, given to model-signing: where it accepts what equipoise refuses.

The list is by name, so a change of either side is seen.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path

import pytest
from tests.malformed.forging import Signed, flipped, library_accepts, sign_small_bundle
from tests.malformed.wrong_signatures import certificates, crafted


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return sign_small_bundle(tmp_path_factory.mktemp("signed"))


STRICTER = {
    "mediaType twice", "payload twice", "predicate twice",
    "the same signature twice", "another's signature second",
    "signature with a keyid", "empty hint", "no hint", "a key beside its hint",
    "the form of v0.2", "the encoding of v0.2",
    "an unknown key", "an unknown key in the predicate", "an unknown key in a resource",
    "root with SHA-512 too", "subject with a number as name",
    "links allowed", "links allowed by a number", "links allowed by a word",
    "links allowed by null", "ignores .git", "ignores model.sig", "an unknown setting",
    "signature in lines", "signature with a space", "too long",
    "a file twice", "a file with ./ before it", "a file with // in it", "a hash in capitals",
}  # fmt: skip
"""Signatures that model-signing accepts in key mode and equipoise does not."""


def test_model_signing_refuses_what_is_refused_here_but_for_this_list(signed: Signed) -> None:
    """Made by hand, cut and flipped; where it is less strict, the list says so."""
    accepted = {c.name for c in crafted(signed) if library_accepts(c.data, signed)}
    assert accepted == STRICTER


def test_model_signing_accepts_no_changed_byte_that_means_another(signed: Signed) -> None:
    """Of cuts and flips it takes only another spelling in base64 of the same bytes."""
    whole, chance = signed.signature, random.Random(1)
    data = [whole[:n] for n in chance.sample(range(len(whole)), 40)]
    data += [flipped(whole, b) for b in chance.sample(range(8 * len(whole)), 120)]
    for changed in (d for d in data if library_accepts(d, signed)):
        assert meaning(changed) == meaning(whole)


def meaning(data: bytes) -> tuple[bytes, ...]:
    """The bytes that a signature file encodes."""
    envelope = json.loads(data)["dsseEnvelope"]
    texts = (envelope["payload"], envelope["signatures"][0]["sig"])
    return tuple(base64.b64decode(text) for text in texts)


def test_model_signing_takes_files_in_git_directories(signed: Signed, tmp_path: Path) -> None:
    """Why its own walk through a directory is not used: it leaves some names out."""
    from model_signing import verifying

    shutil.copytree(signed.bundle, tmp_path / "bundle")
    data = (tmp_path / "bundle/model.sig").read_bytes()
    (tmp_path / "bundle/model.sig").unlink()
    (tmp_path / "m.sig").write_bytes(data)
    (tmp_path / "bundle/.git").mkdir()
    (tmp_path / "bundle/.git/x").write_bytes(b"x")
    config = verifying.Config().use_elliptic_key_verifier(public_key=signed.folder / "public.pem")
    config.verify(tmp_path / "bundle", tmp_path / "m.sig")


def test_model_signing_looks_at_the_chain_of_certificates_alone(
    signed: Signed, tmp_path: Path
) -> None:
    """Why certificates are not accepted: neither dates, nor purpose, nor name would be checked."""
    accepted = {
        case.name.removeprefix("certificate ")
        for case in certificates(signed, tmp_path)
        if library_accepts(case.data, signed, authority=tmp_path / "ca.pem")
    }
    assert accepted == {
        "in order", "expired", "of the future", "for web servers", "of another team",
    }  # fmt: skip
