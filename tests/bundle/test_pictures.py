"""A bundle says how a picture becomes its input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers

import equipoise
from equipoise import record
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.reading import read_manifest
from equipoise.bundle.writer import write_bundle
from equipoise.data.images import apply
from equipoise.data.preprocessing import ImagePreprocessing, from_processor
from equipoise.errors import DataError, InputError, IntegrityError, MissingExtraError
from equipoise.export.rung import preprocessing_of
from equipoise.sources.source import Source
from equipoise.spec import TensorSpec

onnx = pytest.importorskip("onnx")

PREPROCESSING = ImagePreprocessing(
    size=(16, 16), resize_shortest=20, crop=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)
)
FILE = "engines/means/engine.onnx"
MANIFEST = Manifest(
    name="photos",
    engines=(),
    inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16)),),
    outputs=(TensorSpec(name="means", dtype="float32", shape=("batch", 3)),),
    preprocessing=PREPROCESSING,
)


def make(directory: Path, manifest: Manifest = MANIFEST) -> Path:
    """A bundle whose engine takes the mean of every channel."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        means (float[batch, 3, 16, 16] pixel_values) => (float[batch, 3] means) {
            axes = Constant <value_ints = [2, 3]> ()
            means = ReduceMean <keepdims = 0> (pixel_values, axes)
        }
        """
    )
    data = model.SerializeToString()
    engine = Engine(
        name="means",
        file=FILE,
        files=(FILE,),
        runtime="onnxruntime",
        size_bytes=len(data),
        golden_tolerance={"means": 1e-5},
    )
    complete = replace(manifest, engines=(engine,))
    write_bundle(directory, complete, copies={}, documents={FILE: data})
    return directory


def photo() -> np.ndarray:
    """A picture of two halves, wider than high."""
    image = np.zeros((40, 72, 3), np.uint8)
    image[:, 36:] = (200, 100, 50)
    return image


def test_a_picture_goes_through_the_bundle(tmp_path: Path) -> None:
    """Prepared by the manifest, run by the engine."""
    with equipoise.load(make(tmp_path / "bundle")) as session:
        feeds = session.preprocess(photo())
        found = session.run(feeds)["means"]
    np.testing.assert_array_equal(feeds["pixel_values"], apply(photo(), PREPROCESSING))
    half = np.array([200, 100, 50]) / 510
    np.testing.assert_allclose(found[0], (half - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.3], atol=0.02)


def test_a_bundle_without_preprocessing_says_so(tmp_path: Path) -> None:
    """The error names what the engine takes."""
    bundle = make(tmp_path / "bundle", replace(MANIFEST, preprocessing=None))
    with (
        equipoise.load(bundle) as session,
        pytest.raises(InputError, match=r"pixel_values: float32\[batch, 3, 16, 16\]"),
    ):
        session.preprocess(photo())


def test_a_device_without_pillow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a picture has to be resized."""
    with equipoise.load(make(tmp_path / "bundle")) as session:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        fitting = np.zeros((20, 24, 3), np.uint8)
        assert session.preprocess(fitting)["pixel_values"].shape == (1, 3, 16, 16)
        with pytest.raises(MissingExtraError, match="'PIL'"):
            session.preprocess(photo())
        with pytest.raises(DataError, match="uint8"):
            session.preprocess(photo().astype(np.float32))


def test_preprocessing_comes_back(tmp_path: Path) -> None:
    """As it was, or none."""
    assert read_manifest(make(tmp_path / "a")).preprocessing == PREPROCESSING
    plain = make(tmp_path / "b", replace(MANIFEST, preprocessing=None))
    assert read_manifest(plain).preprocessing is None


@pytest.mark.parametrize("change", [{"std": [0.0, 1.0, 1.0]}, {"resize": 3}, {"size": [16]}])
def test_preprocessing_that_cannot_be_is_an_integrity_error(
    tmp_path: Path, change: dict[str, object]
) -> None:
    """It names the file."""
    bundle = make(tmp_path / "bundle")
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    data["preprocessing"].update(change)
    path.write_text(record.dumps(data))
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(bundle)


def test_a_packed_source_takes_its_processor_along(tmp_path: Path) -> None:
    """Steps that cannot be told leave the manifest without them; the engine is packed anyway."""
    processor = transformers.ViTImageProcessorPil()
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    source = Source(kind="transformers", name="vit", processor=file)
    assert preprocessing_of(source, None) == from_processor(processor.to_dict())
    transformers.DetrImageProcessorPil().save_pretrained(tmp_path)
    assert preprocessing_of(source, None) is None
    assert preprocessing_of(replace(source, processor=None), None) is None
