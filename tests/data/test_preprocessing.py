"""Pictures are prepared as the model's own processor prepares them, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from sklearn.datasets import load_sample_images

from equipoise import record
from equipoise.data.images import apply
from equipoise.data.preprocessing import (
    ImagePreprocessing,
    from_processor,
    from_timm,
    nominal_size,
    read_processor,
)
from equipoise.errors import DataError, MissingExtraError

PHOTO = load_sample_images().images[0]
PHOTOS = {
    "landscape": PHOTO,
    "portrait": np.ascontiguousarray(PHOTO.transpose(1, 0, 2)),
    "small and odd": PHOTO[:151, 100:231],
}
TOLERANCE = 1e-5
"""Of normalised values, where a step of one in a picture is about 0.015."""

PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessorPil", {}),
    ("ViTImageProcessorPil", {"resample": 0, "do_normalize": False}),
    ("ViTImageProcessorPil", {"resample": 1, "do_rescale": False}),
    ("ViTImageProcessorPil", {"size": {"height": 48, "width": 64}, "image_mean": [0.1, 0.2, 0.3]}),
    ("DeiTImageProcessorPil", {}),
    ("BeitImageProcessorPil", {}),
    ("BeitImageProcessorPil", {"do_center_crop": True, "size": {"height": 256, "width": 288}}),
    ("CLIPImageProcessorPil", {}),
    ("CLIPImageProcessorPil", {"crop_size": {"height": 96, "width": 131}}),
    ("SiglipImageProcessorPil", {}),
    ("ConvNextImageProcessorPil", {}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 383}, "crop_pct": 0.9}),
    ("EfficientNetImageProcessorPil", {}),
    ("EfficientNetImageProcessorPil", {"rescale_offset": True, "include_top": False}),
    ("EfficientNetImageProcessorPil", {"rescale_offset": True, "do_center_crop": True}),
    ("EfficientNetImageProcessorPil", {"do_normalize": False, "rescale_factor": 1 / 127.5}),
    ("LevitImageProcessorPil", {}),
    ("MobileNetV1ImageProcessorPil", {}),
    ("MobileNetV2ImageProcessorPil", {}),
    ("PoolFormerImageProcessorPil", {}),
    ("PoolFormerImageProcessorPil", {"size": {"height": 224, "width": 260}}),
    ("SegformerImageProcessorPil", {"do_reduce_labels": True}),
    ("DPTImageProcessorPil", {}),
    ("RTDetrImageProcessorPil", {}),
    ("VideoMAEImageProcessorPil", {}),
]


@pytest.mark.parametrize("photo", PHOTOS.values(), ids=PHOTOS)
@pytest.mark.parametrize(("name", "changes"), PROCESSORS, ids=[f"{n}-{c}" for n, c in PROCESSORS])
def test_pictures_come_out_as_from_transformers(
    name: str, changes: dict[str, Any], photo: np.ndarray
) -> None:
    """A real photo through the processor that was saved, and through what its file says."""
    processor = getattr(transformers, name)(**changes)
    preprocessing = from_processor(json.loads(processor.to_json_string()))
    expected = np.asarray(processor(photo, return_tensors="np")["pixel_values"])
    found = apply(photo, preprocessing)
    assert found.dtype == np.float32
    assert found.shape == (1, 3, *preprocessing.size)
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": 224, "feature_extractor_type": "ViTFeatureExtractor"}, (None, (224, 224))),
        (
            {"size": 256, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},
            (256, (224, 224)),
        ),
        (
            {"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"},
            ((256, 256), (224, 224)),
        ),
        ({"size": 224}, (None, (224, 224))),
        ({"size": [96, 128], "do_center_crop": False, "crop_size": 64}, (None, (96, 128))),
        (
            {"size": 96, "crop_size": 64, "image_processor_type": "CLIPImageProcessorFast"},
            (96, (64, 64)),
        ),
    ],
)
def test_older_forms_of_sizes_are_read(config: dict[str, Any], expected: Any) -> None:
    """One number is both sides or the shortest, by the class of the processor."""
    found = from_processor({**config, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert (found.resize_shortest or found.resize_to, found.size) == expected


def test_steps_inside_a_processor_config_are_read(tmp_path: Path) -> None:
    """The newer file has the processor of pictures beside that of texts."""
    inner = transformers.CLIPImageProcessorPil().to_dict()
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": inner}))
    assert read_processor(file) == from_processor(inner)


def test_a_processor_of_sounds_is_none(tmp_path: Path) -> None:
    """There is nothing to do to a picture."""
    file = tmp_path / "preprocessor_config.json"
    for extractor in (transformers.Wav2Vec2FeatureExtractor(), transformers.ASTFeatureExtractor()):
        file.write_text(extractor.to_json_string())
        assert read_processor(file) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"size": NaN}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    """It is no JSON, or no object."""
    file = tmp_path / "preprocessor_config.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        read_processor(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": True}, "do_pad is True"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"size_divisor": 32}, "size_divisor is 32"),
        ({"crop_pct": 0.9}, r"crop_pct is 0\.9"),
        ({"resample": 4}, "resample is 4"),
        ({"do_resize": False}, "do_resize is False"),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, "longest_edge"),
        ({"size": {"shortest_edge": 224}}, "shortest side to 224 and does not crop"),
        ({"size": None}, "size is None"),
        ({"size": {"height": 0, "width": 4}}, "size is"),
        ({"size": {"shortest_edge": 200}, "crop_size": 224, "do_center_crop": True}, "not fit"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "crop_size is"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"image_mean": ["a"] * 3}, "image_mean"),
        ({"image_mean": None}, "image_mean None"),
        ({"image_std": [0.5, 0.5]}, "three numbers each"),
        ({"image_std": [0.5, 0.5, 0]}, "no std of 0"),
        ({"image_processor_type": "SuperPointImageProcessor"}, "SuperPointImageProcessor may do"),
    ],
)
def test_a_step_that_cannot_be_told_is_an_error(changes: dict[str, Any], message: str) -> None:
    """It is never left out; the error names the key and its value."""
    with pytest.raises(DataError, match=message):
        from_processor({**transformers.ViTImageProcessorPil().to_dict(), **changes})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (800, 800)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 200}}, (224, 200)),
        ({"image_processor": {"size": 30}}, (30, 30)),
        ({"size": {"longest_edge": 1333}}, None),
        ({}, None),
    ],
)
def test_what_cannot_be_told_still_has_a_size(config: dict[str, Any], expected: Any) -> None:
    """To make inputs with; None when nothing is said."""
    assert nominal_size(config) == expected


TIMM = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.95,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def test_timm_crops_the_middle_of_the_shortest_side() -> None:
    """Half a pixel of margin is rounded to even: 235 less 224 leaves 5.5, so 6 before."""
    found = from_timm(TIMM)
    assert (found.resize_shortest, found.size, found.resample) == (235, (224, 224), "bicubic")
    assert found.corner(235, 229) == (6, 2)
    assert apply(PHOTO, found).shape == (1, 3, 224, 224)


def test_timm_squashes_where_it_says_so() -> None:
    """Both sides are resized, and a crop keeps the share."""
    found = from_timm({**TIMM, "crop_mode": "squash", "crop_pct": 0.5, "input_size": [3, 10, 20]})
    assert (found.resize_shortest, found.resize_to, found.size) == (None, (20, 40), (10, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"input_size": (1, 28, 28)}, r"\[1, 28, 28\]"),
        ({"input_size": (3, 28, 30)}, r"\[3, 28, 30\]"),
        ({"input_size": None}, "input_size is None"),
        ({"interpolation": "random"}, "'random'"),
        ({"mean": None}, "mean None"),
        ({"crop_pct": "all"}, "crop_pct 'all'"),
    ],
)
def test_steps_of_timm_that_cannot_be_told_are_errors(
    changes: dict[str, Any], message: str
) -> None:
    """By name and value."""
    with pytest.raises(DataError, match=message):
        from_timm({**TIMM, **changes})


def test_preprocessing_goes_to_json_and_back() -> None:
    """A manifest keeps every step exactly."""
    for preprocessing in (from_timm(TIMM), ImagePreprocessing(size=(8, 9))):
        text = record.dumps(preprocessing)
        assert record.loads(ImagePreprocessing, text, where="here") == preprocessing


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_named(image: np.ndarray) -> None:
    """Dtype and shape, and what is needed."""
    with pytest.raises(DataError, match=r"uint8\[height, width, 3\] is needed"):
        apply(image, ImagePreprocessing(size=(4, 4)))


def test_pillow_is_needed_to_resize_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a picture of the right size is prepared; any other is a MissingExtraError."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    preprocessing = ImagePreprocessing(size=(2, 2), resize_shortest=4, crop=True, mean=(0.5,) * 3)
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_allclose(
        apply(image, preprocessing)[0, 0], image[1:3, 1:3, 0] / 255 - 0.5, atol=1e-6
    )
    with pytest.raises(MissingExtraError, match="'PIL'"):
        apply(PHOTO, preprocessing)
