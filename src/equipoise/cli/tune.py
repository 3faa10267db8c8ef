"""``equipoise tune``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.search.budget import Budget
    from equipoise.search.goal import Goal
    from equipoise.search.recipe_file import Word
    from equipoise.search.result import Candidate, TuneResult
    from equipoise.search.search import Watcher
    from equipoise.stages import Observer

_NOT_WORDS: Final = ("recipe", "save_recipe", "json", "quiet", "fresh")
"""Parameters that a recipe file does not have."""


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take the words of a recipe file for options that are not given."""
    if path is not None:
        from equipoise.search.recipe_file import read_recipe_file

        known = {p.name.replace("_", "-") for p in context.command.params if p.name}
        known -= {name.replace("_", "-") for name in _NOT_WORDS}
        found = read_recipe_file(path, options=known)
        words = {key.replace("-", "_"): value for key, value in found.words.items()}
        context.default_map = {**(context.default_map or {}), **words}
        context.obj = found.recipe
    return path


def command(
    context: typer.Context,
    source: options.Source,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for bundle/ and report.html.")
    ],
    recipe: Annotated[  # noqa: ARG001  read by its callback, before the other options
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_from_file,
            help="Recipe file with these options, and perhaps the recipe to make.",
        ),
    ] = None,
    target: options.Target = "cpu",
    also: Annotated[
        str,
        typer.Option(help="Other targets of this device, such as openvino: more candidates."),
    ] = "",
    metric: Annotated[
        str, typer.Option(help="Such as accuracy or entity-f1; found from the task if not given.")
    ] = "",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Largest allowed drop of the metric; 0.01, one point, without --min-metric."
        ),
    ] = None,
    min_metric: Annotated[float | None, typer.Option(help="Least metric.")] = None,
    max_latency: Annotated[str, typer.Option(help="Most time per inference, such as 5ms.")] = "",
    max_size: Annotated[str, typer.Option(help="Most bytes on disk, such as 8MB.")] = "",
    max_memory: Annotated[str, typer.Option(help="Most peak memory, such as 50MB.")] = "",
    minimise: Annotated[
        str,
        typer.Option(
            help="Costs in order, such as latency,size, or with weights: latency=2,size=1."
        ),
    ] = "latency,size,memory",
    confidence: Annotated[
        float, typer.Option(help="Of what is claimed of the metric, for all candidates together.")
    ] = 0.95,
    budget: Annotated[
        str, typer.Option(help="Time for trials, such as 30m, those of earlier runs included.")
    ] = "",
    trials: Annotated[int | None, typer.Option(help="Number of trials at most.")] = None,
    repeat: Annotated[
        int, typer.Option(help="Search so many times, measuring anew, and tell how stable it is.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of what the search draws.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Trials at once; needs the extra 'cluster'.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Address of a Ray cluster: ray://host:10001, host:6379 or auto.")
    ] = "",
    storage: Annotated[
        str, typer.Option(help="Path or fsspec URL that all nodes of the cluster reach.")
    ] = "",
    memory_limit: Annotated[
        str, typer.Option(help="Most resident memory of one stage, such as 8GB.")
    ] = "",
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write a recipe file that makes the result again.")
    ] = None,
    weights: options.Weights = None,
    task: options.Task = "",
    calibration: options.Calibration = None,
    calibration_samples: options.CalibrationSamples = 128,
    samples: options.Samples = None,
    max_length: options.MaxLength = 512,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    float_fallback: Annotated[
        bool,
        typer.Option(
            "--float-fallback", help="Pack the float engine too, for devices of another kind."
        ),
    ] = False,
    prune: Annotated[
        str,
        typer.Option(
            help="Speed-ups to prune to, such as 2 or 2,4: more candidates; none; or auto: what"
            " --budget allows, if the data has a training part."
        ),
    ] = "auto",
    prune_epochs: Annotated[float, typer.Option(help="Epochs that train a pruned model.")] = 3.0,
    prune_rate: Annotated[float, typer.Option(help="Learning rate of that.")] = 2e-4,
    train: Annotated[
        str | None,
        typer.Option(help="Data to train a pruned model on; a part of --data if not given."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads per operator; searched, up to all usable cores, if not given."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Least interleaved rounds per latency.")] = 60,
    time_limit: options.TimeLimit = 3600.0,
    cache_dir: options.CacheDir = None,
    fresh: options.Fresh = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Find the sweet spot of a trained model, prove it, pack it.

    Exports the model, tries recipes, compares each with the source on the same samples, measures it
    on the target, and writes a bundle and a report. A run that is stopped writes the best so far,
    and goes on where it was when the same command is given again.
    """
    from equipoise.compress.cutting import Pruning
    from equipoise.search.goal import parse_minimise
    from equipoise.tuning.config import TuneConfig
    from equipoise.tuning.tune import tune

    costs, powers = parse_minimise(minimise)
    config = TuneConfig(
        source=source,
        data=data,
        output=output,
        weights=weights,
        task=task,
        calibration=calibration,
        target=target,
        also=options.names(also),
        metric=metric,
        goal=_goal(
            max_drop=max_drop,
            min_metric=min_metric,
            max_latency=max_latency,
            max_size=max_size,
            max_memory=max_memory,
            confidence=confidence,
        ),
        budget=_budget(budget, trials),
        recipe=context.obj,
        repeat=repeat,
        seed=seed,
        workers=workers,
        cluster=cluster,
        storage=storage,
        memory_limit_bytes=_bytes(memory_limit, option="--memory-limit"),
        command=_command(),
        samples=samples,
        calibration_samples=calibration_samples,
        max_length=max_length,
        tokenizer=tokenizer,
        labels=options.names(labels),
        threads=threads,
        rounds=rounds,
        time_limit_s=time_limit,
        cache=cache_dir,
        fresh=fresh,
        float_fallback=float_fallback,
        train=train,
        prune=options.prunings(prune),
        recovery=replace(Pruning().recovery, epochs=prune_epochs, learning_rate=prune_rate),
    )
    config = replace(config, goal=replace(config.goal, minimise=costs, weights=powers))
    with console.progress(quiet=quiet or json) as observer:
        result = tune(config, observer=observer, watcher=_watcher(observer))
    if save_recipe is not None:
        _save(context, result, save_recipe)
    if json:
        console.print_json(result)
        return
    _show(result, output)


def _goal(
    *,
    max_drop: float | None,
    min_metric: float | None,
    max_latency: str,
    max_size: str,
    max_memory: str,
    confidence: float,
) -> Goal:
    from equipoise.search.goal import Goal

    unsaid = max_drop is None and min_metric is None
    latency_s = _seconds(max_latency, option="--max-latency")
    return Goal(
        max_drop=Goal().max_drop if unsaid else max_drop,
        min_metric=min_metric,
        max_latency_ms=None if latency_s is None else 1000 * latency_s,
        max_size_bytes=_bytes(max_size, option="--max-size"),
        max_memory_bytes=_bytes(max_memory, option="--max-memory"),
        confidence=confidence,
    )


def _budget(budget: str, trials: int | None) -> Budget:
    from equipoise.search.budget import Budget

    return Budget(seconds=_seconds(budget, option="--budget"), trials=trials)


def _seconds(text: str, *, option: str) -> float | None:
    return options.seconds(text, option=option) if text else None


def _bytes(text: str, *, option: str) -> int | None:
    return int(options.size_bytes(text, option=option)) if text else None


def _command() -> str:
    """What was typed, as a shell takes it."""
    import shlex

    return shlex.join(["equipoise", *sys.argv[1:]])


def _watcher(observer: Observer) -> Watcher:
    """Tells of each trial in a line."""
    from equipoise.report.progress import trial_line
    from equipoise.search.search import Watcher

    class Lines(Watcher):
        def tried(
            self, candidate: Candidate, *, best: Candidate | None, left_s: float | None
        ) -> None:
            observer.say(trial_line(candidate, best=best, left_s=left_s))

    return Lines()


def _save(context: typer.Context, result: TuneResult, path: Path) -> None:
    from equipoise.search.recipe_file import RecipeFile, write_recipe_file

    chosen = next(c.recipe for c in result.candidates if c.recipe.name == result.chosen)
    write_recipe_file(RecipeFile(words=_words(context), recipe=chosen), path)


def _words(context: typer.Context) -> dict[str, Word]:
    """The options that were given, on the command line or in a recipe file."""
    given = {}
    for name, value in context.params.items():
        origin = context.get_parameter_source(name)
        by_default = origin is None or origin.name == "DEFAULT"
        if name not in _NOT_WORDS and name != "output" and not by_default and value is not None:
            given[name.replace("_", "-")] = str(value) if isinstance(value, Path) else value
    return given


def _show(result: TuneResult, output: Path) -> None:
    from equipoise.report.explain import summary
    from equipoise.report.terminal import candidates_table, metric_reports

    out = console.out()
    out.print(candidates_table(result))
    if result.reference_report:
        out.print(metric_reports(result))
    for warning in result.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    out.print(f"Sweet spot: {summary(result)}", markup=False)
    console.print_lines(
        "",
        f"bundle  {output / 'bundle'}",
        f"report  {output / 'report.html'}",
        "",
        *_snippet(output / "bundle"),
    )


def _snippet(bundle: Path) -> tuple[str, ...]:
    """The three lines of Python that run a bundle, and what they need."""
    from equipoise.bundle.reading import read_manifest

    manifest = read_manifest(bundle)
    feeds = ", ".join(f'"{spec.name}": {spec.name}' for spec in manifest.inputs)
    return (
        f"Run it on the device, with numpy and {manifest.engines[0].runtime} alone:",
        "",
        "    import equipoise",
        f'    session = equipoise.load("{bundle}")',
        f"    outputs = session.run({{{feeds}}})",
    )
