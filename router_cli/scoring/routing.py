"""The field's own metrics of routing, under their names: pure functions on arrays.

    PGR, CPT, APGR         Ong et al. 2024, "RouteLLM": a weak and a strong system, and a score that says whom to ask
    AIQ                    Hu et al. 2024, "RouterBench": area under the non-decreasing convex hull of quality over cost
    Opt.Sel, .Cost, .Acc   Lu et al. 2025, "RouterArena": beside the cheapest system that solves the task

Rows are tasks. Like the metrics of `scoring.metrics`, those that are resampled take row weights of shape (..., n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from router_cli.scoring.metrics import mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Point = tuple[float, float]


def pgr(quality: Array, weak: Array, strong: Array, weights: Array | None = None) -> Array:
    """Performance gap recovered: (quality - weak) / (strong - weak), each a mean over rows.

    1 is the strong system's quality, 0 the weak one's. NaN where the strong system is not the better one.
    """
    return _recovered(mean(quality, weights), mean(weak, weights), mean(strong, weights))


def call_curve(score: Array, weak: Array, strong: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Arrays (share of calls to the strong system, quality), from none to all, asking it first where `score` is high.

    Shapes (..., groups + 1). Rows of equal score are called together: between two points a coin decides.
    """
    import numpy as np

    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    ordered = (np.ones(len(order)) if weights is None else weights)[..., order]
    total = ordered.sum(-1, keepdims=True)
    called = np.cumsum(ordered, -1)[..., ends] / total
    gained = np.cumsum(ordered * (strong - weak)[order], -1)[..., ends] / total
    base = (ordered * weak[order]).sum(-1, keepdims=True) / total
    nothing = np.zeros_like(base)
    return np.concatenate([nothing, called], -1), base + np.concatenate([nothing, gained], -1)


def apgr(score: Array, weak: Array, strong: Array, weights: Array | None = None) -> Array:
    """Average PGR over all shares of calls to the strong system: the area under PGR by share. A coin has 0.5."""
    import numpy as np

    share, quality = call_curve(score, weak, strong, weights)
    area = np.trapezoid(quality, share, axis=-1)
    return _recovered(area, mean(weak, weights), mean(strong, weights))


def cpt(score: Array, weak: Array, strong: Array, target: float) -> float | None:
    """Call-performance threshold: the least share of calls to the strong system that recovers `target` of the gap.

    None where the strong system is not the better one.
    """
    import numpy as np

    share, quality = call_curve(score, weak, strong)
    gap = float(strong.mean() - weak.mean())
    if gap <= 0:
        return None
    wanted = float(weak.mean()) + target * gap
    at = int(np.argmax(quality >= wanted - 1e-12))  # the last point recovers all of it
    if at == 0:
        return float(share[0])
    low, high = float(quality[at - 1]), float(quality[at])
    part = 1.0 if high <= low else min(1.0, max(0.0, (wanted - low) / (high - low)))
    return float(share[at - 1] + part * (share[at] - share[at - 1]))


def hull(points: Sequence[Point]) -> list[Point]:
    """The non-decreasing convex hull of (cost, quality) points from the cheapest to the best: what mixing them by a
    coin can reach (RouterBench's Zero router, where the points are the fixed systems)."""
    found: list[Point] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if found and quality <= found[-1][1]:
            continue
        while len(found) > 1 and _turn(found[-2], found[-1], (cost, quality)) >= 0:
            found.pop()
        found.append((cost, quality))
    return found


def _turn(first: Point, middle: Point, last: Point) -> float:
    """Above or at 0 where `middle` lies on or below the line from `first` to `last`."""
    return (middle[0] - first[0]) * (last[1] - first[1]) - (middle[1] - first[1]) * (last[0] - first[0])


def aiq(points: Sequence[Point], low: float, high: float) -> float | None:
    """Average improvement in quality: the mean height of the points' hull over costs from `low` to `high`.

    The hull goes on level behind its last point and before its first one. None where `low` is not below `high`.
    """
    import numpy as np

    if not low < high:
        return None
    edge = hull(points)
    costs, heights = np.array([cost for cost, _ in edge]), np.array([quality for _, quality in edge])
    at = np.unique(np.concatenate([[low, high], costs[(costs > low) & (costs < high)]]))
    return float(np.trapezoid(np.interp(at, costs, heights), at) / (high - low))


@dataclass(frozen=True)
class Optimality:
    """RouterArena's three shares; None without any task that a system solves."""

    selection: float | None
    cost: float | None
    accuracy: float | None


def optimality(choice: Array, solved: Array, price: Array) -> Optimality:
    """Judge choices (column numbers, -1 none) by booleans and prices of shape (rows, systems); NaN prices were not run.

    Where some system solves the task, the optimal one is the cheapest that does. Opt.Sel is the share of these tasks
    for which it was chosen (any of equal price), Opt.Cost the mean of its price over that of the chosen one (a cheaper
    choice that does not solve counts as 1, where the scale ends), Opt.Acc the solved tasks over those that can be.
    """
    import numpy as np

    solved = solved & ~np.isnan(price)
    can = solved.any(axis=1)
    if not can.any():
        return Optimality(None, None, None)
    right = np.where(choice >= 0, solved[np.arange(len(choice)), choice], False)
    accuracy = float(right.sum() / can.sum())
    choice, solved, price, right = choice[can], solved[can], price[can], right[can]
    best = np.where(solved, price, np.inf).min(axis=1)
    paid = np.where(choice >= 0, price[np.arange(len(choice)), choice], np.inf)
    ratio = np.where(paid <= best, 1.0, best / np.where(paid > best, paid, 1.0))
    return Optimality(float((right & (paid <= best)).mean()), float(ratio.mean()), accuracy)


def _recovered(quality: Array, weak: Array, strong: Array) -> Array:
    import numpy as np

    gap = np.asarray(strong - weak, dtype=float)
    share: Array = np.divide(quality - weak, gap, out=np.full(gap.shape, np.nan), where=gap > 1e-12)
    return share
