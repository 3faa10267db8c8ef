"""A diagnosis as people read it: tables of text for terminal and page alike, and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from equipoise.quantize.diagnose import Diagnosis
from equipoise.quantize.sweeps import Damage, Score
from equipoise.report.html import render

_NOTHING: Final = "–"
_EXACT: Final = "exact"
_SHOWN: Final = 12


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table and what to know about it.

    Attributes:
        title: Of the table.
        note: In words.
        columns: Titles of the columns.
        rows: Cells.
        total: Number of rows before those beyond the first were left out.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: int


def headline(found: Diagnosis) -> tuple[str, ...]:
    """The outcome in a few lines."""
    lines = [f"{found.quantized} against {found.model}, {found.samples} samples"]
    if found.metric and found.float_metric is not None:
        value = found.score.metric
        lines.append(f"{found.metric}: {found.float_metric:.4f} in float, {value:.4f} quantised")
    if found.saturation is not None:
        exact, cut = found.saturation.exact, found.saturation.saturated
        lines.append(
            f"on AVX2 without VNNI, where 16-bit sums saturate: {decibel(cut.sqnr_db)} dB, in exact"
            f" integers {decibel(exact.sqnr_db)} dB ({found.saturation.samples} samples)"
        )
    return (*lines, *found.notes)


def exclusion(found: Diagnosis) -> tuple[str, ...]:
    """What to leave in float, as an option ready to paste; empty when no node stands out."""
    damage = found.damage
    if damage is None or not damage.exclude or damage.excluded is None:
        return ()
    gain = (
        f"with these nodes in float {decibel(damage.excluded.sqnr_db)} dB instead of"
        f" {decibel(found.score.sqnr_db)} dB:"
    )
    return gain, f"--nodes-to-exclude {','.join(damage.exclude)}"


def parts(found: Diagnosis, *, most: int | None = _SHOWN) -> tuple[Part, ...]:
    """The tables of a diagnosis, without empty ones.

    Args:
        found: The diagnosis.
        most: Rows per table; None for all.
    """
    made = (make(found) for make in _PARTS)
    cut = (_cut(part, most) for part in made if part.rows)
    return tuple(cut)


def _cut(part: Part, most: int | None) -> Part:
    return Part(
        title=part.title,
        note=part.note,
        columns=part.columns,
        rows=part.rows[:most],
        total=len(part.rows),
    )


def _part(title: str, note: str, columns: str, *, rows: Iterable[tuple[str, ...]]) -> Part:
    cells = tuple(rows)
    titles = tuple(column.strip() for column in columns.split("|"))
    return Part(title=title, note=note, columns=titles, rows=cells, total=len(cells))


def decibel(value: float | None) -> str:
    """An SQNR in dB as text."""
    return _EXACT if value is None else f"{value:.1f}"


def _outputs(found: Diagnosis) -> Part:
    rows = (
        (p.name, decibel(p.sqnr_db), f"{p.cosine:.6f}", f"{p.max_abs:.3g}", f"{p.scale:.3g}")
        for p in found.outputs
    )
    columns = "output|SQNR, dB|cosine|largest difference|largest value"
    return _part("Outputs", "Quantised against float, on this machine.", columns, rows=rows)


def _operators(found: Diagnosis) -> Part:
    return _damages(found, "Types of operators", lambda damage: damage.operators)


def _nodes(found: Diagnosis) -> Part:
    return _damages(found, "Nodes by damage", lambda damage: damage.nodes)


def _damages(found: Diagnosis, title: str, pick: Callable[[Any], tuple[Damage, ...]]) -> Part:
    damages = pick(found.damage) if found.damage is not None else ()
    rows = (
        (d.name, d.operator, str(d.nodes), *_score(d.alone, found), *_score(d.spared, found))
        for d in damages
    )
    metric = f"|{found.metric}" if found.metric else ""
    columns = f"name|type|nodes|alone, dB{metric}|all but it, dB{metric}"
    note = (
        f"SQNR of the worst output with only this quantised, and with all but this; all of it gives"
        f" {decibel(found.score.sqnr_db)} dB."
    )
    return _part(title, note, columns, rows=rows)


def _score(score: Score | None, found: Diagnosis) -> tuple[str, ...]:
    if score is None:
        return (_NOTHING,) * (2 if found.metric else 1)
    metric = (f"{score.metric:.4f}",) if score.metric is not None else ()
    return (decibel(score.sqnr_db), *metric)


def _saturation(found: Diagnosis) -> Part:
    layers = found.saturation.layers if found.saturation is not None else ()
    worst = sorted(layers, key=lambda s: (s.sqnr_db is None, s.sqnr_db))
    rows = (
        (s.name, s.operator, f"{s.share:.4%}", "never" if s.sqnr_db is None else decibel(s.sqnr_db))
        for s in worst
    )
    note = "What int16 sums cut off on AVX2 without VNNI, given exact inputs."
    return _part("Saturation", note, "layer|type|sums cut off|SQNR, dB", rows=rows)


def _tensors(found: Diagnosis) -> Part:
    rounded = [t for t in found.tensors if t.rounding_db is not None]
    rows = (
        (
            t.name,
            decibel(t.rounding_db),
            decibel(t.sqnr_db),
            f"{t.low:.3g} to {t.high:.3g}",
            f"{t.outlier:.1f}",
            str(t.channel),
        )
        for t in sorted(rounded, key=lambda t: t.rounding_db or 0.0)
    )
    note = (
        "Noise of the tensor's own rounding, and with all noise before it. An outlier channel is so"
        " many times larger than the median one."
    )
    columns = "tensor|rounding, dB|SQNR, dB|range|outlier|channel"
    return _part("Tensors by rounding noise", note, columns, rows=rows)


def _islands(found: Diagnosis) -> Part:
    rows = [(name, "island") for name in found.graph.islands]
    rows += [(n, "layer in float") for n in found.graph.fallbacks if n not in found.graph.islands]
    note = (
        f"Nodes that compute in float between Q and DQ after the runtime's own rewriting;"
        f" {len(found.graph.pairs)} Q and DQ nodes are left."
    )
    return _part("Detours through float", note, "node|kind", rows=rows)


def _times(found: Diagnosis) -> Part:
    rows = (
        (t.name, t.operator, _ms(t.float_ms), _ms(t.quantized_ms), _ratio(t))
        for t in found.times
        if t.quantized_ms
    )
    columns = "node|kernel|float, ms|quantised, ms|speed"
    return _part("Nodes by time", "Medians of profiled runs on this machine.", columns, rows=rows)


def _ms(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _ratio(times: Any) -> str:
    known = times.float_ms and times.quantized_ms
    return f"{times.float_ms / times.quantized_ms:.2f}x" if known else _NOTHING


_PARTS: Final = (_outputs, _operators, _nodes, _saturation, _tensors, _islands, _times)


def render_diagnosis(found: Diagnosis) -> str:
    """The page for a diagnosis, self-contained, with every row.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    values = {
        "found": found,
        "headline": headline(found),
        "exclusion": exclusion(found),
        "parts": parts(found, most=None),
    }
    return render("diagnosis.html.j2", values)
