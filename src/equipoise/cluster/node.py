"""The part of a run that happens on a node: fetch the inputs, compute, send the outputs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from equipoise import fs, isolation, record
from equipoise.cluster.code import fetch_code
from equipoise.cluster.mailbox import teller
from equipoise.cluster.messages import Outcome, Request, Versions
from equipoise.cluster.parcels import unpack
from equipoise.cluster.storage import Storage
from equipoise.cluster.versions import check_versions
from equipoise.content import tree_sha256
from equipoise.errors import EquipoiseError, IncompatibleError
from equipoise.isolation import Failure, Limits
from equipoise.launch import Ran, lock_of_machine
from equipoise.stages import default_cache

_INPUTS: Final = "inputs"
_SET_BY_RAY: Final = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def perform(request: str, *, versions: str, node: str, key: str, mailbox: Any) -> str:
    """Compute a stage on this node. It is a task of the cluster.

    Args:
        request: JSON text of a `Request`.
        versions: JSON text of `Versions`, the driver's.
        node: Identifier of this node.
        key: What the stage is called in the mailbox.
        mailbox: Actor that hears of progress.

    Returns:
        JSON text of an `Outcome`; what it raised of our errors is in there.
    """
    began = time.time()
    try:
        _check(versions, node=f"node {node[:8]} ({platform.node()})")
        asked = record.loads(Request, request, where="the request of the driver")
        outcome = _compute(asked, node=node, on_progress=teller(mailbox, key=key))
    except EquipoiseError as error:
        ran = Ran(host=platform.node(), node=node, began_s=began, ended_s=time.time())
        outcome = Outcome(ran=ran, failure=Failure.of(error))
    return record.dumps(outcome)


def _check(versions: str, *, node: str) -> None:
    wanted = record.loads(
        Versions, versions, where=f"{node} has another equipoise", error=IncompatibleError
    )
    check_versions(wanted, node=node)


def _compute(request: Request, *, node: str, on_progress: Callable[[int, int], None]) -> Outcome:
    cache = Path(request.cache) if request.cache else default_cache()
    storage = Storage(request.storage)
    inputs = cache / _INPUTS
    config = unpack(request.config, request.parcels, storage=storage, inputs=inputs)
    code = (str(fetch_code(request.code, storage=storage, inputs=inputs)),) if request.code else ()
    _restore_environment()
    machine = lock_of_machine(cache)
    with fs.scratch_directory() as output:
        asked = isolation.Request(
            function=request.function, config=config, output=output, search_path=code
        )
        limits = Limits(time_s=request.time_limit_s, memory_bytes=request.memory_limit_bytes)
        with machine.writing() if request.measures else machine.reading():
            began = time.time()
            text = isolation.run_request(asked, limits=limits, on_progress=on_progress)
            ran = Ran(host=platform.node(), node=node, began_s=began, ended_s=time.time())
        files = tree_sha256(output)
        storage.put_tree(output, files=files)
    return Outcome(ran=ran, record=text, files=files)


def _restore_environment() -> None:
    """Undo what Ray sets for its tasks: one thread, and no GPU for a task that asked for none.

    The stages bound their threads themselves, and a result must not depend on who started them.
    What the node was started with stands in the environment of Ray's daemon, the parent.
    """
    try:
        text = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return
    entries = (entry.partition(b"=") for entry in text.split(b"\0"))
    before = {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}
    for name in _SET_BY_RAY:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
