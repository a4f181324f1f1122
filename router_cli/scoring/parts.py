"""Parts of an evaluation that go beyond one figure a system: what answers take, slices of the tasks, the ceiling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from router_cli.schema import Decision, Example, Score
from router_cli.scoring import intervals, metrics
from router_cli.scoring.answers import Answers
from router_cli.scoring.gold import About, languages
from router_cli.scoring.results import Ceiling, CostPoint, Difference, RiskPoint, SelectiveRisk, Slice, Spending

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Kind = Literal["data set", "language", "length", "teacher confidence"]
_POINTS = 100


def told(score: Score) -> Difference:
    """A paired difference with its verdict."""
    said = intervals.verdict(score)
    return Difference(score=score, verdict=said.word, tasks=said.tasks, words=str(said))


def spending(spent: Array | None, resamples: int, seed: int) -> Spending | None:
    """Means, and the quantiles of time, of `Answers.spent`; None where nothing was recorded."""
    import numpy as np

    if spent is None or np.isnan(spent).all():
        return None
    names = ("milliseconds", "prompt_tokens", "completion_tokens", "dollars")
    measured: dict[str, metrics.Metric] = {
        name: partial(metrics.mean, row) for name, row in zip(names, spent, strict=True) if not np.isnan(row).all()
    }
    resampled = intervals.bootstrap(measured, spent.shape[1], resamples, seed)
    times = spent[0][~np.isnan(spent[0])]
    found: dict[str, Score | None] = dict.fromkeys(names)
    for name, row in zip(names, spent, strict=True):
        if name in measured:
            found[name] = resampled.score(name).model_copy(update={"n": int((~np.isnan(row)).sum())})
    return Spending(
        n=int((~np.isnan(spent)).any(axis=0).sum()),
        median_milliseconds=float(np.median(times)) if len(times) else None,
        p95_milliseconds=float(np.percentile(times, 95)) if len(times) else None,
        **found,
    )


def slices(
    examples: Sequence[Example],
    about: Mapping[str, About],
    systems: Sequence[Answers],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> tuple[Slice, ...]:
    """The router's accuracy in every part of the tasks, by each way to part them that has two parts or more."""
    import numpy as np

    gold = np.array([classes.index(example.decision.topology) for example in examples])
    right = (systems[0].labels == gold).astype(float)
    rivals = [(one.labels == gold).astype(float) for one in systems if one.kind in ("baseline", "heuristic")]
    best = max(rivals, key=lambda one: float(one.mean())) if rivals else None
    found = []
    for kind, names, order in _partings(examples, about):
        for name in order:
            inside = np.array([each == name for each in names])
            over = None
            if best is not None:
                metric = partial(metrics.mean, (right - best)[inside])
                over = told(intervals.bootstrap({"it": metric}, int(inside.sum()), resamples, seed).score("it"))
            hits = metrics.wilson(int(right[inside].sum()), int(inside.sum()))
            found.append(Slice(kind=kind, name=name, n=int(inside.sum()), accuracy=hits, over_baseline=over))
    return tuple(found)


def _partings(
    examples: Sequence[Example], about: Mapping[str, About]
) -> Iterator[tuple[Kind, list[str | None], list[str]]]:
    """Ways to part the tasks: each task's part (None: not known), and the parts in the order to show them in."""
    import numpy as np

    known = [about.get(example.task_id) for example in examples]
    lengths = np.array([len(example.text) for example in examples])
    low, high = (int(value) for value in np.percentile(lengths, [100 / 3, 200 / 3]))
    thirds = (f"up to {low} characters", f"{low + 1} to {high} characters", f"from {high + 1} characters on")
    votes = [None if one is None else one.agreement for one in known]
    partings: dict[Kind, list[str | None]] = {
        "data set": [one.source if one else None for one in known],
        "language": list(languages([example.text for example in examples], known)),
        "length": [thirds[int(value > low) + int(value > high)] for value in lengths],
        "teacher confidence": [
            None if one is None else "votes of one mind" if one == 1 else "votes divided" for one in votes
        ],
    }
    for kind, names in partings.items():
        there = dict.fromkeys(name for name in (*thirds, *names) if name is not None and name in names)
        if len(there) > 1:
            yield kind, names, list(there)


def ceiling(
    examples: Sequence[Example],
    about: Mapping[str, About],
    again: Mapping[str, Decision],
    router: Answers,
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> Ceiling | None:
    """The teacher's agreement with itself: by a second label file's decisions (`again`), else by votes; or None."""
    import numpy as np

    gold = np.array([classes.index(example.decision.topology) for example in examples])
    right = (router.labels == gold).astype(float)
    second = np.array([_number(again.get(example.task_id), classes) for example in examples])
    twice = bool(again) and (second != metrics.NONE).any()
    if twice:
        agreed = np.where(second == metrics.NONE, np.nan, second == gold)
    else:
        votes = [about[one.task_id].agreement if one.task_id in about else None for one in examples]
        agreed = np.array([np.nan if one is None else one for one in votes], dtype=float)
    rows = np.flatnonzero(~np.isnan(agreed))
    if not len(rows):
        return None
    measured: dict[str, metrics.Metric] = {
        "agreement": partial(metrics.mean, agreed[rows]),
        "router": partial(metrics.mean, right[rows] - agreed[rows]),
    }
    if twice:
        measured["macro-F1"] = partial(metrics.macro_f1, gold[rows], second[rows], len(classes))
    resampled = intervals.bootstrap(measured, len(rows), resamples, seed)
    whole = metrics.wilson(int(agreed[rows].sum()), len(rows)) if twice else resampled.score("agreement")
    return Ceiling(
        source="second file" if twice else "votes",
        agreement=whole,
        macro_f1=resampled.score("macro-F1") if twice else None,
        router=told(resampled.score("router")),
    )


def _number(decision: Decision | None, classes: Sequence[str]) -> int:
    return metrics.NONE if decision is None else classes.index(decision.topology)


def _together(point: RiskPoint, own: Score) -> Score:
    """The agreement of a router that answers what a point covers, with a teacher of the agreement `own` for the rest.

    The interval of this sum comes from those of its parts (Zou and Donner 2008).
    """
    share, risk = point.coverage, point.risk
    low = math.hypot(share * (risk.high - risk.value), (1 - share) * (own.value - own.low))
    high = math.hypot(share * (risk.value - risk.low), (1 - share) * (own.high - own.value))
    value = share * (1 - risk.value) + (1 - share) * own.value
    return Score(value=value, low=max(0.0, value - low), high=min(1.0, value + high), n=own.n)


def cost_quality(
    selective: SelectiveRisk | None, found: Ceiling | None, teacher: Spending | None
) -> tuple[CostPoint, ...] | None:
    """What handing the least sure tasks to the teacher costs and gives, from the risk-coverage curve.

    The teacher agrees with its own labels as often as the ceiling says, always where that is not known.
    """
    if selective is None:
        return None
    own = found.agreement if found else Score(value=1.0, low=1.0, high=1.0, n=selective.n)
    price = teacher.dollars.value if teacher and teacher.dollars else None
    step = max(1, len(selective.curve) // _POINTS)
    kept = [*selective.curve[::-1][::step]]
    points = [
        CostPoint(
            asked=1 - one.coverage,
            dollars=None if price is None else (1 - one.coverage) * price,
            agreement=_together(one, own),
            threshold=one.threshold,
        )
        for one in kept
    ]
    return (*points, CostPoint(asked=1.0, dollars=price, agreement=own, threshold=None))
