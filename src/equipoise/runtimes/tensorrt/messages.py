"""What the library says while it works.

The library keeps the first logger that a process gives it and ignores the others, so there is one
for each package, and whoever wants to know listens to it for a while.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from equipoise import progress

_MOST_NOTES: Final = 5
_UNSUPPORTED: Final = "the operator is not supported"
_PLACE: Final = re.compile(
    r"^[\w.]+\.(cpp|h):\d+: |,? ?In \w+ at /\S+|\[\w+\.(cpp|h)[^\]]*\] ?| Please set k\w+DLA .*$"
)
"""Places in the library's own source, and a flag for an accelerator that is not built for."""
_PREAMBLE: Final = re.compile(
    r"^(Invalid Node - .*|[\w:]+: Error Code \d+: .*?\(|(Assertion failed: )?\w+\([\w.]*\): )"
)
_PLUGIN: Final = "Plugin not found"
_EVERYDAY: Final = ("Int64 binding", "logger passed into", "CUDA lazy loading")
"""Warnings of every build, about nothing that a user could do."""
_NO_DRIVER: Final = "cudaError 35"
"""Follows each other error on a machine without a driver."""


@dataclass(kw_only=True)
class Heard:
    """Messages, in the order in which they came.

    Attributes:
        warnings: Such as deprecated operators.
        errors: What went wrong.
    """

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """The warnings that a user should know, each once and few."""
        kept = (w for w in map(tidy, self.warnings) if not any(e in w for e in _EVERYDAY))
        found = tuple(dict.fromkeys(kept))
        more = len(found) - _MOST_NOTES
        return found if more <= 0 else (*found[:_MOST_NOTES], f"and {more} more warnings")

    def reason(self) -> str:
        """The errors as one line."""
        return joined(self.errors) or "it gave no reason"


def tidy(message: str) -> str:
    """``message`` without the places in the library's own source."""
    return " ".join(_PLACE.sub("", message).split())


def plain(message: str) -> str:
    """The sentence of an error that says what is wrong."""
    if _PLUGIN in message or message == "false":
        return _UNSUPPORTED
    return _PREAMBLE.sub("", tidy(message)).strip().removesuffix(")")


def joined(messages: Iterable[str]) -> str:
    """Errors as one line, each once, without what a missing driver adds."""
    lines = (line for message in messages for line in message.splitlines())
    told = (plain(line) for line in lines if _NO_DRIVER not in line)
    return "; ".join(dict.fromkeys(line for line in told if line))


@functools.cache
def logger(package: Any) -> Any:
    """The one logger of this process for ``package``; its ``heard`` is who listens."""

    class Log(package.ILogger):  # type: ignore[misc] # the package has no types
        def __init__(self) -> None:
            package.ILogger.__init__(self)
            self.heard = Heard()

        def log(self, severity: Any, message: str) -> None:
            if severity == package.ILogger.Severity.WARNING:
                self.heard.warnings.append(message)
            elif severity in {
                package.ILogger.Severity.ERROR,
                package.ILogger.Severity.INTERNAL_ERROR,
            }:
                self.heard.errors.append(message)

    return Log()


@contextmanager
def listening(package: Any) -> Iterator[Heard]:
    """Collect what ``package`` says during a block."""
    log = logger(package)
    log.heard = Heard()
    try:
        yield log.heard
    finally:
        log.heard = Heard()


def monitor(package: Any) -> Any:
    """A progress monitor that reports the steps of the outermost phase."""

    class Monitor(package.IProgressMonitor):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            package.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                progress.report(step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if total := self.steps.pop(phase_name, 0):
                progress.report(total, total)

    return Monitor()
