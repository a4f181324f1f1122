"""The field's metrics of a replayed router, each with its interval by task, and the curve behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from router_cli.schema import Score
from router_cli.scoring import intervals, metrics, routing
from router_cli.scoring.outcomes import Table
from router_cli.scoring.policies import Policy
from router_cli.scoring.worth_results import CurvePoint, RoutingMetrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_CURVE_POINTS = 200


def field_metrics(
    table: Table, first: Policy, score: Array | None, fixed: Sequence[Policy], strong: int, resamples: int, seed: int
) -> tuple[RoutingMetrics | None, list[CurvePoint]]:
    """The metrics of `first`, a router whose probability of not being weak is `score`; `fixed` follow the columns.

    None where it is no router that chooses.
    """
    import numpy as np

    if first.kind != "router" or first.choice is None:
        return None, []
    choice, solves = first.choice, np.nan_to_num(table.solved) >= 0.5
    both = np.flatnonzero(table.executed[:, 0] & table.executed[:, strong])
    weak, better = table.solved[both, 0], table.solved[both, strong]
    sweeps = score is not None and strong > 0 and len(both) > 0
    found: dict[str, Score | None] = dict.fromkeys(
        ("pgr", "apgr", "cpt_50", "cpt_80", "aiq", "aiq_fixed", "opt_sel", "opt_cost", "opt_acc")
    )
    curve: list[CurvePoint] = []
    gap: dict[str, metrics.Metric] = {"pgr": partial(routing.pgr, first.solved[both], weak, better)}
    if score is not None and sweeps:
        called = score[both]
        share = routing.call_curve(called, weak, better)[0]
        spent = routing.call_curve(called, table.price[both, 0], table.price[both, strong])[1]
        kept = np.unique(np.linspace(0, len(share) - 1, min(_CURVE_POINTS, len(share))).round().astype(int))
        # Of equal scores all are called or none, as in the curve.
        levels = np.concatenate([[np.inf], np.unique(called)[::-1]])
        solved = {str(i): partial(metrics.mean, np.where(called >= levels[i], better, weak)) for i in kept}
        drawn = intervals.bootstrap(solved, len(both), resamples, seed)
        curve = [CurvePoint(share=float(share[i]), price=float(spent[i]), solved=drawn.score(str(i))) for i in kept]
        gap["apgr"] = partial(routing.apgr, called, weak, better)
        for name, target in (("cpt_50", 0.5), ("cpt_80", 0.8)):
            gap[name] = _by_rows(partial(_cpt, called, weak, better, target))
    if strong and len(both) and better.mean() > weak.mean():
        resampled = intervals.bootstrap(gap, len(both), resamples, seed)
        found |= {name: resampled.score(name) for name in gap}

    def optimal(rows: Array) -> routing.Optimality:
        return routing.optimality(choice[rows], solves[rows], table.price[rows])

    whole: dict[str, metrics.Metric] = {
        "opt_sel": _by_rows(lambda rows: optimal(rows).selection),
        "opt_acc": _by_rows(lambda rows: optimal(rows).accuracy),
    }
    if table.unit != "rank":
        whole["opt_cost"] = _by_rows(lambda rows: optimal(rows).cost)
        whole["aiq"] = _by_rows(partial(_aiq, table, first, score if sweeps else None, fixed, strong))
        whole["aiq_fixed"] = _by_rows(partial(_aiq, table, None, None, fixed, strong))
    resampled = intervals.bootstrap(whole, len(table.tasks), resamples, seed)
    scores = {name: resampled.score(name) for name in whole}
    found |= {name: one for name, one in scores.items() if not math.isnan(one.value)}
    return RoutingMetrics(weak=table.topologies[0], strong=table.topologies[strong], **found), curve


def _by_rows(figure: Callable[[Array], float | None]) -> metrics.Metric:
    """A metric of row numbers as one of row weights, for the bootstrap: a weight is how often a row was drawn."""
    import numpy as np

    def of(drawn: Array) -> float:
        value = figure(np.repeat(np.arange(len(drawn)), drawn.astype(int)))
        return math.nan if value is None else value

    def metric(weights: Array) -> Array:
        return np.asarray(np.apply_along_axis(of, -1, weights))

    return metric


def _cpt(score: Array, weak: Array, strong: Array, target: float, rows: Array) -> float | None:
    return routing.cpt(score[rows], weak[rows], strong[rows], target)


def _aiq(
    table: Table, first: Policy | None, score: Array | None, fixed: Sequence[Policy], strong: int, rows: Array
) -> float | None:
    """AIQ over these rows of the fixed topologies, or of a router with its two ends and its thresholds."""
    import numpy as np

    points = [(float(metrics.mean(one.price[rows])), float(metrics.mean(one.solved[rows]))) for one in fixed]
    low, high = min(cost for cost, _ in points), max(cost for cost, _ in points)
    if first is not None:
        own = float(metrics.mean(first.price[rows])), float(metrics.mean(first.solved[rows]))
        points = [points[0], points[strong], own]
    if score is not None:
        inside = rows[table.executed[rows, 0] & table.executed[rows, strong]]
        if len(inside):
            spent, quality = (
                routing.call_curve(score[inside], one[inside, 0], one[inside, strong])[1]
                for one in (table.price, table.solved)
            )
            points += list(zip(spent.tolist(), quality.tolist(), strict=True))
    return None if np.isnan(points).any() else routing.aiq(points, low, high)
