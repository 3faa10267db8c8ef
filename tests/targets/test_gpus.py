"""GPUs as NVIDIA's library tells of them, and which targets a machine is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from equipoise import extras
from equipoise.targets import detect as detecting
from equipoise.targets.detect import detect_all
from equipoise.targets.gpus import Gpu, detect_gpus

ADA = Gpu(name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 << 30, driver="590.1")


class _NoDriverError(Exception):
    pass


def _no_driver() -> None:
    raise _NoDriverError


def _library(**calls: object) -> SimpleNamespace:
    """What pynvml offers, with one L4."""
    return SimpleNamespace(
        NVMLError=_NoDriverError,
        **{
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 9),
            "nvmlDeviceGetName": lambda _: ADA.name,
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=ADA.memory_bytes),
            "nvmlSystemGetDriverVersion": lambda: ADA.driver,
        }
        | calls,
    )


def test_the_real_library_finds_gpus_where_a_driver_is_loaded() -> None:
    """And none elsewhere; the kernel says whether there is a driver."""
    if not extras.installed("pynvml"):
        pytest.skip("the extra 'nvidia' is not installed")
    assert bool(detect_gpus()) == Path("/proc/driver/nvidia/version").exists()


def test_a_fake_library_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, compute capability, memory, driver; nothing without a driver or a package."""
    monkeypatch.setattr(extras, "installed", lambda _: True)
    monkeypatch.setitem(sys.modules, "pynvml", _library())
    assert detect_gpus() == (ADA,)
    monkeypatch.setitem(sys.modules, "pynvml", _library(nvmlInit=_no_driver))
    assert detect_gpus() == ()
    monkeypatch.setattr(extras, "installed", lambda _: False)
    assert detect_gpus() == ()


def test_targets_of_the_gpu_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By compute capability; without a GPU the reason is told."""
    monkeypatch.setattr(detecting, "detect_gpus", lambda: (ADA,))
    found = detect_all()
    assert {"l4", "rtx-ada", "cpu"} <= set(found.targets)
    assert not {"a10", "h100", "jetson-orin-nano"} & set(found.targets)
    monkeypatch.setattr(detecting, "detect_gpus", lambda: ())
    found = detect_all()
    assert "l4" not in found.targets
    assert found.no_gpu
