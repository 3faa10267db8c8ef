"""A real Ray cluster of three nodes on this machine; one carries the label of the device."""

from __future__ import annotations

import dataclasses
import importlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TARGET = "cpu"


@dataclasses.dataclass
class Nodes:
    """The cluster; its nodes by name."""

    cluster: Any
    folder: Path
    by_name: dict[str, Any]
    client_port: int

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, name: str, **options: Any) -> None:
        cache = self.folder / name
        cache.mkdir(exist_ok=True)
        environment = {"EQUIPOISE_CACHE_DIR": str(cache), **options.pop("environment", {})}
        self.by_name[name] = self.cluster.add_node(
            num_cpus=1, env_vars=environment, include_dashboard=False, **options
        )

    def id_of(self, name: str) -> str:
        return str(self.by_name[name].node_id)

    def kill(self, name: str) -> None:
        """All its processes at once, as when the power goes."""
        self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(condition: Callable[[], object], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of the digit network, trained for a moment."""
    train: Any = importlib.import_module("examples.digits.train")
    from safetensors.torch import save_file

    monkeypatch.setattr(train, "EPOCHS", 2)
    model, _ = train.train()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"
