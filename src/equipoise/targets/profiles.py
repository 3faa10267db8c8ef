"""The known targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from equipoise.errors import unknown_name
from equipoise.targets.machine import Machine
from equipoise.targets.profile import Int8Scheme, Target

_OPSET: Final = 20
_MAX_IR_VERSION: Final = 13
"""Of onnxruntime 1.32, which the extra asks for at least."""
_DOT_PRODUCT_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def cpu_scheme(machine: Machine) -> Int8Scheme:
    """The integer scheme that ONNX Runtime's CPU kernels want on ``machine``."""
    if machine.architecture in {"aarch64", "arm64"}:
        return Int8Scheme(
            activation="int8",
            weight="int8",
            per_channel=True,
            saturates=False,
            reason="Arm kernels take signed activations and add products in 32 bits",
        )
    vnni = sorted(_DOT_PRODUCT_FLAGS & set(machine.flags))
    reason = (
        f"{vnni[0]} adds u8 x s8 products in 32 bits, so weights use all eight bits"
        if vnni
        else "without VNNI, u8 x s8 products are added in 16 bits and saturate,"
        " so int8 weights keep to seven bits"
    )
    return Int8Scheme(
        activation="uint8",
        weight="int8",
        per_channel=True,
        saturates=not vnni,
        reason=reason,
    )


def _cpu(machine: Machine) -> Target:
    return Target(
        name="cpu",
        summary=f"this machine with ONNX Runtime: {machine.cpu}, {machine.cores} core(s)",
        runtime="onnxruntime",
        int8=cpu_scheme(machine),
        opset=_OPSET,
        max_ir_version=_MAX_IR_VERSION,
    )


_PROFILES: Final[dict[str, Callable[[Machine], Target]]] = {"cpu": _cpu}


def target_names() -> tuple[str, ...]:
    """Names of all targets."""
    return tuple(sorted(_PROFILES))


def get_target(name: str, *, machine: Machine) -> Target:
    """The profile ``name`` as it is for ``machine``.

    Raises:
        UsageError: There is no such target; the message names the known ones.
    """
    if name not in _PROFILES:
        raise unknown_name("target", name, _PROFILES)
    return _PROFILES[name](machine)
