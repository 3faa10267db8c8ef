"""Inputs for a model that came without data: from its tokenizer, processor or signature."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.spec import Array, TensorSpec


@dataclass(frozen=True, kw_only=True)
class ModelSamples:
    """Inputs that fit a model.

    Attributes:
        inputs: One spec per input. Every dimension that has a meaning has a name (``batch``,
            ``sequence``, ``height``, ``width``, ``frames``, ``time``), whether or not it will be
            dynamic; the rows say its size.
        rows: Samples of batch 1.
        made_by: What made them, in words: ``tokenizer``, ``image processor``, ``signature``.
    """

    inputs: tuple[TensorSpec, ...]
    rows: tuple[dict[str, Array], ...]
    made_by: str
