"""Every error that equipoise raises on purpose.

    EquipoiseError                  1
    ├── UsageError                  2   a name or option that does not exist
    ├── InputError                  3   a model, data or recipe that cannot be used
    │   ├── SourceError                 the trained model
    │   │   └── UnsafeCheckpointError       a checkpoint that wants to run code
    │   ├── DataError                   calibration or evaluation data
    │   ├── RecipeError                 settings read from a file
    │   └── NonFiniteError              NaN or infinity where numbers are needed
    ├── IntegrityError              4   a file that is not what its hash says
    │   └── SignatureError              a signature that is missing, wrong, or not to be trusted
    ├── IncompatibleError           5   this machine, version or target cannot do it
    │   └── MissingExtraError           a package that is not installed
    ├── NotMetError                 6   the result is not good enough
    │   ├── ParityError                 outputs differ from the reference
    │   │   └── FrozenDimensionError        a dynamic dimension came out fixed
    │   └── AccuracyError               no candidate keeps the metric
    ├── ResourceError               7   disk, memory or time ran out
    │   └── OutputError                 a place that cannot be written
    ├── LockError                   8   another process holds the lock
    └── BackendError                9   a child process or vendor library died

    InterruptedRunError           130   stopped by a signal; the same command goes on

The last is no Exception: whoever swallows those, as importlib.metadata does while it looks through
directories, would swallow the signal with them.

The number is the exit code of the command line, inherited down the tree. A message says what
failed, on which file, tensor or value, and what is allowed; ``hint`` says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EquipoiseError(Exception):
    """Base of the tree.

    Args:
        message: What failed, on which file, tensor or value, and what is allowed.
        hint: What to do next, as one sentence or command line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(EquipoiseError):
    """A name, option or combination of options that does not exist."""

    exit_code = 2


class InputError(EquipoiseError):
    """A model, data set or recipe that cannot be used as it is."""

    exit_code = 3


class SourceError(InputError):
    """The trained model cannot be found, read or built."""


class UnsafeCheckpointError(SourceError):
    """A checkpoint or model directory that asks to run code when it is read."""


class DataError(InputError):
    """Calibration or evaluation data is missing, empty or of the wrong form."""


class RecipeError(InputError):
    """Settings have an unknown key or a wrong type, or the model has nothing they act on."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinity where finite numbers are needed."""


class IntegrityError(EquipoiseError):
    """A file is missing, extra or different from what its hash says."""

    exit_code = 4


class SignatureError(IntegrityError):
    """A signature is missing, is not of the form that is accepted, or does not vouch for the files.

    Args:
        message: As of the base.
        hint: As of the base.
        kind: Which of these, in one word; ``bundle/signature.py`` lists them.
    """

    def __init__(self, message: str, *, hint: str = "", kind: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class IncompatibleError(EquipoiseError):
    """This machine, version or target cannot do what was asked."""

    exit_code = 5


class MissingExtraError(IncompatibleError):
    """A package is needed that is not installed."""


class NotMetError(EquipoiseError):
    """The result exists but is not good enough."""

    exit_code = 6


class ParityError(NotMetError):
    """Outputs differ from the reference by more than the tolerance."""


class FrozenDimensionError(ParityError):
    """A dimension that was asked to be dynamic came out of the export with a fixed size."""


class AccuracyError(NotMetError):
    """No candidate keeps the metric within the allowed drop."""


class ResourceError(EquipoiseError):
    """Disk, memory or time ran out."""

    exit_code = 7


class OutputError(ResourceError):
    """A place that cannot be written: read-only, a file where a directory is needed, no space."""


class LockError(EquipoiseError):
    """Another process holds the lock on the same work."""

    exit_code = 8


class BackendError(EquipoiseError):
    """A child process or a vendor library died or failed without saying why."""

    exit_code = 9


class InterruptedRunError(BaseException):
    """The run was stopped by a signal. Finished stages are kept.

    Args:
        message: Which signal.
        hint: What to do next.
        exit_code: 128 and the number of the signal.
    """

    def __init__(self, message: str, *, hint: str, exit_code: int) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UsageError:
    """The error for a ``name`` that is not among ``allowed``, with the nearest known one."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}; known: {', '.join(names)}", hint=hint)


def _subclasses(base: type[EquipoiseError]) -> Iterable[type[EquipoiseError]]:
    yield base
    for child in base.__subclasses__():
        yield from _subclasses(child)


def error_class(name: str) -> type[EquipoiseError]:
    """The class of this tree called ``name``; ``BackendError`` for a name from elsewhere."""
    by_name = {cls.__name__: cls for cls in _subclasses(EquipoiseError)}
    return by_name.get(name, BackendError)
