"""The known targets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from equipoise.errors import IncompatibleError, unknown_name
from equipoise.targets import schemes
from equipoise.targets.machine import Machine
from equipoise.targets.profile import Int8Scheme, Target

_DOT_PRODUCT_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def cpu_scheme(machine: Machine) -> Int8Scheme:
    """The integer scheme that ONNX Runtime's CPU kernels want on ``machine``."""
    if machine.architecture in {"aarch64", "arm64"}:
        return schemes.ARM64
    return schemes.X86_VNNI if _DOT_PRODUCT_FLAGS & set(machine.flags) else schemes.X86_AVX2


def _onnxruntime(name: str, summary: str, *, int8: Int8Scheme) -> Target:
    """A CPU with onnxruntime 1.32, which the extra asks for at least."""
    return Target(
        name=name, summary=summary, runtime="onnxruntime", int8=int8, opset=20, max_ir_version=13
    )


_ALL: Final = (
    _onnxruntime("cpu", "this machine with ONNX Runtime", int8=schemes.X86_AVX2),
    _onnxruntime("x86-avx2", "x86-64 CPUs without VNNI, with ONNX Runtime", int8=schemes.X86_AVX2),
    _onnxruntime(
        "x86-vnni", "x86-64 CPUs with VNNI or AMX, with ONNX Runtime", int8=schemes.X86_VNNI
    ),
    _onnxruntime(
        "arm64", "64-bit Arm CPUs (Raspberry Pi, Graviton), with ONNX Runtime", int8=schemes.ARM64
    ),
    Target(
        name="tensorrt",
        summary="NVIDIA GPUs and Jetson with TensorRT 10 or 11",
        runtime="tensorrt",
        int8=schemes.TENSORRT,
        opset=18,  # JetPack 6 stays on TensorRT 10, whose parser reads no IR above 10
        max_ir_version=10,
        resizes=False,
    ),
    Target(
        name="tensorrt-rtx",
        summary="NVIDIA RTX GPUs with TensorRT-RTX; mind that fp16 may be faster there than int8",
        runtime="tensorrt-rtx",
        int8=schemes.TENSORRT,
        opset=20,
        max_ir_version=13,
        resizes=False,
    ),
    Target(
        name="openvino",
        summary="Intel CPUs, GPUs and NPUs with OpenVINO",
        runtime="openvino",
        int8=schemes.OPENVINO,
        opset=20,
        max_ir_version=13,
        resizes=False,
    ),
    Target(
        name="qnn-htp",
        summary="Qualcomm Hexagon NPUs with ONNX Runtime's QNN provider, 8-bit activations",
        runtime="qnn",
        int8=schemes.QNN_HTP,
        opset=20,
        max_ir_version=13,
        resizes=False,
    ),
    Target(
        name="qnn-htp-16",
        summary="Qualcomm Hexagon NPUs with ONNX Runtime's QNN provider, 16-bit activations",
        runtime="qnn",
        int8=schemes.QNN_HTP_16,
        opset=21,
        max_ir_version=13,
        resizes=False,
    ),
    Target(
        name="vitis-ai",
        summary="AMD Ryzen AI and Versal NPUs with ONNX Runtime's Vitis AI provider",
        runtime="vitis-ai",
        int8=schemes.VITIS_AI,
        opset=18,  # its guide recommends 17, below which torch's exporter does not go reliably
        max_ir_version=10,
        resizes=False,
    ),
)
_TARGETS: Final = {target.name: target for target in _ALL}


def target_names() -> tuple[str, ...]:
    """Names of all targets."""
    return tuple(sorted(_TARGETS))


def get_target(name: str, *, machine: Machine) -> Target:
    """The profile ``name``; ``cpu`` is what ``machine`` is.

    Raises:
        UsageError: There is no such target; the message names the known ones.
    """
    if name not in _TARGETS:
        raise unknown_name("target", name, _TARGETS)
    target = _TARGETS[name]
    if name != "cpu":
        return target
    summary = f"{target.summary}: {machine.cpu}, {machine.cores} core(s)"
    return replace(target, summary=summary, int8=cpu_scheme(machine))


def require_measurable(target: Target, *, machine: Machine, runtimes: Collection[str]) -> None:
    """Refuse to measure on a machine that is not the target.

    Args:
        target: What engines are for.
        machine: Where they would run.
        runtimes: Names of the runtimes that equipoise can run.

    Raises:
        IncompatibleError: The target's runtime is not among them, or its CPU is of another kind.
    """
    hint = f"Make its file with `equipoise quantize --target {target.name}` and measure it there."
    if target.runtime not in runtimes:
        raise IncompatibleError(
            f"the target {target.name!r} needs the runtime {target.runtime!r}, which equipoise"
            f" cannot run here; it runs {', '.join(sorted(runtimes))}",
            hint=hint,
        )
    if target.int8 != cpu_scheme(machine):
        raise IncompatibleError(
            f"this machine ({machine.cpu}) is no {target.name!r}, so what it measures would not"
            f" hold there: {target.summary}",
            hint=hint,
        )
