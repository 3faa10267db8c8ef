"""The training loop.

The loss of one step is, for all that its batch holds, over all processes and accumulated parts,

    sum over the parts of the objective of  weight * (sum / count)

so that neither the number of processes nor the number of accumulated parts changes what a step
learns. Counts of labels and tokens differ between shares, so they are added up before the gradient
is computed; a mean of the means of each share would weigh tokens unequally.

Random numbers of a step follow from the seed, the number of the step and the process. So a run that
goes on from a checkpoint draws what an unbroken one draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import extras, progress
from equipoise.compress.batches import Samples, ahead, batches_of, number_of_batches, share
from equipoise.compress.checkpoints import Checkpoints, Evaluation, Standing
from equipoise.compress.distributed import Assembled
from equipoise.compress.evaluation import Validator
from equipoise.compress.optimization import rate, set_training_
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.errors import NonFiniteError, ResourceError
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one process runs at once.

    Attributes:
        batch: Tensors by name.
        counts: Whether it counts. A share of a batch may be empty; its process then runs any
            sample, because the others wait for its gradients, and these are 0.
    """

    batch: dict[str, Any]
    counts: bool


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one part gave: tensors [parts of the objective] by name of the part."""

    names: tuple[str, ...]
    sums: Any
    counts: Any


@dataclass(frozen=True, kw_only=True)
class _Pending:
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


class Loop:
    """Trains what was assembled.

    Args:
        assembled: Model and optimiser.
        settings: How to train.
        samples: What to train on.
        validator: Evaluates the student.
        checkpoints: Where the state is kept.
    """

    def __init__(
        self,
        assembled: Assembled,
        *,
        settings: TrainSettings,
        samples: Samples,
        validator: Validator,
        checkpoints: Checkpoints,
    ) -> None:
        self._assembled, self._settings, self._training = assembled, settings, samples
        self._validator, self._checkpoints = validator, checkpoints
        self.per_epoch = number_of_batches(len(samples), batch_size=settings.batch_size)
        self.steps = max(math.ceil(round(settings.epochs * self.per_epoch, 6)), 1)
        self._moments = _moments(settings, steps=self.steps, per_epoch=self.per_epoch)
        self._trained = [p for p in assembled.root.parameters() if p.requires_grad]
        self._history = _History(processes=assembled.world, objective=settings.objective)
        self._pending: _Pending | None = None
        self.samples = len(samples)
        self.resumed_at_step = 0

    def stopped_early(self) -> bool:
        """Whether patience ran out."""
        return 0 < self._settings.patience <= self._history.standing(scaler={}).stale

    def run(self) -> Standing:
        """Train to the end, or until the metric has not got better for long enough.

        Goes on from the newest checkpoint, with the numbers that an unbroken run would have.

        Raises:
            NonFiniteError: The loss, its gradient, a weight or the metric is NaN or infinite.
            DataError: Labels do not fit.
            OutputError: A checkpoint cannot be written.
            ResourceError: The GPU has not enough memory.
            UsageError: Another number of processes wrote the checkpoint.
        """
        torch = extras.require("torch")
        try:
            self._run()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory at step {self._history.step}: {str(error).partition('. ')[0]}",
                hint="Raise accumulate, which takes a batch in parts, or lower batch_size.",
            ) from error
        return self._standing()

    def _run(self) -> None:
        resumed = self._checkpoints.resume(self._assembled)
        if resumed is None:
            self._evaluate(0)
        else:
            self._history.restore(resumed)
        self._begin_training()
        first = self.resumed_at_step = self._history.step
        if self.stopped_early() or first == self.steps:
            return
        begin = time.perf_counter()
        for step, parts in enumerate(self._prepared(first), start=first):
            self._step(step, parts)
            self._history.step_seconds.append(time.perf_counter() - begin)
            self._after(step + 1)
            if self.stopped_early():
                return
            begin = time.perf_counter()

    def _prepared(self, first: int) -> Iterator[list[_Part]]:
        """What this process runs in each step from ``first`` on."""
        return ahead(self._parts, self._batches(first))

    def _batches(self, first: int) -> Iterator[Array]:
        lengths, order = self._training.lengths, list[Array]()
        for step in range(first, self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if not place or not order:
                order = batches_of(
                    lengths,
                    batch_size=self._settings.batch_size,
                    seed=self._settings.seed,
                    epoch=epoch,
                )
            yield order[place]

    def _parts(self, batch: Array) -> list[_Part]:
        mine = share(
            batch,
            rank=self._assembled.rank,
            world=self._assembled.world,
            parts=self._settings.accumulate,
        )
        return [self._part(indices, instead=batch[:1]) for indices in mine]

    def _part(self, indices: Array, *, instead: Array) -> _Part:
        chosen = indices if len(indices) else instead
        return _Part(
            batch=self._assembled.placed(self._training.batch(chosen)), counts=len(indices) > 0
        )

    # One step

    def _step(self, step: int, parts: Sequence[_Part]) -> None:
        """Forward, backward, update; and look at what the step before has found."""
        assembled, settings = self._assembled, self._settings
        for group in assembled.optimizer.param_groups:
            group["lr"] = rate(step, steps=self.steps, settings=settings)
        self._seed(step)
        counts = self._counted(parts) if len(parts) > 1 else None
        sums = []
        for number, part in enumerate(parts):
            with assembled.held_back(last=number == len(parts) - 1):
                found = self._forward(part)
                counts = self._global_counts(found) if counts is None else counts
                assembled.accelerator.backward(self._loss(found, counts))
            sums.append(found.sums.detach())
        norm = self._clip()
        assembled.optimizer.step()
        assembled.optimizer.zero_grad()
        before, self._pending = (
            self._pending,
            _Pending(
                sums=assembled.summed(sum(sums).double()),
                counts=counts,
                norm=norm,
                names=found.names,
            ),
        )
        self._settle(before)

    def _seed(self, step: int) -> None:
        torch = extras.require("torch")
        entropy = [self._settings.seed, step, self._assembled.rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _forward(self, part: _Part) -> _Found:
        """Sums and counts of one part; zeros, with zero gradients, for one that does not count."""
        if part.counts:
            return _found(self._called(part.batch), factor=1.0)
        self._assembled.root.eval()  # no statistics of batch normalisation from it
        found = _found(self._called(part.batch), factor=0.0)
        self._begin_training()
        return found

    def _called(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        with self._assembled.accelerator.autocast():
            found: Mapping[str, Any] = self._assembled.model(batch)
        return found

    def _counted(self, parts: Sequence[_Part]) -> Any:
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
        self._begin_training()
        return self._assembled.summed(sum(totals))

    def _global_counts(self, found: _Found) -> Any:
        return self._assembled.summed(found.counts.detach().double())

    def _loss(self, found: _Found, counts: Any) -> Any:
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

    # Between steps

    def _begin_training(self) -> None:
        set_training_(self._assembled.root, dropout=self._settings.dropout)

    def _after(self, step: int) -> None:
        """Evaluate and save where it is time to."""
        progress.report(step, self.steps)
        saving = self._settings.save_every and step % self._settings.save_every == 0
        if step not in self._moments and not saving:
            return
        self._settle(self._pending)
        self._pending = None
        if step in self._moments:
            self._evaluate(step)
        else:
            self._require_finite(step)
            self._assembled.average_statistics_()
            self._checkpoints.save(self._standing(), self._assembled)
        self._begin_training()

    def _evaluate(self, step: int) -> None:
        """Evaluate the student, and save it, as the best where it is."""
        self._require_finite(step)
        self._assembled.average_statistics_()
        self._assembled.root.eval()
        value = self._validator.evaluate(self._outputs, summed=self._assembled.summed)
        if not math.isfinite(value):
            raise self._diverged(f"the metric after step {step} is {value}")
        self._history.evaluations.append(Evaluation(step=step, metric=value))
        standing = self._standing()
        if standing.best.step == step:
            self._checkpoints.save_best(standing, self._assembled)
        self._checkpoints.save(standing, self._assembled)

    def _outputs(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        with self._assembled.accelerator.autocast():
            found: Mapping[str, Any] = self._assembled.model(batch, outputs=True)
        return found

    def _standing(self) -> Standing:
        scaler = self._assembled.accelerator.scaler
        return self._history.standing(scaler={} if scaler is None else scaler.state_dict())

    def _settle(self, pending: _Pending | None) -> None:
        """Take up what a step found.

        A GPU is asked only when it has the next step to compute already.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        if pending is None:
            return
        step = self._history.step + 1
        means = (pending.sums / pending.counts.clamp_min(1)).tolist()
        parts = dict(zip(pending.names, means, strict=True))
        for name, value in parts.items():
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value} at step {step}, in its part {name!r}")
        # The scaler of float16 meets infinite gradients with a lower scale, and skips the step.
        scaled = self._assembled.accelerator.scaler is not None
        if pending.norm is not None and not scaled and not math.isfinite(float(pending.norm)):
            raise self._diverged(f"the gradient is {float(pending.norm)} at step {step}")
        self._history.add(parts)

    def _require_finite(self, step: int) -> None:
        """Raises NonFiniteError when a weight is not finite, before it is saved over a good one."""
        torch = extras.require("torch")
        with torch.no_grad():
            bad = sum((~p.isfinite()).sum() for p in map(_local, self._trained))
            count = int(self._assembled.summed(bad.double()))
        if count:
            raise self._diverged(f"weights are NaN or infinite after step {step}")

    def _diverged(self, what: str) -> NonFiniteError:
        last = self._checkpoints.last()
        kept = "There is no checkpoint yet." if last is None else f"The last good one is {last}."
        settings = self._settings
        return NonFiniteError(
            f"training diverged: {what}",
            hint=f"{kept} Try a learning rate below {settings.learning_rate:g}, clip at"
            f" {min(settings.clip, 1.0) or 1.0:g} or less, or a longer warm-up.",
        )


class _History:
    """What has happened, while it grows; :class:`Standing` is the same as it is kept."""

    def __init__(self, *, processes: int, objective: Objective) -> None:
        self._processes, self._objective = processes, objective
        self._losses: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self.step_seconds: list[float] = []
        self.evaluations: list[Evaluation] = []
        self._begin = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps that were taken up."""
        return len(self._losses)

    def add(self, parts: Mapping[str, float]) -> None:
        """The parts of the loss of one more step."""
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value)
        weighted = (getattr(self._objective, name) * value for name, value in parts.items())
        self._losses.append(sum(weighted))

    def restore(self, standing: Standing) -> None:
        """Begin where ``standing`` is."""
        self._losses = list(standing.losses)
        self._parts = {name: list(values) for name, values in standing.parts.items()}
        self.step_seconds = list(standing.step_seconds)
        self.evaluations = list(standing.evaluations)
        self._begin -= standing.seconds

    def standing(self, *, scaler: dict[str, int | float]) -> Standing:
        """What is kept."""
        return Standing(
            processes=self._processes,
            losses=tuple(self._losses),
            parts={name: tuple(values) for name, values in self._parts.items()},
            step_seconds=tuple(self.step_seconds),
            seconds=time.perf_counter() - self._begin,
            evaluations=tuple(self.evaluations),
            scaler=scaler,
        )


def _moments(settings: TrainSettings, *, steps: int, per_epoch: int) -> set[int]:
    """Steps after which the student is evaluated: the last is always among them."""
    every = max(settings.evaluate_every * per_epoch, 1.0)
    if not settings.evaluate_every:
        return {steps}
    return {steps, *(round(every * n) for n in range(1, int(steps / every) + 1))}


def _found(parts: Mapping[str, Any], *, factor: float) -> _Found:
    torch = extras.require("torch")
    sums, counts = (torch.stack([pair[i] for pair in parts.values()]) for i in (0, 1))
    return _Found(names=tuple(parts), sums=sums * factor, counts=counts * factor)


def _local(parameter: Any) -> Any:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
