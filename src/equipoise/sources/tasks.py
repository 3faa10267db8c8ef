"""What a transformers model is for, and so which of its classes to build.

The name of its architecture says so in most cases; an encoder-decoder needs a word from the user,
because its two halves are two models on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise.errors import SourceError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Task:
    """One use of a model.

    Attributes:
        name: What ``--task`` takes.
        auto: Class of transformers that finds the architecture for this task; empty when only the
            checkpoint's own class will do.
        endings: Architectures that end so are for this task.
        classes: Whether ``id2label`` of the config names the classes of its output.
    """

    name: str
    auto: str
    endings: tuple[str, ...] = ()
    classes: bool = False


_TABLE: Final = (
    Task(
        name="token-classification",
        auto="AutoModelForTokenClassification",
        endings=("ForTokenClassification",),
        classes=True,
    ),
    Task(
        name="sequence-classification",
        auto="AutoModelForSequenceClassification",
        endings=("ForSequenceClassification",),
        classes=True,
    ),
    Task(
        name="question-answering",
        auto="AutoModelForQuestionAnswering",
        endings=("ForQuestionAnswering",),
    ),
    Task(name="fill-mask", auto="AutoModelForMaskedLM", endings=("ForMaskedLM",)),
    Task(
        name="causal-lm",
        auto="AutoModelForCausalLM",
        endings=("ForCausalLM", "LMHeadModel"),
    ),
    Task(
        name="image-classification",
        auto="AutoModelForImageClassification",
        endings=("ForImageClassification", "ForImageClassificationWithTeacher"),
        classes=True,
    ),
    Task(
        name="object-detection",
        auto="AutoModelForObjectDetection",
        endings=("ForObjectDetection",),
        classes=True,
    ),
    Task(
        name="semantic-segmentation",
        auto="AutoModelForSemanticSegmentation",
        endings=("ForSemanticSegmentation",),
        classes=True,
    ),
    Task(
        name="video-classification",
        auto="AutoModelForVideoClassification",
        endings=("ForVideoClassification",),
        classes=True,
    ),
    Task(
        name="audio-classification",
        auto="AutoModelForAudioClassification",
        endings=("ForAudioClassification",),
        classes=True,
    ),
    Task(name="ctc", auto="AutoModelForCTC", endings=("ForCTC",)),
    Task(name="encoder", auto="", endings=("EncoderModel",)),
    Task(name="decoder", auto=""),
    Task(name="text-embedding", auto=""),
    Task(name="image-embedding", auto=""),
    Task(name="feature-extraction", auto="AutoModel", endings=("Model", "ModelWithProjection")),
)
TASKS: Final = {task.name: task for task in _TABLE}
"""Tasks by name. The first whose ending fits an architecture is the one that it is for."""

_SPEECH: Final = frozenset(
    {
        "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2",
        "wav2vec2-bert", "wav2vec2-conformer", "wavlm",
    }
)  # fmt: skip
"""Model types whose ``ForSequenceClassification`` takes audio."""


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UsageError: There is none; the message lists all, the hint the nearest.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that the checkpoint was saved from; empty when its config does not say."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def fits(architecture: str, *, task: Task) -> bool:
    """Whether the checkpoint's own class is one for ``task``."""
    return not task.auto or architecture.endswith(task.endings)


def task_of(config: Mapping[str, Any], *, directory: Path) -> Task:
    """The task that the architecture in a transformers config is for.

    Raises:
        SourceError: It is for none, or for two: an encoder and a decoder.
    """
    architecture = architecture_of(config)
    found = next((t for t in _TABLE if t.endings and architecture.endswith(t.endings)), None)
    if found in (None, TASKS["feature-extraction"]) and config.get("is_encoder_decoder"):
        raise SourceError(
            f"{directory}: {architecture or 'this model'} is an encoder and a decoder, two models",
            hint="Choose one with --task encoder or --task decoder, and run again for the other.",
        )
    if found is None:
        raise SourceError(
            f"{directory}: no task is known for architecture {architecture!r}",
            hint=f"Say it with --task; known: {', '.join(TASKS)}.",
        )
    if found.name == "sequence-classification" and config.get("model_type") in _SPEECH:
        return TASKS["audio-classification"]
    return found
