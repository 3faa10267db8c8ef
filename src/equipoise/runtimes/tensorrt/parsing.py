"""An ONNX file to a network, and what the parser refuses of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.errors import SourceError
from equipoise.runtimes.tensorrt import unsigned
from equipoise.runtimes.tensorrt.flavor import Flavor, network_flags
from equipoise.runtimes.tensorrt.messages import joined, listening, logger

_MOST_NAMED: Final = 3
_OTHER_TARGET: Final = (
    "type Int32", "Non-zero zero point", "UINT8", "UInt8", "uint8", "UINT16", "INT16", "zero_point",
)  # fmt: skip
"""Words of the parser about integers that it does not take."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A node that the parser refuses.

    Attributes:
        index: Its place in the graph; -1 where the parser does not say.
        node: Its name.
        operator: Its operator.
        why: What the parser said.
    """

    index: int
    node: str
    operator: str
    why: str

    def __str__(self) -> str:
        name = repr(self.node) if self.node else f"number {self.index}"
        return f"{self.operator} {name}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A parsed network. It reads weights that belong to its parser, so it holds that too."""

    builder: Any
    network: Any
    parser: Any


def parse(package: Any, model: Path, *, flavor: Flavor) -> Network:
    """Parse a file.

    Raises:
        SourceError: The parser refuses it; names the nodes and says why.
    """
    parsed, refusals = attempt(package, model, flavor=flavor)
    if refusals:
        named = "; ".join(map(str, refusals[:_MOST_NAMED]))
        more = len(refusals) - _MOST_NAMED
        raise SourceError(
            f"{flavor.title} {package.__version__} refuses {model}: {named}"
            f"{f'; and {more} more' if more > 0 else ''}",
            hint=_hint(refusals, flavor),
        )
    _refuse_shapes_as_inputs(parsed, model)
    return parsed


def _refuse_shapes_as_inputs(parsed: Network, model: Path) -> None:
    """Such an input would need its values, not only its sizes, before every run."""
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    for given in inputs:
        if given.is_shape_tensor:
            raise SourceError(
                f"{model}: the values of the input {given.name!r} are sizes of other tensors;"
                " sessions take no such input",
                hint="Export the model with this value fixed.",
            )


def attempt(package: Any, model: Path, *, flavor: Flavor) -> tuple[Network, tuple[Refusal, ...]]:
    """The network of a file, as far as it could be parsed, and what its parser refused."""
    builder = package.Builder(logger(package))
    network = builder.create_network(network_flags(flavor, package))
    with listening(package) as heard:
        parser = package.OnnxParser(network, logger(package))
        accepted = parser.parse_from_file(str(model))
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = heard.reason()
    refusals = (*map(_refusal, errors), *_misread(model, {int(e.node()) for e in errors}))
    if not accepted and not refusals:
        refusals = (Refusal(index=-1, node=model.name, operator="model", why=said),)
    return Network(builder=builder, network=network, parser=parser), refusals


def _refusal(error: Any) -> Refusal:
    name = str(error.node_name())
    return Refusal(
        index=int(error.node()),
        node=name,
        operator=str(error.node_operator()) or "model",
        why=joined([str(error.desc())]).removeprefix(f"{name}: ") or "it gave no reason",
    )


def _misread(model: Path, told: Collection[int]) -> Iterator[Refusal]:
    """What the parser accepts and means otherwise, but for the nodes that it has told of."""
    onnx: Any = extras.require("onnx")
    proto = onnx.load(model, load_external_data=False)
    for index in sorted(set(unsigned.misread(proto)).difference(told)):
        node = proto.graph.node[index]
        yield Refusal(index=index, node=node.name, operator=node.op_type, why=unsigned.WHY)


def _hint(refusals: tuple[Refusal, ...], flavor: Flavor) -> str:
    if any(word in refusal.why for refusal in refusals for word in _OTHER_TARGET):
        return (
            "It takes signed integers with zero point 0 and float biases alone. Quantise the float"
            f" model for it: equipoise quantize --target {flavor.name}. `equipoise fit` lists every"
            " such node."
        )
    return "Export the model with other operators, or leave this part of it out."
