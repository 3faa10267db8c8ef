"""Progress of a long loop, sent to whoever listens.

A stage runs in a child process; its parent shows the bars. The stage says only
``for row in track(rows, total=len(rows))``; where nobody listens that costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")
Listener = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

_INTERVAL_S: Final = 0.1
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Send the progress of this process to ``listener`` from now on."""
    _listeners.append(listener)


def report(done: int, total: int) -> None:
    """Tell the listeners that ``done`` of ``total`` steps are finished."""
    for listener in _listeners:
        listener(done, total)


def track(items: Iterable[T], *, total: int) -> Iterator[T]:
    """Yield ``items`` and report progress, at most ten times a second."""
    last = 0.0
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= _INTERVAL_S:
            report(done, total)
            last = now
        yield item
    report(total, total)
