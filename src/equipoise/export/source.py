"""Where a trained model comes from, read without importing PyTorch."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import fs, record
from equipoise.errors import SourceError, unknown_name

Task = Literal["", "token-classification", "sequence-classification"]
TASKS: Final = ("token-classification", "sequence-classification")
_FORMS: Final = (
    "Give module:package.mod:factory with --weights FILE.safetensors, a local transformers"
    " directory, or an .onnx file."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model.

    Attributes:
        kind: ``factory``, ``transformers`` or ``onnx``.
        name: What the user typed.
        path: The transformers directory or ONNX file.
        factory: ``package.mod:function`` that builds the ``torch.nn.Module``.
        weights: Its safetensors file.
        task: Head of a transformers model.
        code_sha256: Hash of the Python files beside the factory, so that an edit counts.
        labels: Class names in index order, from a transformers config.
        tokenizer: ``tokenizer.json`` of a transformers directory.
    """

    kind: Literal["factory", "transformers", "onnx"]
    name: str
    path: Path | None = None
    factory: str = ""
    weights: Path | None = None
    task: Task = ""
    code_sha256: str = ""
    labels: tuple[str, ...] = ()
    tokenizer: Path | None = None


def parse_source(name: str, *, weights: Path | None = None, task: str = "") -> Source:
    """Find out what ``name`` means, and that it is there.

    Args:
        name: ``module:package.mod:factory``, a transformers directory, or an ``.onnx`` file.
        weights: Safetensors file for a factory.
        task: Head of a transformers model; read from its config when empty.

    Raises:
        SourceError: Nothing of that name, or parts of it are missing.
        UsageError: An unknown task.
    """
    if task and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if name.startswith("module:"):
        return _factory(name, weights=weights)
    path = Path(name)
    if weights is not None:
        raise SourceError(f"--weights goes with a module: source, not with {name}", hint=_FORMS)
    if path.is_dir():
        return _transformers(path, task=task)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise SourceError(f"no such ONNX file: {path}")
        return Source(kind="onnx", name=name, path=path.resolve(), task=_task(task))
    raise SourceError(f"{name!r} is no source", hint=_FORMS)


def _task(task: str) -> Task:
    return next((known for known in TASKS if known == task), "")


def _factory(name: str, *, weights: Path | None) -> Source:
    factory = name.removeprefix("module:")
    module, _, function = factory.partition(":")
    if not module or not function:
        raise SourceError(f"{name!r} names no function", hint=_FORMS)
    if weights is None:
        raise SourceError(f"{name!r} needs its weights", hint="Add --weights FILE.safetensors.")
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise SourceError(
            f"weights {weights}: not an existing .safetensors file",
            hint="Save them with safetensors.torch.save_file(model.state_dict(), path).",
        )
    return Source(
        kind="factory",
        name=name,
        factory=factory,
        weights=weights.resolve(),
        code_sha256=_code_sha256(module),
    )


def _code_sha256(module: str) -> str:
    """Hash of the Python files in the directory of ``module``, found without running any code."""
    digest = hashlib.sha256()
    for file in sorted(_module_file(module).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _module_file(module: str) -> Path:
    """The file of a dotted module; ``importlib.util.find_spec`` would import its parents."""
    for entry in [str(Path.cwd()), *sys.path]:
        base = Path(entry, *module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    raise SourceError(
        f"module {module!r} cannot be found from {Path.cwd()}",
        hint="Install its package or run from the directory that contains it.",
    )


def _transformers(path: Path, *, task: str) -> Source:
    config = _read_config(path)
    if not any(
        (path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        raise SourceError(
            f"{path} has no model.safetensors",
            hint="Save it with model.save_pretrained(path): pickled weights are not read.",
        )
    tokenizer = path / "tokenizer.json"
    return Source(
        kind="transformers",
        name=str(path),
        path=path.resolve(),
        task=_task(task) or _task_of(config, path),
        labels=_labels(config, path),
        tokenizer=tokenizer.resolve() if tokenizer.is_file() else None,
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    text = fs.read_text(file, error=SourceError)
    try:
        config = record.parse(text)
    except ValueError as error:
        raise SourceError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds no JSON object: this is no transformers directory")
    return config


def _task_of(config: dict[str, Any], path: Path) -> Task:
    """The task by the name of the architecture."""
    architecture = str((config.get("architectures") or [""])[0])
    for ending, task in (
        ("ForTokenClassification", TASKS[0]),
        ("ForSequenceClassification", TASKS[1]),
    ):
        if architecture.endswith(ending):
            return _task(task)
    raise SourceError(
        f"{path}: no task is known for architecture {architecture!r}",
        hint=f"Say it with --task; known: {', '.join(TASKS)}.",
    )


def _labels(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    try:
        by_index = {int(index): str(name) for index, name in names.items()}
        return tuple(by_index[i] for i in range(len(by_index)))
    except (AttributeError, KeyError, ValueError) as error:
        raise SourceError(f"{path}/config.json: id2label must number its classes from 0") from error
