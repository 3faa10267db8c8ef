"""Models of timm by name: the architecture from timm, the weights from a file."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

from equipoise import extras
from equipoise.errors import EquipoiseError, SourceError, UsageError


def build_timm(name: str) -> Any:
    """The ``torch.nn.Module`` that timm calls ``name``, without trained weights.

    Raises:
        UsageError: timm knows no such model; the hint has near names.
        SourceError: timm cannot build it.
        MissingExtraError: timm is not installed.
    """
    extras.require("torch")
    prepare_torchvision()
    timm = extras.require("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise _unknown(name, known)
    try:
        return timm.create_model(name, pretrained=False)
    except EquipoiseError:
        raise
    except Exception as error:  # a model may ask for packages or settings of its own
        raise SourceError(f"timm cannot build {name!r}: {error}") from error


def _unknown(name: str, known: list[str]) -> UsageError:
    """``errors.unknown_name`` would list more than a thousand."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {', '.join(near)}?" if near else "timm.list_models() has their names."
    return UsageError(f"timm knows no model {name!r}; it knows {len(known)}", hint=hint)


def prepare_torchvision() -> None:
    """Make an installed torchvision importable beside a PyTorch that it was not built for.

    Its Python code describes its C++ operators to PyTorch as it is imported, which fails when
    their library could not be loaded: the common pair of a CPU torch and a CUDA torchvision.
    timm and transformers want that Python code and never the operators, so schemas without
    implementations are enough; a model that did call one would say so.
    """
    if not extras.installed("torchvision"):
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise SourceError(f"torchvision cannot be imported: {error}") from error
        _declare_operators()
        _forget("torchvision")
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    torch = extras.require("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    _KEPT.append(library)


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]


_KEPT: list[Any] = []
"""Libraries of operators; PyTorch takes the definitions back when they are collected."""
