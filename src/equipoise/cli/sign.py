"""``equipoise sign``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import console, options
from equipoise.errors import UsageError


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a directory or a .zip.")],
    key: Annotated[
        Path, typer.Option(help="Private key on P-256, P-384 or P-521, a PEM file of openssl.")
    ],
    serial: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Serial of this release: the bundle's own to keep it, or a higher one. The next"
            " if not given.",
        ),
    ] = None,
    password_env: Annotated[
        str, typer.Option(help="Name of the environment variable with the password of the key.")
    ] = "",
    json: options.Json = False,
) -> None:
    """Sign a bundle, so that a device can tell who made it.

    Checks every file against its hash, raises the serial by one, and writes model.sig into it.
    """
    from equipoise.signing import SignConfig, sign_bundle

    config = SignConfig(key=key, password=_password(password_env), serial=serial)
    found = sign_bundle(bundle, config)
    if json:
        console.print_json(found)
        return
    console.print_lines(
        f"signed   {found.bundle}: {found.files} files",
        f"serial   {found.serial}",
        f"key      {found.key}",
    )


def _password(variable: str) -> bytes | None:
    """The password in the environment; it is on no command line, where others could see it."""
    if not variable:
        return None
    if not os.environ.get(variable):
        raise UsageError(
            f"--password-env {variable}: there is no such environment variable, or it is empty",
            hint=f"Set it in the shell that runs the command: read -rs {variable}; export"
            f" {variable}",
        )
    return os.environ[variable].encode()
