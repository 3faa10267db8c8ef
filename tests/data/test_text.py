"""Texts become what the tokenizer says, and labels find the first piece of each word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.text import TextEncoder
from equipoise.errors import DataError

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##a", "##b")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word pieces of one letter, with padding and truncation left on as training leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_padding(length=32)
    made.enable_truncation(4)
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    made.save(str(path))
    return path


def test_neither_padding_nor_truncation_of_the_file_count(tokenizer: Path) -> None:
    """A text has as many tokens as it has; max_length alone cuts."""
    feeds = TextEncoder(tokenizer).text("a b a b a")
    assert feeds["input_ids"].tolist() == [[2, 4, 5, 4, 5, 4, 3]]
    assert feeds["attention_mask"].tolist() == [[1] * 7]
    assert {a.dtype.name for a in feeds.values()} == {"int64"}


def test_pairs_have_types(tokenizer: Path) -> None:
    """The second text and its separator are of type 1."""
    feeds = TextEncoder(tokenizer).text("a", pair="b")
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=8), st.integers(3, 12))
def test_each_word_has_one_first_piece(tokenizer: Path, words: list[str], most: int) -> None:
    """In order, at its own piece, and none beyond the cut."""
    encoder = TextEncoder(tokenizer, max_length=most)
    feeds, first = encoder.words(words)
    ids = feeds["input_ids"][0].tolist()
    whole = 2 + sum(map(len, words))
    assert len(ids) == len(first) == min(whole, most)
    assert encoder.truncated == (whole > most)
    found = [index for index in first if index is not None]
    assert found == list(range(len(found)))
    for token, index in enumerate(first):
        if index is not None:
            assert PIECES[ids[token]] == words[index][0]
    if whole <= most:
        assert len(found) == len(words)


def test_text_that_has_no_utf8_form_is_shown_escaped(tokenizer: Path) -> None:
    """Half of a surrogate pair, as JSON may carry it."""
    encoder = TextEncoder(tokenizer)
    with pytest.raises(DataError, match=r"'\\ud83d a' cannot be encoded"):
        encoder.text("\ud83d a")
    with pytest.raises(DataError, match=r"\\ud83d.*cannot be encoded"):
        encoder.words(["a", "\ud83d"])
