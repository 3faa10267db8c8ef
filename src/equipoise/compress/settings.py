"""How to train: what a person may choose, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The parts of the loss and their weights. A part of weight 0 is not computed.

    Attributes:
        task: Loss of the task on the labels.
        logits: Kullback-Leibler divergence from the teacher's outputs, times temperature squared
            (Hinton, Vinyals, Dean 2015, section 2).
        temperature: Both sides' logits are divided by it before the softmax.
        hidden: Mean squared error between hidden states, after a learned projection where the
            widths differ.
        attention: Divergence between attention maps.
        features: Error between feature maps of a convolutional network.
    """

    task: float = 1.0
    logits: float = 0.0
    temperature: float = 2.0
    hidden: float = 0.0
    attention: float = 0.0
    features: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any part compares with a teacher."""
        return max(self.logits, self.hidden, self.attention, self.features) > 0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training samples; a part of one is allowed.
        batch_size: Samples per optimiser step, over all processes and accumulated parts.
        accumulate: Parts in which each process takes its share of a batch, to save memory.
        learning_rate: Largest rate of the schedule.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum 0.9.
        weight_decay: Decoupled for AdamW; biases and norms have none.
        schedule: What follows the warm-up.
        warmup: Share of all steps in which the rate rises from 0.
        clip: Largest norm of the gradient; 0 does not clip.
        precision: Of the computation; weights and optimiser stay in float32.
        dropout: Let the model's dropout act. Off, runs of any number of processes agree.
        evaluate_every: Share of an epoch between evaluations on the validation samples.
        patience: Stop after so many evaluations without a better metric; 0 never stops early.
        save_every: Optimiser steps between checkpoints; 0 saves at evaluations only.
        seed: Of the order of samples, and of dropout.
        shard: Share parameters, gradients and optimiser states between processes (FSDP).
    """

    epochs: float = 3.0
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 5e-5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    dropout: bool = False
    evaluate_every: float = 1.0
    patience: int = 0
    save_every: int = 0
    seed: int = 0
    shard: bool = False
    objective: Objective = field(default_factory=Objective)
