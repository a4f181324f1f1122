"""What an evaluation found: the records that `report.json` holds, shapes only. None is "could not be measured"."""

from __future__ import annotations

from typing import Literal

from router_cli.schema import Decision, Record, Score


class Difference(Record):
    """Router minus another system on the same tasks, with the paired interval, and what that says."""

    score: Score
    verdict: Literal["better", "worse", "cannot tell"]
    # About how many tasks would tell, if the difference stays as it is.
    tasks: int | None
    words: str


class System(Record):
    """One row of the comparison. `valid` and `exact` only exist where whole decisions are given, not topologies."""

    name: str
    kind: Literal["router", "compare", "heuristic", "baseline"]
    accuracy: Score
    macro_f1: Score
    valid: Score | None = None
    exact: Score | None = None
    ece: Score | None = None
    brier: Score | None = None
    accuracy_difference: Difference | None = None
    macro_f1_difference: Difference | None = None
    note: str = ""


class ClassRow(Record):
    """One topology: precision of its predictions, recall of its tasks."""

    name: str
    precision: Score | None
    recall: Score | None
    f1: Score | None
    support: int
    predicted: int


class ReliabilityBin(Record):
    """Predictions of like confidence, (low, high]: their mean confidence and how often they were right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: Score


class Calibration(Record):
    """Whether probabilities mean what they say, over the `n` tasks whose answer brought one."""

    n: int
    ece: Score
    # The ECE that a perfectly calibrated router with these confidences shows on so few tasks, on average.
    ece_when_calibrated: float
    brier: Score | None
    bins: tuple[ReliabilityBin, ...]


class RiskPoint(Record):
    """Answering only what is at least `threshold` sure covers this share of the tasks, at this share of errors."""

    coverage: float
    risk: Score
    threshold: float


class SelectiveRisk(Record):
    """The risk-coverage curve and the area under it, over the `n` tasks whose answer brought a probability."""

    n: int
    aurc: Score
    curve: tuple[RiskPoint, ...]


class Coin(Record):
    """The agreement of a coin with the router's own mix, and how often a shuffled copy does as well as the router."""

    expected: Score
    p: float


class LossPoint(Record):
    """One line of the training log."""

    step: float
    loss: float | None = None
    eval_loss: float | None = None


class Mistake(Record):
    """A task whose topology the router missed; `why` says more where there is no valid decision."""

    task_id: str
    text: str
    gold: Decision
    predicted: Decision | None
    probability: float | None
    why: str = ""


class Changed(Record):
    """One way to ask the same thing otherwise, and the share of the topologies and of the decisions that change."""

    name: str
    what: str
    topology: Score
    decision: Score


class Flip(Record):
    """The flip test: decisions about `tasks` of the judged tasks, asked once as they are and once otherwise."""

    tasks: int
    changed: tuple[Changed, ...]


class Counts(Record):
    """Rows on both sides, so that nothing is dropped in silence."""

    labels: int
    unusable_labels: int
    duplicate_labels: int
    judged: int
    predictions: int
    duplicate_predictions: int
    missing_predictions: int
    predictions_of_other_splits: int
    predictions_without_label: int
    invalid: int
    normalised: int


class Spending(Record):
    """What an answer takes, over the `n` judged tasks that bring any of these figures; means a task.

    `dollars` are what was paid to somebody else's endpoint: the time of one's own machine has no price here.
    """

    n: int
    milliseconds: Score | None
    median_milliseconds: float | None
    p95_milliseconds: float | None
    prompt_tokens: Score | None
    completion_tokens: Score | None
    dollars: Score | None


class Slice(Record):
    """A part of the judged tasks: the router there, and against the best baseline (of all tasks, by accuracy)."""

    kind: Literal["data set", "language", "length", "teacher confidence"]
    name: str
    n: int
    accuracy: Score
    over_baseline: Difference | None


class Ceiling(Record):
    """How far the teacher agrees with itself: its votes with its label, or a second label file with the first.

    No router can be expected to agree more; `router` is the router's accuracy minus this, on the same tasks.
    """

    source: Literal["votes", "second file"]
    agreement: Score
    # Of a second file's labels, judged like a router's answers.
    macro_f1: Score | None
    router: Difference


class CostPoint(Record):
    """The router answers where it is at least `threshold` sure, the teacher the rest: what that costs and agrees with.

    `asked` is the share of the tasks that the teacher gets, `dollars` what these cost, a task of all (None: unknown).
    """

    asked: float
    dollars: float | None
    agreement: Score
    threshold: float | None


class Own(Record):
    """One system's decisions by themselves. Shares have Wilson intervals, all else bootstrap intervals, at 95 %."""

    valid: Score
    exact: Score
    accuracy: Score
    macro_f1: Score
    role_f1: Score
    role_exact: Score
    step_exact: Score
    # Mean absolute difference of max_steps, over the valid decisions.
    step_difference: Score | None
    per_class: tuple[ClassRow, ...]
    # Gold (rows) by prediction (columns); the last column is "no valid decision".
    confusion: tuple[tuple[int, ...], ...]
    calibration: Calibration | None
    selective: SelectiveRisk | None
    coin: Coin
    # Entropy of the mix of topologies, in bits: 0 is constant, 2 is four topologies alike.
    entropy: Score
    spending: Spending | None


class Versus(Record):
    """The router and another system task by task: where they agree, and who alone names the labelled topology."""

    same_topology: Score
    same_decision: Score
    only_router: int
    only_other: int
    # Exact McNemar test of the two counts.
    mcnemar: float


class Side(Own):
    """A compared router, as wide as the report's own."""

    name: str
    versus: Versus
    loss: tuple[LossPoint, ...] | None = None


class Figures(Own):
    """Everything measured."""

    classes: tuple[str, ...]
    systems: tuple[System, ...]
    sides: tuple[Side, ...]
    slices: tuple[Slice, ...]
    mistakes: tuple[Mistake, ...]


class Report(Figures):
    """What `report.json` holds and `report.html` shows: the figures, what they were made from, and what they mean."""

    made_with: str
    predictions: str
    labels: tuple[str, ...]
    split: str
    seed: int
    resamples: int
    summary: tuple[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    counts: Counts
    # Judged labels by the teacher that gave them.
    label_teachers: dict[str, int]
    # What a label took, over the judged labels that record it.
    teacher_spending: Spending | None
    ceiling: Ceiling | None
    cost_quality: tuple[CostPoint, ...] | None
    loss: tuple[LossPoint, ...] | None
    flip: Flip | None = None
