"""The command ``equipoise``: one file per command, errors to exit codes at one place."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Final

import typer

from equipoise import __version__
from equipoise.cli import (
    bench,
    build,
    check,
    compare,
    diagnose,
    distill,
    doctor,
    explain,
    export,
    finetune,
    fit,
    inspect,
    lock,
    pack,
    prewarm,
    prune,
    quantize,
    report,
    run,
    sign,
    targets,
    tune,
    verify,
)
from equipoise.errors import EquipoiseError, InterruptedRunError

COMMANDS: Final[dict[str, Callable[..., None] | typer.Typer]] = {
    "tune": tune.command,
    "explain": explain.command,
    "report": report.command,
    "prune": prune.command,
    "distill": distill.command,
    "finetune": finetune.command,
    "export": export.command,
    "fit": fit.command,
    "quantize": quantize.command,
    "diagnose": diagnose.command,
    "build": build.command,
    "pack": pack.command,
    "check": check.command,
    "lock": lock.command,
    "bench": bench.command,
    "compare": compare.command,
    "prewarm": prewarm.command,
    "run": run.command,
    "sign": sign.command,
    "verify": verify.command,
    "inspect": inspect.command,
    "doctor": doctor.command,
    "targets": targets.app,
}

_SIGNAL_BASE: Final = 128
_INTERNAL: Final = 1

app = typer.Typer(
    name="equipoise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"equipoise {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn a trained model into the smallest, fastest engine that is still accurate enough."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise InterruptedRunError(
        f"stopped by {signal.Signals(number).name}",
        hint="The same command goes on where it was.",
        exit_code=_SIGNAL_BASE + number,
    )


def main() -> None:
    """The console entry point."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        code = app(standalone_mode=False)
    except InterruptedRunError as stop:
        _say(stop.message, hint=stop.hint)
        code = stop.exit_code
    except Exception as error:  # noqa: BLE001 - the last place before a traceback
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Print an error; return the exit code. ``EQUIPOISE_TRACEBACK=1`` shows where it came from."""
    if os.environ.get("EQUIPOISE_TRACEBACK"):
        raise error
    if isinstance(error, EquipoiseError):
        _say(error.message, hint=error.hint)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):  # typer's own usage errors, and its Exit
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return code
    _say(
        f"internal error: {type(error).__name__}: {error}",
        hint="Please report it, with what EQUIPOISE_TRACEBACK=1 shows.",
    )
    return _INTERNAL


def _say(message: str, *, hint: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"{hint}\n")
