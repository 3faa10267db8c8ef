"""Student and teacher, each run on named inputs and watched while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise import extras
from equipoise.compress.objective.inner import (
    features,
    maps,
    record_attention,
    record_features,
    record_states,
    states,
)
from equipoise.compress.objective.layers import named
from equipoise.compress.objective.points import Point, Size, feature_points
from equipoise.compress.objective.recorder import Recorder
from equipoise.compress.objective.task_losses import Tensor
from equipoise.compress.settings import Objective
from equipoise.errors import SourceError
from equipoise.sources.torch_model import NamedModule


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a model gave for one batch, outside and inside; a part not watched is empty."""

    outputs: Mapping[str, Tensor]
    states: Sequence[Tensor] = ()
    maps: Sequence[Tensor] = ()
    features: Sequence[Tensor] = ()


class Watched:
    """A model with recorders for the parts that an objective compares.

    Args:
        module: The model.
        names: Input names.
        role: ``student`` or ``teacher``, for messages.
        settings: Which parts are compared.

    Raises:
        SourceError: Its forward does not take the inputs.
    """

    def __init__(
        self, module: Any, *, names: Sequence[str], role: str, settings: Objective
    ) -> None:
        self.module = module
        self.name = f"{role} {named(module)}"
        self._call = NamedModule(module, names=names, source=self.name)
        self._states = record_states(module) if settings.hidden > 0 else None
        self._maps = record_attention(module) if settings.attention > 0 else None
        self._features: Recorder | None = None
        self._points: list[Point] = []

    def run(self, batch: Mapping[str, Tensor], *, through: Any = None) -> Run:
        """Run on a batch.

        Args:
            batch: Tensors by name, with what else the batch holds.
            through: The module to call, when something was wrapped around it since.

        Raises:
            SourceError: It has not got a part that is compared.
        """
        self._call.module = self.module if through is None else through
        recorders = [r for r in (self._states, self._maps, self._features) if r is not None]
        with contextlib.ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder)
            outputs = self._call.call([batch[name] for name in self._call.names])
        return Run(
            outputs=outputs,
            states=states(self._states.take(), module=self.module) if self._states else (),
            maps=maps(self._maps.take(), module=self.module) if self._maps else (),
            features=self._taken_features(),
        )

    def _taken_features(self) -> Sequence[Tensor]:
        return features(self._features.take(), points=self._points) if self._features else ()

    def find_points(self, batch: Mapping[str, Tensor]) -> dict[Size, Point]:
        """Where the spatial size of its feature maps changes."""
        return feature_points(self.module, run=lambda: self.trial(batch))

    def watch_points(self, points: Sequence[Point]) -> None:
        """Record feature maps at ``points``."""
        self._points = list(points)
        self._features = record_features(self.module, points=self._points)

    def trial(self, batch: Mapping[str, Tensor]) -> Run:
        """One run for its shapes: no gradient, as in evaluation, and no statistics changed.

        Raises:
            SourceError: Its forward fails on the batch.
        """
        try:
            with _undisturbed(self.module):
                return self.run(moved(batch, to=device_of(self.module, batch=batch)))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
            first = str(error).strip().partition("\n")[0]
            raise SourceError(
                f"{self.name}: forward failed on {given}: {first}",
                hint="The data must have the names, shapes and dtypes that forward takes.",
            ) from error

    def close(self) -> None:
        """Take all hooks off, and compute attention as before."""
        for recorder in (self._features, self._maps, self._states):
            if recorder is not None:
                recorder.close()


@contextlib.contextmanager
def _undisturbed(module: Any) -> Iterator[None]:
    torch = extras.require("torch")
    training = [inner for inner in module.modules() if inner.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for inner in training:
            inner.training = True


def device_of(module: Any, *, batch: Mapping[str, Tensor]) -> Any:
    """The device of a module's weights; of the batch where it has none."""
    return next(iter((*module.parameters(), *batch.values()))).device


def moved(batch: Mapping[str, Tensor], *, to: Any) -> dict[str, Tensor]:
    """A batch on another device."""
    return {name: tensor.to(to) for name, tensor in batch.items()}
