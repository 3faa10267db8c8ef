"""Ray, joined or started: quietly, and with errors of ours within seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras
from equipoise.errors import EquipoiseError, IncompatibleError, ResourceError, UsageError

_CONNECT_S: Final = 40.0
"""Somebody is there, as a probe has shown; a busy machine takes long to say more."""

_START_S: Final = 90.0
_PROBE_S: Final = 3.0
_LEAVE_S: Final = 30.0
_STORE_BYTES: Final = 100 << 20
"""Of Ray's object store: artefacts do not go through it."""

_ADDRESS: Final = re.compile(
    r"(?P<client>ray://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d{1,5})/?"
)
# What Ray prints when a node is lost has no switch: it is dropped as lines that nobody wants.
_QUIET: Final = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A live node of the cluster.

    Attributes:
        id: Its identifier.
        host: Name of its machine.
        cpus: Tasks that it runs at once.
        labelled: Whether it carries the target's label.
        head: Whether it is the head of the cluster.
    """

    id: str
    host: str
    cpus: float
    labelled: bool
    head: bool


def label_of(target: str) -> str:
    """The resource that nodes with a device of ``target`` have, one per device."""
    return f"equipoise-target-{target}"


def start_line(target: str) -> str:
    """The command line that adds a node with the device to a cluster."""
    return f"ray start --address=HOST:6379 --resources='{{\"{label_of(target)}\": 1}}'"


def load_ray() -> Any:
    """Ray, told to be quiet. Raises MissingExtraError."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # read once, when Ray is imported
    return extras.require("ray")


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray, as a driver of the cluster at ``address`` during the block.

    Args:
        address: ``ray://host:10001`` from anywhere, ``host:6379`` or ``auto`` on one of its nodes.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: No such form of an address.
        ResourceError: Nobody answers there.
        IncompatibleError: The cluster has another Ray or Python.
    """
    ray = load_ray()
    place = _resolved(address)
    _probe(place)
    with _connected(ray, address=place, patience_s=_CONNECT_S):
        yield ray


@contextlib.contextmanager
def started(*, workers: int, target: str) -> Iterator[Any]:
    """Ray on this machine alone during the block, which is the device of ``target``.

    Raises:
        MissingExtraError: Ray is not installed.
        ResourceError: It does not start.
    """
    ray = load_ray()
    options = {
        "num_cpus": workers,
        "resources": {label_of(target): 1},
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
    }
    with _connected(ray, address="local", patience_s=_START_S, options=options):
        yield ray


def live_nodes(ray: Any, *, target: str) -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            id=str(node["NodeID"]),
            host=str(node["NodeManagerHostname"]),
            cpus=float(node["Resources"].get("CPU", 0)),
            labelled=float(node["Resources"].get(label_of(target), 0)) >= 1,
            head="node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def no_device(target: str) -> IncompatibleError:
    """The error of a cluster in which no node has the device."""
    return IncompatibleError(
        f"no node of the cluster carries the label {label_of(target)!r}, so nothing can be measured"
        f" on a device of the target {target!r}",
        hint=f"On the device, run: {start_line(target)}",
    )


@contextlib.contextmanager
def _connected(
    ray: Any, *, address: str, patience_s: float, options: dict[str, Any] | None = None
) -> Iterator[None]:
    if ray.is_initialized():
        raise UsageError("this process is connected to a Ray cluster already; leave it first")
    arguments = {
        "address": address,
        "log_to_driver": False,
        "logging_level": logging.CRITICAL,
        **(options or {}),
    }
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    session = _Session(lambda: ray.init(**arguments), ray.shutdown)
    session.enter(patience_s=patience_s, address=address)
    try:
        yield
    finally:
        session.leave()


class _Session:
    """A connection that begins and ends in a thread of its own.

    In the main thread Ray would put its own handler in the place of ours for SIGTERM. The thread
    lives as long as the connection: the daemons that Ray starts die with the thread that did.
    """

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._begin, self._end = begin, end
        self._begun, self._over = threading.Event(), threading.Event()
        self._raised: BaseException | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)

    def enter(self, *, patience_s: float, address: str) -> None:
        """Begin. Raises an error of ours; a thread that takes too long is left behind."""
        self._thread.start()
        if not self._begun.wait(timeout=patience_s):
            self._over.set()
            raise no_answer(address, f"no answer within {patience_s:.0f} s")
        if self._raised is not None:
            raise _translated(self._raised, address=address) from self._raised

    def leave(self) -> None:
        """End."""
        self._over.set()
        self._thread.join(timeout=_LEAVE_S)

    def _live(self) -> None:
        try:
            self._begin()
        except BaseException as error:  # noqa: BLE001  who waits in `enter` raises it
            self._raised = error
            return
        finally:
            self._begun.set()
        self._over.wait()
        with contextlib.suppress(Exception):
            self._end()


def _translated(error: BaseException, *, address: str) -> EquipoiseError:
    text = str(error) or type(error).__name__
    if "ersion mismatch" in text or "versions do not match" in text:
        return IncompatibleError(
            f"the cluster at {address} does not fit this machine: {text}",
            hint="Use the same Ray and the same Python on every machine.",
        )
    return no_answer(address, text)


def no_answer(address: str, why: str) -> ResourceError:
    """The error of a cluster that cannot be reached."""
    return ResourceError(
        f"the Ray cluster at {address} cannot be reached: {why}",
        hint="Start one with `ray start --head`. From a machine that is none of its nodes, give"
        " ray://HOST:10001.",
    )


def _resolved(address: str) -> str:
    """``auto`` as the address that the environment or a running cluster of this machine says."""
    if address != "auto":
        return address
    services: Any = extras.require("ray._private.services")
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        raise no_answer(address, str(error)) from error


def _probe(address: str) -> None:
    """Find out that nobody is there, which Ray itself would try again for minutes."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise UsageError(
            f"--cluster {address!r} is no address of a Ray cluster",
            hint="Give ray://HOST:10001, HOST:6379 on one of its nodes, or auto.",
        )
    try:
        place = (found["host"].strip("[]"), int(found["port"]))
        socket.create_connection(place, timeout=_PROBE_S).close()
    except OSError as error:
        raise no_answer(address, error.strerror or str(error)) from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}:
        return
    # Ray ends this whole process when what answers speaks something else.
    grpc: Any = extras.require("grpc")
    with grpc.insecure_channel(f"{found['host']}:{found['port']}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PROBE_S)
        except grpc.FutureTimeoutError as error:
            raise no_answer(address, "what listens there is no Ray") from error
