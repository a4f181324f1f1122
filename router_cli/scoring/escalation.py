"""A cascade whose thresholds are chosen: on training tasks with recorded evidence, for a price of an unsolved task.

The choice is among: one agent always; one agent, and the team where the evidence is a failure; each of these with the
team at once where the router gives one agent less than a threshold; the team always. What is chosen is what costs
least on the training tasks, unsolved ones included; it is judged on others. `router run --cascade` has the same knobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from router_cli.scoring.outcomes import Table
from router_cli.scoring.policies import Policy, Wish, bring, cascade, values_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ENOUGH = 30
"""Training tasks from which on a choice among some twenty rules is more than luck."""
STEPS = 10
"""Thresholds that are tried: so many quantiles of the router's probabilities on the training tasks."""


def priced_cascade(
    table: Table, train: Table | None, wishes: Mapping[str, Wish] | None, strong: int, penalty: float
) -> Policy | None:
    """The rule that costs least on `train`, dollars and `penalty` for each unsolved task, as a policy of `table`.

    `wishes` are a router's, by task; without their probabilities no threshold is tried. `strong` is the team's column.
    None where there is no training table of `ENOUGH` tasks with dollars, or nothing to escalate to.
    """
    import numpy as np

    if train is None or strong == 0:
        return None
    share, known = _single(table, wishes), _single(train, wishes)
    best: tuple[float, bool, float] | None = None
    thresholds = [0.0, 2.0]  # never at once, and always
    if known is not None and share is not None:
        thresholds += np.unique(np.quantile(known, np.arange(1, STEPS) / STEPS)).tolist()
    for evidence in (False, True):
        for threshold in sorted(thresholds):
            values = _values(train, known, strong, evidence, threshold)
            bills = values[2] + penalty * (1 - values[0])
            bills = bills[~np.isnan(bills)]
            if len(bills) >= ENOUGH and (best is None or bills.mean() < best[0] - 1e-12):
                best = float(bills.mean()), evidence, threshold
    if best is None:
        return None
    _, evidence, threshold = best
    values = _values(table, share, strong, evidence, threshold)
    names = table.topologies
    rule = [f"{names[strong]} where the evidence is a failure"] * evidence
    rule += [f"{names[strong]} at once below P({names[0]}) = {threshold:.2f}"] * (0 < threshold < 2)
    words = f"always {names[strong]}" if threshold == 2.0 else f"{names[0]} first" if rule else f"always {names[0]}"
    note = "; ".join([words, *(rule if threshold < 2 else [])])
    note += f": the cheapest rule on {len(train.tasks)} training tasks at ${penalty:g} an unsolved one"
    return Policy("priced cascade", "cascade", values, {}, note)


def _single(table: Table, wishes: Mapping[str, Wish] | None) -> Array | None:
    """The router's probability of the cheapest topology for every task; None where it does not say for all."""
    if wishes is None:
        return None
    found = bring(table, wishes)
    return None if found.score is None or len(found.places) < len(table.tasks) else 1.0 - found.score


def _values(table: Table, share: Array | None, strong: int, evidence: bool, threshold: float) -> Array:
    """What the rule gets on every task: shape (5, tasks), as `Policy.values`."""
    import numpy as np

    cells = values_of(table)
    values = cells[:, :, 0]
    if evidence and (climbed := cascade(table, strong)) is not None:
        values = np.where(np.isnan(climbed.values[0]), values, climbed.values)
    at_once = np.full(len(table.tasks), threshold == 2.0) if share is None else share < threshold
    return np.where(at_once, cells[:, :, strong], values)
