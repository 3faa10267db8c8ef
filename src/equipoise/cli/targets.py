"""``equipoise targets``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.targets.profile import Int8Scheme


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
            f" {_scales(scheme)}",
            f"  because  {scheme.reason}",
            f"  opset    {target.opset}, IR version up to {target.max_ir_version}",
        )


def _scales(scheme: Int8Scheme) -> str:
    if not scheme.per_channel:
        return "one scale per tensor"
    excepted = f" ({', '.join(scheme.per_tensor)}: per tensor)" if scheme.per_tensor else ""
    return f"one scale per channel{excepted}"
