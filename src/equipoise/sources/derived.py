"""Modules whose sizes were changed after they were built: a directory with two files.

    source.json         what builds the module, and what was changed of it since
    model.safetensors   its weights

The description is data: sizes that modules have already got get other values, and modules are left
out. It names no code but the one that builds the base, which the user has in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, record
from equipoise.errors import SourceError
from equipoise.sources.checkpoint import first_few
from equipoise.sources.layer_sizes import stated_sizes

FORMAT: Final = 1
DESCRIPTION: Final = "source.json"
WEIGHTS: Final = "model.safetensors"
BASES: Final = ("module:", "timm:")
Setting = bool | int | tuple[bool | int | None, ...] | None
"""What a size may be: a channel count, a shape, the groups of a convolution."""


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """What ``source.json`` says.

    Attributes:
        format: Version of this form.
        base: ``module:package.mod:factory`` or ``timm:NAME``.
        task: What the model is for.
        labels: Class names in index order.
        sizes: Module -> attribute -> what it is now, where that differs from the base.
        identities: Modules in whose place ``torch.nn.Identity`` stands.
        removed: Modules that are not there any more.
    """

    format: int
    base: str
    task: str = ""
    labels: tuple[str, ...] = ()
    sizes: dict[str, dict[str, Setting]] = field(default_factory=dict)
    identities: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def is_derived(directory: Path) -> bool:
    """Whether ``directory`` holds such a source."""
    return (directory / DESCRIPTION).is_file()


def read_derivation(directory: Path) -> Derivation:
    """What ``source.json`` of ``directory`` says.

    Raises:
        SourceError: It is no such description, of another format, or the weights are missing.
    """
    file = directory / DESCRIPTION
    text = fs.read_text(file, error=SourceError)
    _check_format(text, file)
    found = record.loads(Derivation, text, where=str(file), error=SourceError)
    if not found.base.startswith(BASES):
        raise SourceError(
            f"{file}: the base {found.base!r} is none of {', '.join(f'{b}...' for b in BASES)}"
        )
    if not (directory / WEIGHTS).is_file():
        raise SourceError(f"{directory} has no {WEIGHTS}")
    return found


def _check_format(text: str, file: Path) -> None:
    """A newer form is told as such, not as an unknown key."""
    try:
        value = record.parse(text)
    except ValueError as error:
        raise SourceError(f"{file} is no JSON: {error}") from error
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise SourceError(
            f"{file} has the format {found!r}; {FORMAT} is known",
            hint="Read it with the version of equipoise that wrote it, or write it anew.",
        )


# From a module to its description


def described(module: Any, *, fresh: Any, base: str) -> Derivation:
    """What tells ``module`` from ``fresh``, the same as its base builds it.

    Raises:
        SourceError: It has a module that the base has not got, or one of another class.
    """
    mine = dict(module.named_modules())
    theirs = dict(fresh.named_modules())
    identities: list[str] = []
    removed: list[str] = []
    sizes: dict[str, dict[str, Setting]] = {}
    for name, other in theirs.items():
        if _beneath(name, (*identities, *removed)):
            continue
        if name not in mine:
            removed.append(name)
        elif _class(mine[name]) == _class(other):
            sizes |= _named(name, _differing(vars(mine[name]), vars(other)))
        else:
            _require_identity(mine[name], other, name=name, base=base)
            identities.append(name)
    _require_none(sorted(set(mine) - set(theirs)), base)
    return Derivation(
        format=FORMAT,
        base=base,
        sizes=sizes,
        identities=tuple(identities),
        removed=tuple(removed),
    )


def _beneath(name: str, parents: Sequence[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _class(module: Any) -> tuple[str, str]:
    """A factory that makes its classes anew gives others of the same name each time."""
    return type(module).__module__, type(module).__qualname__


def _named(name: str, found: dict[str, Setting]) -> dict[str, dict[str, Setting]]:
    return {name: found} if found else {}


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Setting]:
    torch = extras.require("torch")
    every = set(vars(torch.nn.Module()))  # ``training`` and the tables of every module
    return {
        key: setting(value)
        for key, value in mine.items()
        if key in theirs and key not in every
        if is_setting(value) and is_setting(theirs[key])
        if _kind(value) == _kind(theirs[key]) and setting(value) != setting(theirs[key])
    }


def is_setting(value: object) -> bool:
    """Whether ``value`` can stand in a description."""
    parts = value if isinstance(value, tuple | list) else [value]
    return all(part is None or isinstance(part, bool | int) for part in parts)


def setting(value: Any) -> Setting:
    """``value`` as it stands in a description."""
    return tuple(value) if isinstance(value, tuple | list) else value


def _kind(value: object) -> str:
    """What a size is changed to must be of the same kind."""
    if isinstance(value, tuple | list):
        return "a list"
    return "null" if value is None else "true or false" if isinstance(value, bool) else "an integer"


def _require_identity(module: Any, other: Any, *, name: str, base: str) -> None:
    torch = extras.require("torch")
    if not isinstance(module, torch.nn.Identity):
        raise SourceError(
            f"{name or 'the model'} is {type(module).__name__}; {base} builds"
            f" {type(other).__name__} there",
            hint="Sizes can be changed and modules left out; a model of other parts needs a"
            " factory of its own.",
        )


def _require_none(added: list[str], base: str) -> None:
    if added:
        raise SourceError(
            f"the model has modules that {base} does not build: {first_few(added)}",
            hint="Take off what training or tracing has put into it before it is saved.",
        )


# From a description to the module


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file, from its header alone.

    Raises:
        SourceError: It is no such file.
    """
    safetensors: Any = extras.require("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own Rust exception type
        first = str(error).strip().partition("\n")[0]
        raise SourceError(f"{file} is no valid safetensors file: {first}") from error


def apply_(
    module: Any, derivation: Derivation, *, shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Change ``module`` as ``derivation`` says, and give its tensors ``shapes``. In place.

    Args:
        module: As the base builds it, on any device.
        derivation: What to change.
        shapes: Of every tensor of its state_dict. The values are those of no model afterwards.
        where: The directory, for messages.

    Raises:
        SourceError: A module, an attribute or a place for a tensor is not there, or a size cannot
            be.
    """
    torch = extras.require("torch")
    modules = dict(module.named_modules())
    for name in reversed(derivation.removed):
        _remove(_owner(modules, name, where), name)
    for name in derivation.identities:
        setattr(_owner(modules, name, where), name.rpartition(".")[2], torch.nn.Identity())
    for name, sizes in derivation.sizes.items():
        changed = _module(modules, name, where)
        for key, value in sizes.items():
            _set(changed, key, value, where=f"{where}: {name or 'the model'}")
    _shape(module, shapes, where)
    _check_sizes(module, where)


def _module(modules: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in modules:
        raise SourceError(
            f"{where}: the base has no module {name!r}",
            hint="Its code has changed since; take the version that the model was made with.",
        )
    return modules[name]


def _owner(modules: Mapping[str, Any], name: str, where: str) -> Any:
    """The module that holds the module ``name``."""
    _module(modules, name, where)
    if not name:
        raise SourceError(f"{where}: the model itself cannot be left out")
    return modules[name.rpartition(".")[0]]


def _remove(owner: Any, name: str) -> None:
    """A list gets shorter; of another module the attribute stays, and is None."""
    torch = extras.require("torch")
    key = name.rpartition(".")[2]
    lists = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
    if isinstance(owner, lists):
        delattr(owner, key)
    else:
        setattr(owner, key, None)


def _set(module: Any, key: str, value: Setting, *, where: str) -> None:
    """Only what is there already, and was a size before, gets another value."""
    torch = extras.require("torch")
    held = vars(module)
    if key not in held or key in vars(torch.nn.Module()) or not is_setting(held[key]):
        raise SourceError(f"{where} ({type(module).__name__}) has no size called {key!r}")
    if _kind(held[key]) != _kind(value):
        raise SourceError(f"{where}: {key!r} is {_kind(held[key])}, not {value!r}")
    setattr(module, key, type(held[key])(value) if isinstance(value, tuple) else value)


def _shape(module: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    unplaced = [name for name, shape in sorted(shapes.items()) if not _place(module, name, shape)]
    if unplaced:
        raise SourceError(
            f"{where}/{WEIGHTS} holds tensors for which the base has no place:"
            f" {first_few(unplaced)}",
            hint="Its code has changed since; take the version that the model was made with.",
        )
    missing = sorted(_missing(module, shapes))
    if missing:
        raise SourceError(f"{where}/{WEIGHTS} does not fit: missing: {first_few(missing)}")


def _missing(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Names without a tensor, but for other names of a stored one and counters of training."""
    named = dict(module.named_parameters(remove_duplicate=False))
    stored = {id(parameter) for name, parameter in named.items() if name in shapes}
    for name in module.state_dict():
        counter = name.endswith("num_batches_tracked")
        if name not in shapes and not counter and id(named.get(name)) not in stored:
            yield name


def _place(module: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Make room for one tensor. False when there is no parameter or buffer of that name."""
    torch = extras.require("torch")
    path, _, key = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    held = getattr(owner, key, False)
    like = next(owner.parameters(recurse=False), None)
    if held is None and key == "bias" and like is not None:  # a layer that was built without one
        owner.register_parameter(key, torch.nn.Parameter(like.data.new_empty(shape)))
        return True
    if not isinstance(held, torch.Tensor):
        return False
    _check_rank(name, tuple(held.shape), shape)
    if tuple(held.shape) != shape and isinstance(held, torch.nn.Parameter):
        held.data = held.data.new_empty(shape)
    elif tuple(held.shape) != shape:
        setattr(owner, key, held.new_empty(shape))
    return True


def _check_rank(name: str, built: tuple[int, ...], stored: tuple[int, ...]) -> None:
    fits = len(built) == len(stored) and all(size > 0 for size in stored)
    if built != stored and not fits:
        raise SourceError(
            f"the tensor {name!r} has the shape {list(stored)}, which {list(built)} of the base"
            " cannot have become"
        )


def _check_sizes(module: Any, where: str) -> None:
    """The sizes that layers state must be those of their weights."""
    for name, layer in module.named_modules():
        for key, stated, held in stated_sizes(layer):
            if stated != held:
                raise SourceError(
                    f"{where}: {name!r} has {key} {stated}, but its tensors are for {held}",
                    hint=f"{DESCRIPTION} and {WEIGHTS} belong to different models.",
                )
