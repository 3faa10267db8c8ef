"""A layer as ONNX Runtime runs it inside a model, without what stands around it when it is alone.

On a CPU the runtime gives convolutions a layout of its own. Inside a model the values stay in that
layout from one to the next; around a lone convolution they are brought into it and back, which
takes a fifth of the time of a 1x1 convolution. So the graph is taken as the runtime rewrote it, and
such nodes at its ends are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs
from equipoise.runtimes.onnxruntime.session import open_inference_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array

_LAYOUT: Final = {"ReorderInput", "ReorderOutput", "Transpose"}
_NAME: Final = "layer.onnx"


def bare(
    model: Any, feeds: dict[str, Array], *, settings: SessionSettings
) -> tuple[Any, dict[str, Array]]:
    """``model`` as rewritten for this CPU, without changes of layout at its ends; and its inputs.

    Args:
        model: ``onnx.ModelProto`` of one layer.
        feeds: Inputs of ``model``.
        settings: How it runs.

    Raises:
        SourceError: ONNX Runtime refuses the model.
    """
    rewritten = _rewritten(model, settings=settings)
    graph = rewritten.graph
    outputs = {value.name for value in graph.output}
    entries = [n for n in graph.node if n.op_type in _LAYOUT and n.input[0] in feeds]
    exits = [n for n in graph.node if n.op_type in _LAYOUT and n.output[0] in outputs]
    if not entries and not exits:
        return model, feeds
    given = {**feeds, **_values(rewritten, entries, feeds)}
    for node in (*entries, *exits):
        graph.node.remove(node)
    _declare(graph, given, ends={node.output[0]: node.input[0] for node in exits})
    return rewritten, {value.name: given[value.name] for value in graph.input}


def _rewritten(model: Any, *, settings: SessionSettings) -> Any:
    onnx: Any = extras.require("onnx")
    with fs.scratch_directory() as folder:
        options = session_options(settings)
        options.optimized_model_filepath = str(folder / _NAME)
        open_inference_session(Path(_NAME), options=options, data=model.SerializeToString())
        return onnx.load(folder / _NAME)


def _values(model: Any, entries: list[Any], feeds: dict[str, Array]) -> dict[str, Array]:
    """What ``entries`` make of the inputs: a graph of them alone, run as it is."""
    if not entries:
        return {}
    onnx: Any = extras.require("onnx")
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for field in ("node", "output", "initializer", "value_info"):
        part.graph.ClearField(field)
    part.graph.node.extend(entries)
    names = [node.output[0] for node in entries]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    part.graph.output.extend(
        onnx.helper.make_tensor_value_info(node.output[0], types[node.input[0]], None)
        for node in entries
    )
    options = session_options(SessionSettings(optimize="none"))
    session = open_inference_session(Path(_NAME), options=options, data=part.SerializeToString())
    return dict(zip(names, session.run(names, feeds), strict=True))


def _declare(graph: Any, given: dict[str, Array], *, ends: dict[str, str]) -> None:
    """Inputs: what is read and not computed. Outputs: what led to an end that was left out."""
    helper: Any = extras.require("onnx").helper
    known = {tensor.name for tensor in graph.initializer}
    known |= {name for node in graph.node for name in node.output}
    read = dict.fromkeys(name for node in graph.node for name in node.input if name)
    graph.ClearField("input")
    graph.input.extend(
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(given[name].dtype), given[name].shape
        )
        for name in read
        if name not in known
    )
    kept = [(ends.get(v.name, v.name), v.type.tensor_type.elem_type) for v in graph.output]
    graph.ClearField("output")
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kept)
    graph.ClearField("value_info")
