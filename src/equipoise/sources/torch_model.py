"""A source as a PyTorch module with named arrays in and named arrays out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import SourceError
from equipoise.sources.checkpoint import load_weights, require_finite_weights
from equipoise.sources.derived import WEIGHTS, apply_, read_derivation, stored_shapes
from equipoise.sources.program import load_program, program_module
from equipoise.sources.source import TIMM_PREFIX, Source, base_of, path_of
from equipoise.sources.timm_model import build_timm
from equipoise.sources.transformers_model import build_transformers, load_transformers
from equipoise.spec import Array, describe


def load_module(source: Source) -> Any:
    """Build the ``torch.nn.Module`` of ``source`` with its weights, in float32, to evaluate.

    A transformers model may come behind an adapter that shows one task of it, and a program behind
    one that shows its inputs by name; what is inside is their ``model`` or ``inner``.

    Raises:
        SourceError: It cannot be built, or the weights do not fit.
        UnsafeCheckpointError: A file asks to run code.
        NonFiniteError: A weight is NaN or infinite.
        MissingExtraError: PyTorch, transformers or timm is not installed.
    """
    module = _LOADERS[source.kind](source)
    require_finite_weights(module, what=str(source.weights or source.name))
    # A program fixed its dtypes when it was exported: changing its weights would break it.
    return module if source.kind == "program" else module.float().eval()


def build_module(source: Source) -> Any:
    """The same without weights, on PyTorch's ``meta`` device where it can be built there.

    Raises as above.
    """
    torch = extras.require("torch")
    if source.kind == "program":
        return _program(source)
    with torch.device("meta"):
        if source.kind == "transformers":
            return build_transformers(path_of(source), task=source.task)
        try:
            return _EMPTY[source.kind](source)
        except (RuntimeError, NotImplementedError):
            pass  # it looks at numbers while it is built, which there are none of
    with torch.random.fork_rng(devices=[]):
        return _EMPTY[source.kind](source)


def _transformers(source: Source) -> Any:
    return load_transformers(path_of(source), task=source.task)


def _program(source: Source) -> Any:
    return program_module(load_program(path_of(source)))


def _timm(source: Source) -> Any:
    return build_timm(source.name.removeprefix(TIMM_PREFIX))


def _factory(source: Source) -> Any:
    torch = extras.require("torch")
    name, _, function = source.factory.partition(":")
    try:
        module = getattr(importlib.import_module(name), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise SourceError(f"{source.name}: cannot call {function} of {name}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{source.name} returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _derived(source: Source) -> Any:
    """The module that the first base builds, in its new sizes, with no weights yet."""
    directory = path_of(source)
    shapes = stored_shapes(directory / WEIGHTS)
    module = _EMPTY[base_of(source).kind](base_of(source))
    apply_(module, read_derivation(directory), shapes=shapes, where=source.name)
    return module


def _load_derived(source: Source) -> Any:
    module = _derived(source)
    load_weights(module, path_of(source) / WEIGHTS)
    return module


def _filled(build: Callable[[Source], Any]) -> Callable[[Source], Any]:
    """A loader that builds a module and gives it the weights in the source's file."""

    def load(source: Source) -> Any:
        module = build(source)
        if source.weights is not None:
            load_weights(module, source.weights)
        return module

    return load


_EMPTY: Final[dict[str, Callable[[Source], Any]]] = {
    "factory": _factory,
    "timm": _timm,
    "derived": _derived,
}
_LOADERS: Final = {
    "transformers": _transformers,
    "program": _program,
    "factory": _filled(_factory),
    "timm": _filled(_timm),
    "derived": _load_derived,
}


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
