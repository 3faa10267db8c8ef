"""Inputs for a model that came without data: from its tokenizer, processor or signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.data.preprocessing import ImagePreprocessing, from_timm
from equipoise.errors import DataError, SourceError, UsageError, unknown_name
from equipoise.export.config_samples import (
    ConfigSamples,
    Made,
    joined,
    no_shapes,
    one_input,
)
from equipoise.export.material import pictures, plain_preprocessing
from equipoise.sources.program import program_inputs, program_ranges
from equipoise.sources.source import Source
from equipoise.spec import Array, TensorSpec, describe

_DTYPES: Final = (
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
)  # fmt: skip
_FORM: Final = re.compile(r"(?P<name>[\w./:-]+?)=(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\]")
_DIM: Final = re.compile(r"(?P<name>[A-Za-z_]\w*)(:(?P<size>\d+))?|(?P<fixed>\d+)")
_EXAMPLE: Final = "Write it as pixels=float32[batch,3,224,224] or ids=int64[batch,sequence:16]."
_DEFAULT_SIZE: Final = 16
_RAGGED: Final = ("sequence", "time")
_LARGEST_ID: Final = 100


@dataclass(frozen=True, kw_only=True)
class ModelSamples:
    """Inputs that fit a model.

    Attributes:
        inputs: One spec per input. Every dimension that has a meaning has a name (``batch``,
            ``sequence``, ``height``, ``width``, ``frames``, ``time``), whether or not it will be
            dynamic; the rows say its size.
        rows: Samples of batch 1.
        made_by: What made them, in words: ``tokenizer``, ``image processor``, ``signature``.
    """

    inputs: tuple[TensorSpec, ...]
    rows: tuple[dict[str, Array], ...]
    made_by: str


def model_samples(source: Source, module: Any, *, count: int = 8, seed: int = 0) -> ModelSamples:
    """Inputs for a loaded module.

    A program says its inputs; a module of one's own may, by ``example_inputs`` or
    ``dummy_inputs``; models of timm and transformers have a config, a tokenizer, a processor.

    Args:
        source: Where the module comes from.
        module: The module.
        count: Number of rows, where they are made and not given.
        seed: Of all random numbers.

    Raises:
        SourceError: Nothing says what the inputs look like.
        MissingExtraError: A package is needed that is not installed, such as Pillow for pictures.
    """
    if source.kind == "program":
        return _samples(_program(module.program, count=count, seed=seed))
    examples = _examples(source, module)
    if examples is not None:
        return _samples(examples)
    if _trained_as(module) is not None:
        return _samples(_timm(source, module, count=count, seed=seed))
    if _describes_itself(module):
        maker = ConfigSamples(source, module, count=count, seed=seed)
        return _ordered(joined(maker.make()), maker.names())
    names = tuple(inspect.signature(module.forward).parameters)
    raise no_shapes(source, names, unknown=names)


def _samples(made: Made) -> ModelSamples:
    return ModelSamples(inputs=made.inputs, rows=made.rows, made_by=made.made_by)


def _ordered(made: Made, names: Sequence[str]) -> ModelSamples:
    inputs = tuple(sorted(made.inputs, key=lambda spec: names.index(spec.name)))
    rows = tuple({name: row[name] for name in names} for row in made.rows)
    return ModelSamples(inputs=inputs, rows=rows, made_by=made.made_by)


def module_preprocessing(module: Any) -> ImagePreprocessing | None:
    """How timm prepares pictures for ``module``; None when it does not say.

    Raises:
        DataError: It has a step that cannot be told.
    """
    trained = _trained_as(module)
    return None if trained is None else from_timm(trained)


def _trained_as(module: Any) -> Mapping[str, Any] | None:
    """How a model of timm was trained, in its own words."""
    for name in ("pretrained_cfg", "default_cfg"):
        found: Any = getattr(module, name, None)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if isinstance(found, Mapping) and found.get("input_size"):
            return found
    return None


def _describes_itself(module: Any) -> bool:
    """Whether a module has what those of transformers have."""
    return hasattr(module, "config") and isinstance(getattr(module, "main_input_name", None), str)


def _timm(source: Source, module: Any, *, count: int, seed: int) -> Made:
    name = next(iter(inspect.signature(module.forward).parameters), "")
    channels, height, width = (_trained_as(module) or {})["input_size"]
    if not name:
        raise no_shapes(source, (), unknown=("its input",))
    try:
        preprocessing, by = module_preprocessing(module), "image processor"
    except DataError:
        preprocessing, by = plain_preprocessing((height, width)), "signature"
    chosen = preprocessing or plain_preprocessing((height, width))
    random = np.random.default_rng(seed)
    pixels = pictures(count, chosen, channels=channels, random=random)
    return one_input(name, pixels, ("batch", channels, "height", "width"), by)


# Examples that a module brings along


def _examples(source: Source, module: Any) -> Made | None:
    """What ``example_inputs`` or ``dummy_inputs`` holds: a tensor, several, or a dict of them.

    The first axis of each counts samples. transformers gives every text model the same
    ``dummy_inputs``, which say nothing about it.
    """
    names = () if _describes_itself(module) else ("example_inputs", "dummy_inputs")
    found = next((v for name in names if (v := getattr(module, name, None)) is not None), None)
    if found is None:
        return None
    arrays = _arrays(source, module, found() if callable(found) else found)
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        shown = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise SourceError(
            f"{source.name}: the first axis of every example must count the same samples; it has"
            f" {shown or 'none'}",
            hint="Return tensors with a leading batch axis.",
        )
    parts = [_split(name, array) for name, array in arrays.items()]
    return joined(parts)


def _arrays(source: Source, module: Any, examples: Any) -> dict[str, Array]:
    """Examples by the names of the parameters of ``forward``."""
    torch = extras.require("torch")
    if not isinstance(examples, Mapping):
        values = examples if isinstance(examples, tuple | list) else [examples]
        parameters = inspect.signature(module.forward).parameters
        examples = dict(zip(parameters, values, strict=False))
    for name, value in examples.items():
        if not isinstance(value, torch.Tensor):
            raise SourceError(f"{source.name}: the example {name!r} is no tensor")
    return {str(name): value.detach().cpu().numpy() for name, value in examples.items()}


def _split(name: str, array: Array) -> Made:
    rows = [array[i : i + 1] for i in range(len(array))]
    return one_input(name, rows, ("batch", *array.shape[1:]), "examples of the module")


# Programs of torch.export


def _program(program: Any, *, count: int, seed: int) -> Made:
    """The inputs that a program was exported with, if it has them; else random ones."""
    specs = program_inputs(program)
    carried = _carried(program, specs)
    if carried is not None:
        return Made(inputs=specs, rows=carried, made_by="examples of the program")
    sizes = {
        name: max(low, min(_DEFAULT_SIZE, _DEFAULT_SIZE if high is None else high))
        for name, (low, high) in program_ranges(program).items()
        if name != "batch"
    }
    rows = tuple(random_rows(specs, sizes=sizes, count=count, seed=seed))
    return Made(inputs=specs, rows=rows, made_by="signature (random)")


def _carried(program: Any, specs: Sequence[TensorSpec]) -> tuple[dict[str, Array], ...] | None:
    """Rows out of the example inputs that a program carries."""
    tree: Any = extras.require("torch.utils._pytree")
    torch = extras.require("torch")
    leaves = [v for v in tree.tree_leaves(program.example_inputs) if isinstance(v, torch.Tensor)]
    if [value.ndim for value in leaves] != [len(spec.shape) for spec in specs]:
        return None
    feeds = {s.name: v.detach().cpu().numpy() for s, v in zip(specs, leaves, strict=True)}
    lengths = [feeds[s.name].shape[s.shape.index("batch")] for s in specs if "batch" in s.shape]
    return tuple(
        {s.name: _sample_of(feeds[s.name], s, index) for s in specs}
        for index in range(min(lengths, default=1))
    )


def _sample_of(array: Array, spec: TensorSpec, index: int) -> Array:
    """One sample along the batch axis; all of an input without one."""
    if "batch" not in spec.shape:
        return array
    return np.take(array, [index], axis=spec.shape.index("batch"))


# Inputs that the user describes


def parse_input(text: str) -> TensorSpec:
    """The spec in ``name=float32[batch,3,224,224]``: numbers are fixed, names are dynamic.

    A name may have the size to sample with behind a colon: ``ids=int64[batch,sequence:16]``; see
    :func:`parse_sizes`.

    Raises:
        UsageError: It is not of that form, or names no dtype.
    """
    name, dtype, dims = _parse(text)
    shape = tuple(int(dim["fixed"]) if dim["fixed"] else str(dim["name"]) for dim in dims)
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """The sizes to sample with in what :func:`parse_input` reads, by the name of the dimension.

    Raises:
        UsageError: As above, or a dimension has two sizes, or a batch other than 1.
    """
    sizes: dict[str, int] = {}
    for dim in (dim for text in texts for dim in _parse(text)[2] if dim["size"]):
        size = int(dim["size"])
        if sizes.setdefault(dim["name"], size) != size:
            raise UsageError(
                f"dimension {dim['name']!r} has two sizes: {sizes[dim['name']]}, {size}"
            )
    if sizes.get("batch", 1) != 1:
        raise UsageError(
            f"batch:{sizes['batch']}: samples have batch 1",
            hint="Leave the size out; other batches are tried by themselves.",
        )
    return sizes


def _parse(text: str) -> tuple[str, str, list[re.Match[str]]]:
    """Name, dtype and dimensions."""
    whole = _FORM.fullmatch(text.replace(" ", ""))
    if whole is None:
        raise UsageError(f"--input {text!r} is not of the form name=dtype[shape]", hint=_EXAMPLE)
    if whole["dtype"] not in _DTYPES:
        raise unknown_name("dtype", whole["dtype"], _DTYPES)
    dims = whole["shape"].split(",") if whole["shape"] else []
    return whole["name"], whole["dtype"], [_dim(dim, text) for dim in dims]


def _dim(dim: str, text: str) -> re.Match[str]:
    found = _DIM.fullmatch(dim)
    if found is None or "0" in {(found["fixed"] or "1").lstrip("0") or "0", found["size"]}:
        raise UsageError(
            f"--input {text!r}: {dim!r} is no dimension: a number above 0, or a name", hint=_EXAMPLE
        )
    return found


def random_rows(
    specs: Sequence[TensorSpec],
    *,
    count: int = 8,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Array]]:
    """Rows of random numbers: normal floats, 0 or 1 for masks and token types, else ids below 100.

    Args:
        specs: The inputs.
        count: Number of rows.
        seed: Of the random numbers.
        sizes: Size of named dimensions; 1 for the batch and 16 for others when not given, and
            then sequences and times grow shorter from row to row.
    """
    random = np.random.default_rng(seed)
    for row in range(count):
        yield {
            spec.name: _random(spec, [_sized(d, sizes or {}, row) for d in spec.shape], random)
            for spec in specs
        }


def _sized(dim: int | str, sizes: Mapping[str, int], row: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim == "batch" or dim in sizes:
        return sizes.get(dim, 1)
    return _DEFAULT_SIZE - (3 * row) % 9 if dim.endswith(_RAGGED) else _DEFAULT_SIZE


def _random(spec: TensorSpec, shape: Sequence[int], random: np.random.Generator) -> Array:
    if spec.dtype.startswith("float"):
        return random.standard_normal(shape).astype(spec.dtype)
    choice = spec.dtype == "bool" or "mask" in spec.name or "type" in spec.name
    values: Array = random.integers(0, 2 if choice else _LARGEST_ID, size=shape)
    if "mask" in spec.name and values.ndim:
        values[..., 0] = 1  # a mask that hides everything has no answer
    return values.astype(spec.dtype)
