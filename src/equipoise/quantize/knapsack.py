"""The fastest choice of precisions within a budget of noise: a knapsack with borders.

A mixed-integer linear programme that HiGHS solves by branch and bound on its linear relaxation
(Huangfu and Hall, Mathematical Programming Computation 10, 2018). One row bounds the noise, all
others say what the borders between float and integers cost, so the relaxation is nearly integral:
graphs of hundreds of nodes are solved to the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import BackendError
from equipoise.quantize.borders import Border, BorderTimes, Join, LatencyModel

_GAP: Final = 1e-6
_MOST_BRANCHES: Final = 20_000
"""Of the tree: beyond it the best that was found is taken. Time would differ from run to run."""

_WORTH: Final = 1e-3
"""What all weights in integers are worth besides their time, as a share of the float time: enough
to decide among choices that are equally fast."""

_TICK_MS: Final = 1e-3
"""What profiles count in."""

Variable = str | tuple[str, int]
"""The name of a node, or what else there is of a border."""

_TIME: Final = ("time", 0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which nodes run in integers, and what that is predicted to cost.

    Attributes:
        integers: Nodes in integers.
        noise: Sum of their noise.
        ms: Predicted time of the whole model.
    """

    integers: frozenset[str]
    noise: float
    ms: float


def fastest(
    model: LatencyModel,
    noise: Mapping[str, float],
    *,
    most_noise: float,
    worth_ms: Mapping[str, float],
    least_ms: float = 0.0,
) -> Choice:
    """The choice with the least predicted time among those whose noise is within the budget.

    Args:
        model: What each choice costs.
        noise: Node -> noise power that it makes in integers. A node without one was not measured:
            it stays in integers, and counts for nothing.
        most_noise: What the sum of the noise may be; infinite for no limit.
        worth_ms: Node -> what its integers are worth besides time, for a quarter of the weights; in
            milliseconds.
        least_ms: Nobody asks for less than this time: choices below it are equally fast, and what
            their integers are worth decides among them.

    Raises:
        BackendError: The solver gives up without a choice.
    """
    programme = _Programme(model, noise, most_noise=most_noise)
    integers = model.settled(programme.solve(worth_ms=worth_ms, least_ms=least_ms))
    total = math.fsum(noise.get(name, 0.0) for name in integers)
    return Choice(integers=integers, noise=total, ms=model.predict_ms(integers))


def worth_of_integers(
    sizes: Mapping[str, int], spreads_ms: Mapping[str, float], *, float_ms: float
) -> dict[str, float]:
    """Node -> what its integers are worth besides time, in milliseconds.

    By its share of the weights, which are a quarter of the size; and by what its gain is uncertain
    by, so that no node leaves integers for a difference that the measurement cannot tell.

    Args:
        sizes: Node -> number of its weights.
        spreads_ms: Node -> half the range of its gain over openings.
        float_ms: Time of the float model.
    """
    total = sum(sizes.values()) + len(sizes)
    return {
        name: _WORTH * float_ms * (size + 1) / total + max(spreads_ms.get(name, 0.0), _TICK_MS)
        for name, size in sizes.items()
    }


class _Programme:
    """Variables, each between its bounds, and rows of which each bounds a sum of some of them."""

    def __init__(
        self, model: LatencyModel, noise: Mapping[str, float], *, most_noise: float
    ) -> None:
        self._model = model
        self._bounds: dict[Variable, tuple[float, float]] = {}
        self._rows: list[tuple[Mapping[Variable, float], float]] = []
        self._time: dict[Variable, float] = {}
        joins = {join.name for join in model.joins}
        for name, change_ms in model.changes_ms.items():
            self._pay(name, change_ms)
            known = noise.get(name, 0.0 if name in joins else None)
            self._add_node(name, known, most_noise=most_noise)
        if 0 < most_noise < math.inf:
            self._row(
                {n: p / most_noise for n, p in noise.items() if 0 < p <= most_noise}, high=1.0
            )
        for number, times in enumerate(model.borders):
            self._add_border(times, number)
        for join in model.joins:
            self._add_join(join)

    def _add_node(self, name: str, noise: float | None, *, most_noise: float) -> None:
        """A node is 1 in integers; one that was not measured stays there."""
        if noise is None:
            self._variable(name, low=1.0)
        else:
            self._variable(name, high=float(noise <= most_noise))

    def _add_join(self, join: Join) -> None:
        for producer in join.producers:
            self._row({join.name: 1.0, producer: -1.0}, high=0.0)
        self._row({join.name: 1.0, **dict.fromkeys(join.readers, -1.0)}, high=0.0)

    def _add_border(self, times: BorderTimes, number: int) -> None:
        """The time of a border, as :meth:`~equipoise.quantize.borders.BorderTimes.ms` says."""
        border, given = times.border, self._given(times.border, number)
        less_given: dict[Variable, float] = {} if given is None else {given: -1.0}
        rounded = [{reader: 1.0, **less_given} for reader in border.readers]
        self._passage(rounded, ("rounded", number), ms=times.rounded_ms - times.float_ms)
        if given is None:
            return
        self._pay(given, times.integer_ms - times.float_ms)
        restored: list[dict[Variable, float]]
        restored = [{given: 1.0, reader: -1.0} for reader in border.readers]
        restored += [{given: 1.0}] if border.outside else []
        self._passage(restored, ("restored", number), ms=times.restored_ms - times.integer_ms)

    def _given(self, border: Border, number: int) -> Variable | None:
        """The variable that says whether a tensor is given in integers; None if it never is."""
        if not border.producer or (border.joint and (border.outside or not border.readers)):
            return None
        if not border.joint:
            return border.producer
        given = self._variable(("given", number))
        parts = (border.producer, *border.readers)
        for part in parts:
            self._row({given: 1.0, part: -1.0}, high=0.0)
        self._row({given: -1.0, **dict.fromkeys(parts, 1.0)}, high=len(parts) - 1.0)
        return given

    def _passage(
        self, causes: list[dict[Variable, float]], passage: Variable, *, ms: float
    ) -> None:
        """A kernel that runs when any of ``causes`` is 1."""
        if causes and ms > 0:
            self._pay(self._variable(passage), ms)
            for cause in causes:
                self._row({**cause, passage: -1.0}, high=0.0)

    def _pay(self, variable: Variable, ms: float) -> None:
        self._time[variable] = self._time.get(variable, 0.0) + ms

    def _variable(self, name: Variable, *, low: float = 0.0, high: float = 1.0) -> Variable:
        self._bounds[name] = (low, high)
        return name

    def _row(self, terms: Mapping[Variable, float], *, high: float) -> None:
        """The sum of coefficients times variables is ``high`` at most."""
        self._rows.append((terms, high))

    # Solving.

    def solve(self, *, worth_ms: Mapping[str, float], least_ms: float) -> frozenset[str]:
        """The nodes in integers: least time, and most worth among equals."""
        float_ms = self._model.predict_ms(())
        unit_ms = float_ms if float_ms > 0 else 1.0
        self._variable(_TIME, low=least_ms / unit_ms, high=math.inf)
        shares = {name: ms / unit_ms for name, ms in self._time.items()}
        self._row({**shares, _TIME: -1.0}, high=-float_ms / unit_ms)
        costs: dict[Variable, float] = {name: -ms / unit_ms for name, ms in worth_ms.items()}
        found = self._minimise({**costs, _TIME: 1.0})
        return frozenset(name for name in self._model.changes_ms if found[name] > 0.5)

    def _minimise(self, costs: Mapping[Variable, float]) -> dict[Variable, float]:
        optimize = extras.require("scipy.optimize")
        low, high = np.array(list(self._bounds.values())).T
        result = optimize.milp(
            [costs.get(name, 0.0) for name in self._bounds],
            integrality=[name in self._model.changes_ms for name in self._bounds],
            bounds=optimize.Bounds(low, high),
            constraints=self._constraints(),
            options={"mip_rel_gap": _GAP, "node_limit": _MOST_BRANCHES},
        )
        if result.x is None:
            raise BackendError(
                f"no choice of precisions was found for {len(self._model.changes_ms)} nodes:"
                f" {result.message}"
            )
        return dict(zip(self._bounds, result.x.tolist(), strict=True))

    def _constraints(self) -> Any:
        places = {name: place for place, name in enumerate(self._bounds)}
        entries = [
            (row, places[name], value)
            for row, (terms, _) in enumerate(self._rows)
            for name, value in terms.items()
        ]
        rows, columns, values = zip(*entries, strict=True)
        shape = (len(self._rows), len(places))
        matrix = extras.require("scipy.sparse").csr_array((values, (rows, columns)), shape=shape)
        highs = [high for _, high in self._rows]
        return extras.require("scipy.optimize").LinearConstraint(matrix, -np.inf, highs)
