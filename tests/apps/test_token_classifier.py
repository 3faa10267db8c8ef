"""Tokens become words, words become spans, at the characters of the text as it was given."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.apps.batches import TextSettings
from equipoise.apps.entities import Grouping, find_entities
from equipoise.apps.tokens import TokenClassifier, windows
from equipoise.data.text import TextEncoder
from equipoise.errors import DataError, InputError, NonFiniteError, UsageError

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
STRATEGIES = ("simple", "first", "average", "max")


def spans(text: str, tags: list[str], labels: tuple[str, ...], tokenizer: bytes) -> list:
    """Entities where the first token of each word has the tag of the word."""
    encoder = TextEncoder(tokenizer)
    row = encoder.whole(text)
    words = row.words[row.content].tolist()
    chosen = [tags[sorted(set(words)).index(word)] for word in words]
    probabilities = np.eye(len(labels))[[labels.index(tag) for tag in chosen]] * 0.8 + 0.01
    grouping = Grouping(labels=labels, aggregation="first", splits_words=True)
    found = find_entities(text, row, probabilities, grouping=grouping)
    return [(e.text, e.label) for e in found if e.label != "O"]


# Schemes.


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("In Tokyo", "PER"), ("Berlin", "LOC")]),
        ("B-PER B-PER O I-LOC", [("In", "PER"), ("Tokyo", "PER"), ("Berlin", "LOC")]),
        ("B-PER I-LOC O O", [("In", "PER"), ("Tokyo", "LOC")]),
        ("I-PER I-PER B-PER I-PER", [("In Tokyo", "PER"), ("rained Berlin", "PER")]),  # IOB1
        ("O O O O", []),
    ],
)
def test_bio_and_iob1(tokenizer, tags, expected) -> None:
    """``I-`` goes on or begins, ``B-`` always begins."""
    assert spans("In Tokyo rained Berlin", tags.split(), BIO, tokenizer) == expected


@pytest.mark.parametrize(("end", "single", "inner"), [("E", "S", "I"), ("L", "U", "I")])
def test_bioes_and_bilou_end_where_they_say(tokenizer, end, single, inner) -> None:
    """An ending label is of the span before it, and what follows is another one."""
    kinds, prefixes = ("PER", "LOC"), ("B", inner, end, single)
    labels = ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes))
    tags = [f"{single}-PER", f"{single}-PER", "B-LOC", f"{end}-LOC", f"{inner}-LOC", "O"]
    found = spans("In Tokyo it rained Berlin Paris", tags, labels, tokenizer)
    assert found == [
        ("In", "PER"), ("Tokyo", "PER"), ("it rained", "LOC"), ("Berlin", "LOC"),
    ]  # fmt: skip


def test_plain_labels_join_where_they_are_equal(tokenizer) -> None:
    """A hyphen in a plain label is part of it."""
    labels = ("O", "given-name", "I")
    tags = ["given-name", "given-name", "I", "O"]
    found = spans("In Tokyo rained Berlin", tags, labels, tokenizer)
    assert found == [("In Tokyo", "given-name"), ("rained", "I")]


# Characters.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Angela Merkel", "Angela"),
        ("  \t Angela Merkel", "Angela"),
        ("\U0001f468‍\U0001f469‍\U0001f467 Angela", "Angela"),
        ("\U0001f1e9\U0001f1ea\U0001f600 Angela!", "Angela"),
        ("rain\r\nAngela\r\nMerkel", "Angela"),
        ("\ufeffAngela", "Angela"),
        ("wir (Angela)", "Angela"),
        ("Zu\u0308rich", "Zu\u0308rich"),
        ("in Reykjavi\u0301k!", "Reykjavi\u0301k"),
        ("in Zurich\u0308 it", "Zurich\u0308"),
        ("\uff34\uff4f\uff4b\uff59\uff4f it", "\uff34\uff4f\uff4b\uff59\uff4f"),
        ("it \u6771\u4eac", "\u6771\u4eac"),
        ("100\u202f000 Angela", "Angela"),
        ("\u0041\u030angela", "\u0041\u030angela"),
    ],
)
def test_offsets_are_characters_of_the_text_as_given(tokenizer, text, name) -> None:
    """Whatever the tokenizer makes of them first."""
    encoder = TextEncoder(tokenizer)
    row = encoder.whole(text)
    place = text.index(name)
    inside = (row.offsets[row.content, 0] >= place) & (
        row.offsets[row.content, 1] <= place + len(name)
    )
    probabilities = np.where(inside[:, None], [[0.1, 0.9]], [[0.9, 0.1]])
    grouping = Grouping(labels=("O", "X"), aggregation="first", splits_words=True)
    found = find_entities(text, row, probabilities, grouping=grouping)
    (entity,) = [e for e in found if e.label == "X"]
    assert (entity.text, entity.start, entity.end) == (name, place, place + len(name))


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_every_span_is_the_text_between_its_offsets(tokenizer, text: str) -> None:
    """For any text that can be encoded."""
    encoder = TextEncoder(tokenizer)
    row = encoder.whole(text)
    count = row.content.size
    if not count:
        return
    random = np.random.default_rng(len(text))
    grouping = Grouping(labels=BIO, aggregation="average", splits_words=True)
    found = find_entities(text, row, random.random((count, 5)), grouping=grouping)
    end = 0
    for entity in found:
        assert entity.text == text[entity.start : entity.end]
        assert entity.text == entity.text.strip() != ""
        assert entity.start >= end
        end = entity.end


def test_words_of_a_tokenizer_that_splits_none_end_at_gaps() -> None:
    """At any white space; the space that such tokenizers count to a word is left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    encoder = TextEncoder(made.to_str().encode())
    assert not encoder.splits_words
    text = "in Paris\nLondon, é"
    row = encoder.whole(text)
    probabilities = np.full((row.content.size, 2), 0.2)
    starts = [text.index(word) - 1 for word in ("Paris", "London")]
    for start in starts:
        first = int(np.flatnonzero(row.offsets[:, 0] >= start)[0])
        probabilities[first : first + 2, 1] = 0.7
    grouping = Grouping(labels=("O", "B-LOC"), aggregation="first", splits_words=False)
    found = find_entities(text, row, probabilities, grouping=grouping)
    assert [e.text for e in found if e.label == "LOC"] == ["Paris", "London,"]


# Long texts.


@given(st.integers(1, 400), st.integers(1, 50), st.data())
@settings(deadline=None, max_examples=300)
def test_every_token_is_decided_once_where_most_is_seen(tokens: int, room: int, data) -> None:
    """By a window that sees it, at a place no worse than in any other window."""
    stride = data.draw(st.integers(0, room - 1))
    made = windows(tokens, room=room, stride=stride)
    decided = [t for w in made for t in range(w.first, w.last)]
    assert decided == list(range(tokens))
    assert all(w.start <= w.first <= w.last <= w.stop for w in made)
    assert all(w.stop - w.start == min(room, tokens) for w in made)
    for before, after in pairwise(made):
        assert before.stop - after.start >= stride
        for token in range(after.start, before.stop):
            by = next(w for w in made if w.first <= token < w.last)
            margin = min(
                token - by.start if by.start else tokens,
                by.stop - 1 - token if by.stop < tokens else tokens,
            )
            others = [
                min(
                    token - w.start if w.start else tokens,
                    w.stop - 1 - token if w.stop < tokens else tokens,
                )
                for w in (before, after)
            ]
            assert margin >= max(others)


def test_nothing_of_a_long_text_is_lost(make, texts) -> None:
    """A model that looks at single words gives the same through any windows."""
    long = " ".join(texts * 3)
    whole = TokenClassifier(make("word", classes=5, labels=BIO, max_length=2000))(long)
    assert len(whole) > 30
    for length in (9, 16, 40):
        bundle = make("word", classes=5, labels=BIO, max_length=length)
        found = TokenClassifier(bundle)(long)
        assert [(e.text, e.label, e.start, e.end) for e in found] == [
            (e.text, e.label, e.start, e.end) for e in whole
        ]
        np.testing.assert_allclose([e.score for e in found], [e.score for e in whole], atol=1e-6)
        assert max(shape[1] for shape in bundle.shapes) == length


def test_the_model_sees_what_stands_around_a_token(make, texts, tokenizer) -> None:
    """The window that decides is the one whose answer is given."""
    bundle = make("token", classes=5, labels=BIO, max_length=22)
    classify = TokenClassifier(bundle, aggregation="simple", ignore=(), stride=6)
    long = " ".join(texts[:4])
    row = TextEncoder(tokenizer).whole(long)
    expected = []
    for window in windows(row.content.size, room=20, stride=6):
        feeds = row.part(window.start, window.stop).feeds()
        logits = bundle.run(feeds)["logits"][0, 1:-1].astype(np.float64)
        expected += list(logits[window.first - window.start : window.last - window.start])
    best = np.argmax(expected, axis=1)
    grouping = Grouping(labels=BIO, aggregation="simple", splits_words=True)
    one_hot = np.eye(5)[best]
    wanted = [(e.start, e.label) for e in find_entities(long, row, one_hot, grouping=grouping)]
    assert [(e.start, e.label) for e in classify(long)] == wanted


# Calls.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_list_gives_what_its_texts_give_alone(make, texts, strategy) -> None:
    """In order, padded or not."""
    bundle = make("token", classes=5, labels=BIO, task="token-classification")
    classify = TokenClassifier(bundle, aggregation=strategy)
    together = classify(list(texts))
    assert any(len(found) > 1 for found in together)
    for text, found in zip(texts, together, strict=True):
        alone = classify(text)
        assert [(e.start, e.end, e.label) for e in found] == [
            (e.start, e.end, e.label) for e in alone
        ]
        np.testing.assert_allclose([e.score for e in found], [e.score for e in alone], atol=1e-6)


def test_a_text_without_a_word_has_no_entity(make) -> None:
    """Lines of a document are often empty, and nothing has to run."""
    bundle = make("token", classes=5, labels=BIO)
    assert TokenClassifier(bundle)(["", " \r\n", "\u200b"]) == ((), (), ())
    assert bundle.shapes == []


def test_labels_that_are_left_out_can_be_chosen(make, texts) -> None:
    """By their type."""
    bundle = make("token", classes=5, labels=BIO)
    everything = TokenClassifier(bundle, ignore=())(" ".join(texts))
    kinds = {e.label for e in everything}
    assert len(kinds) > 1
    for kind in kinds:
        without = TokenClassifier(bundle, ignore=(kind,))(" ".join(texts))
        assert without == tuple(e for e in everything if e.label != kind)


def test_a_model_without_names_of_classes_gives_numbers(make, texts) -> None:
    found = TokenClassifier(make("token", classes=5), ignore=())(texts[1])
    assert {e.label for e in found} <= {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "list is empty"), ([3], "text 0 is int"), (b"a", "bytes is neither"), ("\udc00", "enc")],
)
def test_what_is_no_text_is_named(make, given, message) -> None:
    with pytest.raises(DataError, match=message):
        TokenClassifier(make("token", classes=5))(given)


def test_what_cannot_be_is_told_before_anything_runs(make) -> None:
    """A wrong bundle, strategy or stride."""
    with pytest.raises(InputError, match="is for sequence-classification"):
        TokenClassifier(make("class", task="sequence-classification"))
    with pytest.raises(InputError, match=r"no scores \[batch, tokens, classes\]"):
        TokenClassifier(make("class"))
    with pytest.raises(UsageError, match="unknown aggregation 'frist'"):
        TokenClassifier(make("token"), aggregation="frist")
    with pytest.raises(InputError, match="cannot share 62 tokens: the model sees 62"):
        TokenClassifier(make("token"), stride=62)
    with pytest.raises(DataError, match="1 tokens are allowed, and 2 are added"):
        TokenClassifier(make("token"), settings=TextSettings(max_length=1))
    with pytest.raises(InputError, match="cannot share 0 tokens: the model sees 0"):
        TokenClassifier(make("token"), settings=TextSettings(max_length=2))


def test_nan_is_no_entity(make, texts) -> None:
    bundle = make("token", classes=5, weights=np.full((8, 5), np.nan))
    with pytest.raises(NonFiniteError):
        TokenClassifier(bundle)(texts[0])
