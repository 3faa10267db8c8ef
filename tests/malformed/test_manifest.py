"""M9: manifests that are not what was written, by hand and by chance; each is refused, or is read
as what it says.

Without a signature, a manifest with another name is another manifest: **recorded**, and whoever
asks for a trusted key gets an error. What must not be is a crash, another answer of the engine, or
a file opened outside the bundle.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bundle.making import FILE, make_bundle
from tests.malformed.counting import Campaign, Case, Outcome
from tests.malformed.forging import private_pem, public_pem
from tests.malformed.worker import Guard

import equipoise
from equipoise import record
from equipoise.bundle.manifest import MANIFEST_FILE
from equipoise.bundle.parsing import manifest_bytes, parse_manifest
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import EquipoiseError, SignatureError
from equipoise.signing import SignConfig, sign_bundle

EXAMPLES = 2_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1e308, 1e-320, "",
    "x", "null", "\x00", "\ud800", "../..", "/etc/passwd", "engines/float/engine.onnx", "é",
    "e\u0301", "a" * 5000, [], {}, [[]], [{}], {"": {}}, {"kind": "x"}, "float32", "onnxruntime",
    "reference",
)  # fmt: skip


class Watch(Guard):
    """Names without a path are opened below a directory that is held open."""

    def _opened(self, path: object, flags: int) -> None:
        if not isinstance(path, str) or "/" in path or path in {".", ".."}:
            super()._opened(path, flags)


class Tally:
    """Put manifests into a bundle, load it, and tell what became of it."""

    def __init__(self, bundle: Path, key: bytes) -> None:
        self.bundle, self.key = bundle, key
        self.whole = (bundle / MANIFEST_FILE).read_bytes()
        self.guard, self.outcome = Watch(), Outcome()
        self.expected = self.answer()
        # Types of fields are looked up once, which Python does by running their text.
        record._hints(ImagePreprocessing)
        with equipoise.load(bundle, trust=key):
            pass

    def answer(self) -> np.ndarray:
        """What the engine says, every file verified."""
        with equipoise.load(self.bundle) as session:
            session.read("notes.txt")
            session.selftest()
            session.stats()
            return session.run({"x": np.arange(8, dtype=np.float32).reshape(2, 4)})["y"]

    def run(self, name: str, data: bytes) -> None:
        """One manifest, with nobody trusted and with somebody."""
        case = Case(
            name=name, subject="", folder=self.bundle, file=MANIFEST_FILE, target=MANIFEST_FILE
        )
        self.guard.root, self.guard.seen, self.guard.on = str(self.bundle.resolve()), [], True
        try:
            verdict, said = self._verdict(data)
        except Exception as error:  # noqa: BLE001 - what must not be, counted
            verdict, said = "crashed", repr(error)
        finally:
            self.guard.on = False
        if self.guard.seen:
            verdict, said = "escaped", self.guard.seen[0]
        self.outcome.add(case, verdict, said)

    def _verdict(self, data: bytes) -> tuple[str, str]:
        """What becomes of it by itself; of one that makes sense, in the bundle."""
        try:
            parse_manifest(data, where=f"{self.bundle}/{MANIFEST_FILE}")
            (self.bundle / MANIFEST_FILE).write_bytes(data)
            same = np.array_equal(self.answer(), self.expected)
        except EquipoiseError as error:
            # 5 for another format, and for an engine that needs another device.
            fits = error.exit_code in {4, 5} and str(self.bundle) in error.message
            return ("typed" if fits else "crashed"), f"{type(error).__name__}: {error}"
        if not same:
            return "silent", "another answer"
        if manifest_bytes(parse_manifest(data, where="")) != data:
            return "silent", "read as something else than it says"
        try:
            equipoise.load(self.bundle, trust=self.key).close()
        except SignatureError:
            return "recorded", "another manifest"
        return "silent", "trusted"


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path) -> Tally:
    """A signed bundle with a text, a calibration and labels."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from equipoise.bundle.manifest import Calibration, Licences

    folder, key = tmp_path_factory.mktemp("manifests"), ec.generate_private_key(ec.SECP256R1())
    bundle = make_bundle(
        folder / "bundle",
        linear_onnx,
        documents={"notes.txt": b"kept"},
        labels=("zero", "one", "two"),
        calibration=Calibration(fingerprint="0" * 64, samples=3, data="digits"),
        licences=Licences(model="MIT"),
        versions={"equipoise": "0.1.0"},
    )
    (folder / "key.pem").write_bytes(private_pem(key))
    sign_bundle(bundle, SignConfig(key=folder / "key.pem"))
    return Tally(bundle, public_pem(key))


def _text(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    return lambda whole: change(whole.decode()).encode("utf-8", "surrogatepass")


def _value(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(whole: bytes) -> bytes:
        found = json.loads(whole)
        change(found)
        return record.dumps(found).encode()

    return changed


def _twice(key: str) -> Callable[[bytes], bytes]:
    """A key with two values, of which readers take the first or the last."""
    return _text(lambda t: t.replace(f'"{key}":', f'"{key}": null, "{key}":', 1))


def _file(**fields: Any) -> Callable[[bytes], bytes]:
    return _value(lambda d: d["files"][FILE].update(fields))


def _renamed(name: str) -> Callable[[bytes], bytes]:
    return _value(lambda d: d["files"].update({name: d["files"].pop("notes.txt")}))


CASES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _w: b"",
    "not UTF-8": lambda w: w.replace(b"linear", b"lin\xffar"),
    "UTF-16": lambda w: w.decode().encode("utf-16"),
    "a byte order mark": lambda w: b"\xef\xbb\xbf" + w,
    "a list": lambda _w: b"[]\n",
    "a number": lambda _w: b"2\n",
    "cut": lambda w: w[: len(w) // 2],
    "a comment": lambda w: b"// bundle\n" + w,
    "a trailing comma": _text(lambda t: t.replace('"versions"', '"v": 1,, "versions"')),
    "more after the end": lambda w: w + b"{}",
    "spaces after the end": lambda w: w + b" ",
    "no line at the end": lambda w: w.rstrip(),
    "other line ends": lambda w: w.replace(b"\n", b"\r\n"),
    "tabs": lambda w: w.replace(b"  ", b"\t"),
    "on one line": lambda w: json.dumps(json.loads(w), sort_keys=True).encode(),
    "keys in another order": lambda w: json.dumps(
        dict(reversed(json.loads(w).items())), indent=2
    ).encode()
    + b"\n",
    "a letter escaped": _text(lambda t: t.replace("linear", "line\\u0061r")),
    "a slash escaped": _text(lambda t: t.replace("engines/float", "engines\\/float")),
    "a number with an exponent": _text(lambda t: t.replace("0.0001", "1e-4")),
    "a number with a point": _text(lambda t: t.replace('"serial": 1', '"serial": 1.0')),
    "minus zero": _text(lambda t: t.replace('"serial": 1', '"serial": -0')),
    "NaN": _text(lambda t: t.replace("0.0001", "NaN")),
    "infinity": _text(lambda t: t.replace("0.0001", "Infinity")),
    "beyond infinity": _text(lambda t: t.replace("0.0001", "1e999")),
    "five thousand digits": _text(lambda t: t.replace('"serial": 1', '"serial": ' + "9" * 5000)),
    "half a surrogate pair": _text(lambda t: t.replace("linear", "\\ud800")),
    "nested in lists": _text(lambda t: t.replace('"labels": [', '"labels": [' + "[" * 500)),
    "nested too deeply to parse": lambda _w: b"[" * 200_000 + b"]" * 200_000,
    "nested objects": lambda _w: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nine megabytes": lambda w: w + b" " * (9 << 20),
    "name twice": _twice("name"),
    "files twice": _twice("files"),
    "format twice": _twice("format"),
    "the hash of a file twice": _twice("sha256"),
    "an unknown key": _value(lambda d: d.update(extra=1)),
    "an unknown key of an engine": _value(lambda d: d["engines"][0].update(plugin="evil.so")),
    "a prototype": _value(lambda d: d.update(__proto__={})),
    "a missing key": _value(lambda d: d.pop("inputs")),
    "a missing key with a default": _value(lambda d: d.pop("labels")),
    "format 1": _value(lambda d: d.update(format=1)),
    "format 3": _value(lambda d: d.update(format=3)),
    "format true": _value(lambda d: d.update(format=True)),
    "format as text": _value(lambda d: d.update(format="2")),
    "no format": _value(lambda d: d.pop("format")),
    "a serial below 0": _value(lambda d: d.update(serial=-1)),
    "a serial beyond 63 bits": _value(lambda d: d.update(serial=2**63)),
    "a name with an escape": _value(lambda d: d.update(name="\x1b[2J")),
    "a name with two directions": _value(lambda d: d.update(name="a\u202eb")),
    "a name of nothing": _value(lambda d: d.update(name="")),
    "no engine": _value(lambda d: d.update(engines=[])),
    "an engine twice": _value(lambda d: d.update(engines=d["engines"] * 2)),
    "an engine outside": _value(
        lambda d: d["engines"][0].update(file="../m.onnx", files=["../m.onnx"])
    ),
    "an engine of an absolute path": _value(
        lambda d: d["engines"][0].update(file="/m.onnx", files=["/m.onnx"])
    ),
    "an engine that is a document": _value(
        lambda d: d["engines"][0].update(file="notes.txt", files=["notes.txt"])
    ),
    "an engine called by a path": _value(lambda d: d["engines"][0].update(name="../float")),
    "an engine of no size": _value(lambda d: d["engines"][0].update(size_bytes=0)),
    "an unknown runtime": _value(lambda d: d["engines"][0].update(runtime="os:system")),
    "no threads": _value(lambda d: d["engines"][0].update(threads=0)),
    "a million threads": _value(lambda d: d["engines"][0].update(threads=10**6)),
    "a tolerance of everything": _value(
        lambda d: d["engines"][0].update(golden_tolerance={"y": float(10**300), "z": 1.0})
    ),
    "no tolerance": _value(lambda d: d["engines"][0].update(golden_tolerance={})),
    "a hash of another file": _value(
        lambda d: d["files"][FILE].update(sha256=d["files"]["notes.txt"]["sha256"])
    ),
    "a hash in capitals": _value(
        lambda d: d["files"][FILE].update(sha256=d["files"][FILE]["sha256"].upper())
    ),
    "a hash cut off": _file(sha256="00"),
    "a hash with a line end": _value(
        lambda d: d["files"][FILE].update(sha256=d["files"][FILE]["sha256"] + "\n")
    ),
    "no hash": _file(sha256=""),
    "a size too small": _file(size_bytes=1),
    "a size below 0": _file(size_bytes=-1),
    "a size of an exabyte": _value(lambda d: d["files"]["notes.txt"].update(size_bytes=10**18)),
    "a file that is not there": _value(
        lambda d: d["files"].update({"ghost": d["files"]["notes.txt"]})
    ),
    "a file left out": _value(lambda d: d["files"].pop("notes.txt")),
    "the manifest lists itself": _renamed(MANIFEST_FILE),
    "the manifest lists its signature": _renamed("model.sig"),
    "a file above": _renamed("../notes.txt"),
    "an absolute file": _renamed("/etc/hostname"),
    "a file of Windows": _renamed("a\\notes.txt"),
    "a device": _renamed("con.txt"),
    "a stream": _renamed("notes.txt:s"),
    "a file in other letters": _value(
        lambda d: d["files"].update({"NOTES.txt": d["files"]["notes.txt"]})
    ),
    "a file that is a directory": _value(
        lambda d: d["files"].update({"notes.txt/a": d["files"]["notes.txt"]})
    ),
    "a tokenizer elsewhere": _value(lambda d: d.update(tokenizer="/etc/hostname")),
    "inputs of another kind": _value(lambda d: d["inputs"][0].update(dtype="object")),
    "inputs of another shape": _value(lambda d: d["inputs"][0].update(shape=["batch", 5])),
    "inputs without number": _value(lambda d: d["inputs"][0].update(shape=[-1, -1])),
    "outputs of another name": _value(
        lambda d: (
            d["outputs"][0].update(name="z"),
            d["engines"][0].update(golden_tolerance={"z": 1.0}),
        )
    ),
    "pictures in a way that cannot be": _value(lambda d: d.update(preprocessing={"size": [0]})),
}  # fmt: skip


def test_every_manifest_that_is_otherwise_is_refused(tally: Tally, campaign: Campaign) -> None:
    """None is taken for another, and the error names the bundle."""
    tally.outcome = Outcome()
    for name, change in CASES.items():
        data = change(tally.whole)
        assert data != tally.whole, name
        tally.run(name, data)
    (tally.bundle / MANIFEST_FILE).write_bytes(tally.whole)
    campaign.lines.append(tally.outcome.line("M9 manifest"))
    tally.outcome.check(least=80)
    assert tally.outcome.counts["typed"] == len(CASES)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


class Mutator:
    """Changes a manifest by chance, from a seed: its value, or its text."""

    def __init__(self, whole: bytes, seed: int) -> None:
        self.whole, self.random = whole, np.random.default_rng(seed)

    def __call__(self) -> bytes:
        if self.random.random() < 0.3:
            return self._bytes()
        found = json.loads(self.whole)
        for _ in range(int(self.random.integers(1, 3))):
            self._change(found)
        text = json.dumps(found, indent=2, sort_keys=bool(self.random.random() < 0.9)) + "\n"
        return text.encode()

    def _pick(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def _change(self, found: Any) -> None:
        places = [*_places(found)]
        if not places:
            return
        container, key = self._pick(places)
        kind = self.random.random()
        if kind < 0.55:
            container[key] = copy.deepcopy(self._pick(VALUES))
        elif kind < 0.7:
            del container[key]
        elif kind < 0.85:
            other, name = self._pick(places)
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[str(self._pick(VALUES))[:60]] = copy.deepcopy(container[key])
        else:
            container.append(copy.deepcopy(container[key]))

    def _bytes(self) -> bytes:
        data = bytearray(self.whole)
        at = int(self.random.integers(len(data)))
        kind = self.random.random()
        if kind < 0.4:
            data[at] ^= 1 << int(self.random.integers(8))
        elif kind < 0.6:
            del data[at : at + int(self.random.integers(1, 20))]
        elif kind < 0.8:
            data[at:at] = bytes(self.random.integers(0, 256, 3, dtype=np.uint8))
        else:
            end = at + int(self.random.integers(1, 60))
            data[at:at] = data[at:end]
        return bytes(data)


def test_manifests_by_chance(tally: Tally, campaign: Campaign) -> None:
    """Two thousand of them, of which those that still make sense are told by the signature."""
    tally.outcome, mutate = Outcome(), Mutator(tally.whole, seed=9)
    for number in range(EXAMPLES):
        data = mutate()
        while data == tally.whole:
            data = mutate()
        tally.run(f"example {number}", data)
    (tally.bundle / MANIFEST_FILE).write_bytes(tally.whole)
    campaign.lines.append(tally.outcome.line("M9 manifest, by chance"))
    tally.outcome.check(least=EXAMPLES)
