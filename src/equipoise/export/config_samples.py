"""Inputs for a model of transformers: which by its signature, their shapes by its config.

Nothing here knows an architecture: the names of inputs and settings are shared by all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, record
from equipoise.data.preprocessing import (
    ImagePreprocessing,
    from_timm,
    is_image_processor,
    nominal_size,
    read_processor,
)
from equipoise.data.text import TEXT_INPUTS, TextEncoder
from equipoise.errors import DataError, EquipoiseError, SourceError
from equipoise.export.material import TEXTS, pictures, plain_preprocessing, sounds
from equipoise.sources.source import Source, path_of
from equipoise.spec import Array, TensorSpec

_STATES: Final = "encoder_hidden_states"
_STATES_MASK: Final = "encoder_attention_mask"
_DECODER: Final = "decoder_input_ids"
_IMAGES: Final = ("pixel_values", "pixel_values_videos")
_SIGNALS: Final = ("input_values", "input_features")
_SPECIAL_IDS: Final = ("pad", "bos", "eos", "sep", "cls", "mask", "unk", "decoder_start")
_MOST_TOKENS: Final = 512
_RANDOM_TOKENS: Final = 32
_SAMPLING_RATE: Final = 16000
_DEFAULT_SIDE: Final = 224
_FRAMES: Final = 100
_RAW: Final = (("time", _SAMPLING_RATE),)
_SPECTRUM_WIDTHS: Final = ("input_feat_per_channel", "feature_projection_input_dim")
"""Settings of models whose spectra come frame by frame, of any number."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """Some of the inputs of a model.

    Attributes:
        inputs: Their specs.
        rows: Samples of batch 1.
        made_by: What made them.
    """

    inputs: tuple[TensorSpec, ...]
    rows: tuple[dict[str, Array], ...]
    made_by: str


def one_input(name: str, arrays: Sequence[Array], dims: Sequence[int | str], by: str) -> Made:
    """One input of the given arrays, one per row."""
    spec = TensorSpec(name=name, dtype=str(arrays[0].dtype), shape=tuple(dims))
    return Made(inputs=(spec,), rows=tuple({name: array} for array in arrays), made_by=by)


class ConfigSamples:
    """Makes the inputs of one module of transformers, or of a part of one.

    Args:
        source: Where it comes from; its tokenizer and processor are used when it has them.
        module: With ``config``, ``main_input_name`` and a ``forward`` that names its inputs.
        count: Number of rows.
        seed: Of all random numbers.
    """

    def __init__(self, source: Source, module: Any, *, count: int, seed: int) -> None:
        self._source = source
        self._config = module.config
        self._main = module.main_input_name
        self._parameters = inspect.signature(module.forward).parameters
        self._count = count
        self._random = np.random.default_rng(seed)

    def names(self) -> tuple[str, ...]:
        """Inputs by name, in the order of ``forward``: what it must have, and what goes along."""
        wanted = {p.name for p in self._parameters.values() if _must_be_given(p)}
        wanted |= {self._main, *self._companions()}
        return tuple(name for name in self._parameters if name in wanted)

    def _companions(self) -> list[str]:
        """What goes along with the main input."""
        found = []
        if self._main == "input_ids":
            found.append("attention_mask")
            found += ["token_type_ids"] if self._has_token_types() else []
            towers = _nested(self._config, "text_config") and _nested(self._config, "vision_config")
            found += ["pixel_values"] if towers else []
        # With a task the model makes these itself, or is shown without its decoder.
        if self._source.task in {"", "feature-extraction"} and _is_encoder_decoder(self._config):
            found.append(_DECODER)
        return found

    def _has_token_types(self) -> bool:
        """By the model's own table of them; by the tokenizer where the config has no such size."""
        kinds = getattr(self._config, "type_vocab_size", None)
        if kinds is not None:
            return int(kinds) > 1
        tokenizer = self._source.tokenizer
        settings = _read_object(tokenizer.with_name("tokenizer_config.json")) if tokenizer else {}
        return "token_type_ids" in (settings.get("model_input_names") or ())

    def make(self) -> tuple[Made, ...]:
        """All inputs.

        Raises:
            SourceError: An input that nothing says the shape of, or a tokenizer or feature
                extractor that does not fit the model.
            MissingExtraError: A package is needed that is not installed.
        """
        names = self.names()
        text = [name for name in names if name in TEXT_INPUTS]
        states = [name for name in names if name in {_STATES, _STATES_MASK}]
        made = [self._text(text)] if text else []
        made += [self._states(states)] if states else []
        for name in names:
            if name not in text and name not in states:
                made.append(self._one(name, names))
        if not made:
            raise no_shapes(self._source, names, unknown=tuple(self._parameters))
        return tuple(made)

    def _one(self, name: str, names: Sequence[str]) -> Made:
        if name == _DECODER:
            return self._decoder()
        if name in _IMAGES:
            return self._images(name)
        if name in _SIGNALS and self._extracts():
            return self._features(name)
        if name in _SIGNALS:
            return self._signal(name, names)
        raise no_shapes(self._source, names, unknown=(name,))

    # Text

    def _text(self, names: Sequence[str]) -> Made:
        config = _nested(self._config, "text_config") or self._config
        rows, by = self._encoded(config, limit=_position_limit(config), names=names)
        rows = [{name: row[name] for name in names} for row in rows]
        specs = (
            TensorSpec(name=name, dtype="int64", shape=("batch", "sequence")) for name in names
        )
        return Made(inputs=tuple(specs), rows=tuple(rows), made_by=by)

    def _encoded(
        self, config: Any, *, limit: int, names: Sequence[str]
    ) -> tuple[list[dict[str, Array]], str]:
        """Texts, or random ids without a tokenizer; and by what."""
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise no_shapes(self._source, names, unknown=names)
        if self._source.tokenizer is None:
            lengths = self._lengths(min(limit, _RANDOM_TOKENS))
            return [self._random_text(config, length) for length in lengths], "signature"
        encoder = TextEncoder(self._source.tokenizer, max_length=limit)
        rows = [self._row(encoder, i, pair="token_type_ids" in names) for i in range(self._count)]
        largest = max(int(row["input_ids"].max()) for row in rows)
        if largest >= vocabulary:
            raise SourceError(
                f"{self._source.tokenizer} gives the id {largest}, but the model knows"
                f" {vocabulary} tokens",
                hint="Give the tokenizer that the model was trained with.",
            )
        return rows, "tokenizer"

    @staticmethod
    def _row(encoder: TextEncoder, index: int, *, pair: bool) -> dict[str, Array]:
        """A text; every other a pair of texts where the model tells them apart."""
        text, other = TEXTS[index % len(TEXTS)], TEXTS[(index + 1) % len(TEXTS)]
        return encoder.text(text, pair=other if pair and index % 2 else None)

    def _lengths(self, longest: int) -> list[int]:
        """Unlike lengths, the longest first, down to half of it."""
        return [longest - (i * 5) % (longest // 2 + 1) for i in range(self._count)]

    def _random_text(self, config: Any, length: int) -> dict[str, Array]:
        """Random ids that are not special, with the end mark at the end if there is one."""
        ids = self._random.choice(_plain_ids(config), size=(1, length)).astype(np.int64)
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < config.vocab_size:
            ids[0, -1] = end
        types = (np.arange(length) >= length // 2).astype(np.int64)[np.newaxis]
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}

    def _decoder(self) -> Made:
        """What a decoder has said so far: its start mark and a text."""
        config = _nested(self._config, "decoder") or self._config
        limit = _position_limit(config, "max_target_positions")
        rows, by = self._encoded(config, limit=max(1, limit - 1), names=[_DECODER])
        start = getattr(config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            start = getattr(config, "bos_token_id", None) or 0
        first = np.array([[start]], dtype=np.int64)
        ids = [np.concatenate([first, row["input_ids"]], axis=1) for row in rows]
        return one_input(_DECODER, ids, ("batch", "decoder_sequence"), by)

    def _states(self, names: Sequence[str]) -> Made:
        """Random hidden states of an encoder, and a mask that hides none."""
        config = _nested(self._config, "encoder") or self._config
        hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        if not isinstance(hidden, int):
            raise no_shapes(self._source, names, unknown=names)
        fixed = getattr(config, "max_source_positions", None)
        lengths = [fixed] * self._count if fixed else self._lengths(_RANDOM_TOKENS)
        states = [self._normal(1, length, hidden) for length in lengths]
        made = {_STATES: states, _STATES_MASK: [np.ones(s.shape[:2], np.int64) for s in states]}
        dims = ("batch", "encoder_sequence", hidden)
        parts = [one_input(n, made[n], dims[: made[n][0].ndim], "signature") for n in names]
        return joined(parts)

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal(shape).astype(np.float32)

    # Pictures and films

    def _images(self, name: str) -> Made:
        config = _nested(self._config, "vision_config") or self._config
        preprocessing, by = self._preprocessing(config)
        channels = _channels(config)
        frames = _frames(config, name)
        take = frames or 1
        pixels = pictures(self._count * take, preprocessing, channels=channels, random=self._random)
        if not frames:
            return one_input(name, pixels, ("batch", channels, "height", "width"), by)
        films = [np.stack(pixels[i * take : (i + 1) * take], axis=1) for i in range(self._count)]
        return one_input(name, films, ("batch", "frames", channels, "height", "width"), by)

    def _preprocessing(self, config: Any) -> tuple[ImagePreprocessing, str]:
        """The processor's steps; plain ones of the size that it, or the config, says."""
        processor = self._source.processor
        settings = _read_object(processor) if processor else {}
        try:
            found = read_processor(processor) if processor else None
            trained = getattr(self._config, "pretrained_cfg", None)
            found = from_timm(trained) if found is None and trained else found
        except DataError:
            found = None
        if found is not None:
            return found, "image processor"
        return plain_preprocessing(nominal_size(settings) or _image_size(config)), "signature"

    # Sounds

    def _extracts(self) -> bool:
        """Whether the processor is one of sounds."""
        processor = self._source.processor
        return processor is not None and not is_image_processor(_read_object(processor))

    def _features(self, name: str) -> Made:
        """Sounds as the checkpoint's own feature extractor gives them."""
        transformers = extras.require("transformers")
        try:
            extractor = transformers.AutoFeatureExtractor.from_pretrained(
                path_of(self._source), local_files_only=True, trust_remote_code=False
            )
            rate = int(getattr(extractor, "sampling_rate", _SAMPLING_RATE))
            arrays = [
                np.asarray(
                    extractor(sound, sampling_rate=rate, return_tensors="np")[name],
                    dtype=np.float32,
                )
                for sound in sounds(self._count, rate=rate, random=self._random)
            ]
        except EquipoiseError:
            raise
        except Exception as error:  # a wrong config reaches any exception
            raise SourceError(
                f"{self._source.processor}: the feature extractor cannot make {name!r}: {error}",
                hint="Give sounds as the model takes them, with --sample FILE.npz.",
            ) from error
        return one_input(name, arrays, ("batch", *self._dims_of(name, arrays)), "feature extractor")

    def _dims_of(self, name: str, arrays: Sequence[Array]) -> tuple[int | str, ...]:
        """Axes after the batch; those that nothing names are fixed where their size is."""
        known = tuple(dim for dim, _ in self._signal_dims(name))
        if len(known) == arrays[0].ndim - 1:
            return known
        shapes = np.array([array.shape[1:] for array in arrays])
        same = (shapes == shapes[0]).all(axis=0)
        return tuple(
            int(size) if equal else f"{name}_{axis}"
            for axis, (size, equal) in enumerate(zip(shapes[0], same, strict=True), start=1)
        )

    def _signal(self, name: str, names: Sequence[str]) -> Made:
        """Sounds, or random spectra of the size that the config says."""
        dims = self._signal_dims(name)
        if not dims:
            raise no_shapes(self._source, names, unknown=(name,))
        if len(dims) == 1:
            raw = sounds(self._count, rate=_SAMPLING_RATE, random=self._random)
            arrays = [((s - s.mean()) / s.std())[np.newaxis] for s in raw]
        else:
            sizes = [size for _, size in dims]
            arrays = [self._normal(1, *sizes) / 2 for _ in range(self._count)]
        return one_input(name, arrays, ("batch", *(dim for dim, _ in dims)), "signature")

    def _signal_dims(self, name: str) -> tuple[tuple[int | str, int], ...]:
        """Axes after the batch, each with its size to sample with; empty if nothing says."""
        config = _nested(self._config, "audio_config") or self._config
        mels = int(getattr(config, "num_mel_bins", None) or 0)
        if name == "input_values":
            return (("frames", int(config.max_length)), (mels, mels)) if mels else _RAW
        width = next((w for n in _SPECTRUM_WIDTHS if (w := getattr(config, n, None))), None)
        if width:
            return ("frames", _FRAMES), (int(width), int(width))
        positions = int(getattr(config, "max_source_positions", None) or 0)
        return ((mels, mels), ("frames", 2 * positions)) if mels and positions else ()


def no_shapes(source: Source, names: Sequence[str], *, unknown: Sequence[str]) -> SourceError:
    """The error for inputs that nothing says the shape of."""
    takes = ", ".join(names) or "nothing by name"
    return SourceError(
        f"{source.name} takes {takes}; nothing says the shape of {', '.join(unknown)}",
        hint="Give inputs: --data, --sample FILE.npz, or --input name=float32[batch,3,224,224].",
    )


def joined(parts: Sequence[Made]) -> Made:
    """Several inputs as one."""
    words = dict.fromkeys(part.made_by for part in parts)
    return Made(
        inputs=tuple(spec for part in parts for spec in part.inputs),
        rows=tuple(
            {name: array for row in rows for name, array in row.items()}
            for rows in zip(*(part.rows for part in parts), strict=True)
        ),
        made_by=" and ".join(words),
    )


def _must_be_given(parameter: inspect.Parameter) -> bool:
    open_ended = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return parameter.default is inspect.Parameter.empty and parameter.kind not in open_ended


def _nested(config: Any, name: str) -> Any:
    """A config within a config; None when there is none."""
    found = getattr(config, name, None)
    return found if hasattr(found, "to_dict") else None


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _read_object(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty for a file that is not there."""
    if not file.is_file():
        return {}
    try:
        value = record.parse(fs.read_text(file, error=SourceError))
    except ValueError as error:
        raise SourceError(f"{file} is no JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _position_limit(config: Any, *names: str) -> int:
    """Most tokens that the table of positions has room for.

    Some models count positions from behind the padding id, so that many places are left free.
    """
    sizes = (getattr(config, name, None) for name in (*names, "max_position_embeddings"))
    positions = next((size for size in sizes if isinstance(size, int) and size > 0), _MOST_TOKENS)
    padding = getattr(config, "pad_token_id", None)
    kept = 1 + padding if padding in {0, 1, 2} else 1
    return max(1, min(_MOST_TOKENS, positions - kept))


def _plain_ids(config: Any) -> Array:
    """Ids of the vocabulary without those known as special."""
    special = [getattr(config, f"{name}_token_id", None) for name in _SPECIAL_IDS]
    known = [value for value in special if isinstance(value, int)]
    plain = np.setdiff1d(np.arange(config.vocab_size), known)
    return plain if plain.size else np.arange(config.vocab_size)


def _channels(config: Any) -> int:
    backbone = _nested(config, "backbone_config")
    found = getattr(config, "num_channels", None) or getattr(backbone, "num_channels", None)
    return int(found or 3)


def _frames(config: Any, name: str) -> int:
    """Frames of a film; 0 for a picture."""
    if name == "pixel_values_videos":
        return int(getattr(config, "frames_per_clip", 0) or getattr(config, "num_frames", 0) or 16)
    return int(getattr(config, "num_frames", None) or 0)


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width by the config; the commonest where any size will do."""
    size: Any = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    side = int(size) if isinstance(size, int) else _DEFAULT_SIDE
    return side, side
