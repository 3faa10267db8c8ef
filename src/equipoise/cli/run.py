"""``equipoise run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options
from equipoise.errors import UsageError

if TYPE_CHECKING:
    from equipoise.deploy import BundleSession
    from equipoise.spec import Array

_SHOWN = 5
"""Classes of a text that are printed."""


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a directory or a .zip.")],
    inputs: Annotated[
        Path | None, typer.Argument(help=".npz with one array per input, batch first.")
    ] = None,
    text: Annotated[str, typer.Option(help="A text, for a bundle with a tokenizer.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run the golden vectors on this device instead.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="Name of the engine, instead of the first that fits.")
    ] = "",
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key of a signer, a PEM file; repeat it for several."),
    ] = None,
    serials: Annotated[
        Path | None,
        typer.Option(help="File that keeps the highest serial of each bundle: no older one runs."),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Run a bundle on arrays or text, or its self-test.

    The exit code is 4 when a file is not what its hash says, or, with --trust, when none of the
    keys signed the bundle.
    """
    from equipoise.deploy import load

    if sum([inputs is not None, bool(text), selftest]) != 1:
        raise UsageError("give one of: an .npz file, --text, --selftest")
    with load(
        bundle, threads=threads, engine=engine, trust=tuple(trust or ()), serials=serials
    ) as session:
        if selftest:
            _selftest(session, json=json)
        elif text:
            _text(session, text, json=json)
        else:
            _arrays(session, inputs or Path(), output=output, json=json)


def _selftest(session: BundleSession, *, json: bool) -> None:
    from equipoise.errors import ParityError

    found = session.selftest()
    if json:
        console.print_json(found)
    else:
        console.print_lines(str(found))
    if not found.passed:
        raise ParityError(f"{session.directory}: {found}")


def _text(session: BundleSession, text: str, *, json: bool) -> None:
    """What the application of the bundle's task says of a text."""
    from equipoise.apps.text import TextClassifier
    from equipoise.apps.tokens import TokenClassifier

    if session.manifest.tokenizer is None:
        raise UsageError(f"{session.directory} has no tokenizer: give an .npz file")
    if session.manifest.task == "token-classification":
        with TokenClassifier(session) as find:
            entities = find(text)
        _say(entities, *(f"{e.text}\t{e.label}\t{e.score:.4f}" for e in entities), json=json)
    else:
        with TextClassifier(session) as classify:
            found = classify(text)
        lines = (f"{scored.label}\t{scored.score:.4f}" for scored in found.top(_SHOWN))
        _say(found, *lines, json=json)


def _say(found: object, *lines: str, json: bool) -> None:
    if json:
        console.print_json(found)
    else:
        console.print_lines(*lines)


def _arrays(session: BundleSession, inputs: Path, *, output: Path | None, json: bool) -> None:
    from equipoise import fs
    from equipoise.bundle.golden import npz_bytes
    from equipoise.data.readers.npz import read_arrays
    from equipoise.spec import describe

    outputs = session.run(read_arrays(inputs))
    if output is not None:
        fs.write_bytes(output, npz_bytes(outputs))
    if json:
        console.print_json({name: _values(array) for name, array in outputs.items()})
        return
    console.print_lines(*(f"{name}: {describe(array)}" for name, array in outputs.items()))
    if output is None:
        console.print_lines(*(str(array) for array in outputs.values()))


def _values(array: Array) -> list[object]:
    values: list[object] = array.tolist()
    return values
