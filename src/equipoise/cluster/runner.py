"""Runners of stages: on this machine, on this machine many at once, on a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.cluster.connection import joined, live_nodes, started
from equipoise.cluster.launch import ClusterLaunch
from equipoise.cluster.storage import Storage
from equipoise.errors import UsageError
from equipoise.stages import Observer, StageRunner


@contextmanager
def open_runner(  # noqa: PLR0913  every one is a setting of its own
    cluster: str,
    *,
    workers: int | None,
    storage: str,
    target: str,
    cache: Path,
    observer: Observer | None = None,
    time_limit_s: float = 3600.0,
    memory_limit_bytes: int | None = None,
    fresh: bool = False,
) -> Iterator[StageRunner]:
    """A runner whose ``slots`` say how many threads may well run stages at once.

    Args:
        cluster: Address of a Ray cluster: ``ray://host:10001``, ``host:6379``, ``auto``. Empty
            for this machine alone.
        workers: Stages at once; as many as the cluster has CPUs, or one here, when None.
        storage: Path or fsspec URL that the driver and all nodes reach. Needed for a cluster.
        target: Name of the target. Nodes with the device carry ``equipoise-target-NAME``.
        cache: Directory of the driver's cache, in which all results end.
        observer: Hears of progress, from several threads.
        time_limit_s: Limit for one stage.
        memory_limit_bytes: Limit for the resident memory of one stage.
        fresh: Run every stage again.

    Raises:
        UsageError: ``workers`` below 1, no storage, or no such form of an address or URL.
        MissingExtraError: Ray is needed and not installed.
        ResourceError: Nobody answers at the address.
        IncompatibleError: No node has the device, or the cluster has another Ray or Python.
        OutputError: The storage cannot be used.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")

    def made(launch: ClusterLaunch | None, slots: int) -> StageRunner:
        return StageRunner(
            cache,
            observer=observer,
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
            fresh=fresh,
            launch=launch,
            slots=slots,
        )

    if cluster:
        if not storage:
            raise UsageError(
                "--cluster needs --storage: a path or URL that this machine and all nodes reach"
            )
        shared = Storage(storage)
        with joined(cluster) as ray:
            launch = ClusterLaunch(ray, target=target, storage=shared)
            yield made(launch, workers or cluster_slots(ray, target=target))
    elif workers is None or workers == 1:
        yield made(None, 1)
    else:
        with local_workers(workers, target=target, cache=cache, storage=storage) as launch:
            yield made(launch, workers)


@contextmanager
def local_workers(
    count: int, *, target: str, cache: Path, storage: str = ""
) -> Iterator[ClusterLaunch]:
    """Computes up to ``count`` stages at once on this machine, which is the device too.

    While one measures, none of the others computes.

    Args:
        count: Stages at once.
        target: Name of the target.
        cache: Directory of the cache.
        storage: Where files go between processes; in the cache when empty.

    Raises:
        MissingExtraError: Ray is not installed.
        ResourceError: Ray does not start.
    """
    shared = Storage(storage or str(cache / "storage"))
    with started(workers=count, target=target) as ray:
        yield ClusterLaunch(ray, target=target, storage=shared, cache=cache.absolute())


def cluster_slots(ray: Any, *, target: str) -> int:
    """How many stages a cluster computes at once: CPUs of the nodes that are not the device."""
    nodes = live_nodes(ray, target=target)
    computing = [node for node in nodes if not node.labelled] or nodes
    return max(1, math.floor(sum(node.cpus for node in computing)))
