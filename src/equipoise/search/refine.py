"""Around the best: what the axes of a space cannot name, proposed by Optuna.

How much of the outputs static int8 keeps, and which share of values its ranges hold, are real
numbers. TPE with several objectives and with constraints proposes them where the best recipe is
static int8; the recipes that were tried are its first trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from equipoise import extras
from equipoise.quantize.ranges import Percentile
from equipoise.quantize.schemes import StaticInt8
from equipoise.recipe import Recipe

_LEAST_DB, _MOST_DB = 0.0, 45.0
_LEAST_BEYOND, _MOST_BEYOND = 1e-6, 1e-2
"""Share of values outside of a range."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """A recipe that was tried.

    Attributes:
        recipe: Which.
        log_costs: Logarithm of each cost over that of the float engine.
        excess: How far each limit is exceeded, at most 0 where it is kept.
    """

    recipe: Recipe
    log_costs: tuple[float, ...]
    excess: tuple[float, ...]


def refined(best: Recipe, tried: Sequence[Around], *, seed: int) -> Recipe | None:
    """A recipe like ``best`` that was not tried; None where nothing is left to refine.

    Args:
        best: The best so far.
        tried: What was tried.
        seed: Of the proposals.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    if not isinstance(best.quantization, StaticInt8):
        return None
    optuna: Any = extras.require("optuna")
    optuna.logging.disable_default_handler()
    alike = [one for one in tried if _is_alike(one.recipe, best)]
    distributions = _distributions(optuna, best.quantization)
    study = optuna.create_study(
        directions=["minimize"] * len(alike[0].log_costs),
        sampler=optuna.samplers.TPESampler(n_startup_trials=0, multivariate=True, seed=seed),
    )
    for one in alike:
        _teach(study, one, distributions)
    return _with(best, study.ask(distributions).params)


def _is_alike(recipe: Recipe, best: Recipe) -> bool:
    """Whether the two differ in what is refined alone."""
    own, other = recipe.quantization, best.quantization
    if not isinstance(own, StaticInt8) or not isinstance(other, StaticInt8):
        return False
    same_form = replace(own, min_sqnr_db=other.min_sqnr_db, method=other.method) == other
    bare = replace(recipe, name="", summary="", quantization=None)
    return (
        same_form
        and type(own.method) is type(other.method)
        and bare == replace(best, name="", summary="", quantization=None)
    )


def _distributions(optuna: Any, quantization: StaticInt8) -> dict[str, Any]:
    number = optuna.distributions.FloatDistribution
    found = {"kept_db": number(_LEAST_DB, _MOST_DB)}
    if isinstance(quantization.method, Percentile):
        found["beyond"] = number(_LEAST_BEYOND, _MOST_BEYOND, log=True)
    return found


def _teach(study: Any, one: Around, distributions: Mapping[str, Any]) -> None:
    quantization = one.recipe.quantization
    assert isinstance(quantization, StaticInt8)  # noqa: S101  as all that are alike
    params = {"kept_db": min(max(quantization.min_sqnr_db, _LEAST_DB), _MOST_DB)}
    if isinstance(quantization.method, Percentile):
        params["beyond"] = 1 - quantization.method.percent / 100
    study.enqueue_trial(params)
    trial = study.ask(dict(distributions))
    for index, excess in enumerate(one.excess):
        trial.set_constraint(str(index), excess)
    study.tell(trial, list(one.log_costs))


def _with(best: Recipe, params: Mapping[str, float]) -> Recipe:
    quantization = best.quantization
    assert isinstance(quantization, StaticInt8)  # noqa: S101  asked before
    kept = round(params["kept_db"], 1)
    changed = replace(quantization, min_sqnr_db=kept)
    words = f"{kept:g}dB"
    if "beyond" in params:
        digits = 2 - math.floor(math.log10(params["beyond"]))
        percent = round(100 * (1 - params["beyond"]), digits)
        changed = replace(changed, method=Percentile(percent=percent))
        words += f"-{percent:g}pc"
    base = best.name.partition("@")[0]
    summary = f"{best.summary.rstrip('.')}; refined to {words}."
    return replace(best, name=f"{base}@{words}", summary=summary, quantization=changed)
