"""A model with its preprocessing inside computes what it does on pictures prepared outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from equipoise import onnxio
from equipoise.data.images import apply
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.errors import IncompatibleError, UsageError
from equipoise.graph.embed import embed_preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LEVEL = 1 / 255 / 0.224
"""One of 255 after normalisation, about."""


def preprocessing(**settings: Any) -> ImagePreprocessing:
    return ImagePreprocessing(**{"size": (32, 32), **IMAGENET, **settings})


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def passing(
    *, opset: int = 20, dtype: int = TensorProto.FLOAT, size: tuple[Any, Any] = (32, 32)
) -> onnx_ir.Model:
    """A model whose output is its input, so that what was embedded shows."""
    shape = ["batch", 3, *size]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["y"])],
        "passing",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
    )
    opsets = [helper.make_opsetid("", opset)]
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def embedded(model: onnx_ir.Model, steps: ImagePreprocessing, path: Path, **how: Any) -> Path:
    embed_preprocessing(model, steps, **how)
    onnxio.save_ir(model, path)
    onnx.checker.check_model(path, full_check=True)
    return path


def test_normalisation_is_the_same_inside(cnn: Any, tmp_path: Path) -> None:
    """An exported CNN takes bytes and gives the logits that it gave for floats."""
    model = onnxio.load_ir(cnn.path)
    embedded(model, preprocessing(), tmp_path / "model.onnx")
    assert [str(spec) for spec in onnxio.ir_specs(model)[0]] == ["image: uint8[batch, 32, 32, 3]"]
    batch = pictures(4, 32, 32)
    prepared = np.concatenate([apply(picture, preprocessing()) for picture in batch])
    wanted = run(cnn.path, {"image": prepared})
    found = run(tmp_path / "model.onnx", {"image": batch})
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_only_four_nodes_come_and_the_cast_reads_the_input(tmp_path: Path) -> None:
    """Scale, mean and std are one product and one sum."""
    path = embedded(passing(), preprocessing(), tmp_path / "model.onnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes == ["Cast", "Transpose", "Mul", "Add", "Identity"]


STEPS = {
    "straight": {},
    "shortest and crop": {"resize_shortest": 37, "crop": True},
    "both sides and crop": {"resize_to": (40, 35), "crop": True},
    "wide": {"size": (48, 24)},
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(97, 150), (150, 97), (333, 500), (20, 31), (32, 32)])
def test_resize_and_crop_are_pillows_within_one_level(
    shape: tuple[int, int], resample: Any, steps: dict[str, Any], tmp_path: Path
) -> None:
    """Larger and smaller noise, wide and high: nine of ten values are equal, none is further."""
    chosen = preprocessing(**steps, resample=resample)
    model = passing(size=chosen.size)
    path = embedded(model, chosen, tmp_path / "model.onnx", resize=True)
    assert str(onnxio.ir_specs(model)[0][0]) == "image: uint8[batch, height, width, 3]"
    picture = pictures(*shape)
    found = run(path, {"image": picture[np.newaxis]})
    wanted = apply(picture, chosen)
    assert found.shape == wanted.shape
    distance = np.abs(found - wanted)
    assert distance.max() < 1.05 * LEVEL
    assert (distance < 1e-5).mean() > 0.9


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_where_pillow_takes_the_height_first_photos_differ_by_two_levels(
    resample: Any, tmp_path: Path
) -> None:
    """Its bytes between the two passes are others; soft edges show little of it."""
    chosen = preprocessing(size=(24, 48), resample=resample)
    path = embedded(passing(size=chosen.size), chosen, tmp_path / "model.onnx", resize=True)
    small = Image.fromarray(pictures(10, 10))
    picture = np.asarray(small.resize((97, 150), Image.Resampling.BICUBIC))
    distance = np.abs(run(path, {"image": picture[np.newaxis]}) - apply(picture, chosen))
    assert distance.max() < 2.1 * LEVEL
    assert distance.mean() < 0.2 * LEVEL


def test_batch_of_pictures_is_resized(cnn: Any, tmp_path: Path) -> None:
    """The output of the CNN moves by no more than the resized bytes do."""
    steps = preprocessing(resize_shortest=36, crop=True, resample="bicubic")
    embedded(onnxio.load_ir(cnn.path), steps, tmp_path / "model.onnx", resize=True)
    batch = pictures(3, 60, 80)
    wanted = run(cnn.path, {"image": np.concatenate([apply(p, steps) for p in batch])})
    np.testing.assert_allclose(run(tmp_path / "model.onnx", {"image": batch}), wanted, atol=1e-3)


def test_model_in_float16_gets_float16(tmp_path: Path) -> None:
    """The arithmetic is float32 and the last step a cast."""
    path = embedded(passing(dtype=TensorProto.FLOAT16), preprocessing(), tmp_path / "model.onnx")
    picture = pictures(1, 32, 32)
    found = run(path, {"image": picture})
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, apply(picture[0], preprocessing()).astype(np.float16))


def test_dynamic_height_and_width_stay_dynamic_without_resize(tmp_path: Path) -> None:
    """A fully convolutional model takes pictures of any size, before and after."""
    model = passing(size=("rows", "columns"))
    path = embedded(model, preprocessing(), tmp_path / "model.onnx")
    assert str(onnxio.ir_specs(model)[0][0]) == "image: uint8[batch, rows, columns, 3]"
    assert run(path, {"image": pictures(2, 7, 9)}).shape == (2, 3, 7, 9)


def test_what_cannot_be_embedded_is_refused(block: Any) -> None:
    """No picture, another size, a filter or opset without Resize."""
    with pytest.raises(UsageError, match=r"not exactly one image input.*such inputs: none"):
        embed_preprocessing(onnxio.load_ir(block.path), preprocessing())
    with pytest.raises(UsageError, match=r"'picture' is no image input.*such inputs: image"):
        embed_preprocessing(passing(), preprocessing(), input_name="picture")
    with pytest.raises(IncompatibleError, match=r"takes pictures of 32x32; .* makes 24x24"):
        embed_preprocessing(passing(), preprocessing(size=(24, 24)))
    with pytest.raises(IncompatibleError, match="no lanczos resampling"):
        embed_preprocessing(passing(), preprocessing(resample="lanczos"), resize=True)
    with pytest.raises(IncompatibleError, match="opset 17 has no antialiased Resize"):
        embed_preprocessing(passing(opset=17), preprocessing(), resize=True)


def test_refused_model_is_left_as_it_was() -> None:
    """Nothing is half-embedded."""
    model = passing()
    before = onnx_ir.to_proto(model).SerializeToString()
    with pytest.raises(IncompatibleError):
        embed_preprocessing(model, preprocessing(resample="nearest"), resize=True)
    assert onnx_ir.to_proto(model).SerializeToString() == before
