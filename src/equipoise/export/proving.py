"""What PyTorch makes of real inputs at several sizes, and how close to it is equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import EquipoiseError, ParityError, UsageError
from equipoise.export.samples import ModelSamples
from equipoise.parity.compare import require_finite
from equipoise.parity.proof import ProofRecord, write_proof
from equipoise.parity.sizes import (
    BATCH,
    dimension_names,
    feeds_of,
    in_words,
    natural_sizes,
    proving_sizes,
)
from equipoise.parity.tolerance import Tolerance, relative_tolerances, tolerances
from equipoise.sources.torch_model import NamedModule
from equipoise.spec import Array, TensorSpec

_MOST_ROWS: Final = 8
_FLOOR_RUNS: Final = 2
_DEFAULT_DYNAMIC: Final = "sequence"
"""Texts differ in length; the size of an image or a sound is a choice of its preprocessing."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Which dimensions are to be dynamic, and the sizes of the others.

    Attributes:
        dynamic: Names of the dynamic dimensions; None for batch, the lengths of texts, and whatever
            differs between the user's samples.
        fixed: Sizes of named dimensions that are not dynamic; as sampled where not given.
        also: Further sizes to prove: those of static files made from the dynamic one.
    """

    dynamic: tuple[str, ...] | None = None
    fixed: dict[str, int] = field(default_factory=dict)
    also: tuple[dict[str, int], ...] = ()


def settle(samples: ModelSamples, shapes: Shapes, *, given: bool) -> tuple[TensorSpec, ...]:
    """The input specs with only the dynamic dimensions left by name.

    Args:
        samples: Inputs of the model.
        shapes: What was asked for.
        given: Whether the samples are the user's, whose sizes differ for a reason.

    Raises:
        UsageError: A dimension was asked for that the model's inputs do not have.
    """
    known = dimension_names(samples.inputs)
    asked = (*(shapes.dynamic or ()), *shapes.fixed, *(name for s in shapes.also for name in s))
    for name in asked:
        if name not in known:
            raise UsageError(
                f"no input has a dimension {name!r}; there are {', '.join(known) or 'none'}",
                hint=f"The inputs are {'; '.join(map(str, samples.inputs))}.",
            )
    dynamic = shapes.dynamic
    if dynamic is None:
        dynamic = tuple(name for name in known if given or _dynamic_by_default(name))
    sizes = natural_sizes(samples.inputs, samples.rows[0]) | shapes.fixed
    return tuple(_fixed(spec, dynamic=dynamic, sizes=sizes) for spec in samples.inputs)


def _dynamic_by_default(name: str) -> bool:
    return name == BATCH or name.endswith(_DEFAULT_DYNAMIC)


def _fixed(spec: TensorSpec, *, dynamic: Sequence[str], sizes: Mapping[str, int]) -> TensorSpec:
    shape = tuple(
        sizes[dim] if isinstance(dim, str) and dim not in dynamic else dim for dim in spec.shape
    )
    return replace(spec, shape=shape)


def prove(
    module: NamedModule,
    samples: ModelSamples,
    *,
    shapes: Shapes,
    given: bool,
    directory: Path,
) -> ProofRecord:
    """Run the source at every size and write the proof.

    Raises:
        SourceError: ``forward`` fails on an input.
        UsageError: A dimension was asked for that the inputs do not have.
        NonFiniteError: An output is NaN or infinite.
        ParityError: The source gives other numbers the second time.
    """
    specs = settle(samples, shapes, given=given)
    runs, feeds = _runs(samples, specs, shapes)
    expected = [module.run(one) for one in feeds]
    _require_repeatable(module, feeds[0], expected[0])
    for sizes, outputs in zip(runs, expected, strict=True):
        require_finite(outputs, sample=in_words(sizes), what="PyTorch")
    limits, floor_by = _limits(module, feeds, expected)
    proof = ProofRecord(
        inputs=specs,
        runs=tuple(runs),
        tolerances=limits,
        reference="PyTorch",
        made_by=samples.made_by,
        floor_by=floor_by,
    )
    write_proof(directory, proof, inputs=feeds, outputs=expected)
    return proof


def _runs(
    samples: ModelSamples, specs: Sequence[TensorSpec], shapes: Shapes
) -> tuple[list[dict[str, int]], list[dict[str, Array]]]:
    """Sizes and feeds: the sizes to prove first, then the samples as they are."""
    names = dimension_names(specs)
    longest = max(samples.rows, key=lambda row: sum(array.size for array in row.values()))
    natural = natural_sizes(samples.inputs, longest)
    wanted = [*proving_sizes(names, natural)]
    wanted += [wanted[0] | sizes for sizes in shapes.also]
    feeds = [feeds_of(samples.rows, specs, sizes, start=i) for i, sizes in enumerate(wanted)]
    for row in samples.rows[:_MOST_ROWS]:
        sizes = natural_sizes(samples.inputs, row)
        sizes = {name: sizes[name] for name in names}
        wanted.append(sizes)
        feeds.append(feeds_of([row], specs, sizes))
    return wanted, feeds


def _require_repeatable(
    module: NamedModule, feeds: dict[str, Array], first: dict[str, Array]
) -> None:
    """A model that draws random numbers has no right answer to be equal to."""
    for name, again in module.run(feeds).items():
        if not np.allclose(again, first[name], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ParityError(
                f"output {name!r} of the source differs between two runs on the same sample",
                hint="Turn off dropout and random numbers in forward.",
            )


def _limits(
    module: NamedModule, feeds: Sequence[dict[str, Array]], expected: Sequence[dict[str, Array]]
) -> tuple[tuple[Tolerance, ...], str]:
    """Tolerances from the model in float64; by another order of summation if it cannot run so."""
    chosen = _floor_runs(feeds)
    feeds, single = [feeds[i] for i in chosen], [expected[i] for i in chosen]
    try:
        with _in_double(module.module):
            exact = [module.run(one, double=True) for one in feeds]
        again = [module.run(feeds[0])]
        return tolerances(single, exact, again=again), "the model in float64 and a second run"
    except EquipoiseError:
        with _without_fused_kernels():
            other = [module.run(one) for one in feeds]
        return relative_tolerances(single, other), "another order of summation"


def _floor_runs(feeds: Sequence[dict[str, Array]]) -> list[int]:
    """Few runs tell the noise, and convolutions in float64 are slow: the largest of batch 1."""
    batches = [min((len(a) for a in one.values() if a.ndim), default=1) for one in feeds]
    smallest = [i for i, batch in enumerate(batches) if batch == min(batches)]
    size = [sum(array.size for array in one.values()) for one in feeds]
    return sorted(smallest, key=lambda i: -size[i])[:_FLOOR_RUNS]


@contextmanager
def _in_double(module: Any) -> Iterator[None]:
    """In place and back: every float32 has its float64, and a copy would double the memory."""
    module.double()
    try:
        yield
    finally:
        module.float()


@contextmanager
def _without_fused_kernels() -> Iterator[None]:
    torch = extras.require("torch")
    attention: Any = extras.require("torch.nn.attention")
    with (
        torch.backends.mkldnn.flags(enabled=False),
        attention.sdpa_kernel(attention.SDPBackend.MATH),
    ):
        yield
