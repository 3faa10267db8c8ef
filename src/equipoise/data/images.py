"""Pictures to what a model takes, with NumPy, and Pillow where one has to be resized."""

from __future__ import annotations

from typing import Any

import numpy as np

from equipoise import extras
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import DataError
from equipoise.spec import Array, describe


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
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"a picture is {describe(image)}; uint8[height, width, 3] is needed",
            hint="Convert it to RGB with 8 bits per channel.",
        )
    pixels = _cropped(_resized(image, preprocessing), preprocessing).astype(np.float32)
    mean = np.array(preprocessing.mean, dtype=np.float32)
    std = np.array(preprocessing.std, dtype=np.float32)
    values = (pixels * np.float32(preprocessing.scale) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1))[np.newaxis]


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
