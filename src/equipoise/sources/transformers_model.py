"""A transformers directory as a module, with nothing in it believed.

Its JSON files are searched for what makes transformers run foreign code before transformers sees
them; its weights are read here, and none may be left at random.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, record
from equipoise.errors import EquipoiseError, SourceError, UnsafeCheckpointError
from equipoise.sources.checkpoint import first_few, read_checkpoint
from equipoise.sources.tasks import Task, architecture_of, fits, get_task
from equipoise.sources.timm_model import prepare_torchvision

_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_JSON_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "special_tokens_map.json",
)  # fmt: skip
_PICKLES: Final = ("*.pkl", "*.pickle", "*.joblib")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a transformers directory, when no file beside it asks to run code.

    Raises:
        UnsafeCheckpointError: A file brings code or a pickle along; names the file and the key.
        SourceError: There is no config, or it is no JSON object, or the weights are quantised.
    """
    config = _read_object(directory / "config.json")
    for file in (directory / name for name in _JSON_FILES):
        if file.is_file():
            _vet(_read_object(file), file=file)
    for pickled in (file for pattern in _PICKLES for file in directory.glob(pattern)):
        raise UnsafeCheckpointError(
            f"{pickled} is a pickle, which runs code when it is read",
            hint="Save the tokenizer with save_pretrained, and delete the pickle.",
        )
    _check_plain(config, directory)
    return config


def _read_object(file: Path) -> dict[str, Any]:
    text = fs.read_text(file, error=SourceError)
    try:
        value = record.parse(text)
    except ValueError as error:
        raise SourceError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{file} holds no JSON object: this is no transformers directory")
    return value


def _vet(value: Any, *, file: Path) -> None:
    for key, inner in _walk(value):
        if _runs_code(key, inner):
            raise UnsafeCheckpointError(
                f"{file} asks to run code that is not part of transformers: {key!r} is {inner!r}",
                hint=f"Delete {key!r} if transformers has this architecture itself; a model that"
                " needs its own code goes in as module:package.mod:factory.",
            )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict):
        yield from value.items()
    if isinstance(value, dict | list):
        for item in inner:
            yield from _walk(item)


def _runs_code(key: str, value: Any) -> bool:
    """Whether a setting makes transformers load code: each was, or could be, a vulnerability."""
    if key in {"auto_map", "trust_remote_code"}:
        return bool(value)
    if key.endswith("_internal"):
        return value is not None
    # A name with a slash is a repository of compiled kernels.
    return "attn_implementation" in key and "/" in str(value)


def _check_plain(config: dict[str, Any], directory: Path) -> None:
    """Refuse weights that are not simply those of the architecture."""
    if config.get("quantization_config"):
        raise SourceError(
            f"{directory} holds weights that are quantised already",
            hint="Give the float model; equipoise quantises it for the target.",
        )
    if (directory / "adapter_config.json").is_file():
        raise SourceError(
            f"{directory} holds an adapter, which needs its base model",
            hint="Merge it with model.merge_and_unload(), and save that with save_pretrained.",
        )


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files of the weights: one, or the shards that an index names.

    Raises:
        SourceError: There are none, the index is broken, or a shard is missing.
        UnsafeCheckpointError: The index points outside of the directory.
    """
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return (directory / name,)
        if (directory / f"{name}.index.json").is_file():
            return _shards(directory / f"{name}.index.json")
    raise SourceError(
        f"{directory} has no {_WEIGHTS[0]}, nor {_WEIGHTS[1]}, nor an index of shards",
        hint="Save the model with model.save_pretrained(path).",
    )


def _shards(index: Path) -> tuple[Path, ...]:
    named = _read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) and n for n in named.values()):
        raise SourceError(f"{index}: weight_map does not say which file each weight is in")
    for weight, name in named.items():
        if Path(name).name != name or name == ".." or "\\" in name:
            raise UnsafeCheckpointError(f"{index} puts {weight!r} outside of the directory: {name}")
    files = tuple(index.parent / name for name in sorted(set(named.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise SourceError(f"{index} names shards that are not there: {first_few(missing)}")
    return files


def load_transformers(directory: Path, *, task: str) -> Any:
    """The model in ``directory`` with its weights, in float32, seen as ``task`` says.

    Raises:
        UnsafeCheckpointError: See :func:`read_config` and ``checkpoint.read_checkpoint``.
        SourceError: transformers cannot build it, a weight is missing or has another shape, or the
            model does not have the part that ``task`` names.
    """
    build = _Builder(directory, task=get_task(task))
    weights: dict[str, Any] = {}
    for file in weight_files(directory):
        weights |= read_checkpoint(file)
    return build.adapted(build.loaded(weights))


def build_transformers(directory: Path, *, task: str) -> Any:
    """The same without weights, on the device that is in force. Raises as above."""
    build = _Builder(directory, task=get_task(task))
    return build.adapted(build.empty())


class _Builder:
    """The class and config of one directory for one task."""

    def __init__(self, directory: Path, *, task: Task) -> None:
        self.directory = directory
        self.task = task
        self.architecture = architecture_of(read_config(directory))
        self.library = _transformers()
        self.config = self._config()

    def _config(self) -> Any:
        with self._errors():
            config = self.library.AutoConfig.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
        _switch_off(config)
        return config

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return _told_by(f"transformers cannot build {self.directory} for {self.task.name}")

    def _own_class(self) -> Any:
        """The class that the checkpoint was saved from; None when the task needs another."""
        if not fits(self.architecture, task=self.task):
            return None
        found = getattr(self.library, self.architecture, None) if self.architecture else None
        if isinstance(found, type) and issubclass(found, self.library.PreTrainedModel):
            return found
        raise SourceError(
            f"{self.directory}: transformers {self.library.__version__} has no architecture"
            f" {self.architecture!r}",
            hint="Correct architectures in config.json, or install a newer transformers.",
        )

    def empty(self) -> Any:
        own = self._own_class()
        with self._errors():
            if own is not None:
                return own(self.config)
            return getattr(self.library, self.task.auto).from_config(self.config)

    def loaded(self, weights: dict[str, Any]) -> Any:
        torch = extras.require("torch")
        with torch.device("meta"):
            chosen = type(self.empty())
        model, info = self._fill(chosen, weights, options={})
        poolerless = "add_pooling_layer" in inspect.signature(chosen.__init__).parameters
        missing = sorted(info["missing_keys"])
        if poolerless and missing and all("pooler" in name.split(".") for name in missing):
            model, info = self._fill(chosen, weights, options={"add_pooling_layer": False})
        self._check_complete(model, info, weights)
        return model

    def _fill(self, chosen: Any, weights: dict[str, Any], *, options: dict[str, Any]) -> Any:
        """Build and fill the model. Wrong shapes are let through here to be named later."""
        torch = extras.require("torch")
        with self._errors():
            return chosen.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(weights),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )

    def _check_complete(self, model: Any, info: dict[str, Any], weights: dict[str, Any]) -> None:
        """What is missing, transformers draws at random; what it cannot place, it drops."""
        faults = {
            "missing": sorted(info["missing_keys"]),
            "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
            "without a place": _unplaced(model, sorted(info["unexpected_keys"]), weights),
        }
        told = [f"{what}: {first_few(names)}" for what, names in faults.items() if names]
        if told:
            raise SourceError(
                f"{self.directory}: the weights are not those of {type(model).__name__}:"
                f" {'; '.join(told)}",
                hint="Choose the --task that the model was trained for, or correct config.json.",
            )

    def adapted(self, model: Any) -> Any:
        """``model`` as the task sees it: whole, or one part of it behind a plain signature."""
        adapt = _ADAPTERS.get(self.task.name)
        if adapt is None:
            return model
        try:
            return adapt(model)
        except _NoSuchPartError as error:
            raise SourceError(
                f"{self.directory}: {type(model).__name__} has no {error}",
                hint=f"--task {self.task.name} does not fit it; leave --task out to see what does.",
            ) from error


class _NoSuchPartError(Exception):
    """A model has not got what a task wants."""


@contextlib.contextmanager
def _told_by(what: str) -> Iterator[None]:
    """Turn whatever transformers raises into a SourceError that begins with ``what``."""
    try:
        yield
    except EquipoiseError:
        raise
    except Exception as error:  # a wrong config reaches any exception
        first = str(error).strip().partition("\n")[0]
        raise SourceError(f"{what}: {type(error).__name__}: {first}") from error


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a local directory needs no network, and gets none
    extras.require("torch")
    prepare_torchvision()
    library = extras.require("transformers")
    library.utils.logging.set_verbosity_error()  # what it warns of is an error of ours
    library.utils.logging.disable_progress_bar()
    return library


def _switch_off(config: Any) -> None:
    """No caches and no inner states among the outputs, in the config and those nested in it."""
    config.use_cache = False
    config.output_attentions = False
    config.output_hidden_states = False
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None:
            _switch_off(nested)


def _unplaced(model: Any, names: list[str], weights: dict[str, Any]) -> list[str]:
    """Weights that belong inside the model, yet have no place there.

    A head or pooler of another task is dropped without harm: it hangs at the root or at the base
    model. One that hangs deeper, such as a layer too many, would have changed the numbers.
    """
    modules = {name for name, _ in model.named_modules()}
    roots = {"", model.base_model_prefix}
    return [
        name
        for name in names
        if _deepest(name, modules) not in roots
        and (name not in weights or weights[name].is_floating_point())
    ]


def _deepest(name: str, modules: set[str]) -> str:
    """The longest beginning of a weight's name that is a module."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _adapter(model: Any, call: Callable[..., dict[str, Any]], *, names: tuple[str, ...]) -> Any:
    """A module whose ``forward`` takes exactly ``names`` and calls ``call(model, ...)``."""
    torch = extras.require("torch")

    class Adapter(torch.nn.Module):  # type: ignore[misc, name-defined]
        main_input_name = names[0]

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(self, *tensors: Any, **named: Any) -> dict[str, Any]:
            return call(self.model, **dict(zip(names, tensors, strict=False)), **named)

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, either) for name in ("self", *names)]
    Adapter.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Adapter()


def _text_or_signal(encoder: Any) -> tuple[str, ...]:
    """Inputs of an encoder: text comes with a mask, a picture or a spectrogram whole."""
    main = encoder.main_input_name
    return (main, "attention_mask") if main == "input_ids" else (main,)


def _encoder(model: Any) -> Any:
    if not model.config.is_encoder_decoder and not hasattr(model, "encoder"):
        raise _NoSuchPartError("encoder apart from the rest")
    encoder = model.get_encoder()

    def call(encoder: Any, **feeds: Any) -> dict[str, Any]:
        return {"last_hidden_state": encoder(**feeds)[0]}

    return _adapter(encoder, call, names=_text_or_signal(encoder))


def _decoder(model: Any) -> Any:
    """One step without a cache: all tokens so far in, logits for each out."""
    if not model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise _NoSuchPartError("decoder that gives logits")
    text = len(_text_or_signal(model.get_encoder())) > 1

    def call(
        model: Any,
        decoder_input_ids: Any,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any = None,
    ) -> dict[str, Any]:
        mask = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        states = (encoder_hidden_states,)
        found = model(
            encoder_outputs=states, decoder_input_ids=decoder_input_ids, use_cache=False, **mask
        )
        return {"logits": found.logits}

    names = ("decoder_input_ids", "encoder_hidden_states")
    return _adapter(model, call, names=(*names, "encoder_attention_mask") if text else names)


def _text_tower(model: Any) -> Any:
    return _tower(model, "text", names=("input_ids", "attention_mask"))


def _image_tower(model: Any) -> Any:
    return _tower(model, "image", names=("pixel_values",))


def _tower(model: Any, kind: str, *, names: tuple[str, ...]) -> Any:
    """One half of a CLIP-like model, with its projection; not normalised."""
    method = f"get_{kind}_features"
    if not hasattr(model, method):
        raise _NoSuchPartError(f"{kind} tower")

    def call(model: Any, **feeds: Any) -> dict[str, Any]:
        found = getattr(model, method)(**feeds)
        return {f"{kind}_embeds": getattr(found, "pooler_output", found)}

    return _adapter(model, call, names=names)


_ADAPTERS: Final = {
    "encoder": _encoder,
    "decoder": _decoder,
    "text-embedding": _text_tower,
    "image-embedding": _image_tower,
}
