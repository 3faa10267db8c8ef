"""``equipoise targets``."""

from __future__ import annotations

from equipoise.cli import console, options


def command(json: options.Json = False) -> None:
    """List the targets and their integer schemes."""
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target, target_names

    targets = [get_target(name, machine=detect_machine()) for name in target_names()]
    if json:
        console.print_json(targets)
        return
    for target in targets:
        scheme = target.int8
        console.print_lines(
            f"{target.name}: {target.summary}",
            f"  int8     {scheme.activation} activations, {scheme.weight} weights,"
            f" {'per channel' if scheme.per_channel else 'per tensor'}",
            f"  because  {scheme.reason}",
            f"  opset    {target.opset}, IR version up to {target.max_ir_version}",
        )
