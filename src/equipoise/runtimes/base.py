"""What every session does alike: check what comes in, refuse to run once closed, fill buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import ClassVar, Self

import numpy as np

from equipoise import extras
from equipoise.errors import InputError, UsageError
from equipoise.runtimes.protocol import Availability
from equipoise.spec import Array, Feeds, TensorSpec, check_feeds, describe


def package_availability(module: str, *, version: Callable[[], str]) -> Availability:
    """Whether the package of a runtime is installed.

    Args:
        module: Its import name, one of ``extras.EXTRA_OF``.
        version: Gives its version; called only when it is there.
    """
    if not extras.installed(module):
        install = extras.install_line(extras.EXTRA_OF[module])
        return Availability(available=False, reason=f"{module} is not installed", install=install)
    return Availability(available=True, version=version())


class Closing(ABC):
    """A context manager that closes itself at the end of its block."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held. Closing twice is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class BaseSession(Closing):
    """A session whose subclass has only to compute.

    Args:
        inputs: Specs of the inputs.
        outputs: Specs of the outputs.
    """

    concurrent: ClassVar[bool] = False
    """Whether threads may run it at once."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._closed = False

    @abstractmethod
    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        """All outputs by name. ``feeds`` have been checked."""

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once; see :class:`equipoise.runtimes.protocol.Session`."""
        if self._closed:
            raise UsageError("this session is closed", hint="Open the engine again.")
        check_feeds(feeds, self.inputs)
        computed = self._compute(feeds)
        return computed if out is None else fill(computed, out)

    def close(self) -> None:
        """Free the engine."""
        self._closed = True


def fill(computed: dict[str, Array], out: Mapping[str, Array]) -> dict[str, Array]:
    """Copy outputs into the caller's buffers and return those.

    Raises:
        InputError: ``out`` names no output, or a buffer has another shape or dtype.
    """
    for name, buffer in out.items():
        if name not in computed:
            raise InputError(f"no output {name!r}; the model gives {', '.join(computed)}")
        result = computed[name]
        if buffer.shape != result.shape or buffer.dtype != result.dtype:
            raise InputError(
                f"the buffer for output {name!r} is {describe(buffer)};"
                f" the output is {describe(result)}"
            )
        np.copyto(buffer, result)
    return {**computed, **out}
