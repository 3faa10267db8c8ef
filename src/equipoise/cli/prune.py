"""``equipoise prune``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options
from equipoise.cli.grouped import grouped
from equipoise.cli.train_options import (
    DataOptions,
    LoopOptions,
    ObjectiveOptions,
    StageOptions,
    job_fields,
    objective_of,
    settings_of,
)

if TYPE_CHECKING:
    from equipoise.compress.cutting import Pruning, Sparsity
    from equipoise.compress.settings import TrainSettings
    from equipoise.pruning import PruneRequest


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """How far, and what."""

    speedup: Annotated[
        float, typer.Option(help="Goal: measured latency of the float engine before over after.")
    ] = 2.0
    max_drop: Annotated[
        float, typer.Option(help="Largest drop of the metric; 0.01 is one point.")
    ] = 0.01
    steps: Annotated[int, typer.Option(help="Steps to the goal, with training after each.")] = 3
    step_epochs: Annotated[float, typer.Option(help="Epochs after each step.")] = 1.0
    importance: Annotated[
        str, typer.Option(help="What matters: l1, l2, taylor, fisher or activation.")
    ] = "taylor"
    scope: Annotated[
        str, typer.Option(help="global: layers compete; per-layer: each gives the same share.")
    ] = "global"
    multiple: Annotated[
        int | None, typer.Option(min=1, help="Widths are multiples of it; the target's by default.")
    ] = None
    no_depth: Annotated[bool, typer.Option("--no-depth", help="Keep all layers.")] = False
    sparsity: Annotated[
        str,
        typer.Option(
            help="Zeros among the weights, 2:4 or a share such as 0.5; refused where the target"
            " gains nothing from them."
        ),
    ] = ""
    trim_vocabulary: Annotated[
        bool,
        typer.Option("--trim-vocabulary", help="Leave out tokens that the texts do not need."),
    ] = False


@grouped
def command(
    source: options.Source,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for model/ and results.json.")
    ],
    pruning: PruningOptions,
    samples: DataOptions,
    loop: LoopOptions,
    objective: ObjectiveOptions,
    stages: StageOptions,
    target: options.Target = "cpu",
    weights: options.Weights = None,
    task: options.Task = "",
    teacher: Annotated[
        str, typer.Option(help="Model to learn from; the source itself if not given.")
    ] = "",
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    stock: Annotated[
        str, typer.Option(help="A smaller trained model, as a candidate beside the pruned one.")
    ] = "",
    stock_weights: Annotated[Path | None, typer.Option(help="Weights of it.")] = None,
    rounds: Annotated[int, typer.Option(min=10, help="Interleaved rounds per latency.")] = 60,
) -> None:
    """Make a model narrower and shallower until it is fast enough on the target.

    Cuts in steps what a measured table of its layers says is worth most, trains after each step,
    and times the target's engine beside the original's: a step that is no faster is not taken. Ends
    at --speedup or at --max-drop, and says how far it got.
    """
    from equipoise.errors import NotMetError
    from equipoise.pruning import PruneRequest, prune_model
    from equipoise.report.pruning import sides_table, steps_table, words_of

    wanted = objective_of(objective, labelled=not samples.unlabelled)
    request = PruneRequest(
        source=source,
        data=data,
        output=output,
        target=target,
        weights=weights,
        task=task,
        pruning=_pruning(pruning, recovery=settings_of(loop, objective=wanted)),
        teacher=teacher,
        teacher_weights=teacher_weights,
        stock=stock,
        stock_weights=stock_weights,
        sparsity=_sparsity(pruning.sparsity),
        trim_vocabulary=pruning.trim_vocabulary,
        processes=loop.processes,
        checkpoints=loop.checkpoints,
        rounds=rounds,
        **job_fields(samples, stages),
    )
    with console.progress(quiet=stages.quiet or stages.json) as observer:
        result = prune_model(request, observer=observer)
    if stages.json:
        console.print_json(result)
    else:
        out = console.out()
        out.print(steps_table(result))
        out.print(sides_table(result))
        console.print_lines(*words_of(result), *_places(request, chosen=result.chosen))
    if not result.reached:
        raise NotMetError(
            f"a speed-up of {result.speedup:g} at a drop of at most {result.max_drop:g} was not"
            f" reached: {result.stopped}",
            hint="Raise --max-drop, give more --epochs, or ask for less.",
        )


def _pruning(given: PruningOptions, *, recovery: TrainSettings) -> Pruning:
    from equipoise import record
    from equipoise.compress.cutting import Cutting, Pruning
    from equipoise.errors import UsageError

    cutting = {
        "importance": given.importance,
        "scope": given.scope,
        "multiple": given.multiple,
        "depth": not given.no_depth,
    }
    return Pruning(
        speedup=given.speedup,
        max_drop=given.max_drop,
        steps=given.steps,
        step_epochs=given.step_epochs,
        recovery=recovery,
        cutting=record.loads(Cutting, record.dumps(cutting), where="options", error=UsageError),
    )


def _sparsity(text: str) -> Sparsity | None:
    from equipoise.compress.cutting import Sparsity
    from equipoise.errors import UsageError

    if text in {"", "2:4"}:
        return Sparsity() if text else None
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--sparsity {text!r}: give 2:4, or a share between 0 and 1")
    return Sparsity(pattern="unstructured", share=share)


def _places(request: PruneRequest, *, chosen: str) -> tuple[str, ...]:
    if chosen == "original":
        return ("No model was written: nothing keeps the metric and is faster.",)
    return (f"model  {request.output / 'model'}",)
