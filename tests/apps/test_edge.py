"""What a device needs for texts and pictures: NumPy, the runtime, tokenizers, Pillow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.apps.embedding import Embedder
from equipoise.apps.pictures import ImageClassifier
from equipoise.apps.text import TextClassifier
from equipoise.apps.tokens import TokenClassifier

BLOCKED = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "typer", "rich", "safetensors",
    "sklearn", "scipy", "seqeval", "jinja2", "plotly", "filelock", "platformdirs",
    "huggingface_hub", "cryptography",
)  # fmt: skip

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: blocked", name=name)

sys.meta_path.insert(0, Block())
"""

RUN = """
import json, sys
from pathlib import Path
from equipoise.apps.embedding import Embedder
from equipoise.apps.pictures import ImageClassifier
from equipoise.apps.text import TextClassifier
from equipoise.apps.tokens import TokenClassifier

place, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
with TextClassifier(place / "class") as classify, TokenClassifier(place / "token.zip") as tag:
    classes = [c.scores for c in classify(texts)]
    entities = [[(e.text, e.label, e.start, e.end) for e in of_one] for of_one in tag(texts)]
with Embedder(place / "hidden", normalize=True) as embed:
    vectors = embed(texts).tolist()
with ImageClassifier(place / "pictures") as see:
    seen = see([place / "a.png", (place / "a.png").read_bytes()])
print(json.dumps({
    "classes": classes, "entities": entities, "vectors": vectors,
    "seen": [one.label for one in seen],
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "ours": sorted({n.split(".")[1] for n in sys.modules if n.startswith("equipoise.")}),
}))
"""


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a new interpreter."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def place(tmp_path: Path, make, make_picture_bundle, pack) -> Path:
    """Bundles on disk, directories and an archive, and a picture."""
    folder = tmp_path / "device"
    folder.mkdir()
    pack(folder / "class", make("class", labels=("a", "b", "c"), task="sequence-classification"))
    pack(folder / "token.zip", make("token", classes=3, labels=("O", "B-X", "I-X")))
    pack(folder / "hidden", make("hidden", task="text-embedding"))
    pack(folder / "pictures", make_picture_bundle(task="image-classification"))
    Image.new("RGB", (40, 30), (10, 10, 250)).save(folder / "a.png")
    return folder


def test_all_four_run_with_nothing_else_installed(place: Path, texts) -> None:
    """The answers of this process, and no module of what makes bundles."""
    child = run_python(BLOCK.format(blocked=BLOCKED) + RUN, str(place), json.dumps(texts))
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    with (
        TextClassifier(place / "class") as classify,
        TokenClassifier(str(place / "token.zip"), threads=1) as tag,
        Embedder(place / "hidden", normalize=True) as embed,
        ImageClassifier(place / "pictures") as see,
    ):
        many = list(texts)
        np.testing.assert_allclose(found["classes"], [c.scores for c in classify(many)], atol=1e-6)
        np.testing.assert_allclose(found["vectors"], embed(many), atol=1e-6)
        entities = [[[e.text, e.label, e.start, e.end] for e in of_one] for of_one in tag(many)]
        assert found["entities"] == entities
        assert any(entities)
        assert found["seen"] == [see(place / "a.png").label] * 2 == ["blue"] * 2
    assert {"numpy", "onnxruntime", "tokenizers", "PIL"} <= set(found["modules"])
    assert not set(BLOCKED) & set(found["modules"])
    assert set(found["ours"]) <= {
        "apps", "bundle", "data", "deploy", "errors", "extras", "fs", "record", "registry",
        "runtimes", "serving", "spec", "targets", "vouching",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "package", "call"),
    [
        ("class", "tokenizers", "from equipoise.apps.text import TextClassifier as A"),
        ("pictures", "PIL", "from equipoise.apps.pictures import ImageClassifier as A"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    place: Path, name, package, call
) -> None:
    """Not an ImportError out of nowhere."""
    program = f"""
{call}
from equipoise.errors import MissingExtraError
try:
    with A({str(place / name)!r}) as app:
        app(b"GIF89a")
except MissingExtraError as error:
    print(error)
"""
    child = run_python(BLOCK.format(blocked=(package,)) + program)
    assert f"{package!r}, which is not installed" in child.stdout, child.stderr
    assert "pip install" in child.stdout


def test_what_was_opened_here_is_closed_here(place: Path, texts) -> None:
    """At the end of the block, and when the bundle does not fit."""
    from equipoise.errors import InputError, UsageError

    with TextClassifier(place / "class") as classify:
        classify(texts[0])
    with pytest.raises(UsageError, match="closed"):
        classify(texts[0])
    with pytest.raises(InputError, match="is for sequence-classification"):
        TokenClassifier(place / "class")
