"""`router label --audit`: how far a teacher agrees with itself, and which labels a person should look at.

A sample of the finished label file is asked about once more, with the settings that made it, by `label` itself: price,
confirmation, cap and resuming are the same, and the second answers have a journal of their own
(`O.audit.journal.jsonl`). What a teacher does not repeat, no router can learn: the agreement is the ceiling of every
score on these labels.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_cli import examples
from router_cli.errors import InputError, TeacherError, UsageError
from router_cli.jsonl import write_rows
from router_cli.labelling.candidates import WHY, Doubt, rows_of, write
from router_cli.labelling.estimate import Confirm, Estimate
from router_cli.labelling.worklist import Worklist
from router_cli.progress import SILENT, Progress
from router_cli.schema import Score, Usage
from router_cli.scoring.intervals import bootstrap
from router_cli.scoring.metrics import NONE, confusion, wilson
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import task_of
from router_cli.teachers import make_teacher

if TYPE_CHECKING:
    from router_cli.scoring.metrics import Array


@dataclass(frozen=True)
class AuditResult:
    """What a re-ask of `asked` of the `labels` in `output` found; the figures are over the `answered` ones.

    `topology` and `decision` are the shares with the same topology and the same whole decision (Wilson intervals),
    `kappa` is Cohen's kappa of the topologies with its bootstrap interval, None where one topology is all there is. An
    answer that cannot be used (`rejected` of them) agrees with nothing. `changes` counts "first -> again". `balance`
    counts the topologies among all answers in the journal of `output`, by strategy. `candidates` counts the rows of
    `candidates_path` by reason. `usage` is what the second answers cost.
    """

    output: Path
    candidates_path: Path
    labels: int
    asked: int
    answered: int
    rejected: int
    topology: Score
    decision: Score
    kappa: Score | None
    changes: dict[str, int]
    balance: dict[str, dict[str, int]]
    candidates: dict[str, int]
    usage: Usage
    stopped: str | None

    @property
    def complete(self) -> bool:
        """Whether every task of the sample was asked about."""
        return self.answered == self.asked


def audit(settings: Settings, progress: Progress = SILENT, confirm: Confirm | None = None) -> AuditResult:
    """Ask again about `label.audit_sample` rows of the label file `label.output`, and compare.

    The sample is the same every time, and a larger one holds the smaller: nothing is paid for twice.
    Raises UsageError where the settings are others than those of the file, InputError where it is none, and what
    `label` raises.
    """
    from router_cli.label import label

    with _prepared(settings) as (survey, again):
        result = label(again, progress, confirm)
        return _compare(settings, survey, result.output, result.rejected_path, result.usage_all, result.stopped)


def estimate(settings: Settings, progress: Progress = SILENT) -> Estimate:
    """What `audit` is to use. Sends nothing and writes nothing. Raises as `audit` does."""
    from router_cli import label

    with _prepared(settings) as (_, again):
        return label.estimate(again, progress)


# -- the sample ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    """One pass over the label file: its length, the sampled rows by task text, and the rows whose votes split."""

    labels: int
    sample: dict[str, dict[str, Any]]
    places: dict[str, int]  # of the sample: the offset
    split: list[tuple[float, int]]  # (agreement, offset)


@contextmanager
def _prepared(settings: Settings) -> Iterator[tuple[_Survey, Settings]]:
    """The survey, and the settings under which `label` asks again about the sample."""
    wanted = settings.label
    if wanted.teacher == "recorded":
        raise UsageError("--audit: the teacher recorded has no answer of its own to repeat")
    if wanted.from_outcomes is not None:
        raise UsageError("--audit: no teacher made the labels of --from-outcomes; leave one of them out")
    if wanted.batch:
        raise UsageError("--audit asks a small sample at once: leave out --batch")
    survey = _survey(settings)
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "sample.jsonl"
        write_rows(sample, survey.sample.values())
        yield (
            survey,
            settings.with_values(
                label__data=[str(sample)],
                label__output=f"{wanted.output}.audit",
                label__limit=None,
                # The votes of a tie have no topology to compare; the first answer has.
                label__tie="first",
                label__retry_rejected=False,
            ),
        )


def _survey(settings: Settings) -> _Survey:
    output, split = Path(settings.label.output), list[tuple[float, int]]()
    decision, count = settings.decision, 0
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    asked = Worklist(settings, make_teacher(settings), space, examples.choose(settings).id)

    def drawn() -> Iterator[tuple[str, int, dict[str, Any]]]:
        nonlocal count
        for number, (at, row) in enumerate(rows_of(output), start=1):
            try:
                task, made = task_of(row), row["provenance"]
                same = made["key"] == asked.key(task) and len(made.get("votes") or [0]) == asked.votes
            except (ValueError, LookupError, TypeError, AttributeError):
                raise InputError(
                    f"{output}:{number}: is no row of `router label`: expected messages and provenance"
                ) from None
            if not same:
                raise UsageError(
                    f"{output}:{number}: was made with other settings than these ({_differing(made, settings)}): "
                    "repeat the command that made the file, with --audit"
                )
            count += 1
            if made.get("agreement") not in (None, 1.0):
                split.append((made["agreement"], at))
            yield hashlib.sha256(task.text.encode()).hexdigest(), at, row

    # By the text's hash: no order of the file, no seed, and each further row of a larger sample only adds to it.
    least = heapq.nsmallest(settings.label.audit_sample, drawn())
    if not least:
        raise InputError(f"{output}: holds no label to ask again about; label first")
    sample = {task_of(row).text: row for _, _, row in reversed(least)}
    return _Survey(count, sample, {task_of(row).text: at for _, at, row in reversed(least)}, split)


def _differing(made: dict[str, Any], settings: Settings) -> str:
    """What a row's provenance shows of the difference; the rest of its key is a hash."""
    wanted = settings.label
    now = {"teacher": wanted.teacher, "strategy": wanted.strategy, "roles": settings.decision.roles}
    was = {name: made.get(name) for name in now} | {"votes": len(made.get("votes") or [0])}
    said = [
        f"{name} {_words(was[name])}, now {_words(value)}"
        for name, value in (now | {"votes": wanted.votes}).items()
        if was[name] != value
    ]
    return "; ".join(said) or "model, temperature, topologies, step bound or examples"


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# -- comparing ------------------------------------------------------------------------------------------------------


def _compare(
    settings: Settings, survey: _Survey, again: Path, rejected: Path, usage: Usage, stopped: str | None
) -> AuditResult:
    import numpy as np

    output = Path(settings.label.output)
    second: dict[str, dict[str, Any]] = {task_of(row).text: row for _, row in rows_of(again)}
    if rejected.exists():
        second |= {row["task"]: row for _, row in rows_of(rejected)}
    second = {text: second[text] for text in survey.sample if text in second}
    if not second:
        raise TeacherError(f"none of the {len(survey.sample)} questions was answered: run the same command again later")
    classes: list[str] = list(settings.decision.topologies)
    found: dict[int, Doubt] = {at: Doubt(["votes split"], agreement) for agreement, at in survey.split}
    pairs: list[tuple[int, int]] = []
    same, changes = 0, Counter[str]()
    for text, other in second.items():
        first, answer = survey.sample[text]["decision"], other.get("decision")
        topology = answer["topology"] if answer else "no usable answer"
        pairs.append((classes.index(first["topology"]), classes.index(topology) if answer else NONE))
        same += answer == first
        doubt = found.setdefault(survey.places[text], Doubt([], 1.0))
        doubt.again = answer
        if answer == first:
            continue
        if topology != first["topology"]:
            changes[f"{first['topology']} -> {topology}"] += 1
            doubt.why.append("another topology" if answer else "no usable answer")
        else:
            doubt.why.append("another decision")
    gold, guess = (np.array(side) for side in zip(*pairs, strict=True))
    resampled = bootstrap({"kappa": lambda weights: kappa(gold, guess, len(classes), weights)}, len(gold))
    score = resampled.score("kappa")
    candidates = output.with_name(f"{output.name}.audit.jsonl")
    counts = write(candidates, output, {at: doubt for at, doubt in found.items() if doubt.why})
    return AuditResult(
        output=output,
        candidates_path=candidates,
        labels=survey.labels,
        asked=len(survey.sample),
        answered=len(second),
        rejected=sum(row.get("decision") is None for row in second.values()),
        topology=wilson(int((gold == guess).sum()), len(gold)),
        decision=wilson(same, len(gold)),
        kappa=None if math.isnan(score.value) else score,
        changes=dict(changes.most_common()),
        balance=_balance(output, classes),
        candidates={why: counts[why] for why in WHY if counts[why]},
        usage=usage,
        stopped=stopped,
    )


def kappa(first: Array, second: Array, classes: int, weights: Array) -> Array:
    """Cohen's kappa (Cohen 1960) under row weights of shape (..., n): (agreement - chance) / (1 - chance).

    Chance is two raters with these shares who do not look. A second answer of -1 is no usable one: a class that the
    first rater never gives. NaN where both give one and the same class throughout.
    """
    import numpy as np

    shares = confusion(first, second, classes, weights) / weights.sum(-1)[..., None, None]
    observed = np.diagonal(shares[..., :-1], axis1=-2, axis2=-1).sum(-1)
    chance = (shares.sum(-1) * shares[..., :-1].sum(-2)).sum(-1)
    value: Array = np.divide(
        observed - chance, 1 - chance, out=np.full(observed.shape, np.nan), where=chance < 1 - 1e-12
    )
    return value


def _balance(output: Path, classes: list[str]) -> dict[str, dict[str, int]]:
    """Strategy -> topology -> how many of all usable answers that the label file's journal keeps."""
    counts: dict[str, Counter[str]] = {}
    journal = output.with_name(f"{output.name}.journal.jsonl")
    for row in _finished(journal):
        counts.setdefault(row["provenance"]["strategy"], Counter())[row["decision"]["topology"]] += 1
    return {strategy: {name: each[name] for name in classes} for strategy, each in sorted(counts.items())}


def _finished(journal: Path) -> Iterator[dict[str, Any]]:
    if not journal.exists():
        return
    with journal.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # `label` has said so
            if isinstance(row, dict) and isinstance(row.get("provenance"), dict) and row.get("decision"):
                yield row
