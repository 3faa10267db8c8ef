"""``equipoise verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.signing import TrustRecord


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a directory or a .zip.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key of a signer, a PEM file. May be given several times."),
    ] = None,
    revoked: Annotated[
        list[str] | None,
        typer.Option(help="Fingerprint of a key that is trusted no longer, even with --trust."),
    ] = None,
    newest: Annotated[
        int, typer.Option(min=0, help="Highest serial seen; a bundle below it is refused.")
    ] = 0,
    json: options.Json = False,
) -> None:
    """Check every hash of a bundle, and who signed it.

    The exit code is 4 when a file is not what its hash says, or when none of the trusted keys
    signed exactly these files. Without --trust only hashes are checked, which anyone can compute.
    """
    from equipoise.signing import TrustConfig, verify_bundle

    config = TrustConfig(keys=tuple(trust or ()), revoked=tuple(revoked or ()), newest=newest)
    found = verify_bundle(bundle, config)
    if found.key is None:
        sys.stderr.write(f"warning: {_warning(found)}\n")
    if json:
        console.print_json(found)
    else:
        _print(found)


def _warning(found: TrustRecord) -> str:
    state = "has a signature that was NOT CHECKED" if found.signed else "is NOT SIGNED"
    return (
        f"{found.bundle} {state}: its hashes show that nothing broke on the way, not who made it."
        " Give --trust PUBLIC.pem."
    )


def _print(found: TrustRecord) -> None:
    from equipoise.report.rows import size

    console.print_lines(
        f"files    {found.files}, {size(found.size_bytes)}; every hash is right",
        f"serial   {found.serial}",
        f"key      {found.key or 'nobody is trusted'}",
    )
