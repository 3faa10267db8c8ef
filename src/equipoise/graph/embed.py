"""Image preprocessing inside the graph: a device hands over the bytes of its camera or decoder.

    uint8[batch, height, width, 3] ─ (Resize ─ Slice) ─ Cast ─ Transpose ─ Mul ─ Add ─ the model

The steps are those of ``equipoise.data.images.apply``. Without a resize the cast comes first:
TensorRT lets nothing else read a uint8 input. A resize works on bytes, as Pillow does, which makes
it round as Pillow does; and before the transposition, because ONNX Runtime 1.32 moves one through a
Resize that has ``axes`` and gets its sizes wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import IncompatibleError, UsageError

_RESIZE_OPSET: Final = 18
"""Antialiasing came to Resize with opset 18."""

_RESIZE_MODES: Final[dict[str, dict[str, Any]]] = {
    "bilinear": {"mode": "linear"},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
}
"""Resampling of Pillow -> attributes of Resize. Pillow's cubic is the one of Keys (1981)."""


def embed_preprocessing(
    model: Any,
    preprocessing: ImagePreprocessing,
    *,
    input_name: str | None = None,
    resize: bool = False,
) -> str:
    """Put the normalisation of pictures in front of ``model``, in place.

    The image input, float[batch, 3, height, width], becomes uint8[batch, height, width, 3], RGB,
    under the same name. ``(x * scale - mean) / std`` becomes one product and one sum per channel.

    Args:
        model: ``onnx_ir.Model``.
        preprocessing: What the model was trained with.
        input_name: The image input; needed when several inputs could be it.
        resize: Also resize and crop any picture to ``preprocessing.size``, so that height and width
            of the input are dynamic. Without it they are those of the model. In ONNX Runtime the
            bytes differ from Pillow's by at most 1 of 255, unless Pillow 13 takes the height first,
            where that is less work: then sharp edges differ by more, and photos by 2.

    Returns:
        The name of the image input.

    Raises:
        UsageError: No input, or more than one, takes pictures of so many channels.
        IncompatibleError: The model takes another size, or its opset or Resize cannot do it.
    """
    image = _image_input(model, len(preprocessing.mean), name=input_name)
    _check_size(image, preprocessing.size)
    if resize:
        _check_resizable(model, preprocessing)
    chain = _Chain(graph=model.graph, name=image.name)
    picture = _picture_input(image, resize=resize)
    pixels = _resized(chain, picture, preprocessing) if resize else picture
    value = _normalised(chain, pixels, preprocessing)
    value = value if image.dtype.name == "FLOAT" else chain.cast(value, image.dtype)
    value.shape, value.type = image.shape, image.type
    _replace_input(model.graph, image, picture, by=value)
    return str(picture.name)


def resizable(preprocessing: ImagePreprocessing, *, opset: int) -> bool:
    """Whether ONNX has the filter of ``preprocessing``, at that opset."""
    return preprocessing.resample in _RESIZE_MODES and opset >= _RESIZE_OPSET


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """Adds nodes and constants that carry the name of the image input."""

    graph: Any
    name: str

    def node(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        """The output of a new node, which the graph's sort moves before its readers."""
        ir: Any = extras.require("onnx_ir")
        output = ir.Value(name=f"{self.name}/{operator}_{len(self.graph)}")
        node = ir.node(operator, inputs, attributes, outputs=[output], name=output.name)
        self.graph.append(node)
        return output

    def cast(self, value: Any, dtype: Any) -> Any:
        return self.node("Cast", value, to=int(dtype))

    def constant(self, name: str, array: Any) -> Any:
        ir: Any = extras.require("onnx_ir")
        tensor = ir.tensor(array, name=f"{self.name}/{name}")
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self.graph.register_initializer(value)
        return value


def _image_input(model: Any, channels: int, *, name: str | None) -> Any:
    """The one float input of rank 4 with so many channels, or the one called ``name``."""
    found = {
        value.name: value
        for value in model.graph.inputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) == 4
        and (value.shape[1] == channels or not isinstance(value.shape[1], int))
    }
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        wanted = f"input {name!r} is no" if name else "there is not exactly one"
        raise UsageError(
            f"{wanted} image input float[batch, {channels}, height, width];"
            f" such inputs: {', '.join(sorted(found)) or 'none'}"
        )
    return found[name]


def _check_size(image: Any, size: tuple[int, int]) -> None:
    fixed = [(dim, want) for dim, want in zip(image.shape[2:], size, strict=True) if dim != want]
    if any(isinstance(dim, int) for dim, _ in fixed):
        raise IncompatibleError(
            f"input {image.name!r} takes pictures of {image.shape[2]}x{image.shape[3]};"
            f" the preprocessing makes {size[0]}x{size[1]}"
        )


def _check_resizable(model: Any, preprocessing: ImagePreprocessing) -> None:
    opset = model.opset_imports[""]
    if opset < _RESIZE_OPSET:
        raise IncompatibleError(
            f"opset {opset} has no antialiased Resize; it needs {_RESIZE_OPSET}",
            hint="Export with a higher opset, or resize before the model.",
        )
    if preprocessing.resample not in _RESIZE_MODES:
        raise IncompatibleError(
            f"ONNX has no {preprocessing.resample} resampling like Pillow's; it has"
            f" {', '.join(_RESIZE_MODES)}",
            hint="Resize before the model.",
        )


def _picture_input(image: Any, *, resize: bool) -> Any:
    """The new input, uint8[batch, height, width, channels]."""
    ir: Any = extras.require("onnx_ir")
    batch, channels, height, width = image.shape
    sides = ("height", "width") if resize else (height, width)
    return ir.Value(
        name=image.name,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([batch, *sides, channels]),
    )


def _resized(chain: _Chain, picture: Any, preprocessing: ImagePreprocessing) -> Any:
    """uint8[batch, *size, channels].

    Like Pillow, the weights of a pixel near the edge are those inside the picture, made to sum to
    one; ONNX calls it ``exclude_outside``.
    """
    target = _target(chain, picture, preprocessing)
    resized = chain.node(
        "Resize", picture, None, None, target, axes=[1, 2], antialias=1, exclude_outside=1,
        coordinate_transformation_mode="half_pixel", **_RESIZE_MODES[preprocessing.resample],
    )  # fmt: skip
    if not preprocessing.crop:
        return resized
    return _cropped(chain, resized, target, size=preprocessing.size)


def _target(chain: _Chain, picture: Any, preprocessing: ImagePreprocessing) -> Any:
    """int64[2]: height and width after the resize, rounded down where the aspect is kept."""
    if preprocessing.resize_shortest is None:
        return chain.constant("resized", np.array(preprocessing.resize_to or preprocessing.size))
    sides = chain.node("Shape", picture, start=1, end=3)
    wanted = chain.constant("shortest", np.array([preprocessing.resize_shortest]))
    scaled = chain.node("Mul", sides, wanted)
    return chain.node("Div", scaled, chain.node("ReduceMin", sides, keepdims=1))


def _cropped(chain: _Chain, picture: Any, shape: Any, *, size: tuple[int, int]) -> Any:
    """The middle of ``picture``, whose height and width are ``shape``; half a pixel goes down."""
    wanted = chain.constant("size", np.array(size))
    margin = chain.node("Sub", shape, wanted)
    start = chain.node("Div", margin, chain.constant("two", np.array([2])))
    axes = chain.constant("axes", np.array([1, 2]))
    return chain.node("Slice", picture, start, chain.node("Add", start, wanted), axes)


def _normalised(chain: _Chain, pixels: Any, preprocessing: ImagePreprocessing) -> Any:
    """float32[batch, channels, height, width].

    ``(x * scale - mean) / std`` as ``x * (scale / std) + (-mean / std)``.
    """
    dtypes: Any = extras.require("onnx_ir").DataType
    planes = chain.node("Transpose", chain.cast(pixels, dtypes.FLOAT), perm=[0, 3, 1, 2])
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    factor = (preprocessing.scale / std).astype(np.float32).reshape(1, -1, 1, 1)
    shift = (-mean / std).astype(np.float32).reshape(1, -1, 1, 1)
    scaled = chain.node("Mul", planes, chain.constant("factor", factor))
    return chain.node("Add", scaled, chain.constant("shift", shift))


def _replace_input(graph: Any, image: Any, picture: Any, *, by: Any) -> None:
    """Let the readers of ``image`` read ``by``, and the graph take ``picture`` in its place."""
    image.replace_all_uses_with(by)
    graph.inputs[list(graph.inputs).index(image)] = picture
    graph.sort()
