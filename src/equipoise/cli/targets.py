"""``equipoise targets``: list, show, detect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.targets.detect import Detected
    from equipoise.targets.profile import Figure, Int8Scheme, Target

app = typer.Typer(
    help="The devices that engines are made for.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def overview(context: typer.Context, json: options.Json = False) -> None:
    """List the targets; show one; detect what this machine is."""
    if context.invoked_subcommand is not None:
        return
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target, target_names

    targets = [get_target(name, machine=detect_machine()) for name in target_names()]
    if json:
        console.print_json(targets)
        return
    rows = [(target.name, target.runtime, target.summary) for target in targets]
    console.out().print(console.table(["target", "runtime", "what it is"], rows))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A target, or a .toml file of your own.")],
    json: options.Json = False,
) -> None:
    """Everything that is known of a target, and where it is from."""
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target

    target = get_target(name, machine=detect_machine())
    if json:
        console.print_json(target)
    else:
        console.print_lines(*_lines(target))


@app.command()
def detect(json: options.Json = False) -> None:
    """What this machine is, what of it may be used, and which targets it is."""
    from equipoise.targets.detect import detect_all

    found = detect_all()
    if json:
        console.print_json(found)
    else:
        console.print_lines(*_machine_lines(found))


def _lines(target: Target) -> Iterator[str]:
    hardware = target.hardware
    yield f"{target.name}: {target.summary}"
    yield f"  runtime    {' '.join([target.runtime, target.tensorrt, *target.providers])}"
    yield f"  loads      {', '.join(target.artefacts)}"
    yield f"  opset      {target.opset}, IR version up to {target.max_ir_version}"
    yield f"  shapes     {'static' if target.static_shapes else 'dynamic'}"
    yield f"  computes   in {', '.join(target.dtypes)}"
    yield (
        f"  int8       {target.int8.activation} activations, {target.int8.weight} weights,"
        f" {_scales(target.int8)}"
    )
    yield f"  because    {target.int8.reason}"
    device = (hardware.kind, hardware.architecture, hardware.compute_capability)
    yield f"  device     {' '.join(part for part in device if part)}"
    if hardware.flags or hardware.any_flag:
        either = f" and one of {', '.join(hardware.any_flag)}" if hardware.any_flag else ""
        yield f"  flags      {' '.join(hardware.flags)}{either}"
    yield from _figure("memory", hardware.memory_gb, unit="GB")
    yield from _figure("bandwidth", hardware.bandwidth_gb_s, unit="GB/s")
    for kind, peaks in (("dense", hardware.dense_tops), ("sparse", hardware.sparse_tops)):
        for dtype, peak in peaks.items():
            yield from _figure(f"{dtype} {kind}", peak, unit="TOPS")
    if hardware.power_modes_w:
        yield f"  power      {', '.join(f'{watt:g}' for watt in hardware.power_modes_w)} W"


def _figure(name: str, figure: Figure | None, *, unit: str) -> Iterator[str]:
    if figure is not None:
        yield f"  {name:<12} {figure.value:g} {unit} ({figure.source})"


def _scales(scheme: Int8Scheme) -> str:
    if not scheme.per_channel:
        return "one scale per tensor"
    excepted = f" ({', '.join(scheme.per_tensor)}: per tensor)" if scheme.per_tensor else ""
    return f"one scale per channel{excepted}"


def _machine_lines(found: Detected) -> Iterator[str]:
    from equipoise.report.rows import size

    machine = found.machine
    yield f"cpu      {machine.cpu} ({machine.architecture})"
    yield f"flags    {' '.join(machine.flags)}"
    yield f"cores    {machine.cores} of {found.cores_present} may be used"
    yield f"memory   {size(machine.memory_bytes)} of {size(found.memory_present_bytes)} may be used"
    for gpu in found.gpus:
        yield (
            f"gpu      {gpu.name}, compute capability {gpu.compute_capability},"
            f" {size(gpu.memory_bytes)}, driver {gpu.driver}"
        )
    if not found.gpus:
        yield f"gpu      {found.no_gpu}"
    yield f"targets  {', '.join(found.targets)}"
