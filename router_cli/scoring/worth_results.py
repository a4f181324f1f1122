"""What a replay found: the records that its `report.json` holds, shapes only. None is "could not be measured"."""

from __future__ import annotations

from typing import Literal

from router_cli.schema import Record, Score
from router_cli.scoring.results import Calibration, Difference


class PolicyRow(Record):
    """One policy on one table. Solved is a share of the tasks; tokens, dollars, seconds and bill are means a task.

    The differences are those of the judged router (the table's first row) minus this policy, paired by task.
    """

    name: str
    kind: Literal["router", "compare", "fixed", "random", "cascade", "knn", "labels", "oracle"]
    solved: Score
    tokens: Score | None
    dollars: Score | None
    seconds: Score | None
    # Dollars plus the penalty of an unsolved task.
    bill: Score | None
    # Share of the tasks that each topology gets; a cascade's shares sum to more than 1.
    mix: dict[str, float]
    solved_difference: Difference | None = None
    dollars_difference: Score | None = None
    # Exact McNemar test, where both sides solve each task or do not.
    mcnemar: float | None = None
    note: str = ""


class RoutingMetrics(Record):
    """The field's metrics of the router, for the cheapest topology as `weak` and the one that solves most as `strong`.

    Where these are the same topology, or the router names no probabilities, there is nothing to recover or to sweep.
    """

    weak: str
    strong: str
    pgr: Score | None
    apgr: Score | None
    cpt_50: Score | None
    cpt_80: Score | None
    aiq: Score | None
    # The same of fixed topologies and coins between them.
    aiq_fixed: Score | None
    opt_sel: Score | None
    opt_cost: Score | None
    opt_acc: Score | None


class RerunNoise(Record):
    """What running the same again would change by itself.

    `differing` is the share of pairs of identical runs that do not both solve, or both not solve, the task: measured
    over `cells`, or (`cells` 0) taken from other recorded runs. `half_width` is how far rerunning moves the router's
    difference to the best fixed topology (`gain`) in 19 of 20 cases; with `settled_by` runs of every cell it would be
    less than the gain.
    """

    differing: float
    cells: int
    gain: float | None = None
    half_width: float | None = None
    settled_by: int | None = None


class TeacherRegret(Record):
    """What a teacher's opinion is worth by itself: against a coin of its own mix, and what it costs against the oracle.

    Labels minus coin, and oracle minus labels, in solved share on the tasks that are labelled.
    """

    tasks: int
    over_coin: Difference
    regret: Score


class OracleFit(Record):
    """How far the oracle's row can be believed.

    `optimism` is what choosing and judging on the same runs adds: measured where repeats allow cross-fitting, else what
    rerun noise of the share `RerunNoise.differing` gives. `explained_at` is the share of differing reruns from which on
    noise alone explains all that the oracle gains over the best fixed topology.
    """

    cross_fitted: bool
    optimism: float
    explained_at: float | None


class CurvePoint(Record):
    """Sending the tasks that the router holds most likely to need more to the strong topology: what is got for what."""

    share: float
    price: float
    solved: Score


class SolvingRow(Record):
    """How likely the router holds a topology to solve a task, on average of its runs, and the share that did."""

    name: str
    said: float
    solved: Score


class Solving(Record):
    """The router's P(solved | topology) against all runs of these topologies on `tasks` tasks, `calibration.n` runs.

    The Brier score is that of one event, from 0 to 1. `over_average` is what always saying each topology's solved share
    in these runs scores, minus the router: above 0 it knows more of the tasks than which topology solves most.
    """

    tasks: int
    calibration: Calibration
    over_average: Difference
    topologies: tuple[SolvingRow, ...]


class ReplayCounts(Record):
    """Tasks and decisions, so that nothing is dropped in silence."""

    tasks: int
    judged: int
    of_other_splits: int
    of_one_topology: int
    without_prediction: int
    invalid: int
    # Decisions whose topology was never executed on the task, and that fell to one that was.
    fallen: int


class Replayed(Record):
    """One worker on one benchmark."""

    name: str
    benchmark: str
    worker: str
    topologies: tuple[str, ...]
    unit: Literal["USD", "tokens", "rank"]
    counts: ReplayCounts
    policies: tuple[PolicyRow, ...]
    metrics: RoutingMetrics | None
    noise: RerunNoise
    oracle: OracleFit
    teacher: TeacherRegret | None
    curve: tuple[CurvePoint, ...]
    # None where the predictions do not say how likely topologies are to solve a task.
    solving: Solving | None
    summary: tuple[str, str]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class WorthReport(Record):
    """What the `report.json` of `router eval --outcomes` holds and its `report.html` shows."""

    made_with: str
    outcomes: str
    predictions: str | None
    labels: tuple[str, ...]
    split: str
    seed: int
    resamples: int
    unsolved_penalty: float | None
    # Runs that name no topology of the decision space.
    formless: int
    tables: tuple[Replayed, ...]
    notes: tuple[str, ...]
