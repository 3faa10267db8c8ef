"""Which fuser makes a faster encoder for ONNX Runtime on this CPU, and does it still compute it?

    python benchmarks/fusions.py --model DIRECTORY --output RECORD.json

DIRECTORY is a transformers directory of a BERT-like encoder. It is exported once, with dynamic
batch and sequence; each fuser works on that file. Latency is measured at batch 1 with one thread,
at two sequence lengths, all files in interleaved rounds of one process.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import fs, onnxio, record
from equipoise.graph.fuse import FuseConfig, fuse
from equipoise.measure.interval import Interval, median_interval
from equipoise.measure.latency import time_engines
from equipoise.runtimes.engine import EngineFile
from equipoise.spec import Array
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

SEQUENCES = (32, 128)
ROUNDS = 200
OPSET = 20


@dataclass(frozen=True, kw_only=True)
class Latency:
    """At one sequence length.

    Attributes:
        sequence: Tokens.
        unfused_ms: Median of the exported file.
        fused_ms: Median of the fused file in the same rounds.
        speedup: Unfused latency / fused latency, median over rounds.
    """

    sequence: int
    unfused_ms: float
    fused_ms: float
    speedup: Interval


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What one fuser made.

    Attributes:
        fuser: Its name.
        operators: Operators of vendors' domains -> how many.
        nodes: Nodes in all.
        worst_difference: Largest absolute difference of an output from PyTorch, padding included.
        unfused_difference: The same of the exported file.
        latencies: One per sequence length.
    """

    fuser: str
    operators: dict[str, int]
    nodes: int
    worst_difference: float
    unfused_difference: float
    latencies: tuple[Latency, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """All fusers, and where they ran."""

    model: str
    unfused_nodes: int
    machine: Machine
    versions: dict[str, str]
    fusers: tuple[Fused, ...]


def load(directory: Path) -> Any:
    """The encoder with its head, as a module of two tensors to one."""
    import torch
    import transformers

    auto = transformers.AutoModelForTokenClassification
    model = auto.from_pretrained(directory, local_files_only=True).float().eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    return Encoder().eval()


def feeds(sequence: int, *, batch: int = 1) -> dict[str, Array]:
    """Random tokens, the last eighth of them padding."""
    ids = np.random.default_rng(sequence).integers(1000, 20_000, (batch, sequence))
    mask = np.ones((batch, sequence), dtype=np.int64)
    mask[:, sequence - sequence // 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def export(module: Any, path: Path) -> None:
    """Export with dynamic batch and sequence."""
    import torch

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    inputs = feeds(16, batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(map(torch.from_numpy, inputs.values())),
            dynamo=True,
            dynamic_shapes=(dims, dims),
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
    program.save(path)


def by_onnxscript(source: Path, folder: Path) -> None:
    """Equipoise's own stage, which calls onnxscript."""
    fuse(FuseConfig(model=source), output=folder)


def by_onnxruntime(source: Path, folder: Path, *, heads: tuple[int, int]) -> None:
    """ONNX Runtime's transformer optimiser, told the model type and the heads."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimised = optimize_model(
        str(source), model_type="bert", num_heads=heads[0], hidden_size=heads[1], opt_level=0
    )
    onnxio.save_model(optimised.model, folder / "model.onnx")


def difference(path: Path, module: Any) -> float:
    """Largest absolute difference from PyTorch, at both lengths, batch 1 and 3."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for sequence in SEQUENCES:
        for batch in (1, 3):
            inputs = feeds(sequence, batch=batch)
            with torch.inference_mode():
                wanted = module(*map(torch.from_numpy, inputs.values())).numpy()
            found.append(np.abs(session.run(None, inputs)[0] - wanted).max())
    return float(max(found))


def main() -> None:
    """Fuse by all fusers, compare, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    module = load(options.model)
    config = module.model.config
    heads = (config.num_attention_heads, config.hidden_size)
    fusers: dict[str, Callable[[Path, Path], None]] = {
        "onnxscript": by_onnxscript,
        "onnxruntime.transformers": lambda s, f: by_onnxruntime(s, f, heads=heads),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.onnx"
        export(module, source)
        for fuser, make in fusers.items():
            make(source, fs.make_directory(folder / fuser))
        paths = [source, *(folder / fuser / "model.onnx" for fuser in fusers)]
        times = {s: measure(paths, sequence=s) for s in SEQUENCES}
        found = Record(
            model=f"BERT, {config.num_hidden_layers} layers, hidden {config.hidden_size},"
            f" {heads[0]} heads, token classification",
            unfused_nodes=len(onnxio.load_model(source).graph.node),
            machine=detect_machine(),
            versions=versions_of(
                ("equipoise", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch")
            ),
            fusers=tuple(
                describe(fuser, paths, index=index + 1, module=module, times=times)
                for index, fuser in enumerate(fusers)
            ),
        )
    print(record.dumps(found))
    fs.write_json(options.output, found)


def measure(paths: list[Path], *, sequence: int) -> Array:
    """Milliseconds [rounds, files] at batch 1, one thread."""
    engines = [EngineFile(file=path) for path in paths]
    return time_engines(engines, [feeds(sequence)], threads=1, rounds=ROUNDS)


def describe(
    fuser: str, paths: list[Path], *, index: int, module: Any, times: dict[int, Array]
) -> Fused:
    """Operators, parity and latency of one fused file."""
    nodes = onnxio.load_model(paths[index]).graph.node
    return Fused(
        fuser=fuser,
        operators=dict(Counter(node.op_type for node in nodes if node.domain)),
        nodes=len(nodes),
        worst_difference=difference(paths[index], module),
        unfused_difference=difference(paths[0], module),
        latencies=tuple(
            Latency(
                sequence=sequence,
                unfused_ms=float(np.median(found[:, 0])),
                fused_ms=float(np.median(found[:, index])),
                speedup=median_interval(found[:, 0] / found[:, index]),
            )
            for sequence, found in times.items()
        ),
    )


if __name__ == "__main__":
    main()
