"""The oracle, and the rerun noise that flatters it: what luck alone gives to whoever chooses by outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from router_cli.scoring.outcomes import Table
from router_cli.scoring.policies import Policy, chosen, values_of
from router_cli.scoring.worth_results import OracleFit, RerunNoise

# Two runs of Reflexion with gpt-4 on MBPP differ on 22 of 257 tasks, two of a single agent on 6 of 397
# (data/outcomes/mbpp-reflexion): where a table has no repeats, the noisier of the two stands in.
DIFFERING = 22 / 257
_Z = 1.959963984540054


def oracle(table: Table) -> tuple[Policy, bool]:
    """Whoever knew the outcomes: each task's best topology, ties to the cheaper; and whether it was cross-fitted.

    Where every executed cell of a task has two runs or more, the topology is chosen on some repeats and judged on the
    others, in turn: unbiased for a chooser with that much evidence. Where that holds for no task, it is chosen and
    judged on the same runs, which flatters it.
    """
    import numpy as np

    repeated = np.where(table.executed, table.repeats, 2).min(axis=1) >= 2
    if not repeated.any():
        best = np.where(table.executed, table.solved, -1.0).argmax(axis=1)
        return chosen(table, "oracle", "oracle", best, "best of the recorded runs, judged on the same runs"), False
    values = values_of(table)
    found = np.full((5, len(table.tasks)), np.nan)
    count = np.zeros(len(table.topologies))
    for i in np.flatnonzero(repeated):
        there = np.flatnonzero(table.executed[i])
        runs = [np.array([float(run.solved) for run in table.runs[i][j]]) for j in there]
        folds = min(map(len, runs))
        gained = np.zeros((5, folds))
        for fold in range(folds):
            rates = [one[np.arange(len(one)) % folds != fold].mean() for one in runs]
            best = int(np.argmax(rates))  # the first, and so the cheapest, of equals
            gained[:, fold] = values[:, i, there[best]]
            gained[0, fold] = runs[best][np.arange(len(runs[best])) % folds == fold].mean()
            count[there[best]] += 1 / folds
        found[:, i] = gained.mean(axis=1)
    mix = {name: float(share) for name, share in zip(table.topologies, count / repeated.sum(), strict=True) if share}
    note = f"chosen on some repeats, judged on the others, over the {int(repeated.sum())} tasks that have them"
    return Policy("oracle", "oracle", found, mix, note), True


def differing(table: Table) -> tuple[float, int] | None:
    """The share of pairs of identical runs that differ in solving, and over how many cells; None without repeats.

    Of a cell with `r` runs of which `s` solve, 2 s (r - s) / (r (r - 1)): unbiased for 2 p (1 - p).
    """
    import numpy as np

    many = table.repeats >= 2
    if not many.any():
        return None
    runs, rate = table.repeats[many].astype(float), table.solved[many]
    return float(np.mean(2 * rate * (1 - rate) * runs / (runs - 1))), int(many.sum())


def rerun_noise(table: Table, first: Policy, best: Policy, strong: int) -> RerunNoise:
    """How far running the same again moves the difference of `first` to `best`, which is always column `strong`."""
    import numpy as np

    measured = differing(table)
    share, cells = measured if measured is not None else (DIFFERING, 0)
    if first.kind != "router" or first.choice is None:
        return RerunNoise(differing=share, cells=cells)
    known = ~np.isnan(first.solved) & ~np.isnan(best.solved)
    rows = np.flatnonzero(known & (first.choice >= 0) & (first.choice != strong))
    # A cell's mean varies by p (1 - p) / runs from one recording to the next, and 2 p (1 - p) is the share of pairs.
    variance = share / 2 / table.repeats[rows, first.choice[rows]] + share / 2 / table.repeats[rows, strong]
    gain, tasks = float((first.solved - best.solved)[known].mean()), int(known.sum())
    return RerunNoise(
        differing=share,
        cells=cells,
        gain=gain,
        half_width=float(_Z * math.sqrt(variance.sum()) / tasks),
        settled_by=math.ceil(share * len(rows) * (_Z / (gain * tasks)) ** 2) if gain else None,
    )


def best_of_noise(differing: float, runs: float) -> float:
    """What the best of so many identical runs solves more than one of them, where two differ on this share of tasks.

    The tasks that differ are taken to go either way with equal chance; for two runs it holds whatever the chance is.
    """
    return float(2 * differing * (0.5 - 0.5**runs))


def fit(table: Table, oracle: Policy, crossed: bool, fixed: Sequence[Policy], noise: RerunNoise) -> OracleFit:
    """How far the oracle's row can be believed."""
    import numpy as np

    known = ~np.isnan(oracle.solved)
    naive = np.where(table.executed, table.solved, -1.0).max(axis=1)[known]
    if crossed:
        optimism = float(naive.mean() - oracle.solved[known].mean())
        return OracleFit(cross_fitted=True, optimism=optimism, explained_at=None)
    runs = float(table.executed.sum(axis=1).mean())
    gain = float(naive.mean() - max(np.nanmean(one.solved) for one in fixed))
    return OracleFit(
        cross_fitted=False,
        optimism=best_of_noise(noise.differing, runs),
        explained_at=max(0.0, gain) / best_of_noise(1.0, runs),
    )
