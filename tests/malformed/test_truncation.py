"""M1: every file that equipoise reads, cut before every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.malformed import material
from tests.malformed.counting import Campaign, Case, every_cut

from equipoise.bundle.golden import Golden, golden_bytes
from equipoise.data.store import write_rows


def _raw_onnx(folder: Path) -> tuple[Case, ...]:
    material.write_onnx(folder / "model.onnx")
    return (_case(folder, "model.onnx", "onnx_import"),)


def _weights(folder: Path) -> tuple[Case, ...]:
    material.write_safetensors(folder / "w.safetensors")
    torch.save({"w": torch.ones(3)}, folder / "w.pt")
    return _case(folder, "w.safetensors", "checkpoint"), _case(folder, "w.pt", "checkpoint")


def _raw_ir(folder: Path) -> tuple[Case, ...]:
    material.build_engine(folder, runtime="openvino")
    names = ("engine/engine.xml", "engine/engine.bin")
    return tuple(_case(folder, n, "openvino", target="engine/engine.xml") for n in names)


def _engine(folder: Path) -> tuple[Case, ...]:
    engine = material.build_engine(folder, runtime="onnxruntime")
    names = sorted(path.name for path in engine.iterdir())
    return tuple(_case(folder, f"engine/{n}", "engine", target="engine", code=4) for n in names)


def _ir_engine(folder: Path) -> tuple[Case, ...]:
    material.build_engine(folder, runtime="openvino")
    names = ("engine/engine.xml", "engine/engine.bin")
    return tuple(_case(folder, n, "engine", target="engine", code=4) for n in names)


def _golden(folder: Path) -> tuple[Case, ...]:
    x = {"x": np.arange(4, dtype=np.float32)}
    vectors = [Golden(inputs=x, outputs={}, reference=x)] * 2
    (folder / "golden.npz").write_bytes(golden_bytes(vectors))
    return (_case(folder, "golden.npz", "golden", code=4),)


def _data(folder: Path) -> tuple[Case, ...]:
    np.savez(folder / "data.npz", x=np.ones((3, 4), np.float32), label=np.arange(3))
    write_rows(folder / "rows", [{"x": np.ones((1, n), np.float32)} for n in (1, 3, 2)])
    parts = sorted(path.name for path in (folder / "rows").iterdir())
    stored = tuple(_case(folder, f"rows/{name}", "rows", target="rows") for name in parts)
    return (_case(folder, "data.npz", "npz"), *stored)


def _case(folder: Path, file: str, subject: str, *, target: str = "", code: int = 3) -> Case:
    return Case(
        name=f"{file} as {subject}", subject=subject, folder=folder, file=file,
        target=target or file, codes=(code,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "make", "least"),
    [
        ("ONNX", _raw_onnx, 1000),
        ("safetensors and torch.save", _weights, 2000),
        ("OpenVINO IR", _raw_ir, 1000),
        ("engine directory", _engine, 1500),
        pytest.param("engine directory of OpenVINO", _ir_engine, 1000, marks=pytest.mark.slow),
        ("golden vectors", _golden, 500),
        ("data", _data, 500),
    ],
)
def test_truncation(
    what: str,
    make: Callable[[Path], tuple[Case, ...]],
    least: int,
    campaign: Campaign,
    tmp_path: Path,
) -> None:
    """Refused by an error that names the file, or the same to the last bit."""
    cases = [cut for case in make(tmp_path) for cut in every_cut(case)]
    campaign.run(cases, what=f"M1 truncation, {what}", least=least)
