"""Pictures in any form become classes and vectors."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.apps.embedding import Embedder
from equipoise.apps.pictures import ImageClassifier
from equipoise.data.images import apply, decode_picture
from equipoise.errors import DataError, InputError, MissingExtraError, UsageError

LABELS = ("red", "green", "blue")


def photo(seed: int = 0) -> np.ndarray:
    """Coloured noise in two halves, wider than high."""
    image = np.random.default_rng(seed).integers(0, 60, size=(40, 72, 3), dtype=np.uint8)
    image[:, 36:] += np.array([190, 100, 50], np.uint8)
    return image


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_every_form_of_one_picture_gives_the_same(make_picture_bundle, tmp_path, steps) -> None:
    """A path, text, bytes, a picture of Pillow, an array."""
    classify = ImageClassifier(make_picture_bundle(task="image-classification"))
    picture = Image.fromarray(photo())
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture))
    forms = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), picture, photo()]
    found = [classify(form) for form in forms]
    assert len(set(found)) == 1
    means = apply(photo(), steps).mean(axis=(0, 2, 3), dtype=np.float64)
    expected = np.exp(means) / np.exp(means).sum()
    np.testing.assert_allclose(found[0].scores, expected, rtol=1e-5)
    assert found[0].label == LABELS[int(expected.argmax())]
    order = [LABELS[i] for i in np.argsort(-expected)]
    assert [one.label for one in found[0].top(2)] == order[:2]
    assert [one.label for one in found[0].top(10)] == order


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_a_list_gives_what_its_pictures_give_alone(make_picture_bundle, batch) -> None:
    """More than one batch of them, in order."""
    classify = ImageClassifier(make_picture_bundle(batch=batch))
    pictures = [photo(i)[:, i:] for i in range(11)]
    together = classify(pictures)
    assert len(together) == 11
    for picture, found in zip(pictures, together, strict=True):
        np.testing.assert_allclose(found.scores, classify(picture).scores, rtol=1e-5)


def test_an_engine_that_takes_bytes_gets_bytes(make_picture_bundle) -> None:
    """Resized and cropped where its size is fixed; as they are where it resizes by itself."""
    fixed = make_picture_bundle(shape="batch, 16, 16, 3")
    assert ImageClassifier(fixed)(photo()).label == "red"
    assert fixed.shapes == [(1, 16, 16, 3)]
    free = make_picture_bundle(shape="batch, height, width, 3", preprocessing=None)
    ImageClassifier(free)([photo(), photo()[:20]])
    assert free.shapes == [(1, 40, 72, 3), (1, 20, 72, 3)]


def test_pictures_are_turned_upright() -> None:
    """As the camera says in its EXIF data."""
    picture = Image.fromarray(photo())
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 270 degrees
    turned = decode_picture(encoded(picture, exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(photo(), k=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode) -> None:
    """As Pillow converts it, which is what models were trained on."""
    picture = Image.fromarray(photo()).convert(mode)
    form = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decode_picture(encoded(picture, form)), expected)
    np.testing.assert_array_equal(decode_picture(picture), expected)


def test_sixteen_bits_become_eight() -> None:
    """The high ones, not white wherever there is a little light."""
    values = (np.arange(256, dtype=np.uint16).reshape(16, 16) << 8) + 7
    found = decode_picture(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(found[..., 1], np.arange(256).reshape(16, 16))


def test_the_first_of_several_frames_counts() -> None:
    """An animated GIF is one picture."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data)[0, 0].tolist() == [255, 0, 0]


def _bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge, and is small."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_decompression_bombs_are_not_decoded(side) -> None:
    """Neither above Pillow's limit of warnings nor above that of errors."""
    with pytest.raises(DataError, match="pixels"):
        decode_picture(_bomb(side, side))


def test_the_limit_of_pixels_can_be_lower(make_picture_bundle) -> None:
    classify = ImageClassifier(make_picture_bundle(), max_pixels=40 * 72 - 1)
    with pytest.raises(DataError, match="has 72 x 40 pixels; 2879 are allowed"):
        classify(encoded(Image.fromarray(photo())))
    with pytest.raises(DataError, match="2879 are allowed"):
        classify(Image.fromarray(photo()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "picture of 0 bytes is no picture"),
        (b"GIF89a", "is no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
        ("nowhere.png", "no such picture: nowhere.png"),
        (Path("/"), "no such picture: /"),
        (3, "int is no picture"),
        (None, "NoneType is no picture"),
        ([], "the list is empty"),
        (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]; uint8"),
        (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8\[0, 4, 3\]"),
        (Image.new("F", (4, 4)), "32 bits"),
        (Image.new("I", (4, 4)), "32 bits"),
    ],
)
def test_what_is_no_picture_is_named(make_picture_bundle, given, message) -> None:
    with pytest.raises(DataError, match=message):
        ImageClassifier(make_picture_bundle())(given)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_picture_that_was_cut_off_is_named(form) -> None:
    """At a third of its bytes."""
    data = encoded(Image.fromarray(photo()), form)
    assert decode_picture(data).shape == (40, 72, 3)
    with pytest.raises(DataError, match="is no picture that can be read"):
        decode_picture(data[: len(data) // 3])


def test_a_bundle_that_takes_no_picture_is_named(make_picture_bundle, make) -> None:
    with pytest.raises(InputError, match=r"takes no picture.*pixel_values: float32\[batch, 3"):
        ImageClassifier(make_picture_bundle(preprocessing=None))
    with pytest.raises(InputError, match=r"takes no picture"):
        ImageClassifier(make("class"))
    with pytest.raises(InputError, match=r"no scores \[batch, classes\]"):
        ImageClassifier(make_picture_bundle("map"))
    with pytest.raises(InputError, match=r"is for image-embedding(.|\n)*Use Embedder"):
        ImageClassifier(make_picture_bundle(task="image-embedding"))


def test_a_device_without_pillow_classifies_arrays(make_picture_bundle, monkeypatch) -> None:
    """Those that need no resize; for what has to be decoded the error has the line to install."""
    classify = ImageClassifier(make_picture_bundle())
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert classify(np.zeros((20, 24, 3), np.uint8)).label in LABELS
    with pytest.raises(MissingExtraError, match=r"equipoise\[vision\]"):
        classify(b"GIF89a")


# Vectors.


@pytest.mark.parametrize("end", ["vector", "map", "patches"])
def test_pictures_become_vectors(make_picture_bundle, end, steps) -> None:
    """The model's own, or the mean over what it gives of places."""
    embed = Embedder(make_picture_bundle(end, task="image-embedding"))
    pictures = [photo(0), photo(1)[:, 20:]]
    found = embed([pictures[0], encoded(Image.fromarray(pictures[1]))])
    expected = [apply(p, steps).mean(axis=(0, 2, 3), dtype=np.float64) for p in pictures]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(embed(pictures[0]), expected[0], rtol=1e-4)
    assert embed.pooling == ("model" if end == "vector" else "mean")


def test_the_first_patch_can_be_asked_for(make_picture_bundle, steps) -> None:
    found = Embedder(make_picture_bundle("patches"), pooling="cls")(photo())
    np.testing.assert_allclose(found, apply(photo(), steps)[0, :, 0, 0], rtol=1e-5)
    with pytest.raises(UsageError, match="unknown pooling 'clas'"):
        Embedder(make_picture_bundle("patches"), pooling="clas")
