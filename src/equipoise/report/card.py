"""The model card of a bundle, in Markdown: what its records say, and what they do not.

Nothing stands here that is not in a record. What no record says is written as "not stated", "not
known" or "not measured", so that a reader does not take silence for a good answer. The serial of
the bundle is left out, because signing raises it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from equipoise.bundle.manifest import Engine, Manifest, Needs
from equipoise.parity.compare import OutputParity
from equipoise.parity.record import ParityRecord
from equipoise.report.rows import size
from equipoise.spec import TensorSpec

CARD_FILE: Final = "README.md"

_NOT_STATED: Final = "not stated"
_ALWAYS_LIMITS: Final = (
    "Every difference above was measured on those samples alone, where the bundle was packed.",
    "Latency, memory and the metric of the task are not part of this card.",
    "Not examined: fairness, bias, hostile inputs, and what the model was trained for.",
)


def model_card(
    manifest: Manifest,
    *,
    parity: Mapping[str, ParityRecord] | None = None,
    recipes: Mapping[str, str] | None = None,
) -> str:
    """The card as text.

    Args:
        manifest: The bundle; its list of files need not be complete.
        parity: Engine -> its comparison with the reference; one that is not there was not measured.
        recipes: Engine -> how it was made, in a sentence.
    """
    compared, made = parity or {}, recipes or {}
    sections = {
        "What it is": _what(manifest),
        "Engines": _engines(manifest.engines),
        "How close it is to the reference": _closeness(manifest, compared),
        "How it was quantised": _quantisation(manifest, made),
        "Licences": _licences(manifest),
        "Limits, and what was not measured": _limits(manifest, compared),
        "How to run it": _running(manifest),
        "Versions": _versions(manifest),
    }
    body = "\n".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    return f"# {_plain(manifest.name)}\n{body}\n"


def _plain(text: str) -> str:
    """A name that comes from elsewhere, on one line and with no markup of its own."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!&~" else c for c in line)


def _code(text: str) -> str:
    """A name in code; one with a backquote is no code."""
    plain_code = text.isprintable() and not set(text) & set("`|")
    return f"`{text}`" if plain_code else _plain(text)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _what(manifest: Manifest) -> str:
    labels = ", ".join(map(_code, manifest.labels))
    return _list(
        [
            f"Model: {_plain(manifest.name)}",
            f"Task: {_plain(manifest.task) or _NOT_STATED}",
            f"Classes, in order: {labels or _NOT_STATED}",
            f"Inputs: {_specs(manifest.inputs)}",
            f"Outputs: {_specs(manifest.outputs)}",
            f"Preparation of inputs: {_preparation(manifest)}",
        ]
    )


def _specs(specs: Iterable[TensorSpec]) -> str:
    return "; ".join(_code(str(spec)) for spec in specs) or "none"


def _preparation(manifest: Manifest) -> str:
    if manifest.tokenizer is not None:
        return (
            f"texts become tokens by {_code(manifest.tokenizer)}, at most {manifest.max_length} of"
            " them"
        )
    if manifest.preprocessing is not None:
        return f"pictures as the manifest says under {_code('preprocessing')}"
    return "the bundle holds none; arrays as for the model it was made from"


def _engines(engines: Sequence[Engine]) -> str:
    titles = ("engine", "runtime", "target", "precision", "size", "threads", "needs")
    rows = [
        (
            _code(e.name) + (" (fallback)" if e.fallback else ""),
            _plain(", ".join((e.runtime, *e.providers))),
            _plain(e.target) or _NOT_STATED,
            "not known" if e.precision == "unknown" else e.precision,
            size(e.size_bytes),
            str(e.threads),
            _plain(_needs(e.needs)) or "nothing in particular",
        )
        for e in engines
    ]
    text = "A device takes the first that fits it."
    return f"{text}\n\n{_table(titles, rows)}"


def _needs(needs: Needs) -> str:
    """What a device has to have, in words."""
    later, gpus = (
        "or later" if wider else "" for wider in (needs.later_versions, needs.later_gpus)
    )
    found = (
        needs.platform,
        " or ".join(needs.any_cpu_flag),
        f"runtime {needs.runtime_version} {later}" if needs.runtime_version else "",
        _capabilities(needs.compute_capabilities, later=gpus),
    )
    return "; ".join(filter(None, map(str.strip, found)))


def _capabilities(capabilities: Sequence[str], *, later: str) -> str:
    return f"compute capability {' or '.join(capabilities)} {later}" if capabilities else ""


def _closeness(manifest: Manifest, parity: Mapping[str, ParityRecord]) -> str:
    parts = [
        _compared(engine, parity[engine.name]) if engine.name in parity else _unmeasured(engine)
        for engine in manifest.engines
    ]
    return "\n\n".join(parts) or "There is no engine."


def _unmeasured(engine: Engine) -> str:
    return f"### {_plain(engine.name)}\n\nNot measured."


def _compared(engine: Engine, found: ParityRecord) -> str:
    titles = (
        "output",
        "largest difference",
        "largest value",
        "SQNR",
        "cosine",
        "same largest entry",
    )
    exported = [output for size in found.exported for output in size.outputs]
    return f"""\
### {_plain(engine.name)}

Against {_plain(found.reference)}, over {found.samples} real samples, one at a time:

{_table(titles, map(_parity_row, found.engine))}

The float model that it was made from was exported with {_plain(found.exporter)}. Its largest
difference from {_plain(found.reference)}, at every size that was tried: {_largest(exported)}."""


def _parity_row(found: OutputParity) -> tuple[str, ...]:
    agreement = found.top1_agreement
    return (
        _code(found.name),
        f"{found.max_abs:.3g}",
        f"{found.scale:.3g}",
        "equal to the last bit" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB",
        f"{found.cosine:.6f}",
        "–" if agreement is None else f"{100 * agreement:.2f} %",
    )


def _largest(outputs: Sequence[OutputParity]) -> str:
    """Largest difference of each output over all sizes."""
    names = dict.fromkeys(output.name for output in outputs)
    worst = {n: max(output.max_abs for output in outputs if output.name == n) for n in names}
    return (
        ", ".join(f"{_code(name)} {value:.3g}" for name, value in worst.items()) or "not measured"
    )


def _quantisation(manifest: Manifest, recipes: Mapping[str, str]) -> str:
    ways = [
        f"{_code(e.name)}: {e.precision if e.precision != 'unknown' else 'precision not known'};"
        f" {_plain(recipes.get(e.name, '')) or 'how it was made is not stated'}"
        for e in manifest.engines
    ]
    return f"{_list(ways)}\n\nCalibration data: {_calibration(manifest)}."


def _calibration(manifest: Manifest) -> str:
    data = manifest.calibration
    if data is None:
        return "none, or not known"
    rows = f"SHA-256 of the rows {_code(data.fingerprint)}"
    return f"{_plain(data.data)}, {data.samples} samples; {rows}"


def _licences(manifest: Manifest) -> str:
    stated = manifest.licences
    return _list(
        [
            f"Model: {_plain(stated.model) or _NOT_STATED}",
            f"Weights that it was made from: {_plain(stated.weights_from) or _NOT_STATED}",
            f"Data: {_plain(stated.data) or _NOT_STATED}",
        ]
    )


def _limits(manifest: Manifest, parity: Mapping[str, ParityRecord]) -> str:
    names = [engine.name for engine in manifest.engines]
    elsewhere = [e.name for e in manifest.engines if e.golden_from == "reference"]
    apart = [e.name for e in manifest.engines if not e.batching]
    return _list(
        [
            *_about("Not compared with the reference", [n for n in names if n not in parity]),
            *_about(
                "Never run where the bundle was packed, only built; the self-test on a device is"
                " its first",
                elsewhere,
            ),
            *_about("Not shown to give the same for several samples at once", apart),
            *_ALWAYS_LIMITS,
        ]
    )


def _about(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {', '.join(map(_code, names))}."] if names else []


def _running(manifest: Manifest) -> str:
    feeds = ", ".join(f"{spec.name!r}: ..." for spec in manifest.inputs)
    runtimes = ", ".join(dict.fromkeys(_code(engine.runtime) for engine in manifest.engines))
    return f"""\
On the device, with equipoise, NumPy and one of these runtimes installed: {runtimes}.

    import equipoise

    with equipoise.load("path/of/this/bundle") as session:
        print(session.selftest())
        outputs = session.run({{{feeds}}})

The self-test runs the golden inputs of the bundle on the device and compares with their outputs.
Before that, `equipoise verify path/of/this/bundle --trust PUBLIC.pem` says who signed it."""


def _versions(manifest: Manifest) -> str:
    rows = [(_plain(name), _plain(version)) for name, version in sorted(manifest.versions.items())]
    return _table(("package", "version"), rows) if rows else "Not stated."
