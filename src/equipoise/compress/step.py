"""One step of training: forward, backward, update.

The loss of one step is, for all that its batch holds, over all processes and accumulated parts,

    sum over the parts of the objective of  weight * (sum / count)

so that neither the number of processes nor the number of accumulated parts changes what a step
learns. Counts of labels and tokens differ between shares, so they are added up before the gradient
is computed; a mean of the means of each share would weigh tokens unequally.

Random numbers of a step follow from the seed, the number of the step and the process. So a run that
goes on from a checkpoint draws what an unbroken one draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.compress.distributed import Assembled
from equipoise.compress.optimization import set_training_
from equipoise.compress.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process runs at once.

    Attributes:
        batch: Tensors by name.
        counts: Whether it counts. A share of a batch may be empty; its process then runs any
            sample, because the others wait for its gradients, and these are 0.
    """

    batch: dict[str, Any]
    counts: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one part gave: tensors [parts of the objective] by name of the part."""

    names: tuple[str, ...]
    sums: Any
    counts: Any


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What a step found, perhaps still being computed by a GPU.

    Attributes:
        names: Of the parts of the objective.
        sums: Float tensor [parts]: sums of the parts of the objective, over all processes.
        counts: The same of what counted.
        norm: Of the gradient; None when it was not computed.
    """

    names: tuple[str, ...]
    sums: Any
    counts: Any
    norm: Any


class Stepper:
    """Makes steps.

    Args:
        assembled: Model and optimiser.
        settings: How to train.
    """

    def __init__(self, assembled: Assembled, *, settings: TrainSettings) -> None:
        self._assembled, self._settings = assembled, settings
        self._trained = [p for p in assembled.root.parameters() if p.requires_grad]

    def begin_training(self) -> None:
        """Put the model into the state it trains in."""
        set_training_(self._assembled.root, dropout=self._settings.dropout)

    def step(self, number: int, parts: Sequence[Part], *, rate: float) -> Pending:
        """Learn from the parts of one batch.

        Args:
            number: Of the step, from 0.
            parts: What this process takes of the batch.
            rate: Learning rate.
        """
        assembled = self._assembled
        for group in assembled.optimizer.param_groups:
            group["lr"] = rate
        self._seed(number)
        counts = self._counted(parts) if len(parts) > 1 else None
        sums = 0.0
        for place, part in enumerate(parts):
            with assembled.held_back(last=place == len(parts) - 1):
                found = self._forward(part)
                sums = sums + found.sums.detach().double()
                if counts is None:  # the only part: one exchange tells both
                    sums, counts = self._exchanged(sums, found.counts)
                assembled.accelerator.backward(self._loss(found, counts))
        if len(parts) > 1:
            sums = assembled.summed(sums)
        norm = self._clip()
        assembled.optimizer.step()
        assembled.optimizer.zero_grad()
        return Pending(names=found.names, sums=sums, counts=counts, norm=norm)

    def _seed(self, number: int) -> None:
        torch = extras.require("torch")
        entropy = [self._settings.seed, number, self._assembled.rank]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        # torch.manual_seed keeps a stack trace for every device that is not in use yet.
        torch.default_generator.manual_seed(seed)
        if self._assembled.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _forward(self, part: Part) -> Found:
        """Sums and counts of one part; zeros, with zero gradients, for one that does not count."""
        if part.counts:
            return _found(self._called(part.batch), factor=1.0)
        self._assembled.root.eval()  # no statistics of batch normalisation from it
        found = _found(self._called(part.batch), factor=0.0)
        self.begin_training()
        return found

    def _called(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        with self._assembled.accelerator.autocast():
            found: Mapping[str, Any] = self._assembled.model(batch)
        return found

    def _counted(self, parts: Sequence[Part]) -> Any:
        """Counts over all parts and processes, before any gradient is computed.

        They cost a forward pass of each part without a gradient, in evaluation mode, unless the
        objectives have a method ``counts`` that tells them from the batch.
        """
        torch = extras.require("torch")
        count = getattr(self._assembled.root.objectives, "counts", None)
        self._assembled.root.eval()
        with torch.no_grad():
            totals = []
            for part in parts:
                if count is None:
                    found = _found(self._called(part.batch), factor=float(part.counts)).counts
                else:
                    found = torch.stack(list(count(part.batch).values())) * float(part.counts)
                totals.append(found.double())
        self.begin_training()
        return self._assembled.summed(sum(totals))

    def _exchanged(self, sums: Any, counts: Any) -> Any:
        """Sums and counts over all processes."""
        torch = extras.require("torch")
        return self._assembled.summed(torch.stack([sums, counts.detach().double()]))

    def _loss(self, found: Found, counts: Any) -> Any:
        """The share of one part in the loss; gradients are averaged over processes, so times them.

        Args:
            found: Sums of the part.
            counts: float64 [parts of the objective], over all.
        """
        torch = extras.require("torch")
        weights = [getattr(self._settings.objective, name) for name in found.names]
        factors = torch.tensor(weights, dtype=counts.dtype, device=counts.device)
        factors = factors * self._assembled.world / counts.clamp_min(1)
        return (found.sums * factors.to(found.sums.dtype)).sum()

    def _clip(self) -> Any:
        """Clip the gradient, and its norm before; None where nothing clips."""
        if not self._settings.clip:
            return None
        norm = self._assembled.accelerator.clip_grad_norm_(self._trained, self._settings.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def bad_weights(self) -> int:
        """How many trained weights of all are NaN or infinite."""
        torch = extras.require("torch")
        with torch.no_grad():
            bad = sum((~p.isfinite()).sum() for p in map(_local, self._trained))
            return int(self._assembled.summed(bad.double()))


def _found(parts: Mapping[str, Any], *, factor: float) -> Found:
    torch = extras.require("torch")
    sums, counts = (torch.stack([pair[i] for pair in parts.values()]) for i in (0, 1))
    return Found(names=tuple(parts), sums=sums * factor, counts=counts * factor)


def _local(parameter: Any) -> Any:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
