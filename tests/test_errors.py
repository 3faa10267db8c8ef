"""The error tree: classes, exit codes, and messages that help."""

from __future__ import annotations

import pickle
from contextlib import suppress

import pytest

from equipoise import errors
from equipoise.errors import EquipoiseError, error_class, unknown_name

CODES = {
    "EquipoiseError": 1,
    "UsageError": 2,
    "InputError": 3,
    "SourceError": 3,
    "UnsafeCheckpointError": 3,
    "DataError": 3,
    "RecipeError": 3,
    "NonFiniteError": 3,
    "IntegrityError": 4,
    "SignatureError": 4,
    "IncompatibleError": 5,
    "MissingExtraError": 5,
    "NotMetError": 6,
    "ParityError": 6,
    "FrozenDimensionError": 6,
    "AccuracyError": 6,
    "ResourceError": 7,
    "OutputError": 7,
    "LockError": 8,
    "BackendError": 9,
}


def classes() -> dict[str, type[EquipoiseError]]:
    """Every class of the module, by name."""
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, EquipoiseError)
    }


def test_every_error_has_its_exit_code() -> None:
    """Scripts depend on these numbers."""
    assert {name: cls.exit_code for name, cls in classes().items()} == CODES


def test_a_signal_is_not_swallowed_with_errors() -> None:
    """Libraries suppress every Exception in places where a signal may arrive."""
    with pytest.raises(errors.InterruptedRunError) as caught, suppress(Exception):
        raise errors.InterruptedRunError("stopped", hint="again", exit_code=143)
    assert caught.value.exit_code == 143


def test_the_drawn_tree_is_the_tree() -> None:
    """The picture at the top of the module names each class with its exit code."""
    drawn = {}
    code = None
    for line in (errors.__doc__ or "").splitlines():
        words = line.strip("│├└─ ").split()
        if words and words[0] in CODES:
            code = int(words[1]) if len(words) > 1 and words[1].isdigit() else code
            drawn[words[0]] = code
    assert drawn == CODES


@pytest.mark.parametrize("name", CODES)
def test_a_class_is_found_by_its_name(name: str) -> None:
    """As an error crosses from a child process."""
    assert error_class(name) is classes()[name]


def test_a_name_from_elsewhere_is_a_backend_error() -> None:
    """A vendor's exception, or one that a plug-in brought."""
    assert error_class("ValueError") is errors.BackendError


def test_the_hint_follows_the_message() -> None:
    """On a line of its own, and only where there is one."""
    assert str(EquipoiseError("what", hint="do this")) == "what\ndo this"
    assert str(EquipoiseError("what")) == "what"


def test_an_error_survives_pickling() -> None:
    """Process pools send errors that way; the message stays."""
    error = pickle.loads(pickle.dumps(errors.DataError("sample 3 is bad")))
    assert type(error) is errors.DataError
    assert error.message == "sample 3 is bad"


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    """Sorted, with a hint only when something is near."""
    error = unknown_name("metric", "acuracy", ["cosine", "accuracy"])
    assert error.message == "unknown metric 'acuracy'; known: accuracy, cosine"
    assert error.hint == "Did you mean 'accuracy'?"
    assert unknown_name("metric", "zzz", ["cosine"]).hint == ""
