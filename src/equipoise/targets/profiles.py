"""The known targets, read from ``data/*.toml``, and targets of the user's own."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from equipoise import fs, record
from equipoise.errors import EquipoiseError, IncompatibleError, RecipeError, unknown_name
from equipoise.targets.machine import Machine
from equipoise.targets.profile import Int8Scheme, Target

_DATA: Final = Path(__file__).parent / "data"
_SCHEMES_FILE: Final = _DATA / "schemes.toml"
_DOT_PRODUCT_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})

Table = Mapping[str, Any]


def _read(path: Path, *, error: type[EquipoiseError]) -> dict[str, Any]:
    try:
        return tomllib.loads(fs.read_text(path, error=error))
    except tomllib.TOMLDecodeError as cause:
        raise error(f"{path} is no TOML: {cause}") from cause


def _merged(base: Table, over: Table) -> dict[str, Any]:
    """``base`` with the values of ``over``, table by table."""
    both = {
        key: _merged(base[key], value)
        if isinstance(value, dict) and isinstance(base.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**base, **both}


@functools.cache
def _schemes() -> Table:
    """Name -> fields of an integer scheme."""
    return _read(_SCHEMES_FILE, error=RecipeError)


@functools.cache
def _tables() -> Mapping[str, Table]:
    """Target -> its fields, its family's defaults included."""
    found: dict[str, Table] = {}
    for path in sorted(_DATA.glob("*.toml")):
        if path != _SCHEMES_FILE:
            family = _read(path, error=RecipeError)
            common = {**family.get("defaults", {}), "family": family["family"]}
            for name, own in family["targets"].items():
                found[name] = _merged(common, {**own, "name": name})
    return found


def _target(table: Table, *, where: str) -> Target:
    """The target of a table, in which a scheme may stand by its name."""
    scheme = table.get("int8")
    if isinstance(scheme, str):
        if scheme not in _schemes():
            raise unknown_name("integer scheme", scheme, _schemes())
        table = {**table, "int8": _schemes()[scheme]}
    try:
        return record.from_json(Target, dict(table))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def cpu_scheme(machine: Machine) -> Int8Scheme:
    """The integer scheme that ONNX Runtime's CPU kernels want on ``machine``."""
    return get_target(_cpu_target(machine), machine=machine).int8


def _cpu_target(machine: Machine) -> str:
    if machine.architecture in {"aarch64", "arm64"}:
        return "arm64"
    return "x86-vnni" if _DOT_PRODUCT_FLAGS & set(machine.flags) else "x86-avx2"


def target_names() -> tuple[str, ...]:
    """Names of all targets."""
    return tuple(sorted(_tables()))


def get_target(name: str, *, machine: Machine) -> Target:
    """The profile ``name``, or the one in a file; ``cpu`` is what ``machine`` is.

    Args:
        name: A known name, or the path of a ``.toml`` file.
        machine: Where this runs.

    Raises:
        UsageError: There is no such target; the message names the known ones.
        RecipeError: The file is no TOML, or a key or a value in it is not known.
    """
    if name.endswith(".toml"):
        return read_target(Path(name))
    if name not in _tables():
        raise unknown_name("target", name, _tables())
    target = _target(_tables()[name], where=name)
    return _here(target, machine) if name == "cpu" else target


def _here(target: Target, machine: Machine) -> Target:
    """The profile of this machine, from its own flags."""
    alike = _target(_tables()[_cpu_target(machine)], where="cpu")
    return replace(
        alike,
        name=target.name,
        summary=f"{target.summary}: {machine.cpu}, {machine.cores} core(s)",
        hardware=replace(alike.hardware, flags=machine.flags, cores=machine.cores),
    )


def read_target(path: Path) -> Target:
    """A target of the user's own.

    The file has the fields of :class:`~equipoise.targets.profile.Target`; with ``extends = "NAME"``
    those of a known target are taken where it says nothing. Its name is that of the file.

    Raises:
        RecipeError: There is no such file, or a key or a value in it is not known.
        UsageError: ``extends`` or ``int8`` names what does not exist.
    """
    own = _read(path, error=RecipeError)
    extended = own.pop("extends", None)
    if extended is not None and extended not in _tables():
        raise unknown_name("target", str(extended), _tables())
    base = _tables()[extended] if extended else {"family": "own"}
    return _target(_merged(base, {**own, "name": path.stem}), where=str(path))


def require_measurable(target: Target, *, machine: Machine, runtimes: Collection[str]) -> None:
    """Refuse to measure on a machine that is not the target.

    Args:
        target: What engines are for.
        machine: Where they would run.
        runtimes: Names of the runtimes that equipoise can run.

    Raises:
        IncompatibleError: The target's runtime is not among them, or its CPU is of another kind.
    """
    hint = f"Make its file with `equipoise quantize --target {target.name}` and measure it there."
    if target.runtime not in runtimes:
        raise IncompatibleError(
            f"the target {target.name!r} needs the runtime {target.runtime!r}, which equipoise"
            f" cannot run here; it runs {', '.join(sorted(runtimes))}",
            hint=hint,
        )
    if not is_here(target, machine):
        raise IncompatibleError(
            f"this machine ({machine.cpu}) is no {target.name!r}, so what it measures would not"
            f" hold there: {target.summary}",
            hint=hint,
        )


def is_here(target: Target, machine: Machine) -> bool:
    """Whether ``machine`` is a CPU like ``target``, with the same integer scheme."""
    wanted, present = target.hardware, set(machine.flags)
    if wanted.kind != "cpu" or wanted.architecture not in {machine.architecture, ""}:
        return False
    named = not wanted.any_flag or bool(present & set(wanted.any_flag))
    alike = target.runtime != "onnxruntime" or target.int8 == cpu_scheme(machine)
    return named and alike and present >= set(wanted.flags)
