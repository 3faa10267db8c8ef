"""Faults planted into ONNX files by hand, as exporters, fusers and quantisers make them by mistake.

Each planter takes a model and a random generator, changes the model in place and gives the name of
the node that is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from equipoise import extras, onnxio, provenance
from equipoise.spec import Array

Planter = Callable[[Any, np.random.Generator], str]


def _onnx() -> Any:
    return extras.require("onnx")


def _named(model: Any, *operators: str) -> list[Any]:
    return [node for node in model.graph.node if node.op_type in operators]


def _pick(nodes: Iterable[Any], rng: np.random.Generator) -> Any:
    found = list(nodes)
    return found[int(rng.integers(len(found)))]


def _array(model: Any, name: str) -> Array:
    return _onnx().numpy_helper.to_array(onnxio.initializers(model)[name])


def _own_constant(model: Any, node: Any, index: int, array: Array) -> None:
    """Give a node a constant of its own in the place of one that others may read."""
    name = f"{node.input[index]}.planted"
    model.graph.initializer.append(
        _onnx().numpy_helper.from_array(np.ascontiguousarray(array), name)
    )
    node.input[index] = name


def changed_weight(model: Any, rng: np.random.Generator) -> str:
    """One large weight of one layer made -2 times what it was: two bits of a float turned over.

    A weight that is stored in integers has its sign changed.
    """
    constants = onnxio.initializers(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = _named(model, "Conv", "FusedConv", "Gemm", "MatMul")
    stored = [(n, n, 1) for n in layers if n.input[1] in constants]
    stored += [
        (layer, maker, 0)
        for layer in layers
        for maker in [makers.get(layer.input[1])]
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in constants
    ]
    layer, holder, index = _pick(stored, rng)
    array = _array(model, holder.input[index]).copy()
    large = np.argsort(np.abs(array.astype(np.float32)).ravel())[-max(array.size // 4, 1) :]
    place = int(rng.choice(large))
    before = array.ravel()[place]
    array.ravel()[place] = -2 * before if array.dtype.kind == "f" else max(-int(before), -127)
    _own_constant(model, holder, index, array)
    return str(layer.name)


def swapped_transpose(model: Any, rng: np.random.Generator) -> str:
    """Two axes of one Transpose exchanged; without one, height and width behind a node."""
    found = _named(model, "Transpose")
    if found:
        node = _pick(found, rng)
        perm = list(onnxio.attribute(node, "perm", []))
        a, b = sorted(rng.choice(len(perm) - 1, 2, replace=False) + 1)
        perm[a], perm[b] = perm[b], perm[a]
        _set(node, "perm", perm)
        return str(node.name)
    return _behind(model, _pick(_named(model, "Conv", "Clip", "Add"), rng))


def _behind(model: Any, before: Any) -> str:
    """Exchange the last two axes of what ``before`` gives; its value keeps its name."""
    value, inner = before.output[0], f"{before.output[0]}.untransposed"
    before.output[0] = inner
    name = f"{before.name}.transpose"
    node = _onnx().helper.make_node("Transpose", [inner], [value], name=name, perm=[0, 1, 3, 2])
    model.graph.node.insert(list(model.graph.node).index(before) + 1, node)
    return name


def wrong_epsilon(model: Any, rng: np.random.Generator) -> str:
    """The default epsilon of ONNX, 1e-5, in one layer normalisation that was trained with 1e-12."""
    node = _pick(_named(model, "LayerNormalization"), rng)
    _set(node, "epsilon", 1e-5)
    return str(node.name)


def folded_epsilon(statistics: Mapping[str, Mapping[str, Array]]) -> Planter:
    """A batch normalisation folded into its convolution with 1e-5 in the place of 1e-3.

    Args:
        statistics: Module path of a batch normalisation -> ``running_var``, ``running_mean``,
            ``weight`` and ``bias``.
    """

    def plant(model: Any, rng: np.random.Generator) -> str:
        nodes = [n for n in _named(model, "Conv") if provenance.module_path(n) in statistics]
        node = _pick(nodes, rng)
        known = statistics[provenance.module_path(node)]
        ratio = np.sqrt((known["running_var"] + 1e-3) / (known["running_var"] + 1e-5))
        weight, bias = (_array(model, node.input[index]) for index in (1, 2))
        shifted = known["bias"] + (bias - known["bias"]) * ratio
        scaled = weight * ratio.reshape(-1, 1, 1, 1)
        _own_constant(model, node, 1, scaled.astype(np.float32))
        _own_constant(model, node, 2, shifted.astype(np.float32))
        return str(node.name)

    return plant


def saturating(model: Any, rng: np.random.Generator) -> str:
    """The scale of one activation a quarter of what it should be: what is larger is cut off."""
    constants = onnxio.initializers(model)
    nodes = [n for n in _named(model, "QuantizeLinear") if n.input[1] in constants]
    node = _pick(nodes, rng)
    scale = _array(model, node.input[1]) / np.float32(4)
    name = f"{node.input[1]}.planted"
    model.graph.initializer.append(_onnx().numpy_helper.from_array(np.asarray(scale), name))
    pair = [n for n in _named(model, "DequantizeLinear") if n.input[0] == node.output[0]]
    for each in (node, *pair):
        each.input[1] = name
    return str(node.name)


def wrong_padding(model: Any, rng: np.random.Generator) -> str:
    """All padding of one convolution on one side: the same shape, shifted."""
    nodes = [n for n in _named(model, "Conv") if any(onnxio.attribute(n, "pads", []))]
    node = _pick(nodes, rng)
    top, left, bottom, right = onnxio.attribute(node, "pads", [])
    pads = [top + bottom, left, 0, right] if rng.integers(2) else [top, left + right, bottom, 0]
    if pads == [top, left, bottom, right]:
        pads = [bottom, right, top, left]
    if pads == [top, left, bottom, right]:
        pads = [0, left, top + bottom, right]
    _set(node, "pads", pads)
    return str(node.name)


def wrong_mask(model: Any, rng: np.random.Generator) -> str:
    """What masks padded tokens: its two values exchanged, too small, or read by one layer alone."""
    node = _mask(model)
    way = int(rng.integers(3))
    if way == 0:
        node.input[1], node.input[2] = node.input[2], node.input[1]
    elif way == 1:
        small = -float(rng.choice([1.0, 3.0, 10.0]))
        _own_constant(model, node, 2, np.full_like(_array(model, node.input[2]), small))
    else:
        return _unmasked(model, node.output[0], rng)
    return str(node.name)


def _mask(model: Any) -> Any:
    """The Where that gives minus infinity to padded tokens."""
    constants = onnxio.initializers(model)
    return next(
        node
        for node in _named(model, "Where")
        if node.input[2] in constants and (_array(model, node.input[2]) < -1e30).all()
    )


def _unmasked(model: Any, mask: str, rng: np.random.Generator) -> str:
    """One layer adds zero where it should add the mask."""
    adding = [n for n in model.graph.node if mask in n.input and n.op_type == "Add"]
    node = _pick(adding, rng)
    zero = f"{node.name}.zero"
    model.graph.initializer.append(_onnx().numpy_helper.from_array(np.zeros(1, np.float32), zero))
    node.input[list(node.input).index(mask)] = zero
    return str(node.name)


def bad_fusion(model: Any, rng: np.random.Generator) -> str:
    """A fused node that lost a bias, has another activation, or approximates what was exact."""
    ways: dict[str, tuple[Callable[[Any], None], ...]] = {
        "SkipLayerNormalization": (_lost_skip_bias,),
        "BiasGelu": (_approximate_gelu,),
        "Attention": (_lost_mask,),
        "FusedConv": (_lost_bias, _wrong_bound),
    }
    present = sorted({n.op_type for n in model.graph.node} & ways.keys())
    node = _pick(_named(model, str(rng.choice(present))), rng)
    choices = ways[node.op_type]
    choices[int(rng.integers(len(choices)))](node)
    return str(node.name)


def _lost_skip_bias(node: Any) -> None:
    del node.input[4:]


def _lost_bias(node: Any) -> None:
    del node.input[2:]


def _approximate_gelu(node: Any) -> None:
    """FastGelu, by the hyperbolic tangent, adds a bias too."""
    node.op_type = "FastGelu"


def _lost_mask(node: Any) -> None:
    """Attention without its additive mask."""
    del node.input[5:]


def _wrong_bound(node: Any) -> None:
    """A Clip to 6 fused with the bound of another."""
    _set(node, "activation_params", [0.0, 1.0])


def _set(node: Any, name: str, value: object) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, _onnx().helper.make_attribute(name, value)])
