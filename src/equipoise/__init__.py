"""equipoise: the smallest, fastest engine that is still accurate enough, and the proof.

On a device: ``equipoise.load("bundle/")``. Where engines are made: ``equipoise.tune(...)``.
Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equipoise.apps.embedding import Embedder
    from equipoise.apps.pictures import ImageClassifier
    from equipoise.apps.text import TextClassifier
    from equipoise.apps.tokens import TokenClassifier
    from equipoise.compress.cutting import Pruning
    from equipoise.compress.settings import Objective, TrainSettings
    from equipoise.deploy import BundleSession, load
    from equipoise.errors import EquipoiseError
    from equipoise.pruning import PruneRequest, PruneResult, prune_model
    from equipoise.search.result import TuneResult
    from equipoise.spec import TensorSpec
    from equipoise.training import TrainRequest, TrainResult, train_model
    from equipoise.tuning.config import TuneConfig
    from equipoise.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "BundleSession",
    "Embedder",
    "EquipoiseError",
    "ImageClassifier",
    "Objective",
    "PruneRequest",
    "PruneResult",
    "Pruning",
    "TensorSpec",
    "TextClassifier",
    "TokenClassifier",
    "TrainRequest",
    "TrainResult",
    "TrainSettings",
    "TuneConfig",
    "TuneResult",
    "load",
    "prune_model",
    "train_model",
    "tune",
]

_MODULES = {
    "BundleSession": "equipoise.deploy",
    "Embedder": "equipoise.apps.embedding",
    "EquipoiseError": "equipoise.errors",
    "ImageClassifier": "equipoise.apps.pictures",
    "Objective": "equipoise.compress.settings",
    "PruneRequest": "equipoise.pruning",
    "PruneResult": "equipoise.pruning",
    "Pruning": "equipoise.compress.cutting",
    "TensorSpec": "equipoise.spec",
    "TextClassifier": "equipoise.apps.text",
    "TokenClassifier": "equipoise.apps.tokens",
    "TrainRequest": "equipoise.training",
    "TrainResult": "equipoise.training",
    "TrainSettings": "equipoise.compress.settings",
    "TuneConfig": "equipoise.tuning.config",
    "TuneResult": "equipoise.search.result",
    "load": "equipoise.deploy",
    "prune_model": "equipoise.pruning",
    "train_model": "equipoise.training",
    "tune": "equipoise.tuning.tune",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
