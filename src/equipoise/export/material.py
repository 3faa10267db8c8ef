"""What inputs are made of when a model comes without data: texts, parts of photos, sounds."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.data.images import apply
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.spec import Array

TEXTS: Final = (
    "The harbour froze in early January, and for eleven days no ferry left the island.",
    "How long does it take to boil an egg at the top of a mountain?",
    (
        "Prices rose by 2.4 per cent in March. Economists had expected less, because energy became"
        " cheaper and rents hardly moved; the central bank will wait for more figures."
    ),
    "No.",
    "Maria Lindqvist joined the museum in Gothenburg as a restorer of maps in 1987.",
    (
        "The keyboard is excellent, but the screen flickers and the battery barely lasts a morning,"
        " so I sent it back."
    ),
    (
        "Water the seedlings every second day, turn the tray towards the light, and do not plant"
        " them out before the last frost. Tomatoes in particular resent cold feet. If the stems"
        " grow long and pale they want more sun; if the leaves curl, they have had too much of"
        " something."
    ),
    "Please call me back before noon.",
    "Two trains leave the same station an hour apart, the second half as fast again as the first.",
    "She opened the letter, read it twice, and laughed until the neighbours knocked on the wall.",
)
"""Texts of unlike lengths, so that no length is taken for fixed."""


def plain_preprocessing(size: tuple[int, int]) -> ImagePreprocessing:
    """To ``size``, with values of -1 to 1."""
    return ImagePreprocessing(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pictures(
    count: int, preprocessing: ImagePreprocessing, *, channels: int, random: np.random.Generator
) -> list[Array]:
    """Parts of real photos, prepared: float32 [1, channels, height, width] each."""
    datasets: Any = extras.require("sklearn.datasets")
    extras.require("PIL.Image")  # scikit-learn's own message would not name the extra
    photos = datasets.load_sample_images().images
    crops = (_part(photos[i % len(photos)], random) for i in range(count))
    order = np.arange(channels) % 3
    return [np.take(apply(crop, preprocessing), order, axis=1) for crop in crops]


def _part(photo: Array, random: np.random.Generator) -> Array:
    """A random part of a photo, at least half as high and wide."""
    sizes = [int(random.integers(size // 2, size + 1)) for size in photo.shape[:2]]
    starts = [int(random.integers(0, s - n + 1)) for s, n in zip(photo.shape, sizes, strict=False)]
    rows, columns = (slice(s, s + n) for s, n in zip(starts, sizes, strict=True))
    return np.ascontiguousarray(photo[rows, columns])


def sounds(count: int, *, rate: int, random: np.random.Generator) -> list[Array]:
    """Tones that rise, in noise: float32 [time], about one second each, of unlike lengths."""
    return [_chirp((1.0, 0.75, 1.25, 0.9)[i % 4], rate=rate, random=random) for i in range(count)]


def _chirp(seconds: float, *, rate: int, random: np.random.Generator) -> Array:
    time = np.arange(int(seconds * rate)) / rate
    low, high = random.uniform(100, 400), random.uniform(800, 3000)
    phase = 2 * math.pi * (low * time + (high - low) * time**2 / (2 * seconds))
    sound = 0.5 * np.sin(phase) + 0.05 * random.standard_normal(time.size)
    return sound.astype(np.float32)
