"""Computes stages as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, record
from equipoise.cluster.code import code_of, send_code
from equipoise.cluster.connection import Node, label_of, live_nodes, no_device
from equipoise.cluster.mailbox import Mailbox
from equipoise.cluster.messages import Outcome, Request
from equipoise.cluster.node import perform
from equipoise.cluster.parcels import pack
from equipoise.cluster.storage import Storage
from equipoise.cluster.versions import versions_here
from equipoise.errors import BackendError, EquipoiseError, IncompatibleError, ResourceError
from equipoise.launch import Computed, Order, in_time, time_is_over, time_left_s

_ATTEMPTS: Final = 4
_POLL_S: Final = 0.25
_LOOK_S: Final = 5.0
_PAUSE_S: Final = 1.0
_DEVICE_BACK_S: Final = 60.0
"""How long a device may be away before the run gives it up."""

_LONGEST_S: Final = 1e9
_Steps = tuple[int, int]
_LOST: Final = (
    "NodeDiedError", "WorkerCrashedError", "ObjectLostError", "TaskUnschedulableError",
    "LocalRayletDiedError",
)  # fmt: skip
"""Errors of Ray that say that a machine or process was lost, not that the task is wrong."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is sent, and where it may run.

    Attributes:
        name: Name of the stage.
        request: JSON text of the request.
        versions: JSON text of what the node has to have.
        measures: Whether it goes to the device.
        order: What was asked for.
    """

    name: str
    request: str
    versions: str
    measures: bool
    order: Order


class _LostError(Exception):
    """The node or the worker that computed was lost."""


class ClusterLaunch:
    """See the module. Threads may share one.

    Args:
        ray: Ray, connected.
        target: Name of the target, whose label the nodes with a device have.
        storage: Where files go from machine to machine.
        cache: Cache of every node; each node's own when None.

    Attributes:
        lost: What was lost with a node and computed again, in words.

    Raises:
        IncompatibleError: No node has the device.
    """

    def __init__(
        self, ray: Any, *, target: str, storage: Storage, cache: Path | None = None
    ) -> None:
        self._ray = ray
        self._exceptions: Any = extras.require("ray.exceptions")
        self._target = target
        self._storage = storage
        self._cache = str(cache or "")
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self.lost: list[str] = []
        nodes = live_nodes(ray, target=target)
        if not any(node.labelled for node in nodes):
            raise no_device(target)
        self._task = ray.remote(perform)
        self._mailbox = self._post(nodes)

    def __call__(self, order: Order) -> Computed:
        """Compute it somewhere; where a node is lost meanwhile, somewhere else.

        Raises:
            EquipoiseError: What the stage raised, and as `StageRunner.run`.
            IncompatibleError: A node has other versions, or the device has left the cluster.
            IntegrityError: A file was damaged on its way.
            BackendError: Nodes were lost again and again.
        """
        with in_time(order.deadline, what=order.stage.name):
            outcome = self._attempted(self._packed(order))
            if outcome.failure is not None:
                raise outcome.failure.raised()
        self._storage.get_tree(outcome.files, to=order.output)
        return Computed(record=outcome.record, ran=outcome.ran)

    def _post(self, nodes: list[Node]) -> Any:
        """The mailbox, on the head if possible: it is there as long as the cluster."""
        first = next((node for node in nodes if node.head), nodes[0])
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": _on(first, soft=True)}
        return self._ray.remote(Mailbox).options(**options).remote()

    def _packed(self, order: Order) -> _Task:
        stage = order.stage
        config = record.dumps(order.config)
        code = code_of(stage.function, config)
        request = Request(
            stage=stage.name,
            function=stage.function,
            measures=stage.measures,
            config=config,
            parcels=pack(order.config, storage=self._storage),
            code=send_code(code.folders, storage=self._storage),
            storage=self._storage.url,
            cache=self._cache,
            time_limit_s=min(order.left_s, _LONGEST_S),
            memory_limit_bytes=order.limits.memory_bytes,
        )
        return _Task(
            name=stage.name,
            request=record.dumps(request),
            versions=record.dumps(versions_here((*stage.packages, *code.packages))),
            measures=stage.measures,
            order=order,
        )

    def _attempted(self, task: _Task) -> Outcome:
        lost: list[str] = []
        while True:
            node = self._device(task) if task.measures else self._choose(avoid=lost)
            try:
                with self._counted(node):
                    return self._once(task, node)
            except _LostError as error:
                lost.append(node.id)
                self.lost.append(str(error))
                if len(lost) == _ATTEMPTS:
                    raise BackendError(
                        f"the nodes that computed the stage {task.name!r} were lost {_ATTEMPTS}"
                        f" times: {error}",
                        hint="Look at the logs of Ray and at the memory of the nodes.",
                    ) from error
            time.sleep(_PAUSE_S)

    def _choose(self, *, avoid: list[str]) -> Node:
        """The node with the least to do for its size; one with a device only if there is no other.

        Raises:
            IncompatibleError: No node takes tasks.
        """
        nodes = [node for node in live_nodes(self._ray, target=self._target) if node.cpus >= 1]
        if not nodes:
            raise IncompatibleError(
                "no node of the cluster has a CPU for tasks",
                hint="Start one with: ray start --address=HOST:6379 --num-cpus=4",
            )
        nodes = [node for node in nodes if not node.labelled] or nodes
        nodes = [node for node in nodes if node.id not in avoid] or nodes
        return min(nodes, key=lambda node: (self._running[node.id] + 1) / node.cpus)

    def _device(self, task: _Task) -> Node:
        """The device with the least to do. Raises IncompatibleError when none comes back."""
        end = time.monotonic() + _DEVICE_BACK_S
        while True:
            nodes = [n for n in live_nodes(self._ray, target=self._target) if n.labelled]
            if nodes:
                return min(nodes, key=lambda node: self._running[node.id])
            _check_time(task)
            if time.monotonic() > end:
                raise no_device(self._target)
            time.sleep(_PAUSE_S)

    @contextlib.contextmanager
    def _counted(self, node: Node) -> Iterator[None]:
        with self._lock:
            self._running[node.id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[node.id] -= 1

    def _once(self, task: _Task, node: Node) -> Outcome:
        key = uuid.uuid4().hex
        # Ray would run it again where it likes; here it is chosen.
        options: dict[str, Any] = {"max_retries": 0, "scheduling_strategy": _on(node, soft=False)}
        options["num_cpus"] = 0 if task.measures else 1
        options["resources"] = {label_of(self._target): 1} if task.measures else {}
        reference = self._task.options(**options).remote(
            task.request, versions=task.versions, node=node.id, key=key, mailbox=self._mailbox
        )
        try:
            text = self._awaited(reference, task=task, key=key)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
            raise _translated(error, task=task, node=node) from error
        finally:
            with contextlib.suppress(Exception):
                self._mailbox.forget.remote(key)
        return record.loads(Outcome, text, where=f"the outcome of {task.name}", error=BackendError)

    def _awaited(self, reference: Any, *, task: _Task, key: str) -> str:
        seen: _Steps | None = None
        while not self._ray.wait([reference], timeout=_POLL_S)[0]:
            _check_time(task)
            seen = self._told(task, key=key, seen=seen)
        text = str(self._ray.get(reference))
        self._told(task, key=key, seen=seen)
        return text

    def _told(self, task: _Task, *, key: str, seen: _Steps | None) -> _Steps | None:
        """Pass on what is new in the mailbox. The run does not depend on it."""
        found = seen
        with contextlib.suppress(self._exceptions.RayError):
            found = self._ray.get(self._mailbox.read.remote(key), timeout=_LOOK_S)
        if found is not None and found != seen:
            task.order.on_progress(*found)
        return found


def _on(node: Node, *, soft: bool) -> Any:
    strategies: Any = extras.require("ray.util.scheduling_strategies")
    return strategies.NodeAffinitySchedulingStrategy(node_id=node.id, soft=soft)


def _check_time(task: _Task) -> None:
    if time_left_s(task.order.deadline) <= 0:
        raise time_is_over(task.name)


def _translated(error: BaseException, *, task: _Task, node: Node) -> BaseException:
    """The one place where Ray's errors become ours; what is none of Ray's stays as it is."""
    exceptions: Any = extras.require("ray.exceptions")
    where = f"the stage {task.name!r} on node {node.id[:8]} ({node.host})"
    if isinstance(error, EquipoiseError) or not isinstance(error, Exception):
        return error
    if any(isinstance(error, getattr(exceptions, name)) for name in _LOST):
        return _LostError(f"{where}: {error}")
    if isinstance(error, exceptions.OutOfMemoryError):
        return ResourceError(
            f"{where} was stopped by Ray because its machine ran out of memory",
            hint="Run less at once there, or set a memory limit for stages.",
        )
    if "failed to import" in str(error) or "No module named 'equipoise" in str(error):
        return IncompatibleError(
            f"node {node.id[:8]} ({node.host}) has no equipoise, or a much older one",
            hint='Install the same there: pip install "equipoise[cluster]".',
        )
    return BackendError(f"{where} failed: {type(error).__name__}: {error}")
