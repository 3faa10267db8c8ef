"""The loss of a task, as a sum over what counts and the number of what counts.

So sums and counts of several batches, or of several processes, add up to the loss of all of them,
however they were divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from equipoise import extras
from equipoise.data.text import IGNORED
from equipoise.errors import DataError, UsageError

Kind = Literal["classification", "token-classification", "regression", "embedding", "causal-lm"]
Tensor = Any
"""``torch.Tensor``; PyTorch is imported where it is used."""
Part = tuple[Tensor, Tensor]
"""Sum and count, both float32 scalars."""

LABEL: Final = "label"
MASK: Final = "attention_mask"
TOKENS: Final = "input_ids"

_KIND_OF_TASK: Final[dict[str, Kind]] = {
    "sequence-classification": "classification",
    "image-classification": "classification",
    "video-classification": "classification",
    "audio-classification": "classification",
    "token-classification": "token-classification",
    "fill-mask": "token-classification",
    "causal-lm": "causal-lm",
    "encoder": "embedding",
    "text-embedding": "embedding",
    "image-embedding": "embedding",
    "feature-extraction": "embedding",
}
"""A masked language model is a classifier of tokens whose classes are the vocabulary."""


def task_kind(task: str, *, label_dtype: str, label_rank: int) -> Kind:
    """Which loss belongs to a task.

    Args:
        task: A name in ``sources.tasks.TASKS``; empty when nothing says what the model is for, and
            then the labels do.
        label_dtype: Dtype of the labels, as NumPy names it; empty when there are none.
        label_rank: Dimensions of one sample's label: 0 for a scalar.

    Raises:
        UsageError: There is no loss for that task, or neither task nor labels say what to do.
        DataError: The labels are not those of the task.
    """
    floating = label_dtype.startswith("float")
    if not task:
        return _kind_of_labels(label_dtype, rank=label_rank)
    kind = _KIND_OF_TASK.get(task)
    if kind is None:
        raise UsageError(
            f"a model for {task} cannot be trained here: no loss is known for it",
            hint=f"There is one for {', '.join(sorted(_KIND_OF_TASK))}.",
        )
    if kind == "classification" and floating:
        return "regression"
    if label_dtype and floating != (kind == "embedding"):
        wanted = "floating-point vectors" if kind == "embedding" else "whole numbers"
        raise DataError(f"labels are {label_dtype}; a model for {task} learns from {wanted}")
    return kind


def _kind_of_labels(dtype: str, *, rank: int) -> Kind:
    if not dtype:
        raise UsageError(
            "nothing says what the model is for: it names no task, and the data has no labels",
            hint="Say it with --task, such as --task image-classification.",
        )
    if dtype.startswith("float"):
        return "regression"
    return "token-classification" if rank else "classification"


def task_loss(kind: Kind, *, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Part:
    """The loss of the task, computed in float32 whatever the outputs are.

    Classification and token classification: cross-entropy, in nats, per sample or per token whose
    label is not -100. Causal language models: the same of the next token. Regression: squared
    error, mean over the values of a sample. Embedding: squared error over the squared norm of the
    target, per vector.

    Args:
        kind: What is computed.
        outputs: Of the model; the first counts. Classes lie on its last axis.
        batch: The inputs, and ``label``: int64 [batch] or [batch, tokens]; float of the shape of
            the output, or without its axes of length 1. The labels of a causal language model
            stand where the token is predicted; without ``label`` they are ``input_ids``, one
            position later.

    Returns:
        Sum over what counts, and how much counts; float32 scalars.

    Raises:
        DataError: The batch has no labels, or they do not fit the output.
    """
    name, output = next(iter(outputs.items()))
    target = labels_of(kind, batch=batch)
    if target is None:
        raise DataError(
            f"the task part of the loss needs labels, and the data has {', '.join(batch)} only",
            hint="Give labelled data, or learn from a teacher alone: set task to 0, logits to 1.",
        )
    if kind == "regression":
        return value_error(output.float(), _shaped(target, output, name=name))
    if kind == "embedding":
        wanted = _shaped(target, output, name=name)
        return vector_error(output.float(), wanted, mask=batch.get(MASK))
    return _cross_entropy(output, _fitting(target, output, name=name))


def labels_of(kind: Kind, *, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The labels in a batch; of a causal language model without any, its own next tokens."""
    if LABEL in batch or kind != "causal-lm" or TOKENS not in batch:
        return batch.get(LABEL)
    return next_tokens(batch[TOKENS], mask=batch.get(MASK))


def next_tokens(tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """What a causal language model has to say at each position.

    Args:
        tokens: int64 [batch, n].
        mask: int64 [batch, n], 0 for padding; None when there is none.

    Returns:
        int64 [batch, n]: the token one position later; -100 at the last position, at padding, and
        where padding follows.
    """
    torch = extras.require("torch")
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    if mask is not None:
        labels[:, :-1].masked_fill_((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED)
    return labels


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of vectors over the squared norm of what is wanted.

    It is 0 for equal vectors and 1 for a vector of zeros, whatever model they come from, and twice
    ``1 - cosine`` where both have one norm. Unlike the cosine it keeps the scale, which a decoder
    behind an encoder needs. Each vector has a divisor of its own, so that neither the few tokens of
    extreme norm that transformers have, nor how samples are divided into batches, weigh in.

    Args:
        given: float32 [..., d].
        wanted: The same.

    Returns:
        float32 [...].
    """
    torch = extras.require("torch")
    norm = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (given - wanted).square().sum(-1) / norm


def value_error(given: Tensor, wanted: Tensor) -> Part:
    """Squared error of float32 values [batch, ...], mean over the values of a sample."""
    return total((given - wanted).square().reshape(len(given), -1).mean(1))


def vector_error(given: Tensor, wanted: Tensor, *, mask: Tensor | None = None) -> Part:
    """The :func:`relative_error` of vectors, summed.

    Args:
        given: float32 [batch, d], or [batch, n, d] with a vector at each position.
        wanted: The same.
        mask: [batch, n], 0 for padding, which is not counted. One of another shape says nothing
            about these positions, and all of them count.
    """
    errors = relative_error(given, wanted)
    fits = mask is not None and mask.shape == errors.shape
    return total(errors, counted=mask != 0 if fits else None)


def total(values: Tensor, *, counted: Tensor | None = None) -> Part:
    """Sum and count. Nothing is picked out: that would make a GPU wait to learn how much it is."""
    torch = extras.require("torch")
    if counted is None:
        return values.sum(), torch.tensor(values.numel(), dtype=values.dtype, device=values.device)
    kept = torch.where(counted, values, torch.zeros_like(values))
    return kept.sum(), counted.sum().to(values.dtype)


def _shaped(target: Tensor, output: Tensor, *, name: str) -> Tensor:
    """Targets as float32 of the output's shape: ``[batch]`` fits ``[batch, 1]``."""
    same = [size for size in target.shape[1:] if size != 1] == [
        size for size in output.shape[1:] if size != 1
    ]
    if not same or len(target) != len(output):
        raise DataError(
            f"labels do not fit the model: output {name!r} is {list(output.shape)}, the labels are"
            f" {list(target.shape)}",
            hint="A label must have as many values as the model gives for one sample.",
        )
    return target.float().reshape(output.shape)


def _fitting(target: Tensor, output: Tensor, *, name: str) -> Tensor:
    """Labels int64 [decisions], each a class of the output or -100."""
    decisions, classes = output.shape[:-1].numel(), output.shape[-1]
    if target.is_floating_point() or target.numel() != decisions:
        raise DataError(
            f"labels do not fit the model: output {name!r} is {list(output.shape)}, which makes"
            f" {decisions} decisions; the labels are {target.dtype} {list(target.shape)}"
        )
    labels = target.reshape(-1).long()
    strange = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if strange.numel():
        raise DataError(
            f"labels do not fit the model: class {int(strange[0])} is not among its {classes}"
            f" classes (0 to {classes - 1})"
        )
    return labels


def _cross_entropy(output: Tensor, labels: Tensor) -> Part:
    functional = extras.require("torch.nn.functional")
    scores = output.reshape(-1, output.shape[-1]).float()
    losses = functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    return total(losses, counted=labels != IGNORED)
