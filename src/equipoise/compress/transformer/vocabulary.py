"""The stage that leaves a model with the tokens that its user's texts need.

<output>/model    a transformers directory, tokenizer included
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs
from equipoise.compress.transformer.axes import shapes_of
from equipoise.compress.transformer.coverage import Coverage, compare_tokens, opened
from equipoise.compress.transformer.cut import rebuilt
from equipoise.compress.transformer.reduce import MODEL, count_parameters, open_transformer
from equipoise.compress.transformer.shapes import changed
from equipoise.compress.transformer.tokenizer_files import (
    ids_in,
    new_ids,
    new_tokenizer,
    read_json,
    replace_tokenizer,
    tokenizer_texts,
    with_new_ids,
)
from equipoise.compress.transformer.tokens import read_vocabulary, tokens_to_keep
from equipoise.data.store import Rows
from equipoise.errors import BackendError, DataError, IncompatibleError, SourceError
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source, parse_source, path_of
from equipoise.sources.torch_model import load_module, named_outputs

TOKENS: Final = "input_ids"
_STEP: Final = 8
_SAME: Final = 1e-5
"""Largest difference over largest output. Rows of embeddings are copied; only the product of a
narrower output head may be summed in another order."""


@dataclass(frozen=True, kw_only=True)
class TrimConfig:
    """Which tokens to keep.

    Attributes:
        source: A transformers directory with a ``tokenizer.json``.
        data: Directory with ``training`` rows that have ``input_ids``; their tokens are kept. Texts
            to judge by are those of ``validation``, where it is there.
        min_count: Keep what occurs so often.
        multiple: The number of tokens becomes a multiple of it.
        texts: UTF-8 file with texts to judge by, one a line, in place of the validation rows.
    """

    source: Source
    data: Path
    min_count: int = 1
    multiple: int = 8
    texts: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrimRecord:
    """What came of it.

    Attributes:
        tokens_before: Rows of the embeddings.
        tokens_after: The same of the result.
        parameters_before: Numbers in the weights.
        parameters_after: The same of the result.
        kept_share: Share of all tokens in the training rows that are kept as they are.
        coverage: How other texts fare; None when there are none.
        notes: What the user should know.
    """

    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int
    kept_share: float
    coverage: Coverage | None
    notes: tuple[str, ...]


def trim_vocabulary(config: TrimConfig, *, output: Path) -> TrimRecord:
    """Cut a model's vocabulary to what its texts need and leave it in ``output/model``.

    Raises:
        SourceError: The source is no transformers directory, or its tokenizer cannot be read.
        IncompatibleError: It has no ``tokenizer.json``, or one that cannot be trimmed.
        DataError: The data has no tokens, or ids that the model does not have.
        OutputError: ``output`` cannot be written.
    """
    _require_settings(config)
    trim = _Trim(config)
    smaller = trim.smaller_module()
    texts = tokenizer_texts(
        path_of(config.source), tokenizer=trim.tokenizer, vocabulary=trim.vocabulary, kept=trim.kept
    )
    save_source(smaller, base=config.source, directory=output / MODEL)
    gone = replace_tokenizer(output / MODEL, texts)
    _require_same(trim, output / MODEL)
    return trim.record(smaller, gone)


def _require_settings(config: TrimConfig) -> None:
    if config.min_count < 1 or config.multiple < 1:
        raise DataError(
            f"min_count {config.min_count} and multiple {config.multiple}: at least 1 is needed"
        )


class _Trim:
    """One model, its tokenizer, and the tokens of both that stay."""

    def __init__(self, config: TrimConfig) -> None:
        self.config = config
        self.module = open_transformer(config.source)
        file = _tokenizer_file(config.source)
        self.tokenizer: dict[str, Any] = read_json(file)
        self.vocabulary = read_vocabulary(self.tokenizer, where=str(file))
        self.before = _opened(self.tokenizer, file)
        self.rows = int(self.module.config.vocab_size)
        self.counts = _counts(config.data / "training", rows=self.rows)
        self.kept = self._kept()
        self.ids = new_ids(self.vocabulary, self.kept)
        self.after = _opened(new_tokenizer(self.tokenizer, self.vocabulary, kept=self.kept), file)

    def _kept(self) -> tuple[str, ...]:
        beyond = [i for i in self.vocabulary.all_ids() if not 0 <= i < self.rows]
        if beyond:
            raise SourceError(
                f"{self.config.source.name}: the tokenizer has the id {max(beyond)}, the embeddings"
                f" have {self.rows} rows",
                hint="Resize the embeddings of the model to its tokenizer, or the other way round.",
            )
        used = np.flatnonzero(self.counts >= self.config.min_count).tolist()
        needed = [*used, *ids_in(self.module.config.to_dict())]
        return tokens_to_keep(self.vocabulary, needed=needed, multiple=self.config.multiple)

    def order(self) -> Any:
        """int64 [kept]: the old id of each new one."""
        torch = extras.require("torch")
        old = {new: before for before, new in self.ids.items()}
        return torch.tensor([old[new] for new in range(len(self.kept))])

    def smaller_module(self) -> Any:
        """The model with the kept rows of everything that is as long as the vocabulary."""
        order = self.order()
        tensors = dict(self.module.state_dict())
        for name, axis in vocabulary_axes(self.module):
            tensors[name] = tensors[name].index_select(axis, order)
        new = changed(self.module.config, {"vocab_size": len(self.kept)})
        for key, value in with_new_ids(new.to_dict(), self.ids).items():
            if key.endswith(("_token_id", "_token_ids")):
                setattr(new, key, value)
        model = rebuilt(self.module, new, tensors)
        model.generation_config = self._generation_config()
        return model

    def _generation_config(self) -> Any:
        old = getattr(self.module, "generation_config", None)
        if old is None:
            return None
        return type(old).from_dict(with_new_ids(old.to_dict(), self.ids))

    def texts(self) -> list[str]:
        """Texts to judge by: lines of a file, or validation rows put together again."""
        if self.config.texts is not None:
            lines = fs.read_text(self.config.texts, error=DataError).splitlines()
            return [line for line in lines if line.strip()]
        directory = self.config.data / "validation"
        if not directory.is_dir():
            return []
        return [self.before.decode(row[TOKENS].ravel().tolist()) for row in Rows(directory)]

    def record(self, smaller: Any, gone: list[str]) -> TrimRecord:
        kept = [index for index in self.ids if index < len(self.counts)]
        coverage = compare_tokens(
            self.texts(), before=self.before, after=self.after, unknown=self.vocabulary.unknown
        )
        return TrimRecord(
            tokens_before=self.rows,
            tokens_after=len(self.kept),
            parameters_before=count_parameters(self.module),
            parameters_after=count_parameters(smaller),
            kept_share=float(self.counts[kept].sum() / self.counts.sum()),
            coverage=coverage,
            notes=self._notes(gone),
        )

    def _notes(self, gone: list[str]) -> tuple[str, ...]:
        notes = [f"{name} holds the old vocabulary and was left out" for name in gone]
        if len(self.kept) % self.config.multiple:
            notes.append(f"there are {len(self.kept)} tokens in all, no multiple to round up to")
        return tuple(notes)


def _tokenizer_file(source: Source) -> Path:
    if source.tokenizer is None:
        raise IncompatibleError(
            f"{source.name} has no tokenizer.json, so its vocabulary cannot be trimmed",
            hint="Save it with AutoTokenizer.from_pretrained(path).save_pretrained(path).",
        )
    return source.tokenizer


def _opened(tokenizer: Mapping[str, Any], file: Path) -> Any:
    try:
        return opened(tokenizer)
    except ValueError as error:
        raise SourceError(f"{file} is no tokenizer: {error}") from error


def _counts(directory: Path, *, rows: int) -> Any:
    """int64 [rows]: how often each id occurs."""
    data = Rows(directory)
    if TOKENS not in {column.name for column in data.header.columns}:
        raise DataError(f"{directory} has no {TOKENS!r}: it holds no texts")
    counts = np.zeros(rows, dtype=np.int64)
    for index, row in enumerate(data):
        ids = row[TOKENS].ravel()
        if ids.size and not 0 <= ids.min() <= ids.max() < rows:
            raise DataError(
                f"{directory}: sample {index} has the id {ids.max()}, the model has {rows} tokens",
                hint="Prepare the data with the tokenizer of this model.",
            )
        counts += np.bincount(ids, minlength=rows)
    if not counts.sum():
        raise DataError(f"{directory} has no token at all")
    return counts


def vocabulary_axes(module: Any) -> list[tuple[str, int]]:
    """Tensor and axis of everything that has an entry per token, found as in ``axes.py``.

    Raises:
        IncompatibleError: The vocabulary is part of an axis, or nothing follows it.
    """
    size = module.config.vocab_size
    before = shapes_of(module, module.config)
    after = shapes_of(module, changed(module.config, {"vocab_size": size + _STEP}))
    found = [
        (name, axis, shape[axis], after.get(name, shape)[axis])
        for name, shape in before.items()
        for axis in range(len(shape))
        if after.get(name, shape)[axis] != shape[axis]
    ]
    if (
        not found
        or before.keys() != after.keys()
        or any(old != size or new != size + _STEP for _, _, old, new in found)
    ):
        raise IncompatibleError(
            f"{type(module).__name__}: the vocabulary cannot be told apart in its weights"
        )
    return [(name, axis) for name, axis, _, _ in found]


def _require_same(trim: _Trim, directory: Path) -> None:
    """Run both models on a sample whose tokens are all kept.

    Raises:
        BackendError: Outputs differ: something in the model depends on the numbers of its tokens.
    """
    torch = extras.require("torch")
    kept = torch.tensor([trim.ids[i] for i in sorted(trim.ids)])
    row = next(
        (r[TOKENS] for r in Rows(trim.config.data / "training") if _all_kept(r[TOKENS], trim)), None
    )
    if row is None:
        return
    loaded = load_module(parse_source(str(directory), task=trim.config.source.task))
    old = torch.from_numpy(row)
    new = torch.tensor([[trim.ids[int(i)] for i in line] for line in row])
    with torch.no_grad():
        before = named_outputs(trim.module(input_ids=old))
        after = named_outputs(loaded(input_ids=new))
    for name, value in before.items():
        _require_close(name, value, after[name], order=trim.order(), tokens=len(kept))


def _all_kept(ids: Any, trim: _Trim) -> bool:
    return set(ids.ravel().tolist()) <= trim.ids.keys()


def _require_close(name: str, before: Any, after: Any, *, order: Any, tokens: int) -> None:
    if after.shape[-1] == tokens != before.shape[-1]:
        before = before[..., order]
    scale = float(before.abs().max()) or 1.0
    worst = float((before - after).abs().max()) / scale
    if not worst <= _SAME:
        raise BackendError(
            f"output {name!r} is another with the trimmed vocabulary, by {worst:.2g} of its largest"
            " value, on a text whose tokens are all kept: the model depends on what number a token"
            " has"
        )
