"""How well ``equipoise fit`` orders models by latency: estimates beside measurements.

    python benchmarks/fit.py --output RECORD.json [--table TABLE.md] [--rounds 40] [--work FOLDER]

Thirteen architectures of transformers in the sizes of their papers, with random weights, which
latency does not depend on, exported by ``torch.onnx.export``. Each is estimated at the sizes of its
inputs and measured with all usable cores, all models in interleaved rounds of one process. The
figure that counts is Spearman's rank correlation of the two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import fs
from equipoise.fitting import fit_model
from equipoise.measure.latency import time_engines
from equipoise.runtimes.engine import EngineFile
from equipoise.spec import Array, ones
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "torch", "transformers")
TOKENS = 64
SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        model: Architecture.
        estimated_ms: By the roofline.
        measured_ms: Median over rounds.
        ratio: Measured over estimated.
    """

    model: str
    estimated_ms: float
    measured_ms: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All models, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    rounds: int
    rank_correlation: float
    spread: float
    rows: tuple[Row, ...]


def _text(name: str, config: str, **sizes: Any) -> Callable[[Any], Any]:
    return lambda hf: getattr(hf, name)(getattr(hf, config)(**sizes))


MODELS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "BERT-tiny": ("text", _text(
        "BertModel", "BertConfig", hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512,
    )),
    "MiniLM-L6": ("text", _text(
        "BertModel", "BertConfig", hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536,
    )),
    "DistilBERT": ("text", _text("DistilBertModel", "DistilBertConfig")),
    "BERT-base": ("text", _text("BertModel", "BertConfig")),
    "ALBERT-base": ("text", _text(
        "AlbertModel", "AlbertConfig", hidden_size=768, num_attention_heads=12,
        intermediate_size=3072,
    )),
    "ELECTRA-small": ("text", _text("ElectraModel", "ElectraConfig")),
    "ResNet-18": ("image", _text(
        "ResNetModel", "ResNetConfig", layer_type="basic", depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
    )),
    "ResNet-50": ("image", _text("ResNetModel", "ResNetConfig")),
    "MobileNet-v1": ("image", _text("MobileNetV1Model", "MobileNetV1Config")),
    "MobileNet-v2": ("image", _text("MobileNetV2Model", "MobileNetV2Config")),
    "ConvNeXt-tiny": ("image", _text("ConvNextModel", "ConvNextConfig")),
    "DeiT-tiny": ("image", _text(
        "ViTModel", "ViTConfig", hidden_size=192, num_attention_heads=3, intermediate_size=768,
    )),
    "ViT-base": ("image", _text("ViTModel", "ViTConfig")),
}  # fmt: skip


def export(name: str, path: Path) -> None:
    """Write the ONNX file of a model, with fixed sizes."""
    import torch
    import transformers

    kind, make = MODELS[name]
    torch.manual_seed(0)
    model = make(transformers).eval()
    if kind == "text":
        inputs = {
            "input_ids": torch.ones(1, TOKENS, dtype=torch.int64),
            "attention_mask": torch.ones(1, TOKENS, dtype=torch.int64),
        }
    else:
        inputs = {"pixel_values": torch.rand(1, 3, SIDE, SIDE)}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    program.save(str(path))


def models(work: Path) -> dict[str, Path]:
    """Name -> ONNX file, exported on first use."""
    found = {}
    for name in MODELS:
        found[name] = fs.make_directory(work) / f"{name}.onnx"
        if not found[name].is_file():
            say(f"exporting {name}")
            export(name, found[name])
    return found


def measure(files: Mapping[str, Path], *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each; engines of one kind of input are timed together."""
    from equipoise.onnxio import file_specs

    medians = {}
    for kind in ("text", "image"):
        names = [name for name in files if MODELS[name][0] == kind]
        feeds: dict[str, Array] = ones(file_specs(files[names[0]])[0])
        engines = [EngineFile(file=files[name]) for name in names]
        cores = detect_machine().cores
        times = time_engines(engines, [feeds], threads=cores, rounds=rounds)
        medians |= dict(zip(names, np.median(times, axis=0).tolist(), strict=True))
    return medians


def rank_correlation(left: Array, right: Array) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(ranks)[0, 1])


def collect(options: argparse.Namespace) -> Record:
    """Estimate and measure."""
    files = models(options.work)
    estimated = {name: _estimated(path) for name, path in files.items()}
    measured = measure(files, rounds=options.rounds)
    rows = [
        Row(
            model=name,
            estimated_ms=estimated[name],
            measured_ms=measured[name],
            ratio=measured[name] / estimated[name],
        )
        for name in sorted(files, key=lambda name: measured[name])
    ]
    ratios = [row.ratio for row in rows]
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        rounds=options.rounds,
        rank_correlation=rank_correlation(
            np.array([row.estimated_ms for row in rows]),
            np.array([row.measured_ms for row in rows]),
        ),
        spread=max(ratios) / min(ratios),
        rows=tuple(rows),
    )


def _estimated(path: Path) -> float:
    found = fit_model(path, target="cpu").estimate
    assert found is not None
    return found.latency_ms


def table(found: Record) -> str:
    """Markdown."""
    lines = ["| model | estimated, ms | measured, ms | ratio |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {r.model} | {r.estimated_ms:.1f} | {r.measured_ms:.1f} | {r.ratio:.2f} |"
        for r in found.rows
    ]
    return "\n".join([*lines, "", f"Rank correlation {found.rank_correlation:.3f}.", ""])


def say(text: str) -> None:
    """One line about what is going on."""
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Measure; write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-fit")
    options = parser.parse_args()
    found = collect(options)
    fs.write_json(options.output, found)
    if options.table:
        fs.write_text(options.table, table(found))
    say(table(found))


if __name__ == "__main__":
    main()
