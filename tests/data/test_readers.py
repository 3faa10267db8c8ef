"""Readers give back what was written, and name what is wrong with damaged or odd files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import label_indices, read
from equipoise.data.readers.conll import read_sentences
from equipoise.data.readers.npz import read_arrays
from equipoise.errors import DataError, UsageError

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "anna", "met", "otto")
LABELS = ("O", "B-PER", "I-PER")
words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8)
sentences = st.lists(
    st.lists(st.tuples(words, st.sampled_from(LABELS)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real word-level tokenizer with seven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def samples(path: Path, **settings: object):
    """Evaluation samples of a file."""
    return read(str(path), config=DataConfig(data=str(path), **settings)).evaluation


@settings(deadline=None, max_examples=60)
@given(sentences)
def test_column_files_come_back_as_they_were(tmp_path_factory, written) -> None:
    """Any words without spaces, with middle columns, -DOCSTART- lines and Windows line ends."""
    text = "-DOCSTART- -X- O\r\n\r\n" + "\r\n\r\n".join(
        "\r\n".join(f"{word}\tNNP {tag}" for word, tag in sentence) for sentence in written
    )
    path = tmp_path_factory.mktemp("conll") / "d.txt"
    path.write_bytes(text.encode())
    expected = [[pair for pair in s if pair[0] != "-DOCSTART-"] for s in written]
    assert list(read_sentences(path)) == [s for s in expected if s]


def test_spaces_inside_a_word_do_not_end_its_column(tmp_path: Path) -> None:
    """10 000 with a no-break space is one word, and a next-line character ends no line."""
    (tmp_path / "d.txt").write_text("10\u00a0000 O\na\u0085b B-PER\n", encoding="utf-8")
    assert list(read_sentences(tmp_path / "d.txt")) == [
        [("10\u00a0000", "O"), ("a\u0085b", "B-PER")]
    ]


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), min_size=1), st.integers(1, 6)
)  # fmt: skip
def test_arrays_become_one_sample_per_row(tmp_path_factory, inputs, count: int) -> None:
    """Concatenated, the samples are the arrays of the file again."""
    generator = np.random.default_rng(count)
    arrays = {n: generator.normal(size=(count, *[2] * rank)) for n, rank in inputs.items()}
    path = tmp_path_factory.mktemp("npz") / "d.npz"
    np.savez(path, y=np.arange(count), **arrays)
    found = samples(path)
    assert [int(s.label) for s in found] == list(range(count))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([s.feeds[name] for s in found]), array)


def test_big_endian_arrays_are_turned_round(tmp_path: Path) -> None:
    """No runtime takes them as they are."""
    np.savez(tmp_path / "d.npz", x=np.arange(3, dtype=">f4"), y=np.arange(3))
    assert read_arrays(tmp_path / "d.npz")["x"].dtype == np.float32


def damaged(kind: str, folder: Path) -> Path:
    """A file that ends in .npz and is none."""
    good, path = folder / "good.npz", folder / "bad.npz"
    np.savez_compressed(good, x=np.random.default_rng(0).random((90, 40)), y=np.arange(90))
    data = bytearray(good.read_bytes())
    if kind == "bytes overwritten":
        data[200:4000] = bytes(3800)
    np.save(folder / "plain.npy", np.ones(3))
    contents = {
        "empty": b"",
        "text": b"no archive",
        "cut off": bytes(data[: len(data) // 2]),
        "bytes overwritten": bytes(data),
        "a single array": (folder / "plain.npy").read_bytes(),
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    "kind", ["empty", "text", "cut off", "bytes overwritten", "a single array"]
)
def test_damaged_archives_are_named(tmp_path: Path, kind: str) -> None:
    """Whatever numpy and zipfile raise on them."""
    path = damaged(kind, tmp_path)
    with pytest.raises(DataError, match=r"bad\.npz is no \.npz file of plain arrays"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.npz", r"no such data: .*none\.npz"),
        ("npz:none.npz", r"no such data: none\.npz"),
        ("digit", "no such data: digit"),
    ],
)
def test_data_that_is_not_there_is_named(tmp_path: Path, name: str, words: str) -> None:
    """With or without a prefix."""
    typed = str(tmp_path / name) if name == "none.npz" else name
    with pytest.raises(DataError, match=words):
        read(typed, config=DataConfig(data=typed))


def test_text_that_is_no_text_is_named(tmp_path: Path, tokenizer: Path) -> None:
    """Another encoding and a folder in place of a file."""
    (tmp_path / "d.txt").write_bytes("M\u00fcller O\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read .*d\.txt.*utf-8"):
        samples(tmp_path / "d.txt", tokenizer=tokenizer)
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*d\.jsonl"):
        read(
            f"jsonl:{tmp_path / 'd.jsonl'}", config=DataConfig(data="", tokenizer=tokenizer)
        )  # fmt: skip


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path, tokenizer) -> None:
    """Only a line feed does: JSON lets U+2028 and U+0085 stand in a string."""
    line = json.dumps({"text": "anna\u2028met \u0085 otto", "label": 0}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    found = samples(tmp_path / "d.jsonl", tokenizer=tokenizer)
    assert [s.feeds["input_ids"].tolist() for s in found] == [[[4, 5, 6]]] * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"tokens": ["anna"], "tags": 5}, "line 2: .*two lists of equal length"),
        ({"tokens": ["anna"], "tags": None}, "line 2: .*two lists of equal length"),
        ({"tokens": "anna", "tags": ["O"]}, "line 2: .*two lists of equal length"),
        ({"text": "anna", "label": 3}, "line 2: class 3 is not among the 3 classes"),
        ({"text": "anna", "label": -1}, "line 2: class -1 is not among"),
        ({"text": "anna", "label": 10**30}, "line 2: class 10+ is not among"),
        ({"text": "anna", "label": True}, "line 2: label True"),
        ({"text": "anna", "label": 1.5}, r"line 2: label 1\.5"),
        ({"text": "anna", "text_pair": 1, "label": 0}, "line 2: .*text_pair must be strings"),
        ({"text": "\ud800 anna", "label": 0}, r"'\\ud800 anna' cannot be encoded"),
    ],
)
def test_lines_that_are_no_samples_are_named(tmp_path, tokenizer, line, words: str) -> None:
    """The number of the line and the value."""
    good = {"text": "anna", "label": 0}
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [good, line])))
    with pytest.raises(DataError, match=words):
        samples(tmp_path / "d.jsonl", tokenizer=tokenizer, labels=LABELS)


def test_bad_tags_are_named_without_a_model_that_has_labels(tmp_path, tokenizer) -> None:
    """Names come from the data then, and the fault is still that of its line."""
    (tmp_path / "d.jsonl").write_text('{"tokens": ["anna"], "tags": 5}')
    with pytest.raises(DataError, match="line 1: tokens and tags must be two lists"):
        samples(tmp_path / "d.jsonl", tokenizer=tokenizer)


def test_tokens_beside_a_text_and_a_label_are_left_alone(tmp_path, tokenizer) -> None:
    """Only tokens with tags make a tagged sentence."""
    (tmp_path / "d.jsonl").write_text('{"text": "met", "label": 1, "tokens": ["anna"]}')
    (found,) = samples(tmp_path / "d.jsonl", tokenizer=tokenizer)
    assert found.feeds["input_ids"].tolist() == [[5]]
    assert int(found.label) == 1


def test_labels_without_a_model_are_those_of_the_data(tmp_path, tokenizer) -> None:
    """Sorted, so that two runs give the same numbers."""
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": "met", "label": n}) for n in "bca"))
    found = read(str(path), config=DataConfig(data=str(path), tokenizer=tokenizer))
    assert found.labels == ("a", "b", "c")
    assert [int(s.label) for s in found.evaluation] == [1, 2, 0]


def written(path: Path, *lines: object) -> Path:
    """JSON lines."""
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        ((), [4.5, 2], [4.5, 2.0]),
        (("LABEL_0",), [1, 5], [1.0, 5.0]),
        ((), [[0.5, 1], [2, 3]], [[0.5, 1.0], [2.0, 3.0]]),
    ],
)
def test_labels_of_lines_are_values(tmp_path, tokenizer, labels, given, expected) -> None:
    """A fraction in one line, a model of one output, or vectors: all of them are float32."""
    path = written(tmp_path / "d.jsonl", *({"text": "met", "label": v} for v in given))
    found = samples(path, tokenizer=tokenizer, labels=labels)
    assert [s.label.tolist() for s in found] == expected
    assert {str(s.label.dtype) for s in found} == {"float32"}


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("good", "line 2: label 'good' is no number"),
        (None, "line 2: label None is no number"),
        (True, "line 2: label True is no number"),
        (1e39, "line 2: label holds .*beyond float32"),
        (10**400, "line 2: label is '1000.*no number"),
        ([1, [2]], "line 2: label is no array of numbers"),
    ],
)
def test_lines_that_are_no_values_are_named(tmp_path, tokenizer, label, words: str) -> None:
    """Beside one that is."""
    lines = [{"text": "met", "label": 0.5}, {"text": "met", "label": label}]
    with pytest.raises(DataError, match=words):
        samples(written(tmp_path / "d.jsonl", *lines), tokenizer=tokenizer)


def test_a_language_model_learns_the_next_token(tmp_path, tokenizer) -> None:
    """Of text alone, and of text that has a label for something else."""
    path = written(tmp_path / "d.jsonl", {"text": "anna met otto"}, {"text": "met", "label": "x"})
    found = samples(path, tokenizer=tokenizer, task="causal-lm")
    assert [s.label.tolist() for s in found] == [[5, 6, -100], [-100]]
    assert found[0].feeds["input_ids"].tolist() == [[4, 5, 6]]


def test_text_needs_no_label_where_none_is_needed(tmp_path, tokenizer) -> None:
    """A student learns from a teacher, and calibration looks at inputs only."""
    path = written(tmp_path / "d.jsonl", {"text": "anna met"})
    (found,) = samples(path, tokenizer=tokenizer, labelled=False)
    assert found.feeds["input_ids"].tolist() == [[4, 5]]
    with pytest.raises(DataError, match=r"line 1: has \['text'\]; needs text and label"):
        samples(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("labels", "given"),
    [((), np.array([0.5, 2], ">f8")), (("LABEL_0",), np.array([1, 5])), ((), np.ones((2, 3)))],
)
def test_labels_of_arrays_are_values(tmp_path: Path, labels, given) -> None:
    """Floats, whole numbers for a model of one output, and vectors."""
    np.savez(tmp_path / "d.npz", x=np.ones((2, 4), np.float32), y=given)
    found = samples(tmp_path / "d.npz", labels=labels)
    np.testing.assert_array_equal([s.label for s in found], given)
    assert {str(s.label.dtype) for s in found} == {"float32"}


@pytest.mark.parametrize(
    ("labels", "given", "words"),
    [
        (LABELS, np.array([0.0, 1.0]), "y is float64.*has the classes .*whole numbers or names"),
        ((), np.array([1e300, 0]), "beyond float32"),
        ((), np.array([True, False]), "y is bool.*numbers or names"),
    ],
)
def test_labels_of_arrays_that_fit_no_model_are_named(tmp_path, labels, given, words) -> None:
    """Floats for a model of classes among them."""
    np.savez(tmp_path / "d.npz", x=np.ones((2, 4), np.float32), y=given)
    with pytest.raises(DataError, match=words):
        samples(tmp_path / "d.npz", labels=labels)


def test_unknown_label_names_the_known_ones_and_the_place() -> None:
    """A tag set of another corpus."""
    with pytest.raises(DataError, match=r"here: label 'B-GENE' is not among .*'B-PER'"):
        label_indices(["O", "B-GENE"], LABELS, where="here")


def test_unknown_form_is_a_file_name(tmp_path: Path) -> None:
    """csv:x is no form, so there is no such file; a directory without test.txt says what is."""
    with pytest.raises(DataError, match="no such data: csv:x"):
        read("csv:x", config=DataConfig(data="csv:x"))
    (tmp_path / "train.txt").write_text("anna O\n")
    with pytest.raises(DataError, match=r"has none of test\.txt, valid\.txt"):
        samples(tmp_path)
    assert not issubclass(DataError, UsageError)
