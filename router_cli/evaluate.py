"""`router eval`: judge a predictions file against labels, beside everything that a router must beat.

Nothing is generated here: whoever wrote the predictions, they are scored alike. A task without a prediction and a
decision that is not valid count as wrong, and both are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_cli import __version__
from router_cli.dataset import read_labels
from router_cli.errors import InputError, SettingsError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Example, Score
from router_cli.scoring import metrics, wording
from router_cli.scoring.answers import Answers, Rows, in_order, number, read_predictions
from router_cli.scoring.judge import judge
from router_cli.scoring.report import write_report
from router_cli.scoring.results import Counts, LossPoint, Report
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import read_entries, task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FeatureFunction = Callable[[Sequence[str]], "Array"]
"""Texts to a matrix (texts, columns): a frozen model's states, for the linear probe."""

ROUTER = "router"


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


def evaluate(
    settings: Settings,
    progress: Progress = SILENT,
    features: FeatureFunction | None = None,
    loss_log: Path | None = None,
) -> Report:
    """Judge `eval.predictions` and write report.json and report.html into `eval.output_dir`.

    `features` turns texts into the linear probe's matrix; `loss_log` is a training run's loss.json, left out where it
    does not exist. Raises SettingsError for settings that do not go together, InputError for files that cannot be
    used, OutputError where the report cannot be written.
    """
    choice = settings.eval
    if choice.predictions is None:
        raise SettingsError("eval.predictions: needs the predictions file of `router infer`, pass --predictions FILE")
    if not choice.labels:
        raise SettingsError("eval.labels: needs the label files to judge against, pass --labels FILE")
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    others = _compared(choice.compare, settings.origin("eval.compare"))
    with progress.bar("eval", 4) as bar:
        labels = _read_labels(choice.labels, choice.split, space)
        rows = read_predictions(choice.predictions)
        if not any(example.task_id in rows.by_id for example in labels.judged):
            raise InputError(
                f"{choice.predictions}: no row answers a judged task: its ids are like "
                f"{next(iter(rows.by_id), 'none')!r}, those of the labels like {labels.judged[0].task_id!r}"
            )
        compared = {name: read_predictions(path) for name, path in others.items()}
        systems = [in_order(ROUTER, "router", rows, labels.judged, space)]
        systems += [in_order(name, "compare", found, labels.judged, space) for name, found in compared.items()]
        systems.append(_heuristic(labels.judged, space))
        bar.advance(status="baselines")
        baselines, how = _baselines(labels, space.topologies, choice.seed, features)
        systems += baselines
        bar.advance(status="intervals")
        figures = judge(labels.judged, systems, space.topologies, choice.resamples, choice.seed)
        teachers, ceiling = _teachers(labels.judged, choice.labels, choice.resamples, choice.seed)
        around = wording.Surroundings(
            counts=_counts(labels, rows, systems[0]),
            split_carried=labels.split_carried,
            baselines_fit=how,
            leaked=labels.leaked,
            unusable=labels.unusable,
            teachers=teachers,
            missing_elsewhere={name: gone for name, found in compared.items() if (gone := _missing(labels, found))},
            fallbacks=sum(bool(rows.by_id.get(one.task_id, {}).get("fallback")) for one in labels.judged),
            ceiling=ceiling,
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
            ceiling=ceiling,
            loss=_read_loss(loss_log),
        )
        bar.advance(status="report")
        write_report(report, choice.output_dir)
        bar.advance()
    for warning in report.warnings:
        progress.warn(warning)
    return report


# -- reading ----------------------------------------------------------------------------------------------------


def _compared(entries: Sequence[str], origin: str) -> dict[str, str]:
    taken = {ROUTER, "heuristic", "majority", "random", "length", "tf-idf + lr", "tf-idf + knn", "linear probe"}
    found: dict[str, str] = {}
    for entry in entries:
        name, _, path = (part.strip() for part in entry.partition("="))
        if not name or not path:
            raise SettingsError(f"eval.compare ({origin}): expected NAME=FILE, got {entry!r}")
        if name in taken or name in found:
            raise SettingsError(f"eval.compare ({origin}): the name {name!r} is taken, choose another")
        found[name] = str(Path(path).expanduser())
    return found


def _read_labels(paths: list[str], split: str, space: DecisionSpace) -> _Labels:
    unusable: list[str] = []
    everything: list[Example] = []
    for path in paths:

        def note(line: int, text: str, why: str, path: str = path) -> None:
            unusable.append(f"{path}:{line}: {why}")

        everything += read_labels([path], space, on_unusable=note)
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
    return _Labels(
        judged=[judged[name] for name in names],
        train=[] if whole or split == "train" else train,
        split_carried=carried,
        total=len(everything) + len(unusable),
        unusable=unusable,
        duplicates=len(chosen) - len(judged),
        leaked=[name for name in names if name in ids or _plain(judged[name].text) in texts],
        elsewhere=frozenset(one.task_id for one in everything) - judged.keys(),
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _teachers(
    judged: Sequence[Example], paths: Sequence[str], resamples: int, seed: int
) -> tuple[dict[str, int], Score | None]:
    """The judged labels by teacher, and the mean agreement of the votes behind them, where the files record these."""
    import numpy as np

    found: dict[str, tuple[str, float | None]] = {}
    for path in paths:
        if path == "-":  # standard input cannot be read twice
            continue
        for _, _, row in read_entries(path):
            try:
                name, origin = task_of(row).id, row.get("provenance")
            except ValueError:  # an unusable label, counted on reading
                continue
            if isinstance(origin, dict) and isinstance(origin.get("teacher"), str):
                found.setdefault(name, (origin["teacher"], number(origin.get("agreement"), 0, 1)))
            elif "messages" not in row and "decision" in row:
                found.setdefault(name, ("recorded", None))
    known = [found[example.task_id] for example in judged if example.task_id in found]
    votes = np.array([agreement for _, agreement in known if agreement is not None])
    if not len(votes):
        return dict(Counter(name for name, _ in known)), None
    resampled = metrics.bootstrap({"votes": partial(metrics.mean, votes)}, len(votes), resamples, seed)
    return dict(Counter(name for name, _ in known)), resampled.score("votes")


def _read_loss(path: Path | None) -> tuple[LossPoint, ...] | None:
    if path is None or not path.is_file():
        return None
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path}: expected a list of objects with step, loss and eval_loss")
    points = [(number(one.get("step")), number(one.get("loss")), number(one.get("eval_loss"))) for one in lines]
    kept = [(step, loss, held) for step, loss, held in points if step is not None and (loss, held) != (None, None)]
    return tuple(LossPoint(step=step, loss=loss, eval_loss=held) for step, loss, held in kept) or None


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
