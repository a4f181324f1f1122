"""`router eval`: judge a predictions file against labels, beside everything that a router must beat.

Nothing is generated here: whoever wrote the predictions, they are scored alike. A task without a prediction and a
decision that is not valid count as wrong, and both are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_cli import __version__
from router_cli.dataset import read_labels
from router_cli.errors import InputError, SettingsError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Example
from router_cli.scoring import parts, wording
from router_cli.scoring.answers import Answers, Rows, in_order, number, read_predictions
from router_cli.scoring.gold import About, read_about
from router_cli.scoring.judge import judge
from router_cli.scoring.report import write_report
from router_cli.scoring.results import Counts, Flip, LossPoint, Report, Side
from router_cli.scoring.runs import Run, runs
from router_cli.settings import Settings
from router_cli.space import DecisionSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FeatureFunction = Callable[[Sequence[str]], "Array"]
"""Texts to a matrix (texts, columns): a frozen model's states, for the linear probe."""

ROUTER = "router"
TAKEN = (ROUTER, "heuristic", "majority", "random", "length", "tf-idf + lr", "tf-idf + knn", "linear probe")


@dataclass(frozen=True)
class _Labels:
    """The judged examples, the training examples beside them (empty: none, or not apart), and what was counted."""

    judged: list[Example]
    train: list[Example]
    split_carried: bool
    total: int
    unusable: list[str]
    duplicates: int
    leaked: list[str]
    # Ids of the rows of other splits.
    elsewhere: frozenset[str]
    # What a second file says about judged tasks of the first.
    again: dict[str, Decision]


def evaluate(
    settings: Settings,
    progress: Progress = SILENT,
    features: FeatureFunction | None = None,
    loss_log: Path | None = None,
    name: str = ROUTER,
    flip: Flip | None = None,
) -> Report:
    """Judge `eval.predictions` and write report.json and report.html into `eval.output_dir`.

    `features` turns texts into the linear probe's matrix; `loss_log` is a training run's loss.json, left out where it
    does not exist, or an earlier report.json; `name` is what the router is called; `flip` is a flip test's result.
    Raises SettingsError for settings that do not go together, InputError for files that cannot be used, OutputError
    where the report cannot be written.
    """
    choice = settings.eval
    if choice.predictions is None:
        raise SettingsError("eval.predictions: needs the predictions file of `router infer`, pass --predictions FILE")
    if not choice.labels:
        raise SettingsError("eval.labels: needs the label files to judge against, pass --labels FILE")
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    others = runs(choice.compare, (*TAKEN, name), settings.origin("eval.compare"))
    with progress.bar("eval", 4) as bar:
        labels = _read_labels(choice.labels, choice.split, space)
        rows = read_predictions(choice.predictions)
        if not any(example.task_id in rows.by_id for example in labels.judged):
            raise InputError(
                f"{choice.predictions}: no row answers a judged task: its ids are like "
                f"{next(iter(rows.by_id), 'none')!r}, those of the labels like {labels.judged[0].task_id!r}"
            )
        compared = {one.name: read_predictions(one.predictions) for one in others}
        systems = [in_order(name, "router", rows, labels.judged, space)]
        systems += [in_order(one, "compare", found, labels.judged, space) for one, found in compared.items()]
        systems.append(_heuristic(labels.judged, space))
        about = read_about(choice.labels, {example.task_id for example in labels.judged})
        bar.advance(status="baselines")
        baselines, fitted = _baselines(labels, space.topologies, choice.seed, features)
        systems += baselines
        bar.advance(status="intervals")
        how = (choice.resamples, choice.seed)
        figures = judge(labels.judged, systems, space.topologies, *how, about)
        figures = figures.model_copy(update={"sides": _with_loss(figures.sides, others)})
        ceiling = parts.ceiling(labels.judged, about, labels.again, systems[0], space.topologies, *how)
        spent = _teacher_spending(labels.judged, about, *how)
        teachers = dict(Counter(one.teacher for one in about.values() if one.teacher))
        around = wording.Surroundings(
            counts=_counts(labels, rows, systems[0]),
            split_carried=labels.split_carried,
            baselines_fit=fitted,
            leaked=labels.leaked,
            unusable=labels.unusable,
            teachers=teachers,
            missing_elsewhere={name: gone for name, found in compared.items() if (gone := _missing(labels, found))},
            fallbacks=sum(bool(rows.by_id.get(one.task_id, {}).get("fallback")) for one in labels.judged),
            ceiling=ceiling,
            spending=spent,
            flip=flip,
        )
        report = Report(
            **dict(figures),
            made_with=f"router {__version__}",
            predictions=choice.predictions,
            labels=tuple(choice.labels),
            split=choice.split if labels.split_carried else "all",
            seed=choice.seed,
            resamples=choice.resamples,
            summary=wording.summary(figures),
            warnings=tuple(wording.warnings(figures, around)),
            notes=tuple(wording.notes(figures, around)),
            counts=around.counts,
            label_teachers=teachers,
            teacher_spending=spent,
            ceiling=ceiling,
            cost_quality=parts.cost_quality(figures.selective, ceiling, spent),
            loss=_read_loss(loss_log),
            flip=flip,
        )
        bar.advance(status="report")
        write_report(report, choice.output_dir)
        bar.advance()
    for warning in report.warnings:
        progress.warn(warning)
    return report


# -- reading ----------------------------------------------------------------------------------------------------


def _read_labels(paths: list[str], split: str, space: DecisionSpace) -> _Labels:
    unusable: list[str] = []
    everything: list[Example] = []
    file: dict[int, int] = {}
    for place, path in enumerate(paths):

        def note(line: int, text: str, why: str, path: str = path) -> None:
            unusable.append(f"{path}:{line}: {why}")

        everything += read_labels([path], space, on_unusable=note)
        file |= {id(one): place for one in everything if id(one) not in file}
    files = ", ".join(paths)
    if not everything:
        first = f": {unusable[0]}" if unusable else ""
        raise InputError(f"{files}: none of the {len(unusable)} labels can be used{first}")
    splits = Counter(example.split for example in everything)
    carried = set(splits) != {None}
    whole = split == "all" or not carried
    # Among rows that carry a split, one without was not trained on as far as anybody wrote down.
    chosen = everything if whole else [one for one in everything if (one.split or "test") == split]
    if not chosen:
        there = ", ".join(f"{name or 'none'} {count}" for name, count in splits.items())
        raise InputError(f"{files}: no row of the split {split!r} (there: {there}), pass --split with one of them")
    judged = {example.task_id: example for example in reversed(chosen)}
    train = [one for one in everything if one.split == "train"]
    ids, texts = {one.task_id for one in train}, {_plain(one.text) for one in train}
    names = list(dict.fromkeys(example.task_id for example in chosen))
    # A task that another file labels too is a second opinion; one that its own file repeats is a repeated row.
    again = {one.task_id: one.decision for one in reversed(chosen) if file[id(one)] != file[id(judged[one.task_id])]}
    others = {(one.task_id, file[id(one)]) for one in chosen}
    return _Labels(
        judged=[judged[name] for name in names],
        train=[] if whole or split == "train" else train,
        split_carried=carried,
        total=len(everything) + len(unusable),
        unusable=unusable,
        duplicates=len(chosen) - len(others),
        leaked=[name for name in names if name in ids or _plain(judged[name].text) in texts],
        elsewhere=frozenset(one.task_id for one in everything) - judged.keys(),
        again=again,
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _teacher_spending(judged: Sequence[Example], about: Mapping[str, About], resamples: int, seed: int) -> Any:
    import numpy as np

    nothing = (np.nan,) * 4
    spent = [about[one.task_id].spent if one.task_id in about else nothing for one in judged]
    return parts.spending(np.array(spent).T, resamples, seed)


def _read_loss(path: Path | None) -> tuple[LossPoint, ...] | None:
    if path is None or not path.is_file():
        return None
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if isinstance(lines, dict):  # the report of an earlier evaluation
        lines = lines.get("loss") or []
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path}: expected a list of objects with step, loss and eval_loss")
    return _points(lines)


def _points(lines: object) -> tuple[LossPoint, ...] | None:
    rows = [one for one in lines if isinstance(one, dict)] if isinstance(lines, list) else []
    points = [(number(one.get("step")), number(one.get("loss")), number(one.get("eval_loss"))) for one in rows]
    kept = [(step, loss, held) for step, loss, held in points if step is not None and (loss, held) != (None, None)]
    return tuple(LossPoint(step=step, loss=loss, eval_loss=held) for step, loss, held in kept) or None


def _with_loss(sides: Sequence[Side], others: Sequence[Run]) -> tuple[Side, ...]:
    logs = {one.name: _points(one.report.get("loss")) for one in others}
    return tuple(side.model_copy(update={"loss": logs.get(side.name)}) for side in sides)


# -- answers ----------------------------------------------------------------------------------------------------


def _heuristic(judged: Sequence[Example], space: DecisionSpace) -> Answers:
    from router_cli.teachers.heuristic import decide

    rows = {example.task_id: {"decision": decide(example.text, space)[0]} for example in judged}
    return in_order("heuristic", "heuristic", Rows(dict(rows), len(rows)), judged, space)


def _baselines(
    labels: _Labels, classes: Sequence[str], seed: int, features: FeatureFunction | None
) -> tuple[list[Answers], str]:
    """The baselines' answers, and how they were fitted, in words."""
    import numpy as np

    from router_cli.scoring.baselines import FOLDS, fit_baselines, out_of_fold

    judged, train = [one.text for one in labels.judged], [one.text for one in labels.train]
    numbers = [[classes.index(one.decision.topology) for one in part] for part in (labels.train, labels.judged)]
    matrix = None if features is None else np.asarray(features(train + judged), dtype=float)
    if train:
        pair = None if matrix is None else (matrix[: len(train)], matrix[len(train) :])
        fitted = fit_baselines(train, numbers[0], judged, classes, seed, pair)
        how = f"Baselines were fitted on the {len(train)} rows of the training split."
    elif len(judged) > 1:
        fitted = out_of_fold(judged, numbers[1], classes, seed, matrix)
        how = (
            f"There are no training rows beside the judged ones: each baseline was fitted by {FOLDS}-fold "
            "cross-validation on the judged rows, and answers for rows that it had not seen."
        )
    else:
        return [], "One judged row and no training rows: no baseline can be fitted."
    places = np.arange(len(judged))
    return [
        Answers(
            one.name, "baseline", one.labels, one.probabilities, one.probabilities[places, one.labels], note=one.note
        )
        for one in fitted
    ], how


# -- counting ---------------------------------------------------------------------------------------------------


def _missing(labels: _Labels, rows: Rows) -> int:
    return sum(example.task_id not in rows.by_id for example in labels.judged)


def _counts(labels: _Labels, rows: Rows, router: Answers) -> Counts:
    judged = {example.task_id for example in labels.judged}
    missing = _missing(labels, rows)
    return Counts(
        labels=labels.total,
        unusable_labels=len(labels.unusable),
        duplicate_labels=labels.duplicates,
        judged=len(judged),
        predictions=rows.total,
        duplicate_predictions=rows.total - len(rows.by_id),
        missing_predictions=missing,
        predictions_of_other_splits=len(rows.by_id.keys() & labels.elsewhere),
        predictions_without_label=len(rows.by_id.keys() - judged - labels.elsewhere),
        invalid=sum(decision is None for decision in router.decisions) - missing,
        normalised=router.normalised,
    )
