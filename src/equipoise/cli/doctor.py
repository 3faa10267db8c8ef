"""``equipoise doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.runtimes.protocol import Availability


def command(json: options.Json = False) -> None:
    """Say what is installed and what to install."""
    from equipoise.doctor import examine
    from equipoise.report.rows import size

    found = examine()
    if json:
        console.print_json(found)
        return
    machine = found.machine
    console.print_lines(
        f"python   {found.python}",
        f"cpu      {machine.cpu}, {machine.cores} usable core(s), {size(machine.memory_bytes)}",
        f"flags    {' '.join(machine.flags)}",
    )
    out = console.out()
    out.print(
        console.table(
            ["package", "version", "extra", "to install"],
            [(p.module, p.version or "missing", p.extra, p.install) for p in found.packages],
        )
    )
    out.print(
        console.table(
            ["runtime", "state", "to install"],
            [(name, _state(state), state.install) for name, state in found.runtimes.items()],
        )
    )
    for problem in found.problems:
        out.print(f"note: {problem}", style="yellow", markup=False)


def _state(availability: Availability) -> str:
    if availability.available:
        return f"ready, {availability.version}"
    return availability.reason
