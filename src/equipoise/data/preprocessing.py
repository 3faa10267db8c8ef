"""What is done to a picture before a model sees it, as data: resize, crop, scale, normalise.

A device has to repeat these steps exactly, so a step that cannot be told here is an error and is
never left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import fs, record
from equipoise.errors import DataError

Side = int | tuple[int, int]
"""The shortest side of a picture, or its height and width, in pixels."""
Channels = tuple[float, ...]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLE: Final[dict[int, Resample]] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""The numbers that Pillow gives its filters, which processors of transformers save."""

_INT_IS_SQUARE: Final = {
    "": False,
    "BeitImageProcessor": True,
    "BitImageProcessor": False,
    "BlipImageProcessor": True,
    "CLIPImageProcessor": False,
    "ChineseCLIPImageProcessor": False,
    "ConvNextImageProcessor": False,
    "DPTImageProcessor": True,
    "DeiTImageProcessor": True,
    "EfficientNetImageProcessor": True,
    "LevitImageProcessor": False,
    "MobileNetV1ImageProcessor": False,
    "MobileNetV2ImageProcessor": False,
    "OwlViTImageProcessor": True,
    "PoolFormerImageProcessor": False,
    "PvtImageProcessor": True,
    "RTDetrImageProcessor": False,
    "SegformerImageProcessor": True,
    "SiglipImageProcessor": False,
    "ViTImageProcessor": True,
    "VideoMAEImageProcessor": False,
}
"""Processors of transformers that do what can be told here -> whether the size of their older
configs, one number, is both sides or the shortest. An unnamed one counts as plain."""

_SILENT: Final = frozenset(
    {
        "_valid_processor_keys", "data_format", "default_to_square", "device", "disable_grouping",
        "feature_extractor_type", "image_processor_type", "input_data_format", "processor_class",
        "return_tensors",
    }
)  # fmt: skip
"""Keys that say nothing about pixels."""

_TARGETS: Final = frozenset(
    {"annotation_format", "do_convert_annotations", "do_reduce_labels", "format", "reduce_labels"}
)
"""Steps on the labels of training data, which a device has none of."""

_STEPS: Final = frozenset(
    {
        "crop_pct", "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale",
        "do_resize", "image_mean", "image_std", "include_top", "resample", "rescale_factor",
        "rescale_offset", "size",
    }
)  # fmt: skip
"""Steps that are told here; a picture here is RGB already."""

_NEUTRAL: Final = {"ensure_multiple_of": 1}
"""Steps that do nothing at this value."""

_HINT: Final = "Prepare the pictures yourself: give --data or --sample FILE.npz."
_EFFICIENTNET: Final = "EfficientNetImageProcessor"
_CONVNEXT: Final = "ConvNextImageProcessor"
_CONVNEXT_SQUEEZES_FROM: Final = 384
"""From this size on it resizes both sides, and crops nothing."""
_SHARES: Final = {
    _CONVNEXT: 224 / 256,
    "LevitImageProcessor": 224 / 256,
    "PoolFormerImageProcessor": 0.9,
}
"""Processors whose size is that of the crop -> the share of the resize that the crop keeps."""


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """From a picture of any size to what the model takes: resize, crop, scale, normalise.

    A value ``v`` of 0 to 255 in channel ``c`` becomes ``(v * scale - mean[c]) / std[c]``.

    Attributes:
        size: Height and width in pixels that the model takes.
        resize_shortest: The shortest side becomes this before the crop, and the aspect stays; None
            resizes both sides to ``resize_to``.
        resize_to: Height and width before the crop, whatever the aspect; ``size`` when None.
        crop: Cut ``size`` out of the middle.
        crop_rounding: Where the crop begins when the margin is odd: half a pixel is rounded down,
            as by transformers, or to even, as by timm and torchvision.
        resample: Filter of the resize, as Pillow defines it.
        scale: Factor on the values 0 to 255.
        mean: One per channel, of scaled values.
        std: One per channel, of scaled values.

    Raises:
        DataError: The crop is larger than the picture it is cut from, ``mean`` and ``std`` are not
            three numbers each, or a ``std`` is zero.
    """

    size: tuple[int, int]
    resize_shortest: int | None = None
    resize_to: tuple[int, int] | None = None
    crop: bool = False
    crop_rounding: Literal["down", "even"] = "down"
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        smallest = self.resize_shortest
        height, width = (smallest, smallest) if smallest else self.resize_to or self.size
        if min(self.size) < 1 or height < self.size[0] or width < self.size[1]:
            raise DataError(
                f"a crop of {_pixels(self.size)} does not fit in {_pixels((height, width))}",
                hint="Resize to at least the size of the crop.",
            )
        if not self.crop and (smallest or (height, width) != self.size):
            raise DataError(f"pictures are resized, but not to the {_pixels(self.size)} of size")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise DataError(
                f"mean {list(self.mean)} and std {list(self.std)}: three numbers each are needed,"
                " one per channel, and no std of 0"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture after the resize, in pixels."""
        if self.resize_shortest is None:
            return self.resize_to or self.size
        longest = int(self.resize_shortest * max(height, width) / min(height, width))
        if width <= height:
            return longest, self.resize_shortest
        return self.resize_shortest, longest

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Row and column where the crop of a resized picture begins."""
        margins = (height - self.size[0]), (width - self.size[1])
        if self.crop_rounding == "down":
            return margins[0] // 2, margins[1] // 2
        return round(margins[0] / 2), round(margins[1] / 2)


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def read_processor(file: Path) -> ImagePreprocessing | None:
    """The steps in a ``preprocessor_config.json`` or ``processor_config.json`` of transformers.

    Returns:
        None when the file is not about pictures.

    Raises:
        DataError: It is no JSON object, or has a step that cannot be told.
    """
    try:
        config = record.parse(fs.read_text(file, error=DataError))
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no JSON object")
    return from_processor(config) if is_image_processor(config) else None


def is_image_processor(config: Mapping[str, Any]) -> bool:
    """Whether a processor config is about pictures; those of sounds have a sampling rate."""
    settings = _settings(config)
    return "sampling_rate" not in settings and bool({"size", "image_mean"} & settings.keys())


def from_processor(config: Mapping[str, Any]) -> ImagePreprocessing:
    """The steps of an image processor of transformers.

    Sizes and crops round as the processors do that use Pillow.

    Args:
        config: What ``preprocessor_config.json`` or ``processor_config.json`` holds.

    Raises:
        DataError: It has a step that cannot be told, or says no size; names the key.
    """
    settings = _settings(config)
    name = _class_of(settings)
    _check_steps(settings, name)
    mean, std = _normalisation(settings, name)
    before = _before_crop(settings, name)
    size = _crop(settings, name) or before
    if isinstance(size, int):
        raise DataError(
            f"the image processor resizes the shortest side to {size} and does not crop, so"
            " pictures of unlike shapes stay unlike",
            hint=_HINT,
        )
    return ImagePreprocessing(
        size=size,
        resize_shortest=before if isinstance(before, int) else None,
        resize_to=None if isinstance(before, int) or before == size else before,
        crop=before != size,
        resample=_filter(settings.get("resample", 2)),
        scale=_number(settings, "rescale_factor", 1 / 255) if _on(settings, "do_rescale") else 1.0,
        mean=mean,
        std=std,
    )


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("image_processor")
    return nested if isinstance(nested, Mapping) else config


def _class_of(settings: Mapping[str, Any]) -> str:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    plain = str(named).removesuffix("Fast").removesuffix("Pil")
    return plain.replace("FeatureExtractor", "ImageProcessor")


def _check_steps(settings: Mapping[str, Any], name: str) -> None:
    if name not in _INT_IS_SQUARE:
        raise DataError(
            f"the image processor {name} may do more than resize, crop, scale and normalise;"
            f" known: {', '.join(n for n in _INT_IS_SQUARE if n)}",
            hint=_HINT,
        )
    for key, value in settings.items():
        known = key in _SILENT | _TARGETS | _STEPS or _NEUTRAL.get(key) == value
        if not known and value not in (None, False):
            raise _unsupported(key, value)


def _unsupported(key: str, value: object) -> DataError:
    return DataError(
        f"the image processor has a step that is not supported: {key} is {value!r}", hint=_HINT
    )


def _on(settings: Mapping[str, Any], key: str) -> bool:
    return bool(settings.get(key, True))


def _number(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise DataError(f"the image processor has {key} {value!r}: a number above 0 is needed")
    return float(value)


def _filter(value: object) -> Resample:
    if not isinstance(value, int) or value not in _RESAMPLE:
        raise _unsupported("resample", value)
    return _RESAMPLE[value]


def _normalisation(settings: Mapping[str, Any], name: str) -> tuple[Channels, Channels]:
    """Mean and std; EfficientNet's offset of 1 and its second division are folded in."""
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)
    if _on(settings, "do_normalize"):
        mean, std = _channels(settings, "image_mean"), _channels(settings, "image_std")
    if name == _EFFICIENTNET and _on(settings, "include_top"):
        again = _channels(settings, "image_std")
        std = tuple(one * other for one, other in zip(std, again, strict=True))
    if settings.get("rescale_offset") and _on(settings, "do_rescale"):
        mean = tuple(value + 1.0 for value in mean)
    return mean, std


def _channels(settings: Mapping[str, Any], key: str) -> Channels:
    value: Any = settings.get(key)
    values = value if isinstance(value, list | tuple) else [value] * 3
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise DataError(f"pictures are normalised with {key} {value!r}: numbers are needed")
    return tuple(float(v) for v in values)


def _before_crop(settings: Mapping[str, Any], name: str) -> Side:
    """What a picture is resized to: the shortest side, or height and width."""
    if not _on(settings, "do_resize"):
        raise _unsupported("do_resize", settings["do_resize"])
    size = _size(settings, "size", square=_square_int(settings, name))
    if name not in _SHARES:
        if settings.get("crop_pct") is not None:
            raise _unsupported("crop_pct", settings["crop_pct"])
        return size
    if name == _CONVNEXT and isinstance(size, int) and size >= _CONVNEXT_SQUEEZES_FROM:
        return size, size
    return _enlarged(size, _number(settings, "crop_pct", _SHARES[name]))


def _enlarged(size: Side, share: float) -> Side:
    """The resize of which a crop of ``size`` keeps ``share``; equal sides keep the aspect."""
    if isinstance(size, int):
        return int(size / share)
    height, width = (int(side / share) for side in size)
    return height if height == width else (height, width)


def _crop(settings: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Height and width of the crop; None without one."""
    if name == _CONVNEXT:
        size = _size(settings, "size", square=True)
        return (size, size) if isinstance(size, int) else size
    if not _crops(settings):
        return None
    size = _size(settings, "crop_size", square=True)
    if isinstance(size, int):
        raise _unsupported("crop_size", settings["crop_size"])
    return size


def _crops(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("do_center_crop", settings.get("crop_size") is not None))


def _square_int(settings: Mapping[str, Any], name: str) -> bool:
    if "default_to_square" in settings:
        return bool(settings["default_to_square"])
    return _INT_IS_SQUARE[name] if name else not _crops(settings)


def _size(settings: Mapping[str, Any], key: str, *, square: bool) -> Side:
    """Both sides, or the shortest as one number."""
    value = settings.get(key)
    pairs = value if isinstance(value, Mapping) else {}
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return (value, value) if square else value
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_positive, value)):
        return int(value[0]), int(value[1])
    if pairs.keys() == {"height", "width"} and all(map(_positive, pairs.values())):
        return pairs["height"], pairs["width"]
    if pairs.keys() == {"shortest_edge"} and _positive(pairs["shortest_edge"]):
        return int(pairs["shortest_edge"])
    raise _unsupported(key, value)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def from_timm(config: Mapping[str, Any]) -> ImagePreprocessing:
    """The steps that timm takes in evaluation.

    Args:
        config: ``pretrained_cfg`` of a model of timm.

    Raises:
        DataError: It has a step that cannot be told; names the key.
    """
    channels, height, width = _input_size(config)
    mode = config.get("crop_mode") or "center"
    share = _number(config, "crop_pct", 0.875)
    before = math.floor(height / share), math.floor(width / share)
    keeps_aspect = mode == "center"
    if channels != 3 or mode not in {"center", "squash"} or (keeps_aspect and height != width):
        raise DataError(
            f"timm prepares pictures in a way that is not supported: input_size"
            f" {[channels, height, width]}, crop_mode {mode!r}",
            hint=_HINT,
        )
    return ImagePreprocessing(
        size=(height, width),
        resize_shortest=before[0] if keeps_aspect else None,
        resize_to=None if keeps_aspect else before,
        crop=True,
        crop_rounding="even",
        resample=_timm_filter(config.get("interpolation") or "bilinear"),
        mean=_channels(config, "mean"),
        std=_channels(config, "std"),
    )


def _input_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    size = config.get("input_size")
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(map(_positive, size)):
        raise DataError(f"timm's input_size is {size!r}: channels, height and width are needed")
    return size[0], size[1], size[2]


def _timm_filter(name: object) -> Resample:
    known = next((known for known in _RESAMPLE.values() if known == name), None)
    if known is None:
        raise DataError(
            f"timm resizes by {name!r}; known: {', '.join(_RESAMPLE.values())}", hint=_HINT
        )
    return known


def nominal_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the pictures of a processor whose steps cannot be told; None if unsaid.

    Where only the shortest side is said, a square.
    """
    settings = _settings(config)
    for key in ("crop_size", "size"):
        try:
            size = _size(settings, key, square=True)
        except DataError:
            value = settings.get(key)
            size = value.get("shortest_edge", 0) if isinstance(value, Mapping) else 0
        if isinstance(size, tuple):
            return size
        if _positive(size):
            return size, size
    return None
