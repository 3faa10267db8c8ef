"""Where a trained model comes from, read without importing PyTorch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from equipoise.errors import SourceError
from equipoise.sources.checkpoint import SUFFIXES
from equipoise.sources.derived import Derivation, is_derived, read_derivation
from equipoise.sources.tasks import TASKS, get_task, task_of
from equipoise.sources.transformers_model import read_config, weight_files

Kind = Literal["factory", "timm", "transformers", "derived", "program", "onnx"]
TIMM_PREFIX: Final = "timm:"
_FACTORY_PREFIX: Final = "module:"
_FORMS: Final = (
    "Give module:package.mod:factory or timm:NAME with --weights FILE, a local transformers"
    " directory, a directory that equipoise has written, a .pt2 program of torch.export, or an"
    " .onnx file."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model.

    Attributes:
        kind: What builds it.
        name: What the user typed.
        path: The transformers or derived directory, ``.pt2`` program or ``.onnx`` file.
        factory: ``package.mod:function`` that builds the ``torch.nn.Module``, or that of the base.
        weights: The checkpoint for a factory or a model of timm.
        task: What the model is for: a name in ``tasks.TASKS``, or empty when nothing says.
        code_sha256: Hash of the Python files beside the factory, so that an edit counts.
        labels: Class names in index order, from a transformers config or a derived directory.
        tokenizer: ``tokenizer.json`` of a transformers directory.
        processor: Its ``preprocessor_config.json`` or ``processor_config.json``.
    """

    kind: Kind
    name: str
    path: Path | None = None
    factory: str = ""
    weights: Path | None = None
    task: str = ""
    code_sha256: str = ""
    labels: tuple[str, ...] = ()
    tokenizer: Path | None = None
    processor: Path | None = None


def path_of(source: Source) -> Path:
    """The file or directory of a source that has one.

    Raises:
        SourceError: It has none.
    """
    if source.path is None:
        raise SourceError(f"{source.name}: a source of kind {source.kind!r} needs a path")
    return source.path


def parse_source(name: str, *, weights: Path | None = None, task: str = "") -> Source:
    """Find out what ``name`` means, and that it is there.

    Args:
        name: ``module:package.mod:factory``, ``timm:NAME``, a transformers directory, one that
            ``saving.save_source`` has written, a ``.pt2`` program or an ``.onnx`` file.
        weights: Checkpoint for a factory or timm: .safetensors, .pth, .pt or .bin.
        task: What a model is for; read from its config when empty.

    Raises:
        SourceError: Nothing of that name, or parts of it are missing.
        UnsafeCheckpointError: A transformers directory asks to run code.
        UsageError: An unknown task.
    """
    if task:
        get_task(task)
    if name.startswith(_FACTORY_PREFIX):
        return _factory(name, weights=weights, task=task)
    if name.startswith(TIMM_PREFIX):
        checked = _weights(name, weights)
        return Source(kind="timm", name=name, weights=checked, task=task or "image-classification")
    if weights is not None:
        raise SourceError(
            f"--weights goes with a module: or timm: source, not with {name}", hint=_FORMS
        )
    path = Path(name)
    if path.is_dir():
        return _derived(path, task=task) if is_derived(path) else _transformers(path, task=task)
    return _file(path, task=task)


def _file(path: Path, *, task: str) -> Source:
    kinds: dict[str, tuple[Kind, str]] = {
        ".onnx": ("onnx", "ONNX file"),
        ".pt2": ("program", "program"),
    }
    if path.suffix in kinds:
        kind, word = kinds[path.suffix]
        if not path.is_file():
            raise SourceError(f"no such {word}: {path}")
        return Source(kind=kind, name=str(path), path=path.resolve(), task=task)
    if path.suffix in SUFFIXES:
        raise SourceError(
            f"{str(path)!r} is no source: weights alone do not say what to compute",
            hint=f"Say what builds the model: module:package.mod:factory --weights {path}.",
        )
    raise SourceError(f"{str(path)!r} is no source", hint=_FORMS)


def _factory(name: str, *, weights: Path | None, task: str) -> Source:
    factory = name.removeprefix(_FACTORY_PREFIX)
    module, _, function = factory.partition(":")
    if not module or not function:
        raise SourceError(f"{name!r} names no function", hint=_FORMS)
    return Source(
        kind="factory",
        name=name,
        factory=factory,
        weights=_weights(name, weights),
        task=task,
        code_sha256=_code_sha256(module),
    )


def _weights(name: str, weights: Path | None) -> Path:
    if weights is None:
        raise SourceError(f"{name!r} needs its weights", hint="Add --weights FILE.safetensors.")
    if weights.suffix not in SUFFIXES or not weights.is_file():
        raise SourceError(
            f"weights {weights}: not an existing .safetensors, .pth, .pt or .bin file",
            hint="Save them with safetensors.torch.save_file(model.state_dict(), path).",
        )
    return weights.resolve()


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
    config = read_config(path)
    weight_files(path)
    found = task or task_of(config, directory=path).name
    return Source(
        kind="transformers",
        name=str(path),
        path=path.resolve(),
        task=found,
        labels=_labels(config, path) if TASKS[found].classes else (),
        tokenizer=_first_file(path, "tokenizer.json"),
        processor=_first_file(path, "preprocessor_config.json", "processor_config.json"),
    )


def _derived(path: Path, *, task: str) -> Source:
    found = read_derivation(path)
    base = _base(found, where=str(path))
    return Source(
        kind="derived",
        name=str(path),
        path=path.resolve(),
        factory=base.factory,
        task=task or found.task,
        code_sha256=base.code_sha256,
        labels=found.labels,
    )


def base_of(source: Source) -> Source:
    """What builds a source of kind ``derived``, without weights; any other is its own base.

    Raises:
        SourceError: The description cannot be read, or what it names cannot be found.
    """
    if source.kind != "derived":
        return source
    path = path_of(source)
    return _base(read_derivation(path), where=str(path))


def _base(derivation: Derivation, *, where: str) -> Source:
    name = derivation.base
    if name.startswith(TIMM_PREFIX):
        return Source(kind="timm", name=name, task=derivation.task)
    factory = name.removeprefix(_FACTORY_PREFIX)
    module, _, function = factory.partition(":")
    if not module or not function:
        raise SourceError(f"{where}: its base {name!r} names no function")
    try:
        code = _code_sha256(module)
    except SourceError as error:
        raise SourceError(
            f"{where}: its base {name!r}: {error.message}", hint=error.hint
        ) from error
    return Source(
        kind="factory", name=name, factory=factory, task=derivation.task, code_sha256=code
    )


def _first_file(directory: Path, *names: str) -> Path | None:
    files = (directory / name for name in names)
    return next((file.resolve() for file in files if file.is_file()), None)


def _labels(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    try:
        by_index = {int(index): str(name) for index, name in names.items()}
        return tuple(by_index[i] for i in range(len(by_index)))
    except (AttributeError, KeyError, ValueError) as error:
        raise SourceError(f"{path}/config.json: id2label must number its classes from 0") from error
