"""For which GPUs an engine is built, and on which it may be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from equipoise.errors import IncompatibleError
from equipoise.runtimes.tensorrt.cuda import Gpu
from equipoise.runtimes.tensorrt.flavor import Flavor

FIRST_COMPATIBLE: Final = (8, 0)
"""The compute capability from which a hardware-compatible engine holds."""


def number(capability: str) -> tuple[int, ...]:
    """``8.6`` as (8, 6); () for what is no compute capability."""
    pieces = capability.split(".")
    return tuple(map(int, pieces)) if all(piece.isdigit() for piece in pieces) else ()


def chosen(
    flavor: Flavor, asked: Sequence[str], *, gpu: Gpu | None, compatible: bool
) -> tuple[str, ...]:
    """The compute capabilities to build for.

    Args:
        flavor: What builds.
        asked: What was asked for.
        gpu: The GPU here, if any.
        compatible: Whether other GPUs of its generation and later ones shall load it.

    Raises:
        IncompatibleError: It cannot build for one of them.
    """
    if flavor.capabilities:
        return _ahead_of_time(flavor, asked, gpu=gpu)
    if gpu is None:
        raise IncompatibleError(
            f"{flavor.title} builds for the GPU of the machine it runs on, and there is none here",
            hint="Copy the .onnx file to the device and run `equipoise build` there.",
        )
    return _for_the_gpu_here(flavor, asked, gpu=gpu, compatible=compatible)


def _ahead_of_time(flavor: Flavor, asked: Sequence[str], *, gpu: Gpu | None) -> tuple[str, ...]:
    for capability in asked:
        if capability not in flavor.capabilities:
            raise IncompatibleError(
                f"{flavor.title} cannot build for compute capability {capability}; it can for"
                f" {', '.join(flavor.capabilities)}",
                hint="Data centre GPUs and Jetson take an engine of TensorRT, built on the device:"
                " choose such a target.",
            )
    if not asked and gpu is not None and gpu.compute_capability in flavor.capabilities:
        return (gpu.compute_capability,)
    return tuple(sorted(set(asked) or flavor.usual_capabilities, key=number))


def _for_the_gpu_here(
    flavor: Flavor, asked: Sequence[str], *, gpu: Gpu, compatible: bool
) -> tuple[str, ...]:
    own = gpu.compute_capability
    if compatible and number(own) < FIRST_COMPATIBLE:
        raise IncompatibleError(
            f"a hardware-compatible engine needs a GPU of compute capability 8.0 or later to be"
            f" built; {gpu.name} has {own}"
        )
    for capability in asked:
        held = compatible and number(capability) >= FIRST_COMPATIBLE
        if capability != own and not held:
            raise IncompatibleError(
                f"{flavor.title} builds for the GPU here, {gpu.name} of compute capability {own},"
                f" not for {capability}",
                hint="Run `equipoise build` on the device, or with --hardware-compatible where both"
                " are 8.0 or later.",
            )
    return (own,)


def refuse_other_gpu(gpu: Gpu, built_for: Sequence[str], *, later_gpus: bool) -> None:
    """Raise IncompatibleError unless an engine for ``built_for`` holds on ``gpu``."""
    own = gpu.compute_capability
    if own in built_for or (later_gpus and number(own) >= FIRST_COMPATIBLE):
        return
    raise IncompatibleError(
        f"the engine is for compute capability {', '.join(built_for)}; this GPU, {gpu.name}, has"
        f" {own}",
        hint=f"Build it for this GPU: --compute-capability {own}.",
    )
