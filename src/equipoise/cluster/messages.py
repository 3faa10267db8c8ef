"""What goes to a node and what comes back, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from equipoise.isolation import Failure
from equipoise.launch import Ran

Tree = dict[str, str]
"""Relative file name, with slashes -> SHA-256 of the file."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A file or directory that a config names, sent by content.

    Attributes:
        at: Keys and indices that lead to its path in the JSON form of the config.
        prefix: What stands before the path there: ``npz:``.
        files: The tree that is sent.
        path: What the config names, relative to the tree; empty for the tree itself.
    """

    at: tuple[str, ...]
    prefix: str = ""
    files: Tree
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What a node has to have exactly as the driver has it.

    Attributes:
        equipoise: Version of equipoise.
        code_sha256: Hash of its code.
        python: Version of Python; its last part may differ.
        packages: Distribution -> version, of those whose versions change the result.
    """

    equipoise: str
    code_sha256: str
    python: str
    packages: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A stage for a node.

    Attributes:
        stage: Its name.
        function: ``module:function``.
        measures: Whether it needs its machine for itself.
        config: The config as JSON text; the paths in it are those of the driver.
        parcels: The contents of those paths.
        code: SHA-256 of an archive of Python files to import from; empty for none.
        storage: Path or URL of the storage that all nodes share.
        cache: The node's cache; empty for the one that the node itself names.
        time_limit_s: Limit for the computation alone.
        memory_limit_bytes: Limit for its resident memory.
    """

    stage: str
    function: str
    measures: bool
    config: str
    parcels: tuple[Parcel, ...]
    code: str
    storage: str
    cache: str
    time_limit_s: float
    memory_limit_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it.

    Attributes:
        ran: Where and when.
        record: The record as JSON text.
        files: Its outputs; their contents are in the storage.
        failure: The error of ours that it raised.
    """

    ran: Ran
    record: str = ""
    files: Tree = field(default_factory=dict)
    failure: Failure | None = None
