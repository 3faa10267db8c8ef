"""An altered or retrained module as a source that can be opened again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, record
from equipoise.errors import SourceError
from equipoise.sources.checkpoint import first_few, require_finite_weights
from equipoise.sources.derived import DESCRIPTION, WEIGHTS, Derivation, apply_, described
from equipoise.sources.source import Source, base_of, path_of
from equipoise.sources.torch_model import build_module
from equipoise.sources.transformers_model import read_config

_BESIDE: Final = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "chat_template.*", "*processor_config.json", "generation_config.json",
    "modules.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What of a transformers directory is neither the config nor the weights, and belongs to both."""
_SWITCHES: Final = ("use_cache", "output_attentions", "output_hidden_states")
"""What loading switches off in a config."""


def save_source(module: Any, *, base: Source, directory: Path) -> None:
    """Write ``module`` to ``directory``, which ``parse_source`` then takes.

    A transformers model becomes a plain transformers directory with the tokenizer and processor of
    its base. Any other becomes a ``derived`` source, which its first base builds.

    Args:
        module: An altered or retrained module of ``base``, as ``load_module`` gives it.
        base: Where it comes from.
        directory: Appears whole or not at all, in place of what is there.

    Raises:
        SourceError: A source of this kind cannot be written, or what was altered cannot be
            described.
        NonFiniteError: A weight is NaN or infinite.
        OutputError: The directory cannot be written.
    """
    require_finite_weights(module, what=f"the model to be saved as {directory}")
    if base.kind == "transformers":
        _save_transformers(module, base=base, directory=directory)
    elif base.kind in {"factory", "timm", "derived"}:
        _save_derived(module, base=base, directory=directory)
    else:
        raise SourceError(
            f"{base.name}: what is altered of a source of kind {base.kind!r} cannot be saved: its"
            " sizes are fixed",
            hint="Give the model as module:package.mod:factory with --weights, as a transformers"
            " directory, or as timm:NAME.",
        )


def _save_derived(module: Any, *, base: Source, directory: Path) -> None:
    first = base_of(base)
    fresh = build_module(first)
    found = described(module, fresh=fresh, base=first.name)
    found = dataclasses.replace(found, task=base.task, labels=base.labels)
    _check_kept(module, fresh, found)
    tensors = _tensors(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    again = build_module(first)
    apply_(again, found, shapes=shapes, where=str(directory))
    _check_same(module, again, base=first.name)
    with fs.staged_directory(directory) as place:
        fs.write_json(place / DESCRIPTION, found)
        _write_tensors(tensors, place / WEIGHTS)


def _check_kept(module: Any, fresh: Any, found: Derivation) -> None:
    """A layer that is still there must have every tensor that it was built with."""
    held, modules = module.state_dict(), dict(module.named_modules())
    owners = {name: name.rpartition(".")[0] for name in fresh.state_dict() if name not in held}
    gone = [n for n, o in owners.items() if o in modules and o not in found.identities]
    if gone:
        raise SourceError(
            f"the model has not got what {found.base} builds: {first_few(sorted(gone))}",
            hint="A layer is left out as a whole; a bias without effect may be zero.",
        )


def _tensors(module: Any) -> dict[str, Any]:
    """The state_dict, each tensor of several names once: safetensors refuses shared memory."""
    seen: set[tuple[object, ...]] = set()
    kept = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach().cpu().clone().contiguous()
    return kept


def _write_tensors(tensors: dict[str, Any], file: Path) -> None:
    safetensors: Any = extras.require("safetensors.torch")
    with fs.replacing(file) as path:
        safetensors.save_file(tensors, path, metadata={"format": "pt"})


def _check_same(module: Any, again: Any, *, base: str) -> None:
    """Every tensor, in the state_dict or not, must have its place and shape again."""
    mine, theirs = _shapes(module), _shapes(again)
    odd = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if odd:
        raise SourceError(
            f"the model has tensors that {base} does not build in this shape: {first_few(odd)}",
            hint="Buffers that are not saved must not depend on a size that is changed.",
        )


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in named}


# transformers


def _save_transformers(module: Any, *, base: Source, directory: Path) -> None:
    source = path_of(base)
    model = _whole_model(module, base)
    with fs.scratch_directory() as made:
        model.save_pretrained(made)
        with fs.staged_directory(directory) as place:
            for file in (f for f in sorted(made.iterdir()) if f.name != "config.json"):
                fs.copy_file(file, place / file.name)
            for file in _beside(source):
                fs.copy_file(file, place / file.name)
            fs.write_text(place / "config.json", _config(made, read_config(source)))
            read_config(place)


def _whole_model(module: Any, base: Source) -> Any:
    """The model that transformers knows by name, out of the adapter that shows one task of it."""
    transformers = extras.require("transformers")
    known = transformers.PreTrainedModel
    model = module if isinstance(module, known) else getattr(module, "model", None)
    if not isinstance(model, known) or not hasattr(transformers, type(model).__name__):
        raise SourceError(
            f"{base.name}: the task {base.task!r} shows a part of the model, a"
            f" {type(model or module).__name__}, which transformers cannot open by itself",
            hint="Choose a --task that takes the whole model.",
        )
    return model


def _beside(directory: Path) -> list[Path]:
    found = {file for pattern in _BESIDE for file in directory.glob(pattern) if file.is_file()}
    return sorted(found)


def _config(made: Path, original: dict[str, Any]) -> str:
    """The config that was written, with the switches as the original has them."""
    text = fs.read_text(made / "config.json", error=SourceError)
    config: Any = record.parse(text)
    _restore(config, original)
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _restore(config: dict[str, Any], original: dict[str, Any]) -> None:
    for key in _SWITCHES:
        config.pop(key, None)
        if key in original:
            config[key] = original[key]
    for key, nested in config.items():
        if isinstance(nested, dict):
            before = original.get(key)
            _restore(nested, before if isinstance(before, dict) else {})
