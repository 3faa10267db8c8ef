"""Open bundles of small models whose answers can be told from the outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.data.images import prepared
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings

TEXTS = (
    "Angela Merkel besuchte gestern die Universität in Zürich.",
    "The European Union was founded in Maastricht, by twelve countries of Europe.",
    "Barack Obama met Angela Merkel in Berlin; they spoke about Europe and the United Nations.",
    "In Peking (北京) and Tokyo (東京) it rained.",
    "Le président de la République française habite à Paris.",
    "Новая книга Толстого вышла в Москве.",
    "Rain.",
    "It cost 3.50 dollars, said the clerk of the U.S. embassy in Reykjavík.",
)


class Opened:
    """An open bundle, and the shapes that were run."""

    def __init__(
        self, model: Path, documents: Mapping[str, bytes], *, batching: bool = True, **fields: Any
    ) -> None:
        self.model = model
        self._session = open_session(model, settings=SessionSettings())
        self.inputs, self.outputs = self._session.inputs, self._session.outputs
        made = {"name": "made", "engines": (), "inputs": self.inputs, "outputs": self.outputs}
        self.manifest = Manifest(**{**made, **fields})
        self.engine = Engine(
            name="made", file="a", files=("a",), runtime="onnxruntime", size_bytes=1,
            batching=batching,
        )  # fmt: skip
        self.documents = dict(documents)
        self.shapes: list[tuple[int, ...]] = []
        self.closed = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.shapes.append(next(iter(feeds.values())).shape)
        return self._session.run(feeds)

    def run_batch(
        self, feeds: Sequence[Mapping[str, np.ndarray]], *, most: int
    ) -> list[dict[str, np.ndarray]]:
        assert len(feeds) <= most
        if not self.engine.batching:
            return [self.run(sample) for sample in feeds]
        joined = {name: np.concatenate([row[name] for row in feeds]) for name in feeds[0]}
        outputs = self.run(joined)
        return [{n: a[i : i + 1] for n, a in outputs.items()} for i in range(len(feeds))]

    def read(self, name: str) -> bytes:
        return self.documents[name]

    def preprocess(self, image: np.ndarray) -> dict[str, np.ndarray]:
        spec, preprocessing = self.inputs[0], self.manifest.preprocessing
        return {spec.name: prepared(image, spec, preprocessing=preprocessing)}

    def close(self) -> None:
        self.closed = True


def packed(path: Path, bundle: Opened) -> Path:
    """A bundle on disk, a directory or an archive, of what is open."""
    name = "engines/float/engine.onnx"
    engine = replace(
        bundle.engine,
        name="float",
        file=name,
        files=(name,),
        size_bytes=bundle.model.stat().st_size,
        golden_from="reference",
    )
    manifest = replace(bundle.manifest, engines=(engine,))
    write_bundle(path, manifest, copies={name: bundle.model}, documents=bundle.documents)
    return path


@pytest.fixture(scope="session")
def pack() -> Callable[[Path, Opened], Path]:
    """Writes what is open as a bundle."""
    return packed


@pytest.fixture(scope="session")
def opened() -> type[Opened]:
    """Opens a model with the documents and the manifest of a bundle."""
    return Opened


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Sentences of several languages, long and short."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> bytes:
    """Word pieces as BERT has them, trained on the sentences."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=180, special_tokens=special)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made.to_str().encode()


BODY = """
    words = Gather(table, input_ids)
    kinds = Gather(types, token_type_ids)
    both = Add(words, kinds)
    mask = Cast<to = 1>(attention_mask)
    axes = Constant<value_ints = [2]>()
    wide = Unsqueeze(mask, axes)
    counted = Mul(both, wide)
    one = Constant<value_ints = [1]>()
    total = ReduceSum<keepdims = 1>(counted, one)
    count = ReduceSum<keepdims = 1>(wide, one)
    mean = Div(total, count)
    last_hidden_state = Add(both, mean)
"""
"""A model that sees the mean of all words at each of them: what is padded by mistake shows."""

LOOSE_BODY = """
    both = Gather(table, input_ids)
    one = Constant<value_ints = [1]>()
    mean = ReduceMean<keepdims = 1>(both, one)
    last_hidden_state = Add(both, mean)
"""
"""The same without a mask."""

HEADS = {
    "class": ("float[{b}, {c}] logits", "flat = Squeeze(mean, one)\nlogits = MatMul(flat, head)"),
    "token": ("float[{b}, {s}, {c}] logits", "logits = MatMul(last_hidden_state, head)"),
    "word": ("float[{b}, {s}, {c}] logits", "logits = MatMul(both, head)"),
    "hidden": ("float[{b}, {s}, 8] last_hidden_state", ""),
    "both": (
        "float[{b}, {s}, 8] last_hidden_state, float[{b}, 8] pooler_output",
        "flat = Squeeze(mean, one)\npooler_output = Tanh(flat)",
    ),
    "named": ("float[{b}, 8] sentence_embedding", "sentence_embedding = Squeeze(mean, one)"),
}
Make = Callable[..., Opened]


@pytest.fixture
def make(tmp_path: Path, tokenizer: bytes) -> Make:
    """Opens a bundle of a text model: its head, sizes, and the fields of its manifest."""
    onnx = pytest.importorskip("onnx")

    def made(
        head: str,
        *,
        classes: int = 3,
        masked: bool = True,
        batch: int | str = "batch",
        sequence: int | str = "sequence",
        weights: np.ndarray | None = None,
        dtype: str = "int64",
        scale: float = 1.0,
        **fields: Any,
    ) -> Opened:
        outputs, end = HEADS[head]
        names = ("input_ids", "attention_mask", "token_type_ids") if masked else ("input_ids",)
        inputs = ", ".join(f"{dtype}[{batch}, {sequence}] {name}" for name in names)
        model = onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 20]>
            text ({inputs}) => ({outputs.format(b=batch, s=sequence, c=classes)}) {{
            {BODY if masked else LOOSE_BODY}
            {end}
            }}"""
        )
        random = np.random.default_rng(0)
        arrays = {
            "table": random.normal(size=(180, 8)).astype(np.float32) * np.float32(scale),
            "types": random.normal(size=(2, 8)).astype(np.float32),
            "head": random.normal(size=(8, classes)).astype(np.float32),
        }
        if weights is not None:
            arrays["head"] = weights.astype(np.float32)
        used = {name for node in model.graph.node for name in node.input}
        for name, array in arrays.items():
            if name in used:
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(model, path)
        given = {"tokenizer": "tokenizer.json", "max_length": 64, **fields}
        return Opened(path, {"tokenizer.json": tokenizer}, **given)

    return made


PICTURE_STEPS = ImagePreprocessing(
    size=(16, 16), resize_shortest=20, crop=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)
)
PICTURE_ENDS = {
    "class": ("float[{b}, 3] logits", "logits = ReduceMean <keepdims = 0> (pixels, axes)"),
    "vector": (
        "float[{b}, 3] image_embeds",
        "image_embeds = ReduceMean <keepdims = 0> (pixels, axes)",
    ),
    "map": ("float[{b}, 3, 16, 16] features", "features = Identity(pixels)"),
    "patches": (
        "float[{b}, 256, 3] last_hidden_state",
        "flat = Reshape(pixels, sizes)\nlast_hidden_state = Transpose <perm = [0, 2, 1]> (flat)",
    ),
}


@pytest.fixture
def make_picture_bundle(tmp_path: Path) -> Make:
    """A bundle of the means of the channels."""
    onnx = pytest.importorskip("onnx")

    def made(
        end: str = "class", *, batch: int | str = "batch", shape: str = "", **fields: Any
    ) -> Opened:
        outputs, last = PICTURE_ENDS[end]
        taken = (
            f"uint8[{shape}] pixel_values" if shape else f"float[{batch}, 3, 16, 16] pixel_values"
        )
        planar = "planar = Transpose <perm = [0, 3, 1, 2]> (pixel_values)\n"
        body = f"{planar}pixels = Cast <to = 1> (planar)"
        body = body if shape else "pixels = Identity(pixel_values)"
        model = onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 20]>
            means ({taken}) => ({outputs.format(b=batch)}) {{
            axes = Constant <value_ints = [2, 3]> ()
            sizes = Constant <value_ints = [0, 3, 256]> ()
            {body}
            {last}
            }}"""
        )
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(model, path)
        given = {"preprocessing": PICTURE_STEPS, "labels": ("red", "green", "blue"), **fields}
        return Opened(path, {}, **given)

    return made


@pytest.fixture(scope="session")
def steps() -> ImagePreprocessing:
    """What those bundles do to a picture."""
    return PICTURE_STEPS
