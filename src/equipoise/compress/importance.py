"""How much each slice of a weight matters, so that what matters least is cut.

A *slice* is what one index along one axis of a tensor selects: a row of a matrix, a channel of a
convolution. What is cut together (a channel in every tensor that carries it) is scored by the sum
over its slices, so each measure is such that sums of it mean something:

    l1          sum of |w|
    l2          sum of w^2
    taylor      mean over samples of |sum of w dL/dw|: what the loss changes by, to first order,
                when the slice goes (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, equation 8, with
                the magnitude in place of the square)
    fisher      mean over samples of the sum of (w dL/dw)^2: optimal brain damage with the diagonal
                of the empirical Fisher information as the Hessian (LeCun, Denker, Solla 1990;
                Theis, Korshunova, Tejani, Huszar 2018)
    activation  sum of (w_ij times the root mean square of input j)^2: the energy that the slice
                adds to a layer's output when inputs are uncorrelated; Wanda's score (Sun, Liu,
                Bair, Kolter 2024), squared so that it adds up. Layers alone have it, not norms or
                biases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras
from equipoise.compress.objective.task_losses import LABEL, Kind, labels_of, task_loss
from equipoise.errors import DataError, NonFiniteError
from equipoise.sources.torch_model import NamedModule
from equipoise.spec import Array

Importance = Literal["l1", "l2", "taylor", "fisher", "activation"]
FROM_GRADIENTS: Final = frozenset({"taylor", "fisher"})
FROM_SAMPLES: Final = FROM_GRADIENTS | {"activation"}
"""The measures that need samples; the others look at the weights alone."""

Axes = Mapping[str, Sequence[int]]
"""Name of a parameter -> the axes along which its slices are scored."""
Scores = dict[tuple[str, int], Any]
"""Name of a parameter and axis -> float64 [size of that axis]."""


def slice_scores(
    module: Any, importance: Importance, *, axes: Axes, losses: Iterable[Any] = ()
) -> Scores:
    """Score every slice along ``axes``.

    A parameter that has two names (a head tied to the embeddings) is scored under the first one
    alone, so that a sum over names counts it once. Names of buffers are left out.

    Args:
        module: The model, in evaluation mode.
        importance: The measure.
        axes: Which slices.
        losses: For the measures in :data:`FROM_SAMPLES`: one scalar tensor per sample, made as it
            is asked for by a forward pass through ``module``. Without gradients for ``activation``.

    Raises:
        DataError: The measure needs samples and there are none.
        NonFiniteError: The loss of a sample is NaN or infinite.
    """
    chosen = _parameters(module, axes)
    if importance in FROM_GRADIENTS:
        return _from_gradients(module, importance, chosen=chosen, losses=losses)
    if importance == "activation":
        return _from_activations(module, chosen=chosen, losses=losses)
    return _sums(chosen, lambda _, w: w.abs() if importance == "l1" else w * w)


def _parameters(module: Any, axes: Axes) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The first name of each parameter -> the parameter, and its axes under all names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    chosen: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name, asked in axes.items():
        if name not in named:
            continue
        main = first.setdefault(id(named[name]), name)
        known = chosen[main][1] if main in chosen else ()
        chosen[main] = (named[name], tuple(dict.fromkeys((*known, *asked))))
    return chosen


def _sums(
    chosen: Mapping[str, tuple[Any, tuple[int, ...]]], elements: Callable[[str, Any], Any]
) -> Scores:
    """The sum of ``elements(name, parameter)`` over each slice."""
    scores: Scores = {}
    for name, (parameter, axes) in chosen.items():
        value = elements(name, parameter.detach())
        scores |= {(name, axis): _over_others(value, axis) for axis in axes}
    return scores


def _over_others(value: Any, axis: int) -> Any:
    """float64 sums over all axes but one."""
    torch = extras.require("torch")
    others = [other for other in range(value.ndim) if other != axis]
    return value.sum(others, dtype=torch.float64) if others else value.double()


def _from_gradients(
    module: Any,
    importance: Importance,
    *,
    chosen: Mapping[str, tuple[Any, tuple[int, ...]]],
    losses: Iterable[Any],
) -> Scores:
    def elements(product: Any) -> Any:
        return product * product if importance == "fisher" else product

    total: Scores = {}
    count = 0
    with gradients_of(module, [parameter for parameter, _ in chosen.values()]):
        for count, loss in enumerate(losses, start=1):
            _require_finite(loss, sample=count - 1)
            module.zero_grad(set_to_none=True)
            loss.backward()
            sample = _sums(chosen, lambda name, w: elements(w * _gradient(chosen[name][0])))
            for key, value in sample.items():
                total[key] = total.get(key, 0) + value.abs()
    _require_samples(count, importance)
    return {key: value / count for key, value in total.items()}


def _gradient(parameter: Any) -> Any:
    """The gradient; zeros where the loss does not depend on the parameter."""
    torch = extras.require("torch")
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextlib.contextmanager
def gradients_of(module: Any, parameters: Sequence[Any]) -> Iterator[None]:
    """Let ``parameters`` alone have gradients, and leave ``module`` as it was."""
    torch = extras.require("torch")
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    kept = {parameter: parameter.grad for parameter in before}
    wanted = {id(parameter) for parameter in parameters}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = kept[parameter]


def _from_activations(
    module: Any,
    *,
    chosen: Mapping[str, tuple[Any, tuple[int, ...]]],
    losses: Iterable[Any],
) -> Scores:
    squares = mean_squares(module, _count_of(losses))

    def elements(name: str, weight: Any) -> Any:
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in squares:
            return weight * 0
        layer = module.get_submodule(owner)
        return weight * weight * spread_over(layer, squares[owner], weight=weight)

    return _sums(chosen, elements)


def _count_of(losses: Iterable[Any]) -> Callable[[], int]:
    """Run all forward passes; how many there were."""

    def run() -> int:
        return sum(1 for _ in losses)

    return run


def mean_squares(module: Any, run: Callable[[], int]) -> dict[str, Any]:
    """The mean square of every input of every linear layer and convolution.

    Args:
        module: The model.
        run: Runs the forward passes over the samples and says how many there were.

    Returns:
        Name of the layer -> float64 [inputs]. Layers that never ran are left out.

    Raises:
        DataError: There were no samples.
    """
    torch = extras.require("torch")
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: Any, inputs: tuple[Any, ...]) -> None:
            rows = input_rows(layer, inputs[0].detach()).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    layers = [(name, layer) for name, layer in module.named_modules() if is_layer(layer)]
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            _require_samples(run(), "activation")
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


def is_layer(module: Any) -> bool:
    """Whether ``module`` is a linear layer or a convolution, transformers' ``Conv1D`` included."""
    torch = extras.require("torch")
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, kinds) or is_transposed(module)


def is_transposed(module: Any) -> bool:
    """Whether it is transformers' ``Conv1D``: linear, its weight as [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def input_rows(layer: Any, value: Any) -> Any:
    """Inputs of a layer as [positions, inputs]: channels of a convolution are its inputs."""
    if hasattr(layer, "kernel_size"):
        value = value.transpose(1, -1) if value.ndim > 2 else value
    return value.reshape(-1, value.shape[-1])


def spread_over(layer: Any, values: Any, *, weight: Any) -> Any:
    """One value per input of ``layer``, in a shape that multiplies its ``weight``."""
    if is_transposed(layer):
        return values[:, None]
    groups = getattr(layer, "groups", 1)
    outputs, inputs, *kernel = weight.shape
    each = values.reshape(groups, 1, inputs).expand(groups, outputs // groups, inputs)
    return each.reshape(outputs, inputs, *(1 for _ in kernel))


def _require_samples(count: int, importance: str) -> None:
    if not count:
        raise DataError(
            f"importance {importance!r} is measured on samples, and there are none",
            hint="Give data, or use 'l1' or 'l2', which look at the weights alone.",
        )


def _require_finite(loss: Any, *, sample: int) -> None:
    if not bool(loss.isfinite()):
        value = float(loss.detach())
        raise NonFiniteError(f"the loss of sample {sample} is {value}; it must be finite")


def sample_losses(
    model: NamedModule,
    *,
    rows: Iterable[Mapping[str, Array]],
    labels: Iterable[Mapping[str, Array]] | None,
    kind: Kind | None,
) -> Iterator[Any]:
    """The loss of each sample, one forward pass as each is asked for.

    Without labels, what the model itself says stands in for them: its likeliest class, as in the
    empirical Fisher information; for outputs that are no classes a random direction of unit
    variance, whose squared gradient is the Fisher information of a Gaussian about the output.

    Args:
        model: The model with the names of its inputs.
        rows: Inputs by name, each with a batch of 1.
        labels: The label of each row, under ``label``; None when there are none.
        kind: The loss; None where the task has none, which needs no labels.

    Yields:
        Scalar tensors: the mean over what counts in the sample. Samples where nothing counts are
        left out.

    Raises:
        DataError: The labels do not fit.
    """
    torch = extras.require("torch")
    pairs = ((row, None) for row in rows) if labels is None else zip(rows, labels, strict=True)
    generator = torch.Generator().manual_seed(0)
    for row, label in pairs:
        batch = {name: torch.from_numpy(row[name]) for name in model.names}
        outputs = model.call(list(batch.values()))
        if label is not None:
            batch[LABEL] = _with_batch(label[LABEL])
        loss, count = _one_loss(kind, outputs=outputs, batch=batch, generator=generator)
        if count:
            yield loss / count


def _with_batch(label: Array) -> Any:
    """A label with a batch of 1 before it, unless it has one: tokens come as [n] or [1, n]."""
    torch = extras.require("torch")
    array = np.asarray(label)
    return torch.from_numpy(array if array.ndim > 1 else array[None])


def _one_loss(
    kind: Kind | None, *, outputs: Mapping[str, Any], batch: dict[str, Any], generator: Any
) -> tuple[Any, Any]:
    torch = extras.require("torch")
    output = next(iter(outputs.values()))
    if kind is not None and labels_of(kind, batch=batch) is None:
        if kind in {"classification", "token-classification", "causal-lm"}:
            batch = {**batch, LABEL: output.detach().argmax(-1)}
        else:
            kind = None
    if kind is not None:
        return task_loss(kind, outputs=outputs, batch=batch)
    direction = torch.randn(output.shape, generator=generator)
    return (output.float() * direction).sum(), torch.tensor(1.0)
