"""Texts and pairs of texts become classes, together as alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from equipoise.apps.batches import TextSettings
from equipoise.apps.classification import Classification
from equipoise.apps.text import TextClassifier
from equipoise.data.text import TextEncoder
from equipoise.errors import (
    DataError,
    IncompatibleError,
    InputError,
    NonFiniteError,
    UsageError,
)

LABELS = ("bad", "fair", "good")


def scores(found: tuple[Classification, ...]) -> np.ndarray:
    return np.array([one.scores for one in found])


def test_a_text_gets_the_softmax_of_the_models_scores(make, texts, tokenizer) -> None:
    """Label, number and score belong together, and are what the engine says."""
    bundle = make("class", labels=LABELS, task="sequence-classification")
    found = TextClassifier(bundle)(texts[0])
    logits = bundle.run(TextEncoder(tokenizer).text(texts[0]))["logits"][0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)
    assert found.index == expected.argmax()
    assert found.label == LABELS[found.index]
    assert found.score == found.scores[found.index]
    assert [one.index for one in found.top(3)] == np.argsort(-expected).tolist()
    assert [one.label for one in found.above(0.0)] == list(LABELS)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_list_gives_what_its_texts_give_alone_in_its_order(make, texts, batch_size) -> None:
    """Whatever runs together with whatever."""
    classify = TextClassifier(make("class"), settings=TextSettings(batch_size=batch_size))
    together = scores(classify(list(texts)))
    alone = scores(tuple(classify(text) for text in texts))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert len(np.unique(together.round(5), axis=0)) == len(texts)


def test_texts_of_like_length_run_together(make, texts, tokenizer) -> None:
    """Batches are sorted by length, so that less is padded than in the order given."""
    bundle = make("class")
    TextClassifier(bundle, settings=TextSettings(batch_size=2))(list(texts))
    encoder = TextEncoder(tokenizer)
    lengths = sorted((len(encoder.encode(text)) for text in texts), reverse=True)
    assert bundle.shapes == [(2, length) for length in lengths[::2]]


def test_buckets_are_the_only_lengths(make, texts, tokenizer) -> None:
    """The least that has room; what is longer than all of them stays as long as it is."""
    bundle = make("class")
    settings = TextSettings(buckets=(16, 8, 24), batch_size=1)
    bucketed = scores(TextClassifier(bundle, settings=settings)(list(texts)))
    encoder = TextEncoder(tokenizer)
    lengths = [len(encoder.encode(text)) for text in texts]
    padded = [min((b for b in (8, 16, 24) if b >= n), default=n) for n in lengths]
    assert len(set(padded)) > 2
    assert bundle.shapes == [(1, length) for length in sorted(padded, reverse=True)]
    np.testing.assert_allclose(bucketed, scores(TextClassifier(bundle)(list(texts))), atol=1e-6)


@pytest.mark.parametrize(("batch", "sequence"), [(1, "sequence"), (3, 40), ("batch", 40)])
def test_an_engine_of_fixed_sizes_gives_the_same(make, texts, batch, sequence) -> None:
    """Rows are filled up to its length, and a batch with copies that nobody sees."""
    fixed = make("class", batch=batch, sequence=sequence)
    limit = TextSettings(max_length=40)
    found = scores(TextClassifier(fixed, settings=limit)(list(texts)))
    expected = scores(TextClassifier(make("class"), settings=limit)(list(texts)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if isinstance(batch, int):
        assert {shape[0] for shape in fixed.shapes} == {batch}


def test_a_model_without_a_mask_is_never_padded(make, texts, tokenizer) -> None:
    """Each text runs at its own length; texts of one length run together."""
    bundle = make("class", masked=False)
    classify = TextClassifier(bundle)
    given = [*texts, texts[2]]
    found = scores(classify(given))
    encoder = TextEncoder(tokenizer)
    lengths = [len(encoder.encode(text)) for text in given]
    assert sorted(bundle.shapes) == sorted((lengths.count(n), n) for n in set(lengths))
    expected = [bundle.run({"input_ids": encoder.text(t)["input_ids"]})["logits"][0] for t in given]
    powers = np.exp(np.array(expected, dtype=np.float64))
    np.testing.assert_allclose(found, powers / powers.sum(1, keepdims=True), rtol=1e-5)


def test_an_engine_whose_batches_were_not_shown_equal_is_not_padded(make, texts) -> None:
    """Such as one that takes its ranges from its input: padding is input too."""
    bundle = make("class", batching=False)
    TextClassifier(bundle)(list(texts))
    assert len(bundle.shapes) == len(texts)
    assert len({length for _, length in bundle.shapes}) > 4
    assert {rows for rows, _ in bundle.shapes} == {1}


def test_a_fixed_length_without_a_mask_refuses_what_is_shorter(make, texts) -> None:
    """Padding would be answered as if it were text."""
    classify = TextClassifier(make("class", masked=False, sequence=8))
    assert classify(texts[2]).scores  # cut to 8
    with pytest.raises(IncompatibleError, match="takes 8 tokens, a text has"):
        classify("Rain.")


def test_inputs_of_32_bits_get_such_numbers(make, texts) -> None:
    """TensorRT engines often take int32."""
    found = TextClassifier(make("class", dtype="int32"))(list(texts))
    expected = TextClassifier(make("class"))(list(texts))
    np.testing.assert_allclose(scores(found), scores(expected), atol=1e-6)


def test_a_pair_is_a_tuple(make, texts) -> None:
    """The second text has type 1, and its place counts; pairs and texts mix in a list."""
    classify = TextClassifier(make("class"))
    mixed = classify([(texts[0], texts[1]), texts[0], (texts[1], texts[0])])
    assert len({one.scores for one in mixed}) == 3
    assert classify((texts[0], texts[1])).scores == pytest.approx(mixed[0].scores, abs=1e-6)
    with pytest.raises(DataError, match="text 0 is a tuple of 3"):
        classify([("a", "b", "c")])


def test_a_long_text_is_cut_at_its_end(make, texts) -> None:
    """As if it ended where the last token ends; the bundle's limit is never exceeded."""
    bundle = make("class", max_length=8)
    long = " ".join(texts)
    settings = TextSettings(max_length=512)
    found = TextClassifier(bundle, settings=settings)([long, long + " And more."])
    assert bundle.shapes == [(2, 8)]
    assert found[0].scores == found[1].scores


def test_multi_label_scores_each_class_by_itself(make, texts, tokenizer) -> None:
    """Sigmoid; the answers are those above a threshold."""
    bundle = make("class", labels=LABELS)
    found = TextClassifier(bundle, multi_label=True)(texts[0])
    logits = bundle.run(TextEncoder(tokenizer).text(texts[0]))["logits"][0].astype(np.float64)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp(-logits)), rtol=1e-6)
    wanted = [label for label, logit in zip(LABELS, logits, strict=True) if logit >= 0]
    assert [one.label for one in found.above(0.5)] == wanted


def test_a_model_with_one_output_gives_its_value(make, texts, tokenizer) -> None:
    """A regression is not squeezed into a probability, which would always be 1."""
    bundle = make("class", classes=1)
    found = TextClassifier(bundle)(texts[0])
    logits = bundle.run(TextEncoder(tokenizer).text(texts[0]))["logits"]
    assert found.score == pytest.approx(float(logits[0, 0]))
    assert found.label == "0"


def test_large_scores_do_not_overflow(make, texts) -> None:
    """Neither way of scoring warns or gives NaN."""
    for multi_label in (False, True):
        bundle = make("class", weights=np.full((8, 3), 1e6) * [1, -1, 0])
        found = TextClassifier(bundle, multi_label=multi_label)(texts[0])
        assert np.isfinite(found.scores).all()
        assert 0 <= min(found.scores) <= max(found.scores) <= 1


def test_nan_is_no_answer(make, texts) -> None:
    """A broken engine does not get a label."""
    bundle = make("class", weights=np.full((8, 3), np.nan))
    with pytest.raises(NonFiniteError, match="NaN"):
        TextClassifier(bundle)(texts[0])
    single = make("class", classes=1, weights=np.full((8, 1), np.nan))
    with pytest.raises(NonFiniteError, match="value"):
        TextClassifier(single)(texts[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the list is empty"),
        ("", "text 0 is empty"),
        (["fine", " \r\n\t"], "text 1 is empty"),
        (["fine", None], "text 1 is NoneType, not a string"),
        (b"bytes", "bytes is neither text nor a list"),
        ([b"bytes"], "text 0 is bytes"),
        (7, "int is neither text nor a list"),
        ({"text": "a"}, "dict is neither"),
        ((texts for texts in ("a",)), "generator is neither"),
        (["a", ("b", 3)], "text 1 is int"),
        (["a", ["b", "c"]], "text 1 is list"),
        ("x" * 51, "text 0 has 51 characters; 50 are allowed"),
        ("\ud83d", "cannot be encoded"),
    ],
)
def test_what_is_no_text_is_named(make, given, message) -> None:
    """Which one, what it is, and nothing has run."""
    bundle = make("class")
    classify = TextClassifier(bundle, settings=TextSettings(max_characters=50))
    with pytest.raises(DataError, match=message):
        classify(given)
    assert bundle.shapes == []


def test_a_bundle_for_something_else_is_named(make) -> None:
    """What it is for, and what to use instead."""
    with pytest.raises(InputError, match=r"'made' is for token-classification(.|\n)*TokenClass"):
        TextClassifier(make("token", task="token-classification"))
    with pytest.raises(
        InputError, match=r"gives no scores \[batch, classes\], but logits: float32"
    ):
        TextClassifier(make("token"))
    with pytest.raises(InputError, match="'made' has no tokenizer"):
        TextClassifier(make("class", tokenizer=None))


def test_a_bundle_that_takes_no_text_is_named(make, linear_onnx) -> None:
    """By what it takes."""
    bundle = type(make("class"))(linear_onnx, {}, tokenizer="tokenizer.json")
    with pytest.raises(InputError, match=r"takes no text, but x: float32\[batch, 4\]"):
        TextClassifier(bundle)


def test_a_broken_tokenizer_is_named(make) -> None:
    """The bytes are what counts."""
    bundle = make("class")
    bundle.documents["tokenizer.json"] = b'{"model": 3}'
    with pytest.raises(DataError, match=r"the tokenizer is no tokenizer\.json"):
        TextClassifier(bundle)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"buckets": (0,)}, {"max_length": 0}])
def test_settings_below_one_are_refused(wrong) -> None:
    with pytest.raises(InputError, match="below 1"):
        TextSettings(**wrong)


def test_an_open_bundle_stays_open(make, texts) -> None:
    """Whoever opened it closes it."""
    bundle = make("class")
    with TextClassifier(bundle) as classify:
        classify(texts[0])
    assert not bundle.closed


def test_what_counts_when_a_bundle_is_opened_is_refused_for_an_open_one(make) -> None:
    """A signature that nobody looks at is not quietly ignored."""
    for settings in ({"trust": b"key"}, {"threads": 2}):
        with pytest.raises(UsageError, match="this one is open"):
            TextClassifier(make("class"), **settings)


def test_a_bundle_that_is_replaced_brings_its_labels_along(make, texts) -> None:
    """Between calls; and an answer that was half of each is made again."""
    bundle = make("class", labels=LABELS)
    classify = TextClassifier(bundle)
    before = classify(texts[0])
    bundle.manifest = replace(bundle.manifest, labels=("x", "y", "z"))
    assert classify(texts[0]).label == ("x", "y", "z")[before.index]
    run = bundle.run_batch

    def swapped(feeds, *, most):
        bundle.run_batch = run
        bundle.manifest = replace(bundle.manifest, labels=("u", "v", "w"))
        return run(feeds, most=most)

    bundle.run_batch = swapped
    assert classify(texts[0]).label == ("u", "v", "w")[before.index]
    bundle.manifest = replace(bundle.manifest, tokenizer=None)
    with pytest.raises(InputError, match="has no tokenizer"):
        classify(texts[0])


def test_threads_may_share_it(make, texts) -> None:
    """Nothing of the tokenizer changes between calls."""
    classify = TextClassifier(make("class", max_length=12))
    expected = scores(classify(list(texts)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(classify, [texts[i % len(texts)] for i in range(200)]))
    wanted = [expected[i % len(texts)] for i in range(200)]
    np.testing.assert_allclose(scores(tuple(found)), wanted, atol=1e-6)
