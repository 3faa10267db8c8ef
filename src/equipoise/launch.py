"""Computing one stage: what is to be computed and under which limits, and doing it here."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from equipoise.errors import ResourceError
from equipoise.isolation import Limits, run_isolated
from equipoise.rwlock import ReadersWriterLock

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Generic[R]):
    """One step of the pipeline.

    Attributes:
        name: Folder in the cache, and the word in progress bars.
        function: ``module:function`` with the signature ``(config, *, output: Path) -> R``.
        record: The type that the function returns.
        packages: Distributions whose versions change the result.
        measures: Whether it measures on the target. Then it runs on a machine that is one, and
            nothing else of ours computes there meanwhile.
    """

    name: str
    function: str
    record: type[R]
    packages: tuple[str, ...] = ()
    measures: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """Where and when a stage ran.

    Attributes:
        host: Name of the machine.
        node: Its identifier in a cluster; empty outside one.
        began_s: Start of the computation, seconds since 1970.
        ended_s: Its end.
    """

    host: str
    node: str = ""
    began_s: float
    ended_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """A stage that is to be computed now.

    Attributes:
        stage: What.
        config: From what.
        output: Existing empty directory for its files.
        on_progress: Called with steps done and steps in all.
        limits: What it may take.
        deadline: Moment of ``time.monotonic`` at which it has to be done; None for none.
    """

    stage: Stage[Any]
    config: object
    output: Path
    on_progress: Callable[[int, int], None]
    limits: Limits
    deadline: float | None = None

    @property
    def left_s(self) -> float:
        """Most seconds that it may take from now on. Raises ResourceError when none are left."""
        left = time_left_s(self.deadline)
        if left <= 0:
            raise time_is_over(self.stage.name)
        return min(self.limits.time_s, left)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
    """A stage that was computed.

    Attributes:
        record: Its record as JSON text.
        ran: Where and when.
    """

    record: str
    ran: Ran


Launch = Callable[[Order], Computed]
"""Computes a stage somewhere; its files are in ``Order.output`` then. Raises what it raises."""


class LaunchHere:
    """Computes stages in child processes of this machine.

    Args:
        machine: Lock that whatever computes on this machine shares, and what measures has alone.
    """

    def __init__(self, machine: ReadersWriterLock) -> None:
        self._machine = machine

    def __call__(self, order: Order) -> Computed:
        """Compute it, when the machine is free for it. Raises as `StageRunner.run`."""
        stage = order.stage
        enter = self._machine.writing if stage.measures else self._machine.reading
        with in_time(order.deadline, what=stage.name), enter(deadline=order.deadline):
            began = time.time()
            text = run_isolated(
                stage.function,
                order.config,
                output=order.output,
                on_progress=order.on_progress,
                time_limit_s=order.left_s,
                memory_limit_bytes=order.limits.memory_bytes,
            )
            ran = Ran(host=platform.node(), began_s=began, ended_s=time.time())
        return Computed(record=text, ran=ran)


def lock_of_machine(cache: Path) -> ReadersWriterLock:
    """The lock of this machine; processes that use the same cache share it.

    Machines that share a cache have one each.
    """
    return ReadersWriterLock(cache / "machines" / (platform.node() or "unnamed"))


def time_left_s(deadline: float | None) -> float:
    """Seconds until ``deadline``, a moment of ``time.monotonic``; infinite for None."""
    return math.inf if deadline is None else deadline - time.monotonic()


@contextmanager
def in_time(deadline: float | None, *, what: str) -> Iterator[None]:
    """Say of what took too long that the time of the whole run was over, where that is why."""
    try:
        yield
    except (TimeoutError, ResourceError) as error:
        over = time_left_s(deadline) <= 0
        if over and type(error) in {TimeoutError, ResourceError}:
            raise time_is_over(what) from error
        raise


def time_is_over(what: str) -> ResourceError:
    """The error of a stage that the time of the whole run did not suffice for."""
    return ResourceError(
        f"the time of this run was over before the stage {what!r} was done",
        hint="What was finished is kept: the same command with more time goes on from there.",
    )
