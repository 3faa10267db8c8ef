"""Weights of somebody else's training, read without running anything that is in the file.

Pickles are read by PyTorch's restricted unpickler alone. There is no second try without it: a file
that it refuses is code, and code has no business in a file of weights.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from equipoise import extras
from equipoise.errors import (
    IncompatibleError,
    NonFiniteError,
    SourceError,
    UnsafeCheckpointError,
)

SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin")
_SAVE_ANEW: Final = (
    "Save the weights where the model was trained:"
    " safetensors.torch.save_file(model.state_dict(), path)."
)
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
_PREFIXES: Final = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_SAFE_TORCH: Final = (2, 10)  # before it, weights_only=True could still be made to corrupt memory
_REFUSED: Final = re.compile(r"GLOBAL ([\w.]+)")
_PLAIN: Final = re.compile(
    r"collections\.OrderedDict|torch\.(\w+Storage|Size|device|\w*(float|int|bool)\w*)"
    r"|torch\.(_utils|_tensor)\._rebuild\w+|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout"
)
"""What tensors are pickled with."""
_MOST_NAMED: Final = 4
_MOST_PICKLE_BYTES: Final = 1 << 26
_UNREADABLE: Final = (
    ValueError, LookupError, OverflowError, MemoryError, OSError, RuntimeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors of a checkpoint by name, on the CPU and dense.

    Takes ``.safetensors``, ``.pth``, ``.pt`` and ``.bin``. A state dict may lie under
    ``state_dict``, ``model_state_dict`` or ``model``; a prefix that DataParallel or
    ``torch.compile`` put before every name is taken off.

    Raises:
        UnsafeCheckpointError: The file asks for code: a global that is no weight, TorchScript, a
            whole pickled module; or the environment switches the protection off.
        SourceError: Missing, empty, damaged, or no state dict of tensors.
        IncompatibleError: PyTorch is too old to read pickles safely.
    """
    if path.suffix not in SUFFIXES:
        raise SourceError(f"{path}: weights come as {', '.join(SUFFIXES)}", hint=_SAVE_ANEW)
    if not path.is_file():
        raise SourceError(f"no such file of weights: {path}")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    return _without_prefix(_state_dict(read(path), path))


def _read_safetensors(path: Path) -> Any:
    safetensors: Any = extras.require("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # safetensors raises its own Rust exception type
        raise SourceError(f"{path} is no valid safetensors file: {_first_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    _check_archive(path)
    with path.open("rb") as file:
        return unpickle(file, what=str(path))


def _check_archive(path: Path) -> None:
    """Refuse what the restricted unpickler would not see: code beside the pickle, and twins."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise SourceError(f"{path} is damaged: {error}") from error
    twins = [name for name, times in Counter(names).items() if times > 1]
    if twins:
        raise SourceError(f"{path} is damaged: it holds {twins[0]!r} twice")
    if any(name.split("/")[1:2] == ["code"] for name in names):
        raise UnsafeCheckpointError(f"{path} is TorchScript: code, not weights", hint=_SAVE_ANEW)


def unpickle(file: BinaryIO, *, what: str) -> Any:
    """What a file of ``torch.save`` holds, read by the restricted unpickler.

    Args:
        file: Open for reading, at its beginning.
        what: Its name in messages.

    Raises:
        As :func:`read_checkpoint`.
    """
    torch = extras.require("torch")
    _check_protection(torch)
    try:
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            warnings.simplefilter("ignore")  # of protocols that may fail; that is told below
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # a hostile pickle reaches any exception it likes
        raise _refusal(error, file, what=what) from error


def _check_protection(torch: Any) -> None:
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name):
        raise UnsafeCheckpointError(
            f"{name} is set: PyTorch would run code that a checkpoint brings along",
            hint=f"Unset {name}.",
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise IncompatibleError(
            f"torch {torch.__version__} cannot read pickled weights safely; 2.10 or newer can",
            hint="Install a newer torch, or give the weights as .safetensors.",
        )


def _refusal(error: Exception, file: BinaryIO, *, what: str) -> SourceError:
    """Say whether a pickle that cannot be read is hostile, foreign or damaged."""
    text = str(error)
    found = _REFUSED.search(text)
    strange = "Unsupported operand" in text  # an opcode of a newer or older protocol
    asked = found[1] if found else next(_foreign_globals(file), "") if strange else ""
    if asked:
        kind = "a whole module" if asked.startswith("torch.nn.modules") else "code"
        return UnsafeCheckpointError(f"{what} holds {kind}, not weights: {asked}", hint=_SAVE_ANEW)
    if "TorchScript" in text or ".tar format" in text:
        kind = "TorchScript" if "TorchScript" in text else "a tar archive of an ancient PyTorch"
        return UnsafeCheckpointError(f"{what} is {kind}, which cannot be read without running code")
    if strange:
        return SourceError(
            f"{what} is a pickle of a protocol that cannot be read safely",
            hint=f"{_SAVE_ANEW} torch.save's own protocol is 2.",
        )
    return SourceError(f"{what} is damaged or no checkpoint: {_reason(error)}", hint=_SAVE_ANEW)


def _reason(error: Exception) -> str:
    """What went wrong, without PyTorch's advice to read the file unsafely."""
    inner = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    return f"{type(error).__name__}: {inner.partition(chr(10))[0][:200]}".rstrip(": ")


def _foreign_globals(file: BinaryIO) -> Iterator[str]:
    """Globals that a pickle names and a state dict does not need, read and never looked up."""
    try:
        for pickled in _pickles(file):
            yield from (name for name in _globals(pickled) if not _PLAIN.fullmatch(name))
    except _UNREADABLE:
        return  # what can be made out was looked at


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """The pickles of a file of ``torch.save``: members of a zip archive, or the file itself."""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        file.seek(0)
        yield file
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl") and member.file_size < _MOST_PICKLE_BYTES:
                yield io.BytesIO(archive.read(member))


def _globals(file: BinaryIO) -> Iterator[str]:
    """Every ``module.name`` of the pickles in a row in ``file``, of any protocol."""
    strings: list[str] = []
    while True:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in {"GLOBAL", "INST"}:
                yield str(argument).replace(" ", ".")
            elif operation.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    """The state dict in what was loaded, every value a dense tensor."""
    torch = extras.require("torch")
    if isinstance(loaded, Mapping):
        inner = (loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping))
        loaded = next(inner, loaded)
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "an empty dict" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise SourceError(f"{path} holds {kind}, not a state dict", hint=_SAVE_ANEW)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{path} holds no state dict: {name!r} is {type(value).__name__}, not a tensor",
                hint=_SAVE_ANEW,
            )
    return {name: value.detach().to_dense() for name, value in loaded.items()}


def _without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def load_weights(module: Any, path: Path) -> None:
    """Give ``module`` exactly the weights in ``path``.

    Raises:
        SourceError: Names are missing or unexpected, or shapes differ; the first few are named.
        As :func:`read_checkpoint`.
    """
    given = read_checkpoint(path)
    wanted = module.state_dict()
    problems = [
        *_listed("missing", _missing(wanted, given)),
        *_listed("unexpected", sorted(set(given) - set(wanted))),
        *_listed("of another shape", _misshapen(wanted, given)),
    ]
    if problems:
        raise SourceError(
            f"{path} does not fit the model: {'; '.join(problems)}",
            hint="Give the weights of this architecture, with the names of its state_dict.",
        )
    try:
        module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise SourceError(f"{path} does not fit the model: {_first_line(error)}") from error


def _missing(wanted: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Names without a tensor, but for another name of a given one and counters of training."""
    shared = {wanted[name].data_ptr() for name in given if name in wanted}
    return sorted(
        name
        for name, value in wanted.items()
        if name not in given
        and not name.endswith("num_batches_tracked")
        and not (value.numel() and value.data_ptr() in shared)
    )


def _misshapen(wanted: dict[str, Any], given: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {list(value.shape)}, the model has {list(wanted[name].shape)}"
        for name, value in sorted(given.items())
        if name in wanted and value.shape != wanted[name].shape
    ]


def _listed(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {first_few(names)}"] if names else []


def first_few(names: list[str]) -> str:
    """The first names of a list for a message, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def require_finite_weights(module: Any, *, what: str) -> None:
    """Check that ``module`` can give numbers at all.

    Buffers may hold infinity: that is how attention masks are written.

    Raises:
        NonFiniteError: A parameter holds NaN or infinity, or a buffer NaN; names it and counts.
    """
    for name, value in module.named_parameters():
        _require_none(~value.isfinite(), name, what)
    for name, value in module.named_buffers():
        _require_none(value.isnan(), name, what)


def _require_none(bad: Any, name: str, what: str) -> None:
    count = int(bad.sum())
    if count:
        raise NonFiniteError(
            f"{what}: {count} of {bad.numel()} numbers in the weight {name!r} are NaN or infinite",
            hint="Training diverged or the file is damaged; take an earlier checkpoint.",
        )
