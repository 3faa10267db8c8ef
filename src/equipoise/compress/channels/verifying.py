"""Proof that couplings are right: a module that was cut gives what the whole one gives.

To cut channels must be the same as to let nobody look at them: the narrower module has to give the
numbers of the whole one in which the weights that lead from those channels are zero. Norms over
several channels would differ rightly, so they only scale and shift while this is checked. Weights
are random: of a trained branch that adds next to nothing, no wrong index would show.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.compress.channels.coupling import NO_CHANNEL, Coupling, Member, Role
from equipoise.compress.channels.cutting import cut_, mask_
from equipoise.sources.torch_model import NamedModule
from equipoise.spec import Array

_MAKERS: Final = frozenset({"outputs", "depthwise"})
_TOLERANCE: Final = {"float64": 1e-8, "float32": 1e-3}
"""Largest difference, relative to the largest output. A wrong index is off by about 1."""


def verified(
    module: Any,
    couplings: Sequence[Coupling],
    *,
    names: Sequence[str],
    tensors: Sequence[Any],
) -> tuple[tuple[Coupling, ...], tuple[str, ...]]:
    """Those couplings that can be cut, and notes on the others.

    Half of the channels are left out, of all at once; of each by itself only when that fails.

    Args:
        module: In evaluation mode. It is not changed.
        couplings: What to try.
        names: Of the inputs.
        tensors: One sample.
    """
    check = _Check(module, names=names, tensors=tensors)
    chosen = tuple(couplings)
    if not check.faults(chosen):
        return chosen, ()
    wrong = {coupling.name: check.fault((coupling,)) for coupling in chosen}
    paired = [p for p in _pairs([c for c in chosen if wrong[c.name]]) if not check.fault((p,))]
    solved = {member.key for pair in paired for member in pair.members if member.role in _MAKERS}
    chosen = (*(coupling for coupling in chosen if not wrong[coupling.name]), *paired)
    notes = [
        f"{coupling.name}: cannot be cut; {wrong[coupling.name]}"
        for coupling in couplings
        if wrong[coupling.name] and not any(m.key in solved for m in coupling.members)
    ]
    while chosen and (fault := check.faults(chosen)):
        notes.append(f"{chosen[-1].name}: cannot be cut together with others; {fault}")
        chosen = chosen[:-1]
    order = [coupling.name for coupling in couplings]
    return tuple(sorted(chosen, key=lambda coupling: order.index(coupling.name))), tuple(notes)


def _pairs(couplings: Sequence[Coupling]) -> Iterator[Coupling]:
    """Halves of what one layer makes (or thirds of it), as one coupling.

    A gate splits its channels in the middle, so as many have to go on either side.
    """
    shared: dict[tuple[object, ...], list[Coupling]] = defaultdict(list)
    for coupling in couplings:
        for member in coupling.members:
            if member.role in _MAKERS and not member.whole():
                shared[(*member.key, coupling.width)].append(coupling)
    alike = {tuple(c.name for c in halves): halves for halves in shared.values()}
    for halves in alike.values():
        if len(halves) > 1:
            yield joined(halves)


def joined(couplings: Sequence[Coupling]) -> Coupling:
    """Couplings of one width as one: the first channel with the first, the last with the last."""
    channels: dict[tuple[str, Role, int], Array] = {}
    for member in (m for coupling in couplings for m in coupling.members):
        channels[member.key] = np.maximum(
            channels.get(member.key, NO_CHANNEL), np.array(member.channels)
        )
    labels = list(zip(*(coupling.parts for coupling in couplings), strict=True))
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return Coupling(
        name=couplings[0].name,
        width=couplings[0].width,
        members=tuple(
            Member(module=module, role=role, axis=axis, channels=tuple(index.tolist()))
            for (module, role, axis), index in channels.items()
        ),
        parts=tuple(numbers[label] for label in labels),
    )


class _Check:
    """One sample and the module that everything is compared with."""

    def __init__(self, module: Any, *, names: Sequence[str], tensors: Sequence[Any]) -> None:
        self._names = names
        self._module, self._tensors = _random(copy.deepcopy(module)), tensors
        self._tolerance = _TOLERANCE["float32"]
        double = copy.deepcopy(self._module).double()
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        if not isinstance(self._run(double, wide), str):
            self._module, self._tensors = double, wide
            self._tolerance = _TOLERANCE["float64"]

    def _run(self, module: Any, tensors: Sequence[Any]) -> dict[str, Any] | str:
        """Outputs by name, or why there are none."""
        torch = extras.require("torch")
        named = NamedModule(module, names=self._names, source="the model")
        try:
            with torch.no_grad(), _only_scaling():
                return named.call(tensors)
        except Exception as error:  # noqa: BLE001 - a forward on sizes it does not expect may do anything
            first = str(error).strip().partition("\n")[0]
            return f"forward fails on fewer channels: {type(error).__name__}: {first}"

    def faults(self, couplings: Sequence[Coupling]) -> str:
        """Why these cannot be cut to widths of their own; empty when they can.

        All at once, and every other one alone: couplings that only go together show there.
        """
        rounds = (couplings, couplings[::2], couplings[1::2])
        return next((fault for chosen in rounds if (fault := self.fault(chosen))), "")

    def fault(self, couplings: Sequence[Coupling]) -> str:
        """Why these cannot be cut together; empty when they can."""
        kept = {coupling.name: _half(coupling) for coupling in couplings}
        narrow, masked = copy.deepcopy(self._module), copy.deepcopy(self._module)
        try:
            cut_(narrow, couplings, kept)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            return f"its tensors do not divide: {first}"
        mask_(masked, couplings, kept)
        found, wanted = self._run(narrow, self._tensors), self._run(masked, self._tensors)
        if isinstance(found, str) or isinstance(wanted, str):
            return found if isinstance(found, str) else str(wanted)
        same = all(_close(found[n], wanted[n], tolerance=self._tolerance) for n in wanted)
        return "" if same else "what comes out depends on more than its weights"


def _random(module: Any) -> Any:
    """``module`` with weights that let every path through it count. In place."""
    torch = extras.require("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan = math.prod(parameter.shape[1:])
                parameter.normal_(generator=generator).mul_(math.sqrt(2 / fan))
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module


def _half(coupling: Coupling) -> Array:
    """Every other channel of each part."""
    parts = np.array(coupling.parts)
    kept = np.zeros(coupling.width, dtype=bool)
    for part in np.unique(parts):
        kept[np.flatnonzero(parts == part)[::2]] = True
    return kept


def _close(found: Any, wanted: Any, *, tolerance: float) -> bool:
    if found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return bool((found == wanted).all())
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return bool(((found - wanted).abs() <= tolerance * max(scale, 1e-30)).all())


@contextlib.contextmanager
def _only_scaling() -> Iterator[None]:
    """Let norms over several channels scale and shift alone, whoever calls them."""
    functional: Any = extras.require("torch.nn.functional")
    replaced = {"layer_norm": _scaled_last, "rms_norm": _scaled_last, "group_norm": _scaled_second}
    before = {name: getattr(functional, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


def _scaled_last(
    value: Any, shape: Any, weight: Any = None, bias: Any = None, eps: Any = None
) -> Any:
    """``layer_norm`` without its statistics."""
    del eps
    if tuple(value.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"a norm over {tuple(shape)} was given {tuple(value.shape)}")
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _scaled_second(
    value: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: Any = None
) -> Any:
    """``group_norm`` without its statistics."""
    del eps
    if value.shape[1] % num_groups:
        raise ValueError(f"{value.shape[1]} channels do not divide into {num_groups} groups")
    shape = (1, -1, *(1 for _ in value.shape[2:]))
    value = value if weight is None else value * weight.view(shape)
    return value if bias is None else value + bias.view(shape)
