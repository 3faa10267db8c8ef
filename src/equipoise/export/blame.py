"""Where an exported file departs from PyTorch: the first node whose numbers differ.

The exporters by ``torch.export`` call a value of the graph like the node of the program that it
comes from, so both sides are run with every intermediate value kept, and compared by name. A
traced graph has names of modules instead: there the outputs of modules are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.data.store import Rows
from equipoise.export.exporters import export_with
from equipoise.export.rung import RungConfig, trace_of
from equipoise.parity.proof import read_proof
from equipoise.provenance import module_of
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import Array, Feeds

_NOISE: Final = 16 * float(np.finfo(np.float32).eps)
_BEYOND_NOISE: Final = 64 * _NOISE
"""No order of summation moves a value by as much."""


@dataclass(frozen=True, kw_only=True)
class BlameConfig:
    """What departs.

    Attributes:
        model: The exported file.
        rung: How it was exported; its proof has the inputs.
    """

    model: Path
    rung: RungConfig


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The first node whose output differs from PyTorch's.

    Attributes:
        node: Its name; empty when nothing that can be compared departs.
        operator: Its operator type.
        module: Path of the PyTorch module that it comes from.
        step: What went wrong there: ``torch.export`` or ``the translation to ONNX``.
        relative: Largest difference over the largest value of the reference.
        before: The same of the values compared before it, at most.
    """

    node: str = ""
    operator: str = ""
    module: str = ""
    step: str = ""
    relative: float = 0.0
    before: float = 0.0

    def in_words(self) -> str:
        """For a message; empty without a node."""
        if not self.node:
            return ""
        module = f" of module {self.module}" if self.module else ""
        return (
            f"the first node that departs, by {self.step}, is {self.node}"
            f" ({self.operator}){module}: its output is off by {self.relative:.2g} of its largest"
            f" value, all before it by at most {self.before:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What PyTorch computed for one value; the paths of the modules it is in, outermost first."""

    value: str
    modules: tuple[str, ...]
    array: Array


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One value on both sides."""

    node: str
    operator: str
    module: str
    reference: Array
    found: Array


def find_departure(config: BlameConfig, *, output: Path) -> Departure:  # noqa: ARG001
    """Compare every value that both sides have, in the order they are computed.

    Raises:
        SourceError: The source cannot be built or exported again.
    """
    proof = read_proof(config.rung.proof)
    names = [spec.name for spec in proof.inputs]
    source = config.rung.source
    named = NamedModule(load_module(source), names=names, source=source.name)
    feeds = Rows(config.rung.proof / "inputs")[0]
    modules = _module_outputs(named, feeds)
    program = export_with(config.rung.rung, trace_of(named, proof, config.rung)).program
    model = onnxio.load_model(config.model)
    if program is None:
        pairs = _file_pairs(model, feeds, _in_scopes(model, modules))
        return _first_departure(pairs, step="the translation to ONNX")
    known = _program_values(program, feeds, names)
    found = _first_departure(_file_pairs(model, feeds, known), step="the translation to ONNX")
    return found if found.node else _first_departure(_pairs(modules, known), step="torch.export")


def _module_outputs(named: NamedModule, feeds: Feeds) -> list[_Known]:
    """The output of every module, in the order they finish."""
    torch = extras.require("torch")
    kept: list[_Known] = []

    def keep(path: str) -> Any:
        def hook(_module: Any, _inputs: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) and result else result
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                array = first.detach().numpy().copy()
                kept.append(_Known(value=path, modules=(path,), array=array))

        return hook

    hooks = [m.register_forward_hook(keep(p)) for p, m in named.module.named_modules() if p]
    named.run(feeds)
    for hook in hooks:
        hook.remove()
    return kept


def _program_values(program: Any, feeds: Feeds, names: Sequence[str]) -> list[_Known]:
    """Every float tensor that the nodes of the program compute."""
    torch = extras.require("torch")
    fx: Any = extras.require("torch.fx")
    kept: list[_Known] = []

    class Recorder(fx.Interpreter):  # type: ignore[misc]
        def run_node(self, node: Any) -> Any:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                array = result.detach().numpy().copy()
                kept.append(_Known(value=node.name, modules=_modules_of(node), array=array))
            return result

    with torch.no_grad():
        Recorder(program.module()).run(*(torch.from_numpy(feeds[name]) for name in names))
    return kept


def _modules_of(node: Any) -> tuple[str, ...]:
    """Paths of the modules around a node of a program; ours, that calls by position, left out."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    paths = (str(path).removeprefix("inner").removeprefix(".") for path, _ in stack)
    return tuple(path for path in paths if path)


def _in_scopes(model: Any, modules: Sequence[_Known]) -> list[_Known]:
    """Module outputs by the name that the last node in the module's scope gives to its value."""
    last = {module_of(node.name, {}): node.output[0] for node in model.graph.node}
    return [replace(known, value=last[known.value]) for known in modules if known.value in last]


def _file_pairs(model: Any, feeds: Feeds, known: Sequence[_Known]) -> list[_Pair]:
    """The values of the file that PyTorch computed too, in the order of the graph."""
    by_value = {k.value: k for k in known}
    found = _values(model, feeds, wanted=set(by_value))
    return [
        _Pair(
            node=node.name or value,
            operator=node.op_type,
            module=next(reversed(by_value[value].modules), ""),
            reference=by_value[value].array,
            found=found[value],
        )
        for node in model.graph.node
        for value in node.output
        if value in found
    ]


def _pairs(modules: Sequence[_Known], known: Sequence[_Known]) -> list[_Pair]:
    """The outputs of modules, and of the last nodes inside them in the program."""
    pairs = []
    for module in modules:
        inside = [k for k in known if module.value in k.modules]
        alike = [k for k in inside if k.array.shape == module.array.shape]
        if alike:
            pair = {"node": alike[-1].value, "operator": "last node", "module": module.value}
            pairs.append(_Pair(**pair, reference=module.array, found=alike[-1].array))
    return pairs


def _first_departure(pairs: Sequence[_Pair], *, step: str) -> Departure:
    """Noise grows on the way; what departs stands far above it: half-way, on a scale of powers."""
    errors = [_relative(pair.reference, pair.found) for pair in pairs]
    worst = max(errors, default=0.0)
    if worst <= _BEYOND_NOISE:
        return Departure()
    limit = math.sqrt(_NOISE * worst)
    first = next(index for index, error in enumerate(errors) if error > limit)
    return Departure(
        node=pairs[first].node,
        operator=pairs[first].operator,
        module=pairs[first].module,
        step=step,
        relative=errors[first],
        before=max(errors[:first], default=0.0),
    )


def _relative(reference: Array, found: Array) -> float:
    if reference.shape != found.shape:
        return 1.0
    scale = float(np.abs(reference).max(initial=0.0))
    difference = float(np.abs(found.astype(np.float64) - reference).max(initial=0.0))
    return min(difference / scale, 1e6) if scale and math.isfinite(difference) else 0.0


def _values(model: Any, feeds: Feeds, *, wanted: set[str]) -> Mapping[str, Array]:
    """Intermediate values of the file by name, without the runtime's own rewriting."""
    helper: Any = extras.require("onnx").helper
    types = onnxio.value_types(model)
    present = {value.name for value in model.graph.output}
    made = {name for node in model.graph.node for name in node.output}
    names = sorted(name for name in wanted & made if name in types)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None)
        for name in names
        if name not in present
    )
    with fs.scratch_directory() as folder:
        onnxio.save_model(model, folder / "kept.onnx")
        settings = SessionSettings(optimize="none")
        with session_opener("onnxruntime")(folder / "kept.onnx", settings=settings) as session:
            results = session.run(feeds)
    return {name: results[name] for name in names}
