"""How far P(solved | topology) can be believed, where a router names it: judged on recorded runs, whatever it chose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from router_cli.scoring import intervals, metrics, parts, policies
from router_cli.scoring.outcomes import Table
from router_cli.scoring.policies import Wish
from router_cli.scoring.results import Calibration, ReliabilityBin
from router_cli.scoring.worth_results import Solving, SolvingRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def solving(table: Table, wishes: Mapping[str, Wish], resamples: int, seed: int) -> Solving | None:
    """Hold what `keyed` wishes say about solving against every run of the table; None where they say nothing.

    The Brier score is that of one event, from 0 to 1. It is compared with always saying what each topology solves on
    average of these very runs: who is no better than that knows topologies, not tasks.
    """
    import numpy as np

    rows = [
        (place, column, said[name], float(run.solved))
        for place, task in enumerate(table.tasks)
        if (said := (policies.wish_for(wishes, task) or Wish(None)).solving) is not None
        for column, name in enumerate(table.topologies)
        if name in said
        for run in table.runs[place][column]
    ]
    if not rows:
        return None
    found = np.array(rows)
    tasks, columns = np.unique(found[:, 0], return_inverse=True)[1], found[:, 1].astype(int)
    chance, solved = found[:, 2], found[:, 3]
    count, said_of, solved_of = (np.bincount(columns, weights=each) for each in (None, chance, solved))
    average = solved_of[columns] / count[columns]
    losses = {"brier": (chance - solved) ** 2, "gain": (average - solved) ** 2 - (chance - solved) ** 2}
    runs = np.bincount(tasks).astype(float)
    measured = {
        name: partial(metrics.mean_of_sums, np.bincount(tasks, weights=loss), runs) for name, loss in losses.items()
    }
    resampled = intervals.bootstrap(measured, len(runs), resamples, seed)
    return Solving(
        tasks=len(runs),
        calibration=Calibration(
            n=len(rows),
            ece=metrics.ece_interval(chance, solved, resamples, seed, groups=tasks),
            ece_when_calibrated=metrics.ece_when_calibrated(chance, seed),
            brier=resampled.score("brier"),
            bins=tuple(ReliabilityBin(**vars(one)) for one in metrics.reliability(chance, solved)),
        ),
        over_average=parts.told(resampled.score("gain")),
        topologies=tuple(
            SolvingRow(
                name=table.topologies[column],
                said=float(said_of[column] / count[column]),
                solved=metrics.wilson(int(solved_of[column]), int(count[column])),
            )
            for column in np.flatnonzero(count)
        ),
    )
