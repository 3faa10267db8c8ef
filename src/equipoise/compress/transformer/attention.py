"""Which tensors lead into the attention and out of it, found by running the model once.

The attention itself is a function (``scaled_dot_product_attention``, or a softmax over scores of
rank four in models that spell it out), so it is seen as it is called. What the innermost module
around it has computed until then are the queries, keys and values; the first linear layer that runs
afterwards is the one that they end in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from equipoise import extras
from equipoise.compress.importance import is_layer, is_transposed
from equipoise.errors import SourceError

_TOKENS: Final = 7


@dataclass(kw_only=True)
class Trace:
    """What a forward pass showed.

    Attributes:
        into: Names of the layers that make queries, keys and values.
        out: Names of the layers behind the attention.
        ran: Names of all modules that ran.
    """

    into: list[str] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    def axes(self, module: Any) -> list[tuple[str, int]]:
        """Tensor and axis of everything along the heads, biases and norms included."""
        found = []
        for name in self.into:
            layer = module.get_submodule(name)
            along = 1 if is_transposed(layer) else 0
            found += [(f"{name}.weight", along), (f"{name}.bias", 0)]
        for name in self.out:
            found.append((f"{name}.weight", 0 if is_transposed(module.get_submodule(name)) else 1))
        return found


def sample_inputs(module: Any) -> dict[str, Any]:
    """Inputs that a text or picture model runs on, with tokens that differ from each other.

    Raises:
        SourceError: The model takes something else.
    """
    torch = extras.require("torch")
    config = module.config
    if module.main_input_name == "input_ids":
        tokens = (torch.arange(_TOKENS) + 3) % config.vocab_size
        return {"input_ids": tokens[None]}
    if module.main_input_name == "pixel_values" and isinstance(config.image_size, int):
        generator = torch.Generator().manual_seed(0)
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    raise SourceError(
        f"{type(module).__name__} takes {module.main_input_name!r}: no input for it can be made up",
        hint="Give data, so that the model can be run on a sample.",
    )


def trace(module: Any, inputs: Mapping[str, Any]) -> Trace:
    """Run ``module`` once and see where its attention is."""
    torch = extras.require("torch")
    found = Trace()
    with _watching(module, found), torch.no_grad():
        module(**inputs)
    return found


@contextlib.contextmanager
def _watching(module: Any, found: Trace) -> Iterator[None]:
    """Fill ``found`` as ``module`` runs in the block."""
    watch = _Watch(found)
    handles = []
    for name, inner in module.named_modules():
        handles.append(inner.register_forward_pre_hook(watch.entering(name, inner)))
        handles.append(inner.register_forward_hook(watch.leaving))
    try:
        with _seeing_attention(watch.attended):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The modules that are running, and the layers that each has run so far."""

    def __init__(self, found: Trace) -> None:
        self._found = found
        self._running: list[tuple[str, list[str]]] = []
        self._ends = False

    def entering(self, name: str, module: Any) -> Any:
        carries = bool(list(module.parameters(recurse=False)))
        layer = is_layer(module)

        def hook(_module: Any, _inputs: Any) -> None:
            self._found.ran.add(name)
            if layer and self._ends:
                self._found.out.append(name)
                self._ends = False
            for _, done in self._running if carries else ():
                done.append(name)
            self._running.append((name, []))

        return hook

    def leaving(self, _module: Any, _inputs: Any, _outputs: Any) -> None:
        self._running.pop()

    def attended(self) -> None:
        """The attention is being computed by the innermost module that has run layers."""
        done = next((done for _, done in reversed(self._running) if done), [])
        self._found.into += [name for name in done if name not in self._found.into]
        self._ends = True


@contextlib.contextmanager
def _seeing_attention(attended: Any) -> Iterator[None]:
    """Call ``attended`` whenever attention is computed in the block."""
    torch = extras.require("torch")
    fused = torch.nn.functional.scaled_dot_product_attention
    softmaxes = {torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax}

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
        def __torch_function__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is fused or (function in softmaxes and args[0].ndim == 4):
                attended()
            return function(*args, **(kwargs or {}))

    with Mode():
        yield
