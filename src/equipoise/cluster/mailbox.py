"""Progress of stages on its way from the nodes to the driver. Losing some of it does no harm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

_INTERVAL_S: Final = 0.5


class Mailbox:
    """Keeps the last progress of every stage that runs. It is an actor of the cluster."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[int, int]] = {}

    def tell(self, key: str, done: int, total: int) -> None:
        """The stage ``key`` has done ``done`` of ``total`` steps."""
        self._steps[key] = (done, total)

    def read(self, key: str) -> tuple[int, int] | None:
        """What was told of ``key`` last."""
        return self._steps.get(key)

    def forget(self, key: str) -> None:
        """Nobody asks for ``key`` any more."""
        self._steps.pop(key, None)


def teller(mailbox: Any, *, key: str) -> Callable[[int, int], None]:
    """A listener that tells the actor ``mailbox`` of progress, twice a second and at the end."""
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _INTERVAL_S or done == total:
            last = now
            mailbox.tell.remote(key, done, total)

    return tell
