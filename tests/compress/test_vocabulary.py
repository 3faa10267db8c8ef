"""Vocabularies cut to what texts need: kept texts as before, every other one still spelled."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from equipoise import record
from equipoise.compress.transformer.tokens import read_vocabulary, tokens_to_keep
from equipoise.compress.transformer.vocabulary import TrimConfig, TrimRecord, trim_vocabulary
from equipoise.data.store import write_rows
from equipoise.errors import DataError, IncompatibleError, OutputError, SourceError
from equipoise.sources.source import parse_source

MINILM = Path("/work/shared/models/minilm-conll2003")
USED = ["the cat sat on the mat", "a cat and a dog", "dogs sit on mats", "the dog sat"]
OTHERS = [
    "zebras run quickly over the hills", "running water flows downhill in winter",
    "quick brown foxes jump over lazy hounds", "winter hills and running zebras",
    "catamaran sailors sailing quickly", "the cat sat", "sat on a dog",
]  # fmt: skip
KINDS = ("wordpiece", "bytes", "bpe", "unigram")
ROOM = 13
"""Rows of embeddings beyond the tokenizer's tokens."""


def _wordpiece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer, {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


def _bytes():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    return tokenizer, {"pad_token": "<|pad|>", "eos_token": "<|end|>", "bos_token": "<|end|>"}


def _bpe():
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    _train(tokenizer, trainers.BpeTrainer(vocab_size=460, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _without_byte_specials(tokenizer), names


def _without_byte_specials(tokenizer):
    """Bytes are tokens of the model alone, as SentencePiece has them."""
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [t for t in text["added_tokens"] if not t["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(text))


def _unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>"
    )  # fmt: skip
    _train(tokenizer, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "mask_token": "<mask>",
    }  # fmt: skip
    return tokenizer, names


def _train(tokenizer, trainer) -> None:
    tokenizer.train_from_iterator([*USED, *OTHERS] * 3, trainer)


_SIZES = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
}  # fmt: skip


def _model(kind: str, tokenizer, names: dict[str, str]):
    rows = tokenizer.get_vocab_size() + ROOM
    ids = {f"{key}_id": tokenizer.token_to_id(name) for key, name in names.items()}
    ids = {key: value for key, value in ids.items() if key[:3] in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    make: Any = {
        "wordpiece": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=rows, **_SIZES, **ids)
        ),
        "bytes": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=rows, n_embd=16, n_head=2, n_layer=1, **ids)
        ),
        "bpe": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=rows, **_SIZES, **ids)
        ),
        "unigram": lambda: transformers.XLMRobertaForSequenceClassification(
            transformers.XLMRobertaConfig(vocab_size=rows, **_SIZES, **ids)
        ),
    }[kind]
    return make().eval()


@dataclass(frozen=True)
class Case:
    """A saved model, its data, and what trimming left."""

    kind: str
    source: Path
    config: TrimConfig
    output: Path
    made: TrimRecord

    @property
    def before(self):
        return _plain(self.source)

    @property
    def after(self):
        return _plain(self.output / "model")


def _plain(directory: Path):
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _rows(tokenizer, texts):
    return [{"input_ids": np.array([tokenizer.encode(text).ids])} for text in texts]


def _saved(kind: str, directory: Path):
    tokenizer, names = {
        "wordpiece": _wordpiece, "bytes": _bytes, "bpe": _bpe, "unigram": _unigram,
    }[kind]()  # fmt: skip
    pad = names["pad_token"]
    tokenizer.enable_padding(pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    _model(kind, tokenizer, names).save_pretrained(directory)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(directory)
    return _plain(directory)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    """Trimmed to USED, judged by OTHERS."""
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = _saved(request.param, directory / "source")
    write_rows(directory / "data" / "training", _rows(tokenizer, USED))
    write_rows(directory / "data" / "validation", _rows(tokenizer, OTHERS))
    source = parse_source(str(directory / "source"))
    config = TrimConfig(source=source, data=directory / "data")
    made = trim_vocabulary(config, output=directory)
    return Case(
        kind=request.param, source=directory / "source", config=config, output=directory, made=made
    )


# What is left


@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_there_are_fewer_tokens_a_multiple_of_8_of_them(case):
    """In the tokenizer, the config, and every tensor with an entry per token."""
    model = case.output / "model"
    config = json.loads((model / "config.json").read_text())
    size = case.after.get_vocab_size()
    assert size % 8 == 0
    assert size == config["vocab_size"] == case.made.tokens_after < case.made.tokens_before
    assert sorted(case.after.get_vocab().values()) == list(range(size))
    assert case.made.parameters_after < case.made.parameters_before
    assert record.loads(TrimRecord, record.dumps(case.made), where="record") == case.made


def test_texts_of_kept_tokens_are_divided_as_before(case):
    """All that the data had, with what stands around them."""
    for text in USED:
        before, after = case.before.encode(text), case.after.encode(text)
        assert after.tokens == before.tokens
        assert after.offsets == before.offsets
        assert [case.after.id_to_token(i) for i in after.ids] == after.tokens
    assert case.made.kept_share == 1.0


def test_plain_transformers_loads_it_and_gives_the_same_outputs(case):
    """Bit for bit where no output head is as long as the vocabulary, else in the kept places."""
    transformer = getattr(transformers, json.loads(
        (case.source / "config.json").read_text())["architectures"][0])  # fmt: skip
    models_ = [transformer.from_pretrained(d).eval() for d in (case.source, case.output / "model")]
    texts = [
        transformers.AutoTokenizer.from_pretrained(d) for d in (case.source, case.output / "model")
    ]
    order = [
        case.before.token_to_id(case.after.id_to_token(i)) for i in range(case.made.tokens_after)
    ]
    with torch.no_grad():
        before, after = (
            model(**text(USED[0], return_tensors="pt")).logits
            for model, text in zip(models_, texts, strict=True)
        )
    if case.kind == "unigram":
        assert torch.equal(before, after)
    else:
        assert torch.allclose(before[..., order], after, rtol=1e-5, atol=1e-6)
    for new, old in zip(texts[1].all_special_tokens, texts[0].all_special_tokens, strict=True):
        assert new == old
        assert texts[1].convert_tokens_to_ids(new) == case.after.token_to_id(new)


def test_ids_in_the_config_are_those_of_the_same_tokens(case):
    """Padding, beginning and end, where the config names them, and of the padding settings."""
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (case.source, case.output / "model")
    )
    named = [
        key for key, value in before.items() if key.endswith("_token_id") and value is not None
    ]
    assert "pad_token_id" in named
    for key in named:
        assert case.after.id_to_token(after[key]) == case.before.id_to_token(before[key])
    padding = json.loads((case.output / "model" / "tokenizer.json").read_text())["padding"]
    assert case.after.token_to_id(padding["pad_token"]) == padding["pad_id"]
    generation = case.output / "model" / "generation_config.json"
    if generation.exists() and "pad_token_id" in json.loads(generation.read_text()):
        assert json.loads(generation.read_text())["pad_token_id"] == after["pad_token_id"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_text_encodes_and_kept_ones_as_before(case, data):
    """Any words; what the whole vocabulary can spell, the trimmed one spells too."""
    words = st.sampled_from(sorted({word for text in (*USED, *OTHERS) for word in text.split()}))
    letters = st.text(st.sampled_from("abcdefghilmnoqrstuvwyz"), min_size=1, max_size=6)
    text = " ".join(data.draw(st.lists(st.one_of(words, letters), min_size=1, max_size=5)))
    before, after = case.before.encode(text), case.after.encode(text)
    unknown = {"[UNK]", "<unk>"}
    assert unknown & set(after.tokens) <= unknown & set(before.tokens)
    known = set(case.after.get_vocab())
    if set(before.tokens) <= known:
        assert after.tokens == before.tokens
    if not unknown & set(before.tokens):
        assert case.after.decode(after.ids) == case.before.decode(before.ids)


def test_what_other_texts_cost_is_told(case):
    """Some are divided otherwise, into more tokens, and none becomes unknown."""
    found = case.made.coverage
    texts = [case.before.decode(case.before.encode(text).ids) for text in OTHERS]
    pairs = [(case.before.encode(t).tokens, case.after.encode(t).tokens) for t in texts]
    assert found.texts == len(OTHERS)
    assert found.unchanged == pytest.approx(np.mean([old == new for old, new in pairs]))
    assert found.growth == pytest.approx(np.mean([len(new) / len(old) for old, new in pairs]))
    assert found.unchanged < 1 < found.growth
    assert found.unknown_before == found.unknown_after == 0


def test_a_file_of_texts_takes_the_place_of_validation_rows(case, tmp_path):
    """One a line; texts of kept tokens do not change."""
    (tmp_path / "texts.txt").write_text("\n".join(USED[:3]) + "\n\n")
    config = replace(case.config, texts=tmp_path / "texts.txt")
    found = trim_vocabulary(config, output=tmp_path).coverage
    assert (found.texts, found.unchanged, found.growth) == (3, 1.0, 1.0)


def test_what_is_rare_can_go(case, tmp_path):
    """Then less of the data is kept as it is, and the vocabulary is no larger."""
    made = trim_vocabulary(replace(case.config, min_count=3, multiple=1), output=tmp_path)
    assert made.tokens_after < case.made.tokens_after
    assert 0 < made.kept_share < 1


def test_keeping_all_texts_of_the_tokenizer_changes_little(case, tmp_path):
    """Trimmed to its own result: nothing is left to go."""
    again = replace(case.config, source=parse_source(str(case.output / "model")), data=tmp_path)
    write_rows(tmp_path / "training", _rows(case.after, USED))
    made = trim_vocabulary(again, output=tmp_path)
    assert made.tokens_after == made.tokens_before == case.made.tokens_after
    assert made.coverage is None
    first, second = (
        json.loads((d / "model" / "tokenizer.json").read_text()) for d in (case.output, tmp_path)
    )
    assert first == second


# Files beside the tokenizer


def test_files_beside_the_tokenizer_say_the_same(tmp_path):
    """Lists of tokens are rewritten; what cannot be is left out, and that is told."""
    tokenizer = _saved("wordpiece", tmp_path / "source")
    ids = tokenizer.get_vocab()
    (tmp_path / "source" / "vocab.txt").write_text(
        "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__))
    )
    (tmp_path / "source" / "spiece.model").write_bytes(b"\0")
    (tmp_path / "source" / "added_tokens.json").write_text(json.dumps({"[MASK]": ids["[MASK]"]}))
    settings_ = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    settings_["added_tokens_decoder"] = {
        str(ids[name]): {"content": name, "special": True} for name in ("[PAD]", "[MASK]", "[UNK]")
    }
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings_))
    write_rows(tmp_path / "data" / "training", _rows(tokenizer, USED))
    config = TrimConfig(source=parse_source(str(tmp_path / "source")), data=tmp_path / "data")
    made = trim_vocabulary(config, output=tmp_path)
    model = tmp_path / "model"
    after = _plain(model).get_vocab()
    lines = (model / "vocab.txt").read_text().splitlines()
    assert {token: index for index, token in enumerate(lines)} == after
    assert json.loads((model / "added_tokens.json").read_text()) == {"[MASK]": after["[MASK]"]}
    decoder = json.loads((model / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(index): token["content"] for index, token in decoder.items()} == {
        after[name]: name for name in ("[PAD]", "[MASK]", "[UNK]")
    }
    assert not (model / "spiece.model").exists()
    assert made.notes == ("spiece.model holds the old vocabulary and was left out",)
    loaded = transformers.AutoTokenizer.from_pretrained(model)
    assert loaded(USED[0]).input_ids == _plain(model).encode(USED[0]).ids


def test_rules_beside_a_tokenizer_are_those_that_are_left(tmp_path):
    """``vocab.json`` and ``merges.txt`` of GPT-2 and its kin make the same tokenizer."""
    tokenizer = _saved("bytes", tmp_path / "source")
    text = json.loads((tmp_path / "source" / "tokenizer.json").read_text())["model"]
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(text["vocab"]))
    (tmp_path / "source" / "merges.txt").write_text("#version: 0.2\n")
    write_rows(tmp_path / "data" / "training", _rows(tokenizer, USED))
    config = TrimConfig(source=parse_source(str(tmp_path / "source")), data=tmp_path / "data")
    trim_vocabulary(config, output=tmp_path)
    files = [str(tmp_path / "model" / name) for name in ("vocab.json", "merges.txt")]
    made = tokenizers.Tokenizer(models.BPE.from_file(*files))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for line in (*USED, *OTHERS):
        assert made.encode(line).tokens == _plain(tmp_path / "model").encode(line).tokens


# Which tokens stay


def test_what_makes_a_token_stays_with_it():
    """Every way that rules lead to it, and theirs."""
    vocab = {
        token: index for index, token in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "cd"])
    }
    merges = [["a", "b"], ["b", "c"], ["c", "d"], ["ab", "c"], ["a", "bc"]]
    text = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": []}
    vocabulary = read_vocabulary(text, where="text")
    assert tokens_to_keep(vocabulary, needed=[6], multiple=1) == (
        "a", "b", "c", "d", "ab", "bc", "abc",
    )  # fmt: skip
    assert tokens_to_keep(vocabulary, needed=[], multiple=5)[-1] == "ab"
    old = {**text, "model": {**text["model"], "merges": [" ".join(pair) for pair in merges]}}
    assert read_vocabulary(old, where="old").merges == vocabulary.merges


# Bad input


def spoiled(case: Case, directory: Path, **changes: Any):
    """The case's source with ``tokenizer.json`` or ``config.json`` changed."""
    shutil.copytree(case.source, directory / "spoiled")
    for name, change in changes.items():
        file = directory / "spoiled" / f"{name}.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    source = parse_source(str(directory / "spoiled"))
    return replace(case.config, source=source)


def test_a_vocabulary_of_whole_words_is_refused(case, tmp_path):
    """What is not in it cannot be spelled."""

    def words(tokenizer):
        model = {"type": "WordLevel", "vocab": tokenizer["model"]["vocab"], "unk_token": "[UNK]"}
        return {**tokenizer, "model": model}

    with pytest.raises(IncompatibleError, match="'WordLevel' cannot be trimmed"):
        trim_vocabulary(spoiled(case, tmp_path, tokenizer=words), output=tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: {}, "no tokenizer: it has no 'model'"),
        (lambda t: {**t, "model": {"type": "WordPiece"}}, "no tokenizer: it has no 'vocab'"),
        (lambda t: {**t, "added_tokens": [{"content": "x"}]}, "no tokenizer: it has no 'id'"),
        (lambda t: {**t, "model": []}, "no tokenizer"),
        (lambda t: {**t, "decoder": {"type": "Unheard"}}, "no tokenizer"),
        (lambda _: [], "no tokenizer"),
    ],
)
@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_a_tokenizer_that_is_none_is_refused(case, tmp_path, change, told):
    """With what is missing."""
    with pytest.raises(SourceError, match=told):
        trim_vocabulary(spoiled(case, tmp_path, tokenizer=change), output=tmp_path)


@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_a_directory_without_tokenizer_is_refused(case, tmp_path):
    """The hint says how to save one."""
    source = replace(case.config.source, tokenizer=None)
    with pytest.raises(IncompatibleError, match=r"no tokenizer\.json") as caught:
        trim_vocabulary(replace(case.config, source=source), output=tmp_path)
    assert "AutoTokenizer" in caught.value.hint


@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_a_tokenizer_larger_than_the_embeddings_is_refused(case, tmp_path):
    """Its last tokens have no row."""

    def more(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        extra = {f"##x{index}": len(vocab) + index for index in range(ROOM + 1)}
        return {**tokenizer, "model": {**tokenizer["model"], "vocab": {**vocab, **extra}}}

    with pytest.raises(SourceError, match=r"the embeddings have \d+ rows"):
        trim_vocabulary(spoiled(case, tmp_path, tokenizer=more), output=tmp_path)


@pytest.mark.parametrize("case", ["bytes"], indirect=True)
def test_settings_that_name_tokens_in_another_form_are_refused(case, tmp_path):
    """Words that must not be made, as lists of ids: they would name other words."""

    def banned(settings_):
        return {**settings_, "bad_words_ids": [[3, 4]]}

    config = spoiled(case, tmp_path, generation_config=banned)
    with pytest.raises(IncompatibleError, match="bad_words_ids"):
        trim_vocabulary(config, output=tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"pixel_values": np.zeros((1, 3), dtype=np.float32)}], "no 'input_ids'"),
        ([{"input_ids": np.array([[1, 99999]])}], "has the id 99999"),
        ([{"input_ids": np.zeros((1, 0), dtype=np.int64)}], "no token at all"),
    ],
)
@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_data_that_is_not_of_this_tokenizer_is_refused(case, tmp_path, rows, told):
    """Or holds no texts."""
    write_rows(tmp_path / "data" / "training", rows)
    with pytest.raises(DataError, match=told):
        trim_vocabulary(replace(case.config, data=tmp_path / "data"), output=tmp_path)


@pytest.mark.parametrize("settings_", [{"min_count": 0}, {"multiple": 0}])
@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_settings_below_one_are_refused(case, tmp_path, settings_):
    """Nothing occurs less often than never."""
    with pytest.raises(DataError, match="at least 1"):
        trim_vocabulary(replace(case.config, **settings_), output=tmp_path)


@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_texts_that_are_not_there_are_a_data_error(case, tmp_path):
    """Named."""
    with pytest.raises(DataError, match="no such file"):
        trim_vocabulary(replace(case.config, texts=tmp_path / "none.txt"), output=tmp_path)


@pytest.mark.parametrize("case", ["wordpiece"], indirect=True)
def test_a_place_that_cannot_be_written_is_an_output_error(case, tmp_path):
    """A file stands in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        trim_vocabulary(case.config, output=tmp_path / "file")


# A real model


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.exists(), reason="the model is not on this machine")
def test_minilm_gives_the_same_bits_with_a_third_of_its_vocabulary(tmp_path, repository):
    """On this project's documents, which it is trimmed to."""
    before = transformers.AutoTokenizer.from_pretrained(MINILM)
    lines = [
        line
        for file in sorted((repository / "docs").glob("*.md"))
        for line in file.read_text().splitlines()
        if len(line) > 20
    ]
    write_rows(
        tmp_path / "data" / "training",
        [{"input_ids": np.array([before(line, truncation=True).input_ids])} for line in lines],
    )
    source = parse_source(str(MINILM))
    made = trim_vocabulary(TrimConfig(source=source, data=tmp_path / "data"), output=tmp_path)
    assert made.tokens_after < made.tokens_before / 3
    assert made.parameters_after < 0.7 * made.parameters_before
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    auto = transformers.AutoModelForTokenClassification
    whole, small = (auto.from_pretrained(d).eval() for d in (MINILM, tmp_path / "model"))
    for line in lines[:40]:
        old, new = (text(line, return_tensors="pt") for text in (before, after))
        assert after.convert_ids_to_tokens(new.input_ids[0]) == before.convert_ids_to_tokens(
            old.input_ids[0]
        )
        with torch.no_grad():
            assert torch.equal(whole(**old).logits, small(**new).logits)
