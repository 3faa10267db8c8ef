"""The stages of pruning and training, by name."""

from __future__ import annotations

from typing import Final

from equipoise.compress.channels.narrow import NarrowRecord
from equipoise.compress.channels.structure import ChannelsRecord
from equipoise.compress.latency.table import LayerTable
from equipoise.compress.sparsity import SparsifyRecord
from equipoise.compress.study import StudyResult
from equipoise.compress.train import TrainRecord
from equipoise.compress.transformer.reading import (
    LayersRecord,
    TransformerReading,
)
from equipoise.compress.transformer.reduce import ReduceRecord
from equipoise.compress.transformer.vocabulary import TrimRecord
from equipoise.pipeline import ONNX, TORCH
from equipoise.quantize.module_ranges import ModuleRangesRecord
from equipoise.stages import Stage

MODEL: Final = "model"
"""What stages that change a model call it in their output."""

TRAIN: Final = Stage(
    name="train",
    function="equipoise.compress.train:train",
    record=TrainRecord,
    packages=(*TORCH, "accelerate"),
)


STUDY: Final = Stage(
    name="study",
    function="equipoise.compress.studying:search_settings",
    record=StudyResult,
    packages=(*TORCH, "accelerate", "optuna"),
)
READ_TRANSFORMER: Final = Stage(
    name="read-transformer",
    function="equipoise.compress.transformer.reading:read_transformer",
    record=TransformerReading,
    packages=TORCH,
)
READ_LAYERS: Final = Stage(
    name="read-layers",
    function="equipoise.compress.transformer.reading:read_layers",
    record=LayersRecord,
    packages=TORCH,
)
REDUCE: Final = Stage(
    name="reduce",
    function="equipoise.compress.transformer.reduce:reduce_transformer",
    record=ReduceRecord,
    packages=TORCH,
)
TRIM: Final = Stage(
    name="trim",
    function="equipoise.compress.transformer.vocabulary:trim_vocabulary",
    record=TrimRecord,
    packages=(*TORCH, "tokenizers"),
)
SPARSIFY: Final = Stage(
    name="sparsify",
    function="equipoise.compress.sparsity:sparsify",
    record=SparsifyRecord,
    packages=TORCH,
)
READ_CHANNELS: Final = Stage(
    name="read-channels",
    function="equipoise.compress.channels.structure:read_structure",
    record=ChannelsRecord,
    packages=(*TORCH, "torch-pruning"),
)
NARROW: Final = Stage(
    name="narrow",
    function="equipoise.compress.channels.narrow:narrow",
    record=NarrowRecord,
    packages=(*TORCH, "torch-pruning"),
)
TABLE: Final = Stage(
    name="layer-table",
    function="equipoise.compress.latency.table:measure_layers",
    record=LayerTable,
    packages=ONNX,
    measures=True,
)
MODULE_RANGES: Final = Stage(
    name="module-ranges",
    function="equipoise.quantize.module_ranges:module_ranges",
    record=ModuleRangesRecord,
    packages=ONNX,
)
