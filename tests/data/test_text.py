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


def test_bytes_are_as_good_as_a_file(tokenizer: Path) -> None:
    """A bundle gives what it has verified, not a path that somebody may write to."""
    from_bytes = TextEncoder(tokenizer.read_bytes())
    assert (
        from_bytes.encode("a b").ids.tolist() == TextEncoder(tokenizer).encode("a b").ids.tolist()
    )
    for broken in (b"", b"{}", b"\xff\xfe", tokenizer.read_bytes()[:-9]):
        with pytest.raises(DataError, match=r"the tokenizer is no tokenizer\.json"):
            TextEncoder(broken)
    with pytest.raises(DataError, match="no such tokenizer"):
        TextEncoder(tokenizer / "nothing")
    with pytest.raises(DataError, match=r"needs a tokenizer\.json"):
        TextEncoder(None)


@settings(deadline=None, max_examples=150)
@given(
    st.text("ab ", max_size=30), st.none() | st.text("ab ", max_size=30), st.integers(3, 24),
    st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_what_is_cut_is_what_the_package_cuts(
    tokenizer: Path, text: str, pair: str | None, most: int, direction: str
) -> None:
    """Which text, how much of it, at which end."""
    from tokenizers import Tokenizer

    package = Tokenizer.from_file(str(tokenizer))
    package.no_padding()
    package.enable_truncation(most, direction=direction)
    expected = package.encode(text, pair)
    cut = TextEncoder(package.to_str().encode(), max_length=most).encode(text, pair=pair)
    assert cut.ids.tolist() == expected.ids
    assert cut.type_ids.tolist() == expected.type_ids
    assert cut.offsets.tolist() == [list(pair) for pair in expected.offsets]
    assert cut.truncated == bool(expected.overflowing)


def test_a_limit_without_room_for_the_template_is_refused(tokenizer: Path) -> None:
    """Not answered with a text of nothing but special tokens, one of them missing."""
    with pytest.raises(DataError, match="1 tokens are allowed, and 2 are added to every text"):
        TextEncoder(tokenizer, max_length=1).text("a")


def test_the_token_that_fills_up_is_the_files_or_the_one_that_is_called_so(tokenizer: Path) -> None:
    """Padding that training left on says which; its type too."""
    from tokenizers import Tokenizer, models

    assert TextEncoder(tokenizer).padding == (0, 0)
    package = Tokenizer.from_file(str(tokenizer))
    package.enable_padding(pad_id=5, pad_type_id=1, pad_token="b")
    assert TextEncoder(package.to_str().encode()).padding == (5, 1)
    package.no_padding()
    assert TextEncoder(package.to_str().encode()).padding == (0, 0)
    nameless = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert TextEncoder(nameless.to_str().encode()).padding is None


def test_a_part_of_a_text_has_the_template_around_it(tokenizer: Path) -> None:
    """What a window over a long text is."""
    whole = TextEncoder(tokenizer).whole("a b a b a")
    part = whole.part(1, 3)
    assert part.ids.tolist() == [2, 5, 4, 3]
    assert part.offsets.tolist() == [[0, 0], [2, 3], [4, 5], [0, 0]]
    assert part.content.tolist() == [1, 2]
