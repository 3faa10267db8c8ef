"""What a smaller vocabulary costs: how texts are divided into tokens before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise import extras


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How texts fare that the vocabulary was not trimmed to.

    Attributes:
        texts: How many.
        unchanged: Share of texts whose tokens are the same as before.
        growth: Mean over texts of the number of tokens after over before.
        unknown_before: Share of tokens that say "unknown", with the whole vocabulary.
        unknown_after: The same with the trimmed one.
    """

    texts: int
    unchanged: float
    growth: float
    unknown_before: float
    unknown_after: float


def compare_tokens(
    texts: Sequence[str], *, before: Any, after: Any, unknown: str
) -> Coverage | None:
    """Encode ``texts`` with two tokenizers, neither of which cuts or pads.

    Args:
        texts: What is encoded; those that give no token are left out.
        before: ``tokenizers.Tokenizer``.
        after: The trimmed one.
        unknown: The unknown token; empty when there is none.

    Returns:
        The comparison; None when no text gives a token.
    """
    pairs = [(before.encode(text).tokens, after.encode(text).tokens) for text in texts]
    pairs = [(old, new) for old, new in pairs if old and new]
    if not pairs:
        return None
    return Coverage(
        texts=len(pairs),
        unchanged=sum(old == new for old, new in pairs) / len(pairs),
        growth=sum(len(new) / len(old) for old, new in pairs) / len(pairs),
        unknown_before=_share((old for old, _ in pairs), unknown),
        unknown_after=_share((new for _, new in pairs), unknown),
    )


def _share(texts: Iterable[list[str]], unknown: str) -> float:
    tokens = [token for text in texts for token in text]
    return sum(token == unknown for token in tokens) / len(tokens) if unknown else 0.0


def opened(tokenizer: Mapping[str, Any]) -> Any:
    """``tokenizers.Tokenizer`` of a parsed ``tokenizer.json``, without cutting or padding.

    Raises:
        ValueError: It is none.
    """
    tokenizers: Any = extras.require("tokenizers")
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # tokenizers raises plain exceptions of its own
        raise ValueError(str(error).partition("\n")[0]) from error
    made.no_truncation()
    made.no_padding()
    return made
