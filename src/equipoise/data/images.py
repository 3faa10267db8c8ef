"""Pictures to what a model takes, with NumPy, and Pillow where one is decoded or resized."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import DataError
from equipoise.spec import Array, TensorSpec, describe

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows others, some of which start programs."""

MAX_PIXELS: Final = 89_478_485
"""Most pixels of a picture: a quarter of a gibibyte of three bytes each, as Pillow has it."""

_SIXTEEN_BITS: Final = "I;16"
_WIDE_MODES: Final = frozenset({"I", "F"})


def decode_picture(source: object, *, max_pixels: int = MAX_PIXELS) -> Array:
    """A picture as RGB, turned upright as its EXIF data says.

    Grey, palette and CMYK pictures become RGB as Pillow converts them; transparency is left out,
    not blended with a background; 16 bits become 8; of several frames the first counts.

    Args:
        source: A path, the bytes of a file, a picture of Pillow, or an array, which is taken to be
            RGB and upright.
        max_pixels: A larger picture is refused before it is decoded.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: It is no picture, is damaged or too large, or has numbers whose range is unknown.
        MissingExtraError: Pillow is not installed.
    """
    if isinstance(source, np.ndarray):
        return check_picture(source)
    pillow: Any = extras.require("PIL.Image")
    if isinstance(source, pillow.Image):
        return _rgb(source, "the picture", max_pixels=max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _opened(io.BytesIO(source), f"a picture of {len(source)} bytes", max_pixels)
    if not isinstance(source, str | Path):
        raise DataError(
            f"{type(source).__name__} is no picture",
            hint="Give a path, bytes, a picture of Pillow, or uint8[height, width, 3].",
        )
    if not Path(source).is_file():
        raise DataError(f"no such picture: {source}")
    return _opened(Path(source), str(source), max_pixels)


def _opened(file: Path | io.BytesIO, where: str, max_pixels: int) -> Array:
    pillow: Any = extras.require("PIL.Image")
    try:
        with pillow.open(fp=file, formats=FORMATS) as picture:
            return _rgb(picture, where, max_pixels=max_pixels)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(
            f"{where} is no picture that can be read: {error}",
            hint=f"It has to be one of {', '.join(FORMATS)}.",
        ) from error


def _rgb(picture: Any, where: str, *, max_pixels: int) -> Array:
    if picture.width * picture.height > max_pixels:
        raise DataError(
            f"{where} has {picture.width} x {picture.height} pixels; {max_pixels} are allowed",
            hint="Make it smaller first.",
        )
    operations: Any = extras.require("PIL.ImageOps")
    return np.asarray(_eight_bits(operations.exif_transpose(picture), where).convert("RGB"))


def _eight_bits(picture: Any, where: str) -> Any:
    """Pillow would clip 16 bits to 8, which makes nearly everything white."""
    if picture.mode in _WIDE_MODES:
        raise DataError(
            f"{where} has values of 32 bits, of which nobody says what is white",
            hint="Scale them to 0..255, and give uint8[height, width, 3].",
        )
    if not picture.mode.startswith(_SIXTEEN_BITS):
        return picture
    pillow: Any = extras.require("PIL.Image")
    return pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def check_picture(image: Array) -> Array:
    """``image``, when it is RGB, uint8 [height, width, 3]. Raises DataError when it is not."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"a picture is {describe(image)}; uint8[height, width, 3] is needed",
            hint="Convert it to RGB with 8 bits per channel.",
        )
    return image


def apply(image: Array, preprocessing: ImagePreprocessing) -> Array:
    """Resize, crop, scale and normalise one picture.

    Values agree to 1e-5 with the processors of transformers that use Pillow, and with timm's.

    Args:
        image: RGB, uint8 [height, width, 3].
        preprocessing: The steps.

    Returns:
        float32 [1, 3, H, W] of the size that ``preprocessing`` names.

    Raises:
        DataError: The picture has another dtype or shape.
        MissingExtraError: It has to be resized, and Pillow is not installed.
    """
    pixels = framed(image, preprocessing).astype(np.float32)
    mean = np.array(preprocessing.mean, dtype=np.float32)
    std = np.array(preprocessing.std, dtype=np.float32)
    values = (pixels * np.float32(preprocessing.scale) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1))[np.newaxis]


def takes_picture(spec: TensorSpec, preprocessing: ImagePreprocessing | None) -> bool:
    """Whether an input is a picture that can be prepared: by what is told, or by the engine."""
    of_bytes = spec.dtype == "uint8" and len(spec.shape) == 4 and spec.shape[3] == 3
    return of_bytes or preprocessing is not None


def prepared(image: Array, spec: TensorSpec, *, preprocessing: ImagePreprocessing | None) -> Array:
    """A picture as an input takes it, batch dimension first.

    An engine that takes bytes normalises by itself, and resizes too where it takes any size.

    Args:
        image: RGB, uint8 [height, width, 3].
        spec: The input, for which :func:`takes_picture` holds.
        preprocessing: The steps.

    Raises:
        DataError: The picture has another dtype or shape.
        MissingExtraError: It has to be resized, and Pillow is not installed.
    """
    if spec.dtype != "uint8" and preprocessing is not None:
        return apply(image, preprocessing).astype(spec.dtype, copy=False)
    any_size = any(isinstance(size, str) for size in spec.shape[1:3])
    if any_size or preprocessing is None:
        return check_picture(image)[np.newaxis]
    return framed(image, preprocessing)[np.newaxis]


def framed(image: Array, preprocessing: ImagePreprocessing) -> Array:
    """Resize and crop one picture: uint8 [H, W, 3]. Errors are those of :func:`apply`."""
    return _cropped(_resized(check_picture(image), preprocessing), preprocessing)


def _resized(image: Array, preprocessing: ImagePreprocessing) -> Array:
    height, width = preprocessing.resized(image.shape[0], image.shape[1])
    if image.shape[:2] == (height, width):
        return image
    pillow: Any = extras.require("PIL.Image")
    chosen = pillow.Resampling[preprocessing.resample.upper()]
    return np.asarray(pillow.fromarray(image).resize((width, height), resample=chosen))


def _cropped(image: Array, preprocessing: ImagePreprocessing) -> Array:
    height, width = preprocessing.size
    top, left = preprocessing.corner(image.shape[0], image.shape[1])
    return image[top : top + height, left : left + width]
