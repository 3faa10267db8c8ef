"""One process or several: Accelerate, what it wraps, and tensors that are divided between them.

Several processes each hold the whole model, and average their gradients; where parameters are
shared out (FSDP, as PyTorch's ``fully_shard``), each holds a part. Accelerate 1.15 shards on
accelerators alone, so ``fully_shard`` is called here, which runs on CPUs too.

Batch normalisation takes the statistics of each process's own share of a batch; with CUDA those of
all processes (``SyncBatchNorm``). Running statistics are averaged over the processes before they
are used.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.compress.optimization import build_optimizer
from equipoise.compress.settings import TrainSettings
from equipoise.errors import IncompatibleError, UsageError
from equipoise.sources.torch_model import NamedModule
from equipoise.spec import Array

_PRECISIONS: Final = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_ELSEWHERE: Final = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
)


def launched_world() -> int:
    """Processes of the launcher around this one, such as torchrun; 0 when there is none."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0
    return int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def accelerator(settings: TrainSettings, *, rendezvous: Path | None = None) -> Iterator[Any]:
    """Accelerate's ``Accelerator`` for this process and those launched beside it.

    Args:
        settings: Precision and sharding.
        rendezvous: File through which the processes of one machine find each other; None where the
            environment says how.

    Raises:
        IncompatibleError: This device does not compute in that precision.
        UsageError: The launcher was told to use another way to divide the model or started more
            processes than there are GPUs, or settings exclude each other.
    """
    accelerate, state = extras.require("accelerate"), extras.require("accelerate.state")
    cpu = _on_cpu()
    _check(settings, cpu=cpu)
    if rendezvous is not None:
        _join(rendezvous, cpu=cpu)
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=1)
    ddp = accelerate.DistributedDataParallelKwargs(
        # A part of the model that no part of the loss reaches would otherwise stop the run.
        find_unused_parameters=True,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    made = accelerate.Accelerator(
        mixed_precision=_PRECISIONS[settings.precision],
        cpu=cpu,
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[ddp],
    )
    try:
        yield made
        made.end_training()
    finally:
        # Its state is global, and another training of this process may have other settings.
        state.AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  no other way


def _on_cpu() -> bool:
    torch = extras.require("torch")
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return asked or not torch.cuda.is_available()


def check_devices(processes: int) -> None:
    """Raise UsageError where so many processes of this machine would have to share GPUs."""
    if _on_cpu():
        return
    gpus = extras.require("torch").cuda.device_count()
    if processes > gpus:
        raise UsageError(
            f"{processes} processes need as many GPUs; this machine has {gpus}",
            hint=f"Start {gpus} at most, or set ACCELERATE_USE_CPU=1 to train on the CPU.",
        )


def _check(settings: TrainSettings, *, cpu: bool) -> None:
    check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name in _ELSEWHERE:
        if os.environ.get(name, "").lower() in {"1", "true"}:
            raise UsageError(
                f"{name} is set by the launcher; here the setting shard divides a model",
                hint="Launch with torchrun, or accelerate launch without FSDP and DeepSpeed.",
            )
    if settings.precision == "float16" and cpu:
        raise IncompatibleError(
            "training in float16 needs a GPU", hint="Use bfloat16 or float32 on a CPU."
        )
    if settings.precision == "float16" and settings.shard:
        raise UsageError("float16 cannot be sharded here: its loss scale is kept per process",
                         hint="Use bfloat16.")  # fmt: skip


def _join(rendezvous: Path, *, cpu: bool) -> None:
    torch = extras.require("torch")
    torch.distributed.init_process_group(
        backend="gloo" if cpu else "cpu:gloo,cuda:nccl",
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What the loop works on.

    Attributes:
        accelerator: Of :func:`accelerator`.
        root: The module that holds all that is trained.
        model: ``root`` as it is called: itself, or wrapped.
        optimizer: Over the parameters of ``root``.
    """

    accelerator: Any
    root: Any
    model: Any
    optimizer: Any

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def student(self) -> Any:
        """The model that learns."""
        return self.root.objectives.student

    def placed(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Arrays as tensors on the device."""
        return placed(batch, device=self.accelerator.device)

    def held_back(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Keep gradients from being averaged until the last part of a batch.

        Sharded ones are averaged part by part: whole ones would not fit.
        """
        hold = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if last or hold is None else hold()

    def summed(self, tensor: Any) -> Any:
        """The sum over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.world > 1 else tensor

    def average_statistics_(self) -> None:
        """Give every process the mean of the running statistics of batch normalisation."""
        torch = extras.require("torch")
        if self.world == 1:
            return
        for layer in self.root.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  no public base
                for statistic in (layer.running_mean, layer.running_var):
                    if statistic is not None:
                        statistic.copy_(self.summed(statistic.clone()) / self.world)


def placed(batch: Mapping[str, Array], *, device: Any) -> dict[str, Any]:
    """Arrays as tensors on ``device``; the copy to a GPU does not keep the caller waiting."""
    torch = extras.require("torch")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
    if device.type != "cuda":
        return tensors
    return {n: t.pin_memory().to(device, non_blocking=True) for n, t in tensors.items()}


def assemble(
    objectives: Any, *, names: Sequence[str], settings: TrainSettings, accelerator: Any
) -> Assembled:
    """Place ``objectives`` on the device, wrap it for several processes, and make its optimiser.

    Args:
        objectives: Module with ``student`` whose ``forward(batch)`` gives sums and counts.
        names: Names of the inputs, for the student alone.
        settings: Optimiser and sharding.
        accelerator: Of :func:`accelerator`.
    """
    torch = extras.require("torch")
    root = _root_class()(objectives, names).to(accelerator.device)
    several = accelerator.num_processes > 1
    if several and accelerator.device.type == "cuda":
        root = torch.nn.SyncBatchNorm.convert_sync_batchnorm(root)
    sharded = several and settings.shard
    if sharded:
        _shard_(root, accelerator=accelerator)
    optimizer = build_optimizer(root, settings=settings, fused=not sharded)
    model = root if sharded else accelerator.prepare(root)
    if accelerator.scaler is not None:  # else Accelerate's wrapper does nothing, and takes time
        optimizer = accelerator.prepare(optimizer)
    return Assembled(accelerator=accelerator, root=root, model=model, optimizer=optimizer)


@functools.cache
def _root_class() -> Any:
    torch = extras.require("torch")

    class Root(torch.nn.Module):  # type: ignore[misc, name-defined]
        """The one module that is wrapped, so that every call goes through the wrapper."""

        def __init__(self, objectives: Any, names: Sequence[str]) -> None:
            super().__init__()
            self.objectives = objectives
            # In a list, so that the student is registered once.
            self._named = [NamedModule(objectives.student, names=names, source="the student")]

        def forward(self, batch: dict[str, Any], *, outputs: bool = False) -> dict[str, Any]:
            """Sums and counts of the loss; the student's outputs alone with ``outputs``."""
            if outputs:
                named = self._named[0]
                found: dict[str, Any] = named.call([batch[name] for name in named.names])
                return found
            return dict(self.objectives(batch))

    return Root


def _shard_(root: Any, *, accelerator: Any) -> None:
    """Divide the parameters between all processes, block by block, the rest as one."""
    torch, fsdp = extras.require("torch"), extras.require("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh(
        accelerator.device.type, (accelerator.num_processes,)
    )
    for block in _blocks(root):
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(root, mesh=mesh)


def _blocks(module: Any) -> Iterator[Any]:
    """The members of the outermost module lists: the layers of a transformer."""
    torch = extras.require("torch")
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def whole(tensor: Any) -> Any:
    """A tensor that may be divided between processes, whole and on the CPU."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def divided_like(value: Any, *, model: Any) -> Any:
    """A whole tensor placed and divided as ``model`` is, when it has its shape."""
    placed = value.to(model.device)
    if not hasattr(model, "full_tensor") or value.shape != model.shape:
        return placed
    tensor: Any = extras.require("torch.distributed.tensor")
    return tensor.distribute_tensor(placed, model.device_mesh, model.placements)
