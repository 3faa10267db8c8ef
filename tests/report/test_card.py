"""The model card: what the records say, nothing else, and silence named as such."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from equipoise.bundle.manifest import Calibration, Engine, Licences, Manifest, Needs
from equipoise.parity.compare import Comparison
from equipoise.parity.proof import SizeParity
from equipoise.parity.record import ParityRecord
from equipoise.parity.tolerance import Tolerance
from equipoise.report.card import model_card
from equipoise.spec import TensorSpec


def engine(name: str, **changes: Any) -> Engine:
    file = f"engines/{name}/engine.onnx"
    made = Engine(name=name, file=file, files=(file,), runtime="onnxruntime", size_bytes=1234)
    return replace(made, **changes)


def compared() -> ParityRecord:
    """A real comparison of two samples: the second output is equal to the last bit."""
    meter = Comparison()
    for sample in range(2):
        wanted = {"y": np.array([[1.0, 3.0, 2.0]]), "z": np.array([[float(sample)]])}
        got = {"y": wanted["y"] + np.array([[0.0, 0.25, 0.0]]), "z": wanted["z"]}
        meter.add(wanted, got)
    outputs = meter.result()
    return ParityRecord(
        reference="PyTorch",
        exporter="dynamo",
        samples=2,
        tolerances=(Tolerance(output="y", atol=1e-5, floor=1e-7),),
        exported=(SizeParity(sizes={"batch": 1}, runs=1, outputs=outputs),),
        engine=outputs,
        engine_batch=outputs,
    )


BARE = Manifest(
    name="bare",
    engines=(engine("only"),),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
)
FULL = replace(
    BARE,
    name="digits",
    engines=(
        engine(
            "int8", precision="int8", target="pi5", threads=4, batching=True,
            needs=Needs(platform="linux-aarch64", any_cpu_flag=("asimddp",)),
        ),
        engine("gpu", runtime="tensorrt", golden_from="reference",
               needs=Needs(runtime_version="10.16.1", compute_capabilities=("8.6", "8.9"))),
        engine("float", precision="float32", fallback=True),
    ),
    task="sequence-classification",
    labels=("zero", "one"),
    calibration=Calibration(fingerprint="d" * 64, samples=128, data="digits"),
    licences=Licences(model="Apache-2.0"),
    versions={"torch": "2.13.0", "equipoise": "0.1.0"},
)  # fmt: skip


def sections(card: str) -> dict[str, str]:
    """Title -> text."""
    parts = card.split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


@pytest.fixture(scope="module")
def full() -> dict[str, str]:
    card = model_card(
        FULL, parity={"int8": compared()}, recipes={"int8": "Ranges from calibration data."}
    )
    return sections(card)


def test_every_section_is_there_and_says_something(full: dict[str, str]) -> None:
    """Of the barest manifest too."""
    assert list(full) == list(sections(model_card(BARE)))
    for text in (*full.values(), *sections(model_card(BARE)).values()):
        assert len(text.strip()) > 10


def test_what_no_record_says_is_called_so() -> None:
    """Task, classes, licences, calibration, parity, versions."""
    card = sections(model_card(BARE))
    assert card["What it is"].count("not stated") == 2
    assert card["Licences"].count("not stated") == 3
    assert "Calibration data: none, or not known" in card["How it was quantised"]
    assert "Not measured" in card["How close it is to the reference"]
    assert "precision not known; how it was made is not stated" in card["How it was quantised"]
    assert "Not stated" in card["Versions"]


def test_each_engine_has_its_row(full: dict[str, str]) -> None:
    """Runtime, target, precision, size, threads, needs; the fallback is marked."""
    rows = [line for line in full["Engines"].splitlines() if line.startswith("| `")]
    assert rows[0].split(" | ")[:6] == [
        "| `int8`", "onnxruntime", "pi5", "int8", "1.2\N{NO-BREAK SPACE}kB", "4",
    ]  # fmt: skip
    assert "linux-aarch64; asimddp" in rows[0]
    assert "runtime 10.16.1; compute capability 8.6 or 8.9" in rows[1]
    assert "`float` (fallback)" in rows[2]
    assert "nothing in particular" in rows[2]


def test_figures_are_those_of_the_record(full: dict[str, str]) -> None:
    """Per output; an output without decisions has none, and equal is said in words."""
    text = full["How close it is to the reference"]
    assert "| `y` | 0.25 | 3 | " in text
    assert "| 100.00 % |" in text
    assert "| `z` | 0 | 1 | equal to the last bit |" in text
    assert "Against PyTorch, over 2 real samples" in text
    assert "`y` 0.25, `z` 0." in text
    assert text.count("Not measured.") == 2


def test_how_it_was_quantised_names_the_data(full: dict[str, str]) -> None:
    """The recipe in words, and the calibration data with its fingerprint."""
    text = full["How it was quantised"]
    assert "`int8`: int8; Ranges from calibration data." in text
    assert f"digits, 128 samples; SHA-256 of the rows `{'d' * 64}`" in text


def test_limits_name_the_engines_they_hold_for(full: dict[str, str]) -> None:
    """What was not compared, not run, not tried in batches."""
    text = full["Limits, and what was not measured"]
    assert "Not compared with the reference: `gpu`, `float`." in text
    assert "self-test on a device is its first: `gpu`." in text
    assert "for several samples at once: `gpu`, `float`." in text


def test_the_inputs_are_in_the_line_that_runs_it(full: dict[str, str]) -> None:
    """As it is written for this bundle."""
    assert "session.run({'x': ...})" in full["How to run it"]
    assert "`onnxruntime`, `tensorrt`" in full["How to run it"]


def test_signing_changes_nothing_in_it() -> None:
    """The card is signed, so it cannot hold the serial that signing raises."""
    assert model_card(FULL) == model_card(replace(FULL, serial=9))


@pytest.mark.parametrize(
    "name", ["a\n# Forged heading", "a | b", "[x](http://e)", "<script>", "`code`", "*bold*"]
)
def test_names_bring_no_markup_of_their_own(name: str) -> None:
    """Labels, tensors and names come from the source; the card stays one card."""
    spec = TensorSpec(name=name, dtype="float32", shape=(1,))
    wild = replace(FULL, name=name, labels=(name,), inputs=(spec,), task=name)
    card = model_card(wild, recipes={"int8": name})
    assert list(sections(card)) == list(sections(model_card(FULL)))
    for line in card.splitlines():
        assert not line.startswith("# Forged")
        if line.startswith(("- Model", "- Task")):
            assert "<script>" not in line
            assert "[x](" not in line.replace("\\[x\\]", "")
