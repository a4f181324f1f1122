"""Every figure of a report, from the answers of several systems to the same tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from router_cli.schema import Example, Score
from router_cli.scoring import intervals, metrics, parts
from router_cli.scoring.answers import Answers
from router_cli.scoring.gold import About
from router_cli.scoring.results import (
    Calibration,
    ClassRow,
    Coin,
    Difference,
    Figures,
    Mistake,
    Own,
    ReliabilityBin,
    RiskPoint,
    SelectiveRisk,
    Side,
    System,
    Versus,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_MISTAKES = 20
_CURVE_POINTS = 200


def judge(
    examples: Sequence[Example],
    systems: Sequence[Answers],
    classes: Sequence[str],
    resamples: int,
    seed: int,
    about: Mapping[str, About] | None = None,
) -> Figures:
    """Judge the first of `systems`, the router, by itself and against the others. All arrays follow `examples`.

    `about` says what the labels' rows bring beside; the parts of the tasks are made by it.
    """
    import numpy as np

    router, n = systems[0], len(examples)
    gold = np.array([classes.index(example.decision.topology) for example in examples])
    measured: dict[str, metrics.Metric] = {}
    for system in systems:
        measured[f"accuracy of {system.name}"] = partial(metrics.accuracy, gold, system.labels)
        measured[f"macro-F1 of {system.name}"] = partial(metrics.macro_f1, gold, system.labels, len(classes))
    resampled = intervals.bootstrap(measured, n, resamples, seed)
    sides = [
        Side(
            **dict(_own(one, examples, gold, classes, resamples, seed)),
            name=one.name,
            versus=_versus(router, one, gold),
        )
        for one in systems
        if one.kind == "compare"
    ]
    return Figures(
        **dict(_own(router, examples, gold, classes, resamples, seed)),
        classes=tuple(classes),
        systems=tuple(_system(system, router, examples, gold, resampled, (resamples, seed)) for system in systems),
        sides=tuple(sides),
        slices=parts.slices(examples, about or {}, systems, classes, resamples, seed),
        mistakes=tuple(_mistakes(router, examples, (router.labels == gold).astype(float))),
    )


def _own(
    system: Answers, examples: Sequence[Example], gold: Array, classes: Sequence[str], resamples: int, seed: int
) -> Own:
    """Everything about whole decisions that needs no other system."""

    n, count = len(examples), len(classes)
    correct = (system.labels == gold).astype(float)
    role_f1, role_exact = metrics.role_agreement(
        [example.decision.roles for example in examples], [one.roles if one else None for one in system.decisions]
    )
    step_difference, step_exact = metrics.step_agreement(
        [example.decision.max_steps for example in examples],
        [one.max_steps if one else None for one in system.decisions],
    )
    measured: dict[str, metrics.Metric] = {
        "macro-F1": partial(metrics.macro_f1, gold, system.labels, count),
        "role_f1": partial(metrics.mean, role_f1),
        "step_difference": partial(metrics.mean, step_difference),
        "coin": partial(metrics.coin_agreement, gold, system.labels),
        "entropy": partial(metrics.mix_entropy, system.labels),
    }
    measured |= {f"F1 of {name}": partial(_f1, gold, system.labels, count, i) for i, name in enumerate(classes)}
    resampled = intervals.bootstrap(measured, n, resamples, seed)
    calibration, selective = _confidence(system, gold, correct, resamples, seed)
    counts = metrics.confusion(gold, system.labels, count)
    whole = [one == example.decision for one, example in zip(system.decisions, examples, strict=True)]
    return Own(
        valid=metrics.wilson(int((system.labels != metrics.NONE).sum()), n),
        exact=metrics.wilson(sum(whole), n),
        # A share's bootstrap interval collapses at 0 and 1, Wilson's does not.
        accuracy=metrics.wilson(int(correct.sum()), n),
        macro_f1=resampled.score("macro-F1"),
        role_f1=resampled.score("role_f1"),
        role_exact=metrics.wilson(int(role_exact.sum()), n),
        step_exact=metrics.wilson(int(step_exact.sum()), n),
        step_difference=_known(resampled.score("step_difference")),
        per_class=tuple(
            _class_row(name, score, resampled)
            for name, score in zip(classes, metrics.per_class(gold, system.labels, count), strict=True)
        ),
        confusion=tuple(tuple(int(cell) for cell in row) for row in counts),
        calibration=calibration,
        selective=selective,
        coin=Coin(expected=resampled.score("coin"), p=intervals.coin_test(gold, system.labels, resamples, seed)),
        entropy=resampled.biased("entropy", math.log2(count)),
        spending=parts.spending(system.spent, resamples, seed),
    )


def _f1(gold: Array, labels: Array, count: int, place: int, weights: Array) -> Array:
    found: Array = metrics.f1(metrics.confusion(gold, labels, count, weights))[..., place]
    return found


def _class_row(name: str, score: metrics.ClassScore, resampled: intervals.Resampled) -> ClassRow:
    hits = round((score.recall or 0) * score.support)
    return ClassRow(
        name=name,
        precision=metrics.wilson(hits, score.predicted) if score.predicted else None,
        recall=metrics.wilson(hits, score.support) if score.support else None,
        f1=_known(resampled.score(f"F1 of {name}")),
        support=score.support,
        predicted=score.predicted,
    )


def _versus(router: Answers, other: Answers, gold: Array) -> Versus:
    first, second = (router.labels == gold).astype(float), (other.labels == gold).astype(float)
    same = [one is not None and one == two for one, two in zip(router.decisions, other.decisions, strict=True)]
    alike = (router.labels == other.labels) & (router.labels != metrics.NONE)
    p = intervals.mcnemar(first, second)
    assert p is not None  # both are zeros and ones
    return Versus(
        same_topology=metrics.wilson(int(alike.sum()), len(gold)),
        same_decision=metrics.wilson(sum(same), len(gold)),
        only_router=int((first > second).sum()),
        only_other=int((second > first).sum()),
        mcnemar=p,
    )


def _known(score: Score) -> Score | None:
    return None if math.isnan(score.value) else score


def _system(
    system: Answers,
    router: Answers,
    examples: Sequence[Example],
    gold: Array,
    resampled: intervals.Resampled,
    how: tuple[int, int],
) -> System:
    n, correct = len(examples), system.labels == gold
    whole = [one == example.decision for one, example in zip(system.decisions, examples, strict=False)]

    def difference(metric: str) -> Difference | None:
        if system is router:
            return None
        return parts.told(resampled.difference(f"{metric} of {router.name}", f"{metric} of {system.name}"))

    return System(
        name=system.name,
        kind=system.kind,
        accuracy=metrics.wilson(int(correct.sum()), n),
        macro_f1=resampled.score(f"macro-F1 of {system.name}"),
        valid=metrics.wilson(int((system.labels != metrics.NONE).sum()), n) if whole else None,
        exact=metrics.wilson(sum(whole), n) if whole else None,
        ece=_ece(system, correct, *how),
        brier=_brier(system, gold, *how),
        accuracy_difference=difference("accuracy"),
        macro_f1_difference=difference("macro-F1"),
        note=system.note,
    )


def _confidence(
    router: Answers, gold: Array, correct: Array, resamples: int, seed: int
) -> tuple[Calibration | None, SelectiveRisk | None]:
    """Calibration and selective risk over the tasks whose answer brought a probability; None without any."""
    import numpy as np

    rows = np.flatnonzero(~np.isnan(router.confidence))
    if not len(rows):
        return None, None
    confidence, right = router.confidence[rows], correct[rows]
    resampled = intervals.bootstrap(
        {"aurc": partial(metrics.aurc, confidence, right)},
        len(rows),
        resamples,
        seed,
    )
    coverage, risk, threshold = metrics.risk_coverage(confidence, right)
    kept = np.unique(np.linspace(0, len(coverage) - 1, min(_CURVE_POINTS, len(coverage))).round().astype(int))
    return Calibration(
        n=len(rows),
        ece=metrics.ece_interval(confidence, right, resamples, seed),
        ece_when_calibrated=metrics.ece_when_calibrated(confidence, seed),
        brier=_brier(router, gold, resamples, seed),
        bins=tuple(ReliabilityBin(**vars(one)) for one in metrics.reliability(confidence, right)),
    ), SelectiveRisk(
        n=len(rows),
        aurc=resampled.score("aurc"),
        curve=tuple(
            RiskPoint(
                coverage=float(coverage[i]),
                risk=metrics.wilson(round(risk[i] * (count := round(coverage[i] * len(rows)))), count),
                threshold=float(threshold[i]),
            )
            for i in kept
        ),
    )


def _ece(system: Answers, correct: Array, resamples: int, seed: int) -> Score | None:
    import numpy as np

    rows = np.flatnonzero(~np.isnan(system.confidence))
    if not len(rows):
        return None
    return metrics.ece_interval(system.confidence[rows], correct[rows].astype(float), resamples, seed)


def _brier(system: Answers, gold: Array, resamples: int, seed: int) -> Score | None:
    import numpy as np

    rows = np.flatnonzero(~np.isnan(system.probabilities).any(axis=1))
    if not len(rows):
        return None
    metric = partial(metrics.brier, system.probabilities[rows], gold[rows])
    return intervals.bootstrap({"brier": metric}, len(rows), resamples, seed).score("brier")


def _mistakes(router: Answers, examples: Sequence[Example], correct: Array) -> list[Mistake]:
    """The wrong answers, the surest first; those without a probability come last."""
    import numpy as np

    order = np.argsort(-np.nan_to_num(router.confidence, nan=-1.0), kind="stable")
    wrong = [int(i) for i in order if not correct[i]][:_MISTAKES]
    return [
        Mistake(
            task_id=examples[i].task_id,
            text=examples[i].text,
            gold=examples[i].decision,
            predicted=router.decisions[i],
            probability=None if np.isnan(router.confidence[i]) else float(router.confidence[i]),
            why=router.problems[i],
        )
        for i in wrong
    ]
