"""A node computes the same as the driver only with the same code and the same packages."""

from __future__ import annotations

import platform
from typing import Final

from equipoise import __version__
from equipoise.cluster.messages import Versions
from equipoise.content import code_sha256, versions_of
from equipoise.errors import IncompatibleError

_SHOWN: Final = 12
_HINT: Final = "Install the same versions on every node, and start Ray there again."


def versions_here(packages: tuple[str, ...]) -> Versions:
    """What this machine has, with the versions of ``packages``."""
    return Versions(
        equipoise=__version__,
        code_sha256=code_sha256(),
        python=platform.python_version(),
        packages=versions_of(packages),
    )


def check_versions(wanted: Versions, *, node: str) -> None:
    """Compare this machine, which a message calls ``node``, with the driver.

    Raises:
        IncompatibleError: Names everything that differs, as it is here and there.
    """
    found = versions_here(tuple(wanted.packages))
    pairs = {
        "Python": (_python(wanted), _python(found)),
        "equipoise": (_code(wanted), _code(found)),
        **{name: (wanted.packages[name], found.packages[name]) for name in wanted.packages},
    }
    differing = [f"{name} {b} (here: {a})" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise IncompatibleError(f"{node} has {', '.join(differing)}", hint=_HINT)


def _python(versions: Versions) -> str:
    return ".".join(versions.python.split(".")[:2])


def _code(versions: Versions) -> str:
    return f"{versions.equipoise} with code {versions.code_sha256[:_SHOWN]}"
