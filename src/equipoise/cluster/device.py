"""What machine the device is: a stage like any other, so that it is asked where it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise.launch import Stage
from equipoise.stages import StageRunner
from equipoise.targets.machine import Machine, detect_machine


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Whose device.

    Attributes:
        target: Name of the target.
    """

    target: str


def describe_device(config: DeviceConfig, *, output: Path) -> Machine:  # noqa: ARG001
    """The machine that this runs on."""
    return detect_machine()


DEVICE: Final = Stage(
    name="device",
    function="equipoise.cluster.device:describe_device",
    record=Machine,
    measures=True,
)


def detect_device(runner: StageRunner, *, target: str) -> Machine:
    """The machine that measures for ``runner``: a node with the device, or this one.

    Raises:
        IncompatibleError: The device has left the cluster.
    """
    return runner.run(
        DEVICE, DeviceConfig(target=target), label="find the device", fresh=True
    ).record
