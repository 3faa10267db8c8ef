"""Vectors of texts, pooled as sentence-transformers pools them."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.apps.batches import TextSettings
from equipoise.apps.embedding import Embedder
from equipoise.data.text import TextEncoder
from equipoise.errors import DataError, InputError, NonFiniteError


def hidden_of(bundle, tokenizer: bytes, text: str) -> np.ndarray:
    """Vectors of all tokens of one text, nothing padded: [tokens, 8]."""
    feeds = TextEncoder(tokenizer, max_length=64).text(text)
    return bundle.run(feeds)["last_hidden_state"][0]


def mean_pooling(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The formula of sentence-transformers: [batch, tokens, size] and [batch, tokens]."""
    wide = np.broadcast_to(mask[..., None].astype(np.float32), hidden.shape)
    return (hidden * wide).sum(1) / np.clip(wide.sum(1), 1e-9, None)


@pytest.mark.parametrize("head", ["hidden", "both"])
def test_the_mean_leaves_padding_out(make, texts, tokenizer, head) -> None:
    """Many texts together, in order; an output that is called a pooler's is not an embedding."""
    bundle = make(head, task="feature-extraction")
    embed = Embedder(bundle, settings=TextSettings(batch_size=3))
    assert embed.pooling == "mean"
    found = embed(list(texts))
    assert found.dtype == np.float32
    assert found.shape == (len(texts), 8)
    for text, vector in zip(texts, found, strict=True):
        hidden = hidden_of(bundle, tokenizer, text)
        expected = mean_pooling(hidden[None], np.ones((1, len(hidden))))[0]
        np.testing.assert_allclose(vector, expected, atol=1e-6)
        np.testing.assert_allclose(embed(text), expected, atol=1e-6)


def test_other_poolings_are_asked_for(make, texts, tokenizer) -> None:
    """The first token, or what the model has made."""
    bundle = make("both")
    cls = Embedder(bundle, pooling="cls")(list(texts))
    own = Embedder(bundle, pooling="model")(list(texts))
    for text, first, vector in zip(texts, cls, own, strict=True):
        np.testing.assert_allclose(first, hidden_of(bundle, tokenizer, text)[0], atol=1e-6)
        outputs = bundle.run(TextEncoder(tokenizer).text(text))
        np.testing.assert_allclose(vector, outputs["pooler_output"][0], atol=1e-6)


def test_an_output_that_is_called_an_embedding_is_one(make, texts) -> None:
    """The model pools by itself."""
    embed = Embedder(make("named", task="text-embedding"))
    assert embed.pooling == "model"
    together = embed(list(texts))
    np.testing.assert_allclose(together, [embed(text) for text in texts], atol=1e-6)


def test_vectors_of_length_one(make, texts) -> None:
    """Their dot products are cosines; a vector of zeros stays one."""
    bundle = make("hidden")
    plain, unit = Embedder(bundle)(list(texts)), Embedder(bundle, normalize=True)(list(texts))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    norms = np.linalg.norm(plain, axis=1)
    cosines = plain @ plain.T / np.outer(norms, norms)
    np.testing.assert_allclose(unit @ unit.T, cosines, atol=1e-5)
    nothing = Embedder(make("named", scale=0.0), normalize=True)
    nothing._finished(np.zeros((1, 8), np.float32))
    np.testing.assert_array_equal(nothing._finished(np.zeros((1, 8), np.float32)), 0)


def test_what_cannot_be_embedded_is_named(make, texts) -> None:
    """The bundle, the pooling, the text."""
    with pytest.raises(InputError, match=r"pooling 'model' needs an output \[batch, size\]"):
        Embedder(make("hidden"), pooling="model")
    with pytest.raises(InputError, match=r"pooling 'cls' needs an output \[batch, tokens, size\]"):
        Embedder(make("named"), pooling="cls")
    with pytest.raises(InputError, match=r"is for sequence-classification(.|\n)*TextClassifier"):
        Embedder(make("class", task="sequence-classification"))
    with pytest.raises(InputError, match="no tokenizer"):
        Embedder(make("hidden", tokenizer=None))
    embed = Embedder(make("hidden"))
    for given, message in (([], "is empty"), (" ", "text 0 is empty"), ([texts[0], 3], "text 1")):
        with pytest.raises(DataError, match=message):
            embed(given)
    with pytest.raises(NonFiniteError, match="NaN"):
        Embedder(make("hidden", scale=np.nan))(texts[0])
