"""Names -> ``module:Object`` tables, opened on first use and open to other packages.

Another package adds a name through an entry point in the group ``equipoise.<table>``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from equipoise.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A table of named things.

    Attributes:
        kind: What the things are, for messages: ``runtime``, ``metric``.
        group: Entry-point group in which other packages add names.
        builtin: Name -> ``module:Object``.
    """

    kind: str
    group: str
    builtin: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """All known names, sorted."""
        return tuple(sorted({*self.builtin, *(e.name for e in entry_points(group=self.group))}))

    def get(self, name: str) -> object:
        """The object under ``name``. Raises UsageError that lists the known names."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        raise unknown_name(self.kind, name, self.names())
