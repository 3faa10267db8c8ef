"""Heads of self-attention in modules that say how many they have.

A dependency graph sees a reshape and no heads. But modules of this form are written alike: a number
``num_heads``, linear layers for queries, keys and values, in one or in three, and a last one that
mixes the heads. Whether a module that looks so works so, ``verifying.py`` finds out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from equipoise import extras
from equipoise.compress.channels.coupling import Coupling, Member
from equipoise.compress.structure import Layer, LayerShape
from equipoise.spec import Array

NUMBER: Final = "num_heads"
_WIDTHS: Final = ("attn_dim", "all_head_dim", "inner_dim", "embed_dim", "dim")
"""What a module may call the heads times the size of one."""
_INPUTS: Final = (("qkv",), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"), ("to_q", "to_k", "to_v"))  # fmt: skip
_OUTPUTS: Final = ("proj", "out_proj", "o_proj", "out", "to_out")


def head_couplings(module: Any) -> Iterator[Coupling]:
    """The heads of every module in ``module`` that has that form: one channel per head."""
    for name, attention in module.named_modules():
        heads = vars(attention).get(NUMBER)
        inputs, output = _layers(attention)
        if isinstance(heads, int) and heads > 1 and inputs and output:
            coupling = _coupling(name, attention, inputs=inputs, output=output)
            if coupling is not None:
                yield coupling


def _layers(attention: Any) -> tuple[tuple[str, ...], str]:
    """Names of the layers before the heads, and of the one behind them; empty for none."""
    linear = extras.require("torch").nn.Linear
    found = {name for name, child in attention.named_children() if isinstance(child, linear)}
    inputs = next((names for names in _INPUTS if found.issuperset(names)), ())
    return inputs, next((name for name in _OUTPUTS if name in found), "")


def _coupling(
    name: str, attention: Any, *, inputs: tuple[str, ...], output: str
) -> Coupling | None:
    """One channel per head; None where the layers are not of equal widths."""
    heads = getattr(attention, NUMBER)
    width = getattr(attention, output).in_features
    parts = [getattr(attention, n).out_features for n in inputs]
    if width % heads or sum(parts) != 3 * width or len(set(parts)) != 1:
        return None
    size = width // heads
    inside = tuple(index // size for index in range(width))
    made = tuple(
        Member(module=f"{name}.{n}", role="outputs", channels=inside * (part // width))
        for n, part in zip(inputs, parts, strict=True)
    )
    mixed = Member(module=f"{name}.{output}", role="inputs", channels=inside)
    number = Member(module=name, role="heads", channels=tuple(range(heads)))
    return Coupling(
        name=name, width=heads, members=(*made, mixed, number), parts=(0,) * heads, unit=size
    )


def cut_heads_(attention: Any, mask: Array) -> None:
    """Let ``attention`` have the heads that stay. Its layers are cut elsewhere. In place."""
    before, after = getattr(attention, NUMBER), int(mask.sum())
    for name in _WIDTHS:
        width = vars(attention).get(name)
        if width is not None and width == _width_of(attention):
            setattr(attention, name, width // before * after)
    setattr(attention, NUMBER, after)


def _width_of(attention: Any) -> int:
    """Heads times the size of one, from a size that cutting its layers does not change."""
    size = vars(attention).get("head_dim")
    return -1 if size is None else int(size) * int(getattr(attention, NUMBER))


def with_heads(couplings: Sequence[Coupling], heads: Iterable[Coupling]) -> tuple[Coupling, ...]:
    """Couplings of channels, and heads in place of those that share a layer with them."""
    chosen = tuple(heads)
    taken = {m.key for coupling in chosen for m in coupling.members if m.role == "outputs"}
    others = (c for c in couplings if not any(m.key in taken for m in c.members))
    return (*others, *chosen)


def attention_layers(couplings: Iterable[Coupling], layers: Sequence[Layer]) -> list[Layer]:
    """``layers``, and behind those that make heads the attention between them."""
    after: dict[str, Layer] = {}
    known = {layer.name: layer for layer in layers}
    for coupling in couplings:
        if any(member.role == "heads" for member in coupling.members):
            last = [m.module for m in coupling.members if m.role == "outputs"][-1]
            if last in known:
                after[last] = _attention(coupling, known[last])
    return [each for layer in layers for each in (layer, after.get(layer.name)) if each is not None]


def _attention(coupling: Coupling, before: Layer) -> Layer:
    width = coupling.width * coupling.unit
    return Layer(
        name=coupling.name,
        shape=LayerShape(
            kind="attention",
            inputs=width,
            outputs=width,
            size=before.shape.size,
            groups=coupling.width,
        ),
        input_group=coupling.name,
        output_group=coupling.name,
        input_factor=coupling.unit,
        output_factor=coupling.unit,
    )
