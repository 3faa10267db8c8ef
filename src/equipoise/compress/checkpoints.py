"""Where a training stands, on disk, so that a killed one goes on with the same numbers.

    <directory>/step-000000120/state.json               position, losses, evaluations
    <directory>/step-000000120/model.safetensors        all that is trained
    <directory>/step-000000120/optimizer.safetensors    <parameter>/<what the optimiser keeps of it>
    <directory>/best-000000080.safetensors              the student when its metric was best

The directory belongs to one config, whose hash names it, so another config never meets it. A
checkpoint appears whole under a new name, and only then are the older ones removed. There is no
pickle. Nothing is kept of random numbers: those of a step follow from the seed and its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, record
from equipoise.compress.distributed import Assembled, divided_like, whole
from equipoise.compress.history import Standing
from equipoise.errors import IntegrityError, UsageError

_STATE: Final = "state.json"
_MODEL: Final = "model.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
_STEP: Final = "step-"
_BEST: Final = "best-"
_LEFT_BY_A_KILL: Final = ".equipoise-*"


class Checkpoints:
    """The checkpoints of one config.

    Args:
        directory: Its own, made when it is not there.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        fs.check_writable(directory)

    def last(self) -> Path | None:
        """The newest checkpoint."""
        return max(self.directory.glob(f"{_STEP}*"), default=None)

    def clean(self) -> None:
        """Remove what a killed process left half-written. Nobody else may be writing."""
        for path in self.directory.glob(_LEFT_BY_A_KILL):
            fs.remove(path)

    def keep(self, standing: Standing, assembled: Assembled) -> None:
        """Write where training stands, then remove what it supersedes.

        Every process calls it, and the first writes.

        Raises:
            OutputError: There is no space, or the directory cannot be written any more.
        """
        tensors, kept = _model_state(assembled), _optimizer_state(assembled)
        if assembled.rank:
            return
        place = self.directory / f"{_STEP}{standing.step:09d}"
        with fs.staged_directory(place) as staging:
            _write(staging / _MODEL, tensors)
            _write(staging / _OPTIMIZER, kept)
            fs.write_json(staging / _STATE, standing)
        for old in self.directory.glob(f"{_STEP}*"):
            if old != place:
                fs.remove(old)
        for old in self.directory.glob(f"{_BEST}*"):
            if old != self.best_file(standing):
                fs.remove(old)

    def keep_best(self, standing: Standing, assembled: Assembled) -> None:
        """Write the student as the best so far. Every process calls it, and the first writes."""
        tensors = {name: whole(value) for name, value in assembled.student.state_dict().items()}
        if not assembled.rank:
            _write(self.best_file(standing), tensors)

    def best_file(self, standing: Standing) -> Path:
        """Where the best student of ``standing`` lies."""
        return self.directory / f"{_BEST}{standing.best.step:09d}.safetensors"

    def resume(self, assembled: Assembled) -> Standing | None:
        """Put everything back to the newest checkpoint; None when there is none.

        Raises:
            UsageError: Another number of processes wrote it.
            IntegrityError: It is damaged.
        """
        place = self.last()
        if place is None:
            return None
        standing = self._standing(place, world=assembled.world)
        _load_model(assembled, read_tensors(place / _MODEL), where=place)
        _load_optimizer(assembled, read_tensors(place / _OPTIMIZER), where=place)
        if standing.scaler and assembled.accelerator.scaler is not None:
            assembled.accelerator.scaler.load_state_dict(standing.scaler)
        return standing

    def _standing(self, place: Path, *, world: int) -> Standing:
        text = fs.read_text(place / _STATE, error=IntegrityError)
        found = record.loads(Standing, text, where=str(place / _STATE), error=IntegrityError)
        if found.processes != world:
            raise UsageError(
                f"the checkpoint {place} is of {found.processes} processes, and {world} are to go"
                " on with it: the numbers would differ",
                hint=f"Run with {found.processes} processes, or delete {self.directory} to start"
                " again.",
            )
        return found


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors by name.

    Raises:
        IntegrityError: The file is missing or damaged.
    """
    safetensors: Any = extras.require("safetensors.torch")
    try:
        found: dict[str, Any] = safetensors.load_file(file)
    except Exception as error:  # safetensors raises its own Rust exception type
        raise IntegrityError(
            f"{file} is missing or damaged: {error}",
            hint=f"Delete {file.parent} to start again.",
        ) from error
    return found


def _write(file: Path, tensors: Mapping[str, Any]) -> None:
    safetensors: Any = extras.require("safetensors.torch")
    # Copies, because tied weights share memory, which safetensors refuses.
    apart = {name: value.contiguous().clone() for name, value in tensors.items()}
    with fs.replacing(file) as path:
        safetensors.save_file(apart, path)


def _model_state(assembled: Assembled) -> dict[str, Any]:
    return {name: whole(value) for name, value in assembled.root.state_dict().items()}


def _load_model(assembled: Assembled, tensors: Mapping[str, Any], *, where: Path) -> None:
    torch = extras.require("torch")
    own = assembled.root.state_dict()
    if own.keys() != tensors.keys():
        raise IntegrityError(f"{where} holds other tensors than the model has")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(divided_like(tensors[name], model=value))


def _optimizer_state(assembled: Assembled) -> dict[str, Any]:
    return {
        f"{name}/{key}": whole(value)
        for name, parameter in assembled.root.named_parameters()
        for key, value in assembled.optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def _load_optimizer(assembled: Assembled, tensors: Mapping[str, Any], *, where: Path) -> None:
    parameters = dict(assembled.root.named_parameters())
    fused = assembled.optimizer.defaults["fused"]
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        if name not in parameters:
            raise IntegrityError(f"{where} holds optimiser states of {name!r}, which is not there")
        parameter = parameters[name]
        # The count of steps stays on the CPU, but for the fused kernels.
        placed = divided_like(value, model=parameter) if value.ndim or fused else value
        assembled.optimizer.state[parameter][what] = placed
