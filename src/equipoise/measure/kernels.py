"""Which kernels a runtime runs, and which of them were lost since.

A runtime rewrites a graph: it puts operators together, and runs in integers what it finds
quantised. When it no longer does, nothing fails and the outputs stay what they were; only the
counts tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from equipoise.runtimes.engine import ENGINE_MANIFEST, EngineFile, read_engine_manifest
from equipoise.runtimes.protocol import SessionSettings

Kernels = Mapping[str, int]
"""Operator type -> count in the graph as the runtime rewrote it; ``{}`` where it does not say."""

_INTEGER_MARKS: Final = (
    "DynamicQuantize", "QLinear", "QOrdered", "QMoE", "QAttention", "QGemm", "Integer", "NBits"
)  # fmt: skip
_INTEGER_TYPES: Final = {"u8", "i8", "int8", "uint8"}
_NOT_INTEGER: Final = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_FUSED_MARKS: Final = (
    "Fused", "Skip", "Bias", "Attention", "Gelu", "Norm", "EmbedLayer", "RotaryEmbedding", "Swish",
    "FastGelu", "QuickGelu", "MatMulActivation",
)  # fmt: skip
_ACTIVATIONS: Final = {"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"}
"""What ONNX Runtime puts into the layer before it, whose name may stay what it was."""

_PREFIXES: Final = ("DynamicQuantize", "QLinear", "QOrdered", "Fused", "Q")
_SUFFIXES: Final = ("IntegerToFloat", "Integer", "NBits")
_ALIKE: Final = {"Gemm": "MatMul", "TransposeMatMul": "MatMul"}


def kernels_of(engine: EngineFile, *, threads: int) -> dict[str, int]:
    """The kernels that run here; as its builder wrote down where the runtime cannot be asked.

    Raises:
        SourceError: The runtime refuses the engine.
    """
    settings = SessionSettings(threads=threads, providers=engine.providers)
    if engine.runtime == "onnxruntime" and not engine.providers:
        from equipoise.runtimes.onnxruntime.builder import rewritten_operators

        return rewritten_operators(engine.file, settings=settings)
    if engine.runtime == "openvino":
        from equipoise.runtimes.openvino.builder import executed

        return executed(engine.file, settings=settings)
    folder = engine.file.parent
    return read_engine_manifest(folder).engine.kernels if _built(engine) else {}


def _built(engine: EngineFile) -> bool:
    return (engine.file.parent / ENGINE_MANIFEST).is_file()


def lost(before: Kernels, now: Kernels) -> tuple[str, ...]:
    """What runs in fewer integer or fused kernels than before, in words.

    An integer kernel counts as lost when its operator runs in float instead: there are fewer in
    integers and more in float. A fused kernel counts as lost when there are fewer, the graph has
    become no smaller, and integers have not taken its place; and an activation that stands alone
    where there was none counts as one, for the layer it was part of keeps its name.
    """
    found = (*_lost_integers(before, now), *_lost_fusions(before, now))
    return found or _bared(before, now)


def _lost_integers(before: Kernels, now: Kernels) -> list[str]:
    (was, was_float), (are, are_float) = _families(before), _families(now)
    return [
        f"{family}: {was[family]} in integers, now {are[family]}, and {are_float[family]} in float"
        for family in sorted(was)
        if are[family] < was[family] and are_float[family] > was_float[family]
    ]


def _lost_fusions(before: Kernels, now: Kernels) -> list[str]:
    gained = sum(_families(now)[0].values()) - sum(_families(before)[0].values())
    fallen = {
        name: count - now.get(name, 0)
        for name, count in before.items()
        if _is_fused(name) and now.get(name, 0) < count
    }
    if sum(now.values()) < sum(before.values()) or sum(fallen.values()) <= gained:
        return []
    return [f"{name}: {before[name]}, now {now.get(name, 0)}" for name in sorted(fallen)]


def _bared(before: Kernels, now: Kernels) -> tuple[str, ...]:
    """Activations that run alone, though nothing else has become more."""
    others = [sum(n for op, n in k.items() if op not in _ACTIVATIONS) for k in (before, now)]
    if not before or others[1] > others[0]:
        return ()
    return tuple(
        f"{name}: {before.get(name, 0)} alone, now {now[name]}"
        for name in sorted(_ACTIVATIONS & set(now))
        if now[name] > before.get(name, 0)
    )


def _families(kernels: Kernels) -> tuple[Counter[str], Counter[str]]:
    """Operator -> how many of it run in integers, and how many in float."""
    integers: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    for name, count in kernels.items():
        (integers if _is_integer(name) else floats)[_family(name)] += count
    return integers, floats


def _is_integer(name: str) -> bool:
    operator, _, numbers = name.partition(" ")
    if operator in _NOT_INTEGER:
        return False
    return numbers in _INTEGER_TYPES or any(mark in operator for mark in _INTEGER_MARKS)


def _is_fused(name: str) -> bool:
    return not _is_integer(name) and any(mark in name for mark in _FUSED_MARKS)


def _family(name: str) -> str:
    """``QLinearConv`` and ``FusedConv`` are convolutions; so is ``Convolution u8``."""
    bare = name.partition(" ")[0]
    if bare in _NOT_INTEGER:
        return bare
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    for suffix in _SUFFIXES:
        bare = bare.removesuffix(suffix)
    return _ALIKE.get(bare, bare)
