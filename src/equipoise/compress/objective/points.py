"""Where the spatial size of feature maps changes in a convolutional network."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise import extras
from equipoise.compress.objective.recorder import first_tensor

Point = tuple[str, int]
"""A module by its dotted name, and which of its calls in one run."""
Size = tuple[int, int]
"""Height and width."""


def feature_points(module: Any, *, run: Callable[[], object]) -> dict[Size, Point]:
    """The last feature map of each spatial size, on the way from the input to the output.

    A block that halves the size computes maps of the old size inside of it, which are no more than
    its own: they are passed over, and the map that goes into the block is taken.

    Args:
        module: A convolutional network.
        run: Runs it once, on a real batch.

    Returns:
        Size to the call that gives that map, larger sizes first. Maps of one position are left
        out: they say nothing about where a network looks.
    """
    trace = _Trace()
    handles = []
    for name, inner in module.named_modules():
        enter = functools.partial(trace.enter, name)
        handles.append(inner.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(inner.register_forward_hook(trace.leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return _points(trace.ended)


@dataclass(kw_only=True)
class _Call:
    """One call of a module.

    Attributes:
        point: Which.
        learned: Whether it has weights.
        chain: Whether it runs its children one behind the other, and so is no block of its own.
        around: The calls that it is inside of.
        before: Size of its input; None when that is no feature map.
        after: Size of its output.
    """

    point: Point
    learned: bool
    chain: bool
    around: Sequence[_Call]
    before: Size | None
    after: Size | None = field(default=None)


class _Trace:
    """The calls of one run, in the order that they end."""

    def __init__(self) -> None:
        self.ended: list[_Call] = []
        self._open: list[_Call] = []
        self._times: dict[str, int] = {}

    def enter(self, name: str, module: Any, positional: Any, named: dict[str, Any]) -> None:
        times = self._times.get(name, 0)
        self._times[name] = times + 1
        call = _Call(
            point=(name, times),
            learned=next(module.parameters(), None) is not None,
            chain=_is_chain(module),
            around=tuple(self._open),
            before=_size((*positional, *named.values())),
        )
        self._open.append(call)

    def leave(self, _: Any, __: Any, output: Any) -> None:
        call = self._open.pop()
        call.after = _size(output)
        self.ended.append(call)


def _is_chain(module: Any) -> bool:
    """Whether a module does nothing but run a list of children, one behind the other."""
    torch = extras.require("torch")
    children = list(module.children())
    lists = torch.nn.Sequential | torch.nn.ModuleList
    return isinstance(module, torch.nn.Sequential) or (
        len(children) == 1 and isinstance(children[0], lists)
    )


def _size(value: Any) -> Size | None:
    tensor = first_tensor(value)
    if tensor is None or tensor.ndim != 4 or tensor.shape[2] * tensor.shape[3] == 1:
        return None
    return int(tensor.shape[2]), int(tensor.shape[3])


def _points(calls: Sequence[_Call]) -> dict[Size, Point]:
    found: dict[Size, list[_Call]] = {}
    # What comes before the first weight, such as padding, is the input, and the same for both.
    for call in itertools.dropwhile(lambda call: not call.learned, calls):
        if call.after is None:
            continue
        smallest = next(reversed(found), call.after)
        if call.after[0] <= smallest[0] and call.after[1] <= smallest[1]:
            found.setdefault(call.after, []).append(call)
    following = [*found, None][1:]
    return {
        size: _last(found[size], size=size, smaller=smaller)
        for size, smaller in zip(found, following, strict=True)
    }


def _last(calls: Sequence[_Call], *, size: Size, smaller: Size | None) -> Point:
    """The last call that is not inside of a block from this size to the next."""
    outside = [
        call
        for call in calls
        if not any(
            (block.before, block.after) == (size, smaller)
            for block in call.around
            if not block.chain
        )
    ]
    return (outside or calls)[-1].point
