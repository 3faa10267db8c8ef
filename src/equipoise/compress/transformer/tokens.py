"""Which tokens of a vocabulary stay, so that every text still encodes and kept ones as before.

A text whose tokens are all kept is divided as before, whatever else goes:

- WordPiece takes the longest token that fits; fewer tokens leave the longest one the longest.
- Unigram takes the most likely path; fewer pieces leave the best path the best.
- BPE merges in the order of its rules. Every rule that makes a kept token stays, with the tokens
  that it joins, and theirs; so each step finds the same rule first.

Single characters, bytes and continuations stay always, so that what is not kept whole is spelled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise.errors import IncompatibleError, SourceError

_BYTES: Final = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_META: Final = "▁"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a ``tokenizer.json``.

    Attributes:
        kind: ``WordPiece``, ``BPE`` or ``Unigram``.
        ids: Token -> id, of the model.
        added: The same of added tokens; some are in ``ids`` too.
        merges: Of BPE: the pairs that are joined, in order.
        scores: Of Unigram: token -> log probability.
        prefix: What WordPiece, or a BPE with such a setting, puts before continuations.
        unknown: The token for what cannot be spelled; empty when there is none.
    """

    kind: str
    ids: Mapping[str, int]
    added: Mapping[str, int]
    merges: tuple[tuple[str, str], ...] = ()
    scores: Mapping[str, float] | None = None
    prefix: str = ""
    unknown: str = ""

    def all_ids(self) -> dict[int, str]:
        """Every id and its token."""
        return {index: token for part in (self.ids, self.added) for token, index in part.items()}


def read_vocabulary(tokenizer: Mapping[str, Any], *, where: str) -> Vocabulary:
    """The tokens of a parsed ``tokenizer.json``.

    Args:
        tokenizer: Its JSON.
        where: Its name in messages.

    Raises:
        IncompatibleError: Its model is not one that can be trimmed.
        SourceError: It is no tokenizer.
    """
    try:
        model = tokenizer["model"]
        added = {str(t["content"]): int(t["id"]) for t in tokenizer.get("added_tokens") or ()}
        kind = str(model.get("type") or _guessed(model))
        return _READERS[kind](model, added)
    except KeyError as error:
        if error.args[0] in {"model", "content", "id", "vocab"}:
            raise SourceError(f"{where} is no tokenizer: it has no {error}") from error
        raise IncompatibleError(
            f"{where}: a vocabulary of the kind {error} cannot be trimmed; {', '.join(_READERS)}"
            " can: they spell in smaller pieces what is not in them",
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where} is no tokenizer: {error}") from error


def _guessed(model: Mapping[str, Any]) -> str:
    """The kind of an old file, which does not say it."""
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "unknown"


def _wordpiece(model: Mapping[str, Any], added: Mapping[str, int]) -> Vocabulary:
    prefix = str(model.get("continuing_subword_prefix") or "##")
    unknown = str(model.get("unk_token") or "")
    ids = dict(model["vocab"])
    return Vocabulary(kind="WordPiece", ids=ids, added=added, prefix=prefix, unknown=unknown)


def _bpe(model: Mapping[str, Any], added: Mapping[str, int]) -> Vocabulary:
    merges = tuple(_pair(merge) for merge in model["merges"])
    return Vocabulary(
        kind="BPE",
        ids=dict(model["vocab"]),
        added=added,
        merges=merges,
        prefix=str(model.get("continuing_subword_prefix") or ""),
        unknown=str(model.get("unk_token") or ""),
    )


def _pair(merge: Any) -> tuple[str, str]:
    """A rule is written as a list of two, or, in old files, with a space between."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return str(first), str(second)


def _unigram(model: Mapping[str, Any], added: Mapping[str, int]) -> Vocabulary:
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    index = model.get("unk_id")
    unknown = "" if index is None else pieces[index][0]
    return Vocabulary(kind="Unigram", ids=ids, added=added, scores=dict(pieces), unknown=unknown)


_READERS: Final = {"WordPiece": _wordpiece, "BPE": _bpe, "Unigram": _unigram}


def tokens_to_keep(
    vocabulary: Vocabulary, *, needed: Iterable[int], multiple: int
) -> tuple[str, ...]:
    """The tokens that stay, in the order of their old ids.

    Args:
        vocabulary: All tokens.
        needed: Ids that stay: what the texts use, and what the config names.
        multiple: Their number becomes a multiple of it, by keeping some more of the first ones.

    Returns:
        Tokens of the model, then added tokens that are not in it.
    """
    closure = _Closure(vocabulary)
    known = vocabulary.all_ids()
    for token in (known[index] for index in needed if index in known):
        closure.add(token)
    for token in _always(vocabulary):
        closure.add(token)
    _round_up(closure, vocabulary, multiple=multiple)
    return _ordered(closure.kept, vocabulary)


def _always(vocabulary: Vocabulary) -> list[str]:
    """Added tokens, the unknown token, and what spells all else."""
    single = [t for t in vocabulary.ids if _is_single(t, vocabulary) or t in _BYTES]
    # The unknown token of Unigram costs as much as the least likely piece, and some more.
    least = [min(vocabulary.scores, key=vocabulary.scores.__getitem__)] if vocabulary.scores else []
    unknown = [vocabulary.unknown] if vocabulary.unknown else []
    return [*vocabulary.added, *unknown, *single, *least]


def _is_single(token: str, vocabulary: Vocabulary) -> bool:
    bare = token.removeprefix(vocabulary.prefix) if vocabulary.prefix else token
    if vocabulary.kind == "Unigram" and len(bare) > 1:
        bare = bare.removeprefix(_META)
    if vocabulary.kind == "BPE":
        bare = bare.removesuffix("</w>") if len(bare) > 4 else bare
    return len(bare) == 1


class _Closure:
    """Tokens that stay, with all that is needed to make them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._known = vocabulary.ids.keys() | vocabulary.added.keys()
        self._parts: dict[str, set[str]] = defaultdict(set)
        for first, second in vocabulary.merges:
            self._parts[joined(first, second, prefix=vocabulary.prefix)] |= {first, second}
        self.kept: set[str] = set()

    def add(self, token: str) -> None:
        waiting = [token]
        while waiting:
            each = waiting.pop()
            if each in self._known and each not in self.kept:
                self.kept.add(each)
                waiting += self._parts.get(each, ())

    def is_complete(self, token: str) -> bool:
        """Whether all that makes ``token`` stays already."""
        return self._parts.get(token, set()) <= self.kept


def joined(first: str, second: str, *, prefix: str) -> str:
    """What a rule of BPE makes of two tokens: a continuation loses its prefix."""
    return first + (second.removeprefix(prefix) if prefix else second)


def _round_up(closure: _Closure, vocabulary: Vocabulary, *, multiple: int) -> None:
    """Keep more of the first tokens, which are the commonest ones, until ``multiple`` divides."""
    missing = -len(closure.kept) % multiple
    for token in sorted(vocabulary.ids, key=vocabulary.ids.__getitem__):
        if not missing:
            return
        if token not in closure.kept and closure.is_complete(token):
            closure.add(token)
            missing -= 1


def _ordered(kept: set[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    ids, added = vocabulary.ids, vocabulary.added
    own = sorted((t for t in kept if t in ids), key=ids.__getitem__)
    extra = sorted((t for t in kept if t not in ids), key=added.__getitem__)
    return (*own, *extra)
