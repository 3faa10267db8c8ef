"""NVIDIA GPUs of this machine, as the driver's own library tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from equipoise import extras


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Product name.
        compute_capability: ``8.6``.
        memory_bytes: Its memory.
        driver: Version of the driver.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


def detect_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs; none without a driver, or without the package that asks it."""
    if not extras.installed("pynvml"):
        return ()
    nvml: Any = extras.require("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or none that answers
        return ()
    try:
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=str(nvml.nvmlDeviceGetName(handle)),
        compute_capability=f"{major}.{minor}",
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        driver=str(nvml.nvmlSystemGetDriverVersion()),
    )
