"""The files of a tokenizer with other ids, so that all of them say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from equipoise import fs, record
from equipoise.compress.transformer.tokens import Vocabulary, joined
from equipoise.errors import IncompatibleError, SourceError

_LISTS_OF_IDS: Final = ("suppress_tokens", "begin_suppress_tokens")
_NOT_UNDERSTOOD: Final = ("bad_words_ids", "forced_decoder_ids", "sequence_bias", "force_words_ids")
_STALE: Final = ("*.model", "vocab.bpe", "encoder.json")
"""Files that hold the old vocabulary in a form that is not rewritten."""


def read_json(file: Path) -> Any:
    """A JSON file of a transformers directory. Raises SourceError when it is none."""
    try:
        return record.parse(fs.read_text(file, error=SourceError))
    except ValueError as error:
        raise SourceError(f"{file} is no JSON: {error}") from error


def new_tokenizer(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, *, kept: tuple[str, ...]
) -> dict[str, Any]:
    """``tokenizer.json`` with the tokens ``kept`` alone; the place of each is its new id."""
    place = {token: index for index, token in enumerate(kept)}
    ids = new_ids(vocabulary, kept)
    result = {**tokenizer, "model": _model(tokenizer["model"], vocabulary, place)}
    result["added_tokens"] = sorted(
        ({**token, "id": place[token["content"]]} for token in tokenizer.get("added_tokens") or ()),
        key=lambda token: int(token["id"]),
    )
    result["post_processor"] = _processor(tokenizer.get("post_processor"), place, ids)
    padding = tokenizer.get("padding")
    if padding:
        place_of_padding = place.get(padding["pad_token"], ids.get(padding["pad_id"], 0))
        result["padding"] = {**padding, "pad_id": place_of_padding}
    return result


def new_ids(vocabulary: Vocabulary, kept: tuple[str, ...]) -> dict[int, int]:
    """Old id -> new id of what is kept."""
    place = {token: index for index, token in enumerate(kept)}
    return {old: place[token] for old, token in vocabulary.all_ids().items() if token in place}


def _model(
    model: Mapping[str, Any], vocabulary: Vocabulary, place: Mapping[str, int]
) -> dict[str, Any]:
    result = dict(model)
    own = [token for token in place if token in vocabulary.ids]
    if vocabulary.kind == "Unigram":
        scores = vocabulary.scores or {}
        result["vocab"] = [[token, scores[token]] for token in own]
        result["unk_id"] = place.get(vocabulary.unknown) if vocabulary.unknown else None
        return result
    result["vocab"] = {token: place[token] for token in own}
    if vocabulary.kind == "BPE":
        merges = zip(model["merges"], vocabulary.merges, strict=True)
        result["merges"] = [
            written for written, pair in merges if _stays(pair, place, prefix=vocabulary.prefix)
        ]
    return result


def _stays(pair: tuple[str, str], place: Mapping[str, int], *, prefix: str) -> bool:
    return {*pair, joined(*pair, prefix=prefix)} <= place.keys()


def _processor(value: Any, place: Mapping[str, int], ids: Mapping[int, int]) -> Any:
    """A post-processor, or several in one, with the ids that it puts around texts."""
    if not isinstance(value, dict):
        return value
    result = dict(value)
    for key in ("sep", "cls"):
        if isinstance(value.get(key), list):
            result[key] = [value[key][0], place[value[key][0]]]
    if isinstance(value.get("processors"), list):
        result["processors"] = [_processor(inner, place, ids) for inner in value["processors"]]
    if value.get("type") == "TemplateProcessing":
        result["special_tokens"] = {
            name: {**token, "ids": [ids[index] for index in token["ids"]]}
            for name, token in value["special_tokens"].items()
        }
    return result


def ids_in(settings: Any) -> set[int]:
    """Every id of a token that a config names, at any depth."""
    if not isinstance(settings, dict):
        return set()
    found: set[int] = set()
    for key, value in settings.items():
        if _names_ids(key):
            found |= {v for v in _flat(value) if v >= 0}
        found |= ids_in(value)
    return found


def with_new_ids(settings: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A config with the ids that it names renewed.

    Ids that no token had are left: they were beyond the vocabulary and are so still. Of lists of
    tokens that must not be made, those that are gone are left out.

    Raises:
        IncompatibleError: A setting names tokens in a form that is not known here.
    """
    odd = [key for key in _NOT_UNDERSTOOD if settings.get(key)]
    if odd:
        raise IncompatibleError(
            f"{odd[0]} is set, which names tokens in a form that cannot be renumbered",
            hint=f"Delete {odd[0]} from generation_config.json or config.json.",
        )
    result = dict(settings)
    for key, value in settings.items():
        if key in _LISTS_OF_IDS and isinstance(value, list):
            result[key] = [ids[v] for v in value if v in ids]
        elif _names_ids(key):
            result[key] = _renewed(value, ids)
        elif isinstance(value, dict):
            result[key] = with_new_ids(value, ids)
    return result


def _names_ids(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(("_token_id", "_token_ids"))


def _flat(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _renewed(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_renewed(v, ids) for v in value]
    return ids.get(value, value) if isinstance(value, int) else value


def tokenizer_texts(
    base: Path, *, tokenizer: Mapping[str, Any], vocabulary: Vocabulary, kept: tuple[str, ...]
) -> dict[str, str]:
    """The texts of the tokenizer's files with the tokens ``kept``, by name.

    Args:
        base: The transformers directory that the tokenizer comes from.
        tokenizer: Its ``tokenizer.json``.
        vocabulary: Its tokens.
        kept: Those that stay.

    Raises:
        SourceError: A file is no JSON.
        IncompatibleError: A setting names tokens in a form that is not known here.
    """
    new = new_tokenizer(tokenizer, vocabulary, kept=kept)
    ids = new_ids(vocabulary, kept)
    texts = {"tokenizer.json": json.dumps(new, ensure_ascii=False, indent=2) + "\n"}
    for name, text in _BESIDE.items():
        if (base / name).is_file():
            texts[name] = text(base / name, new["model"], ids)
    return texts


def replace_tokenizer(directory: Path, texts: Mapping[str, str]) -> list[str]:
    """Write a tokenizer's files in place of the old ones in a transformers directory.

    Returns:
        Names of files that were taken away, because they hold the old vocabulary.
    """
    gone = [f.name for pattern in _STALE for f in sorted(directory.glob(pattern))]
    for name in gone:
        fs.remove(directory / name)
    for name, text in texts.items():
        fs.write_text(directory / name, text)
    return gone


def _vocab_txt(_file: Path, model: Mapping[str, Any], _ids: Mapping[int, int]) -> str:
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return "".join(f"{token}\n" for token in tokens)


def _vocab_json(_file: Path, model: Mapping[str, Any], _ids: Mapping[int, int]) -> str:
    return json.dumps(model["vocab"], ensure_ascii=False) + "\n"


def _merges_txt(_file: Path, model: Mapping[str, Any], _ids: Mapping[int, int]) -> str:
    rules = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    return "".join(f"{line}\n" for line in ("#version: 0.2", *rules))


def _tokenizer_config(file: Path, _model: Mapping[str, Any], ids: Mapping[int, int]) -> str:
    settings = with_new_ids(read_json(file), ids)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        settings["added_tokens_decoder"] = {
            str(ids[int(old)]): token for old, token in decoder.items() if int(old) in ids
        }
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"


def _added_tokens(file: Path, _model: Mapping[str, Any], ids: Mapping[int, int]) -> str:
    renewed = {token: ids[old] for token, old in read_json(file).items() if old in ids}
    return json.dumps(renewed, ensure_ascii=False, indent=2) + "\n"


def _generation_config(file: Path, _model: Mapping[str, Any], ids: Mapping[int, int]) -> str:
    return json.dumps(with_new_ids(read_json(file), ids), indent=2) + "\n"


_BESIDE: Final = {
    "vocab.txt": _vocab_txt,
    "vocab.json": _vocab_json,
    "merges.txt": _merges_txt,
    "tokenizer_config.json": _tokenizer_config,
    "added_tokens.json": _added_tokens,
    "generation_config.json": _generation_config,
}
