"""What modules give inside of a model, while it runs, through hooks.

Not through ``output_hidden_states``: the model's config stays as it is exported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from equipoise import extras
from equipoise.compress.objective.task_losses import Tensor

Pick = Callable[[Any], "Tensor | None"]
"""Of what a module takes or gives, the tensor to keep; None to keep nothing."""


class Recorder:
    """Keeps what modules take or give while it is entered, in the order that they run.

    Hooks are on the modules themselves, so they act inside of DistributedDataParallel, autocast
    and ``no_grad`` alike. Outside of ``with`` they keep nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._open = False
        self._undo: list[Callable[[], object]] = []

    def outputs_of(self, module: Any, *, key: str, pick: Pick) -> None:
        """Keep what ``module`` gives under ``key``."""
        handle = module.register_forward_hook(lambda _, __, output: self._keep(key, pick(output)))
        self.at_close(handle.remove)

    def inputs_of(self, module: Any, *, key: str) -> None:
        """Keep the first tensor that ``module`` takes under ``key``."""

        def keep(_: Any, positional: Any, named: dict[str, Any]) -> None:
            self._keep(key, first_tensor((*positional, *named.values())))

        self.at_close(module.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def at_close(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` when the recorder is closed."""
        self._undo.append(undo)

    def _keep(self, key: str, tensor: Tensor | None) -> None:
        if self._open and tensor is not None:
            self._kept.setdefault(key, []).append(tensor)

    def __enter__(self) -> Recorder:
        self._kept, self._open = {}, True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        if error is not None:
            self._kept = {}

    def take(self) -> dict[str, list[Tensor]]:
        """What was kept, which the recorder then forgets: it would hold the graph of a step."""
        kept, self._kept = self._kept, {}
        return kept

    def close(self) -> None:
        """Take the hooks off, and put back what was changed for their sake."""
        while self._undo:
            self._undo.pop()()


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of what a module takes or gives."""
    torch = extras.require("torch")
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None
