"""What the user names becomes rows; what cannot is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.data.config import DataConfig
from equipoise.data.prepare import prepare_data
from equipoise.data.readers.base import split_form
from equipoise.data.store import Rows
from equipoise.data.text import IGNORED
from equipoise.errors import DataError

LABELS = ("O", "B-PER", "I-PER")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real word-piece tokenizer with eight pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "anna", "met", "ott", "##o")
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def prepared(tmp_path: Path, data: object, **settings: object):
    """Run the stage; return its record and the three row stores."""
    output = tmp_path / "rows"
    record = prepare_data(DataConfig(data=str(data), **settings), output=output)
    return record, *(Rows(output / part) for part in ("calibration", "evaluation", "labels"))


def conll(path: Path, sentences: int = 12, text: str = "anna B-PER\notto O\n") -> Path:
    path.write_text("-DOCSTART- O\n\n" + "\n".join([text] * sentences))
    return path


def test_digits_are_split_without_overlap(tmp_path: Path) -> None:
    """Calibration comes from the half that training uses, evaluation from the other."""
    record, calibration, evaluation, labels = prepared(tmp_path, "digits")
    assert (len(calibration), len(evaluation), len(labels)) == (128, 901, 901)
    assert record.inputs[0].shape == ("batch", 1, 8, 8)
    seen = {row["image"].tobytes() for row in calibration}
    assert not seen & {row["image"].tobytes() for row in evaluation}


def test_npz_sets_a_part_aside_for_calibration(tmp_path: Path) -> None:
    """No sample is in both parts, and the order of evaluation samples is kept."""
    x = np.arange(90, dtype=np.float32).reshape(90, 1)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(90) % 3)
    record, calibration, evaluation, labels = prepared(
        tmp_path, tmp_path / "d.npz", calibration_samples=20
    )
    aside = {float(row["x"][0, 0]) for row in calibration}
    kept = [float(row["x"][0, 0]) for row in evaluation]
    assert len(aside) == 20
    assert kept == sorted(set(range(90)) - aside)
    assert [int(row["label"]) for row in labels] == [int(v) % 3 for v in kept]
    assert any("calibration samples" in w for w in record.warnings)


def test_conll_labels_stand_at_first_pieces(tmp_path: Path, tokenizer: Path) -> None:
    """[CLS] anna ott ##o [SEP]: two words count, three tokens do not."""
    path = conll(tmp_path / "d.txt")
    record, _, evaluation, labels = prepared(
        tmp_path, path, tokenizer=tokenizer, labels=LABELS, calibration_samples=3
    )
    assert evaluation[0]["input_ids"].tolist() == [[2, 4, 6, 7, 3]]
    assert labels[0]["label"].tolist() == [IGNORED, 1, 0, IGNORED, IGNORED]
    assert record.inputs[0].shape == ("batch", "sequence")


def test_conll_directory_calibrates_on_validation_text(tmp_path: Path, tokenizer: Path) -> None:
    """test.txt is evaluated, valid.txt calibrates."""
    conll(tmp_path / "test.txt", sentences=5)
    conll(tmp_path / "valid.txt", sentences=7, text="met O\n")
    record, calibration, evaluation, _ = prepared(
        tmp_path, tmp_path, tokenizer=tokenizer, labels=LABELS
    )
    assert (record.evaluation_samples, record.calibration_samples) == (5, 7)
    assert calibration[0]["input_ids"].shape != evaluation[0]["input_ids"].shape


def test_json_lines_take_texts_pairs_and_tokens(tmp_path: Path, tokenizer: Path) -> None:
    """Class names, class numbers and tags all become indices."""
    lines = [{"text": "anna met", "label": "I-PER"}, {"text": "anna", "label": 1}] * 4
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, _, evaluation, labels = prepared(
        tmp_path, tmp_path / "d.jsonl", tokenizer=tokenizer, labels=LABELS, calibration_samples=1
    )
    assert {int(row["label"]) for row in labels} == {1, 2}
    assert all(row["input_ids"][0, 0] == 2 for row in evaluation)
    pairs = [{"text": "anna", "text_pair": "met", "label": 0}] * 4
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    _, _, evaluation, _ = prepared(
        tmp_path / "p", tmp_path / "p.jsonl", tokenizer=tokenizer, calibration_samples=1
    )
    assert evaluation[0]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    tagged = [{"tokens": ["anna", "otto"], "tags": ["B-PER", "O"]}] * 4
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    _, _, _, labels = prepared(
        tmp_path / "t", tmp_path / "t.jsonl", tokenizer=tokenizer, labels=LABELS,
        calibration_samples=1,
    )  # fmt: skip
    assert labels[0]["label"].tolist() == [IGNORED, 1, 0, IGNORED, IGNORED]


def test_long_texts_are_cut_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    """A warning says how many; the cut text has max_length tokens."""
    path = conll(tmp_path / "d.txt", sentences=9, text="anna O\n" * 10)
    record, _, evaluation, _ = prepared(
        tmp_path, path, tokenizer=tokenizer, labels=LABELS, max_length=6
    )
    assert evaluation[0]["input_ids"].shape == (1, 6)
    assert any("9 texts are longer than 6 tokens" in w for w in record.warnings)


def test_constant_calibration_input_is_warned_of(tmp_path: Path) -> None:
    """Ranges from constants mean nothing."""
    np.savez(tmp_path / "d.npz", x=np.ones((90, 4), np.float32), y=np.zeros(90, np.int64))
    record, *_ = prepared(tmp_path, tmp_path / "d.npz")
    assert any("'x' is constant" in w for w in record.warnings)


def test_single_values_are_constant_only_if_all_are_the_same(tmp_path: Path) -> None:
    """One number per sample never varies within a sample."""
    labels = np.zeros(90, np.int64)
    for name, values, warned in (("a", np.arange(90.0), False), ("b", np.ones(90), True)):
        np.savez(tmp_path / f"{name}.npz", x=values[:, None], y=labels)
        record, *_ = prepared(tmp_path / name, tmp_path / f"{name}.npz")
        assert any("'x' is constant" in w for w in record.warnings) is warned


GOOD = np.ones((9, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": GOOD}, "exactly one label array"),
        ({"x": GOOD, "y": np.zeros(9, int), "label": np.zeros(9, int)}, "exactly one label array"),
        ({"y": np.zeros(9, int)}, "no input array"),
        ({"x": GOOD, "y": np.zeros(8, int)}, "'x'.*8 labels"),
        ({"x": GOOD, "y": np.zeros(9, bool)}, "numbers or names are needed"),
        ({"x": GOOD * np.nan, "y": np.zeros(9, int)}, "'x' holds NaN"),
        ({"x": GOOD.astype(complex), "y": np.zeros(9, int)}, "'x'.*numbers are needed"),
        ({"x": GOOD, "y": np.array(["cat"] * 9)}, "label 'cat' is not among"),
        ({"x": GOOD[:0], "y": np.zeros(0, int)}, "empty"),
        ({"x": GOOD[:2], "y": np.zeros(2, int)}, "2 samples: too few"),
    ],
)
def test_arrays_that_are_no_data_set(tmp_path: Path, arrays, words: str) -> None:
    """Each fault of an .npz is named."""
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=words):
        prepared(tmp_path, tmp_path / "d.npz")


def test_pickled_arrays_are_refused_unopened(tmp_path: Path) -> None:
    """An object array would run code when it is read."""
    np.savez(tmp_path / "d.npz", x=np.array([{}, []], dtype=object), y=np.zeros(2, int))
    with pytest.raises(DataError, match=r"d\.npz is no \.npz file of plain arrays"):
        prepared(tmp_path, tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", '{"text": "a", "label": 0}\nnot json', "line 2: no JSON"),
        ("d.jsonl", "[1]", "line 1: expected an object"),
        ("d.jsonl", '{"words": 1}', "needs text and label"),
        ("d.jsonl", '{"tokens": ["a"], "tags": []}', "two lists of equal length"),
        ("d.jsonl", '{"text": 1, "label": 0}', "must be strings"),
        ("d.jsonl", '{"text": "a", "label": null}', "neither a class name nor a number"),
        ("d.jsonl", '{"text": "a", "label": "X"}', "'X' is not among"),
        ("d.jsonl", "", "0 samples: too few"),
        ("d.txt", "anna PER", "line 1.*BIO tag"),
        ("d.txt", "\nanna", "line 2.*BIO tag"),
        ("d.txt", "anna B-ORG", "'B-ORG' is not among"),
    ],
)
def test_text_files_that_are_no_data_set(tmp_path, tokenizer, name, content, words) -> None:
    """Each fault is named with its line."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        prepared(tmp_path, tmp_path / name, tokenizer=tokenizer, labels=LABELS)


def test_text_needs_a_real_tokenizer(tmp_path: Path) -> None:
    """None, a missing one, and a file that is none."""
    path = conll(tmp_path / "d.txt")
    with pytest.raises(DataError, match=r"needs a tokenizer\.json"):
        prepared(tmp_path, path)
    with pytest.raises(DataError, match="no such tokenizer"):
        prepared(tmp_path, path, tokenizer=tmp_path / "none.json")
    with pytest.raises(DataError, match=r"d\.txt is no tokenizer"):
        prepared(tmp_path, path, tokenizer=path)


def test_calibration_has_to_look_like_evaluation(tmp_path: Path) -> None:
    """Names, dtypes and numbers of dimensions."""
    np.savez(tmp_path / "a.npz", x=GOOD, y=np.zeros(9, int))
    np.savez(tmp_path / "b.npz", x=GOOD.astype(np.float64), y=np.zeros(9, int))
    with pytest.raises(DataError, match="float64, 2 dimensions"):
        prepared(tmp_path, tmp_path / "a.npz", calibration=str(tmp_path / "b.npz"))


def test_forms_are_told_by_suffix_or_prefix(tmp_path: Path) -> None:
    """A prefix wins; an unknown suffix lists the forms."""
    path = tmp_path / "d.txt"
    path.write_text("")
    assert split_form("digits") == ("digits", None)
    assert split_form(str(path)) == ("conll", path)
    assert split_form(f"jsonl:{path}") == ("jsonl", path)
    assert split_form(str(tmp_path)) == ("conll", tmp_path)
    (tmp_path / "d.csv").write_text("")
    with pytest.raises(DataError, match=r"'\.csv'"):
        split_form(str(tmp_path / "d.csv"))
    with pytest.raises(DataError, match=r"has none of test\.txt"):
        prepared(tmp_path / "out", tmp_path)
