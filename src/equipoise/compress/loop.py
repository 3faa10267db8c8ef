"""The training loop: steps, and evaluations and checkpoints between them.

What a step found is looked at while the next one is computed, so that a GPU never waits to be
asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from equipoise import extras, progress
from equipoise.compress.batches import Samples, ahead, batches_of, number_of_batches, share
from equipoise.compress.checkpoints import Checkpoints
from equipoise.compress.distributed import Assembled
from equipoise.compress.evaluation import Validator
from equipoise.compress.history import Evaluation, History, Standing, stale
from equipoise.compress.optimization import rate
from equipoise.compress.settings import TrainSettings
from equipoise.compress.step import Part, Pending, Stepper
from equipoise.errors import NonFiniteError, ResourceError
from equipoise.spec import Array


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
        self._on_evaluation: Callable[[int, float], None] | None = None
        self.per_epoch = number_of_batches(len(samples), batch_size=settings.batch_size)
        self.steps = max(math.ceil(round(settings.epochs * self.per_epoch, 6)), 1)
        self._moments = _moments(settings, steps=self.steps, per_epoch=self.per_epoch)
        self._stepper = Stepper(assembled, settings=settings)
        self._history = History(processes=assembled.world, objective=settings.objective)
        self._pending: Pending | None = None
        self.samples = len(samples)
        self.resumed_at_step = 0

    def stopped_early(self) -> bool:
        """Whether patience ran out."""
        return 0 < self._settings.patience <= stale(self._history.evaluations)

    def run(self, *, on_evaluation: Callable[[int, float], None] | None = None) -> Standing:
        """Train to the end, or until the metric has not got better for long enough.

        Goes on from the newest checkpoint, with the numbers that an unbroken run would have.

        Args:
            on_evaluation: Called with the step and the metric after every evaluation of this run.

        Raises:
            NonFiniteError: The loss, its gradient, a weight or the metric is NaN or infinite.
            DataError: Labels do not fit.
            OutputError: A checkpoint cannot be written.
            ResourceError: The GPU has not enough memory.
            UsageError: Another number of processes wrote the checkpoint.
        """
        torch = extras.require("torch")
        self._on_evaluation = on_evaluation
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
        self._stepper.begin_training()
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

    def _step(self, step: int, parts: list[Part]) -> None:
        """Make a step, and take up the one before."""
        learning_rate = rate(step, steps=self.steps, settings=self._settings)
        found = self._stepper.step(step, parts, rate=learning_rate)
        before, self._pending = self._pending, found
        self._settle(before)

    def _prepared(self, first: int) -> Iterator[list[Part]]:
        """What this process runs in each step from ``first`` on."""
        # Beside a GPU a thread is free; on a CPU it would take the time from the step.
        gpu = self._assembled.accelerator.device.type == "cuda"
        return (ahead if gpu else map)(self._parts, self._batches(first))

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

    def _parts(self, batch: Array) -> list[Part]:
        mine = share(
            batch,
            rank=self._assembled.rank,
            world=self._assembled.world,
            parts=self._settings.accumulate,
        )
        return [self._part(indices, instead=batch[:1]) for indices in mine]

    def _part(self, indices: Array, *, instead: Array) -> Part:
        chosen = indices if len(indices) else instead
        return Part(
            batch=self._assembled.placed(self._training.batch(chosen)), counts=len(indices) > 0
        )

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
            self._checkpoints.keep(self._standing(), self._assembled)
        self._stepper.begin_training()

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
            self._checkpoints.keep_best(standing, self._assembled)
        self._checkpoints.keep(standing, self._assembled)
        if self._on_evaluation is not None:
            self._on_evaluation(step, value)

    def _outputs(self, batch: dict[str, Any]) -> Mapping[str, Any]:
        with self._assembled.accelerator.autocast():
            found: Mapping[str, Any] = self._assembled.model(batch, outputs=True)
        return found

    def _standing(self) -> Standing:
        scaler = self._assembled.accelerator.scaler
        return self._history.standing(scaler={} if scaler is None else scaler.state_dict())

    def _settle(self, pending: Pending | None) -> None:
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
        """Before it is saved over a good one.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        if self._stepper.bad_weights():
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


def _moments(settings: TrainSettings, *, steps: int, per_epoch: int) -> set[int]:
    """Steps after which the student is evaluated: the last is always among them."""
    every = max(settings.evaluate_every * per_epoch, 1.0)
    if not settings.evaluate_every:
        return {steps}
    return {steps, *(round(every * n) for n in range(1, int(steps / every) + 1))}
