"""A source as a PyTorch module with named arrays in and named arrays out."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from equipoise import extras
from equipoise.errors import SourceError
from equipoise.export.source import Source
from equipoise.spec import Array, describe

_AUTO_CLASSES = {
    "token-classification": "AutoModelForTokenClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
}


def load_module(source: Source) -> Any:
    """Build the ``torch.nn.Module`` of ``source`` with its weights, in evaluation mode.

    Raises:
        SourceError: The factory or the weights do not fit.
        MissingExtraError: PyTorch or transformers is not installed.
    """
    if source.kind == "transformers":
        module = _from_transformers(source, "from_pretrained")
    else:
        module = _call_factory(source)
        if source.weights is not None:
            _load_weights(module, source.weights)
    return module.float().eval()


def build_module(source: Source) -> Any:
    """Build the ``torch.nn.Module`` of ``source`` without its weights. Raises as above."""
    if source.kind == "transformers":
        return _from_transformers(source, "from_config")
    return _call_factory(source)


def _from_transformers(source: Source, method: Literal["from_pretrained", "from_config"]) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a local directory needs no network, and gets none
    transformers = extras.require("transformers")
    auto = getattr(transformers, _AUTO_CLASSES[source.task])
    try:
        if method == "from_config":
            config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True)
            return auto.from_config(config)
        return auto.from_pretrained(source.path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SourceError(f"transformers cannot read {source.path}: {error}") from error


def _call_factory(source: Source) -> Any:
    torch = extras.require("torch")
    name, _, function = source.factory.partition(":")
    try:
        module = getattr(importlib.import_module(name), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise SourceError(f"{source.name}: cannot call {function} of {name}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{source.name} returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _load_weights(module: Any, weights: Path) -> None:
    safetensors: Any = extras.require("safetensors.torch")
    try:
        module.load_state_dict(safetensors.load_file(weights))
    except Exception as error:  # safetensors raises its own Rust exception type
        first = str(error).partition("\n")[2].strip().partition("\n")[0] or str(error)
        raise SourceError(f"{weights} does not fit the model: {first}") from error


class NamedModule:
    """A module called with named arrays.

    The names are the data's. They go in as keywords when the module's ``forward`` has parameters
    of those names, and a single input goes in by position whatever it is called.

    Args:
        module: In evaluation mode.
        names: Input names in the order of the specs.
        source: For messages.
    """

    def __init__(self, module: Any, *, names: Sequence[str], source: str) -> None:
        self.module = module
        self.names = tuple(names)
        self._source = source
        self._by_keyword = self._takes_keywords()

    def _takes_keywords(self) -> bool:
        parameters = inspect.signature(self.module.forward).parameters
        unknown = [name for name in self.names if name not in parameters]
        if unknown and len(self.names) > 1:
            raise SourceError(
                f"{self._source}: the data has inputs {list(self.names)}, but forward takes"
                f" {list(parameters)}",
                hint="Rename the arrays in the data to the parameters of forward.",
            )
        return not unknown

    def call(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Run on tensors in the order of the names; return named tensors."""
        if self._by_keyword:
            return named_outputs(self.module(**dict(zip(self.names, tensors, strict=True))))
        return named_outputs(self.module(*tensors))

    def run(self, feeds: Mapping[str, Array], *, double: bool = False) -> dict[str, Array]:
        """Run on arrays; ``double`` feeds float inputs as float64 to a float64 module."""
        torch = extras.require("torch")
        tensors = [torch.from_numpy(_cast(feeds[name], double=double)) for name in self.names]
        try:
            with torch.inference_mode():
                return {name: value.numpy() for name, value in self.call(tensors).items()}
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            given = ", ".join(f"{name} {describe(feeds[name])}" for name in self.names)
            first = str(error).strip().partition("\n")[0]
            raise SourceError(
                f"{self._source}: forward failed on {given}: {first}",
                hint="The data must have the names, shapes and dtypes that forward takes.",
            ) from error


def _cast(array: Array, *, double: bool) -> Array:
    floating = np.issubdtype(array.dtype, np.floating)
    return array.astype(np.float64) if double and floating else array


def named_outputs(result: Any) -> dict[str, Any]:
    """Tensors of a module's result by name: its keys or fields; ``output`` for a bare tensor.

    Raises:
        SourceError: The result holds no tensor.
    """
    torch = extras.require("torch")
    named = {k: v for k, v in _items(result) if isinstance(v, torch.Tensor)}
    if not named:
        raise SourceError(f"forward returned {type(result).__name__} without a tensor in it")
    return named


def _items(result: Any) -> list[tuple[str, Any]]:
    if isinstance(result, Mapping):
        return [(str(k), v) for k, v in result.items()]
    if is_dataclass(result):
        return [(f.name, getattr(result, f.name)) for f in fields(result)]
    if isinstance(result, tuple | list):
        return [(f"output_{i}", v) for i, v in enumerate(result)]
    return [("output", result)]
