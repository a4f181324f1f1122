"""Who decides where the router is not sure enough: a teacher, the offline rules, one fixed decision, or nobody.

The threshold is given, or picked from the risk-coverage curve that `train` measured on its validation tasks.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from router_cli.backends import space_from
from router_cli.backends.local import calibration_of, read_meta, space_of
from router_cli.costs import dollars
from router_cli.errors import TeacherError, UsageError
from router_cli.labelling.estimate import Confirm, Estimator, approve
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Prediction, Task, Usage
from router_cli.scoring.calibration import Calibration, Point
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import FREE, Teacher, heuristic, make_teacher, total

THRESHOLDS = ("min_confidence", "target_agreement", "target_cost")

PRICED = 20
"""First tasks of the data whose expected price stands for all, with --target-cost."""

NOTHING = FREE.model_copy(update={"attempts": 0})


@dataclass(frozen=True)
class Given:
    """What the place of an unsure decision is taken by: None is nobody."""

    decision: Decision | None
    name: str
    usage: Usage = FREE


class Fallback:
    """Decides the tasks whose topology's probability is below `threshold`; a context that closes connections.

    `counts` says how often who decided, `usage` what all answers cost, those too that came to nothing.
    """

    def __init__(
        self,
        settings: Settings,
        space: DecisionSpace,
        threshold: float,
        teacher: Teacher | None,
        fixed: Decision | None,
        progress: Progress = SILENT,
    ) -> None:
        self._settings, self._space, self.threshold = settings, space, threshold
        self._teacher, self._fixed, self._progress = teacher, fixed, progress
        # A teacher's connections live in one event loop.
        self._runner = asyncio.Runner() if teacher else None
        self.counts: Counter[str] = Counter()
        self.usage = NOTHING

    def __enter__(self) -> Fallback:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._runner and self._teacher:
            self._runner.run(self._teacher.close())
            self._runner.close()

    def apply(self, tasks: Sequence[Task], rows: Sequence[Prediction]) -> Iterator[Prediction]:
        """The rows in their order, those below the threshold decided anew, up to the first that nobody decides.

        As few questions are asked before a row is handed out as a teacher answers at once: what stands written is not
        paid for again. Raises UsageError for a row without a probability, and the teacher's errors in the row's place,
        after a notice of what its answers have cost.
        """
        for part in self._parts(tasks, rows):
            for place, row in enumerate(part):
                if isinstance(row, BaseException):
                    self._say_bill(part[place:])
                    raise row
                yield row

    def outcomes(self, tasks: Sequence[Task], rows: Sequence[Prediction]) -> Iterator[Prediction | BaseException]:
        """As `apply`, but what it would raise stands in the place of its row, and those behind are decided too."""
        for part in self._parts(tasks, rows):
            yield from part

    def _parts(self, tasks: Sequence[Task], rows: Sequence[Prediction]) -> Iterator[list[Prediction | BaseException]]:
        """What becomes of the rows, in pieces that each end with the last of as many as a teacher is asked at once."""
        if self._teacher:
            self._teacher.resume()
        found: dict[int, Given | BaseException] = {}
        unsure = []
        for i, row in enumerate(rows):
            if row.probability is None and row.fallback is None:
                words = f"--backend {row.backend} gives no probability to be compared: leave --fallback off"
                found[i] = UsageError(f"{row.task_id}: {words}")
            # A server without a valid answer: nobody is sure of what the rules said in its place.
            elif row.probability is None or row.probability < self.threshold:
                unsure.append(i)
        at_once, done = self._settings.label.concurrency, 0
        for start in range(0, len(unsure), at_once):
            part = unsure[start : start + at_once]
            found |= zip(part, self._decide([tasks[i] for i in part]), strict=True)
            yield self._replaced(rows, found, done, part[-1] + 1)
            done = part[-1] + 1
        yield self._replaced(rows, found, done, len(rows))

    def _decide(self, tasks: Sequence[Task]) -> Sequence[Given | BaseException]:
        kind = self._settings.infer.fallback
        if kind == "heuristic":
            return [Given(heuristic.decide(task.text, self._space)[0], kind) for task in tasks]
        if kind == "abstain" or self._runner is None:
            return [Given(self._fixed, "abstain" if kind == "abstain" else "decision")] * len(tasks)
        return self._runner.run(self._ask(tasks))

    async def _ask(self, tasks: Sequence[Task]) -> Sequence[Given | BaseException]:
        async def one(task: Task) -> Given:
            assert self._teacher is not None  # only a teacher is asked
            answer = await self._teacher.ask(task, self._space, self._settings.label.strategy)
            why = ", ".join(violation.name for violation in answer.violations)
            return Given(answer.decision, "teacher" if answer.decision else f"teacher ({why})", answer.usage)

        # What the others answered is paid for, whatever happened to one.
        found = await asyncio.gather(*map(one, tasks), return_exceptions=True)
        for given in found:
            used = given.usage if isinstance(given, Given) else given.spent if isinstance(given, TeacherError) else None
            self.usage = total(self.usage, used or NOTHING)
        return found

    def _replaced(
        self, rows: Sequence[Prediction], found: Mapping[int, Given | BaseException], start: int, end: int
    ) -> list[Prediction | BaseException]:
        return [self._row(rows[i], found[i]) if i in found else rows[i] for i in range(start, end)]

    def _row(self, row: Prediction, given: Given | BaseException) -> Prediction | BaseException:
        if isinstance(given, BaseException):
            return given
        self.counts[given.name.partition(" ")[0] if given.decision else "none"] += 1
        share = row.topologies[given.decision.topology] if row.topologies and given.decision else None
        told: dict[str, Any] = {"decision": given.decision, "fallback": given.name, "probability": share}
        told["decision_probability"] = None  # the router's was that of another decision
        if given.usage.prompt_tokens:  # what was paid for; the router's own tokens have no price
            told["usage"] = given.usage
        return row.model_copy(update=told)

    def _say_bill(self, lost: Sequence[Prediction | BaseException]) -> None:
        if not self.usage.attempts:
            return
        bill = f"the fallback's answers so far: {self.usage.attempts:,} requests, {dollars(self.usage.cost_usd)}"
        behind = sum(isinstance(row, Prediction) and row.fallback is not None for row in lost)
        if behind:
            bill += f"; those to {behind} tasks behind the one that got none are lost, because order is kept"
        self._progress.notice(bill)


def check(settings: Settings) -> bool:
    """Whether a fallback is asked for. Raises UsageError for options that do not go together."""
    wanted = settings.infer
    given = [f"--{name.replace('_', '-')}" for name in THRESHOLDS if getattr(wanted, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: all say where the fallback begins")
    if given and wanted.fallback is None:
        raise UsageError(f"{given[0]} needs --fallback: teacher, heuristic, abstain or a decision as JSON")
    if wanted.fallback is not None and not given:
        raise UsageError(
            "--fallback needs --min-confidence, --target-agreement or --target-cost: when is it to decide?"
        )
    paying = [f"--{name.replace('_', '-')}" for name in settings.options("label")]
    if paying and wanted.fallback != "teacher":
        raise UsageError(f"{paying[0]} needs --fallback teacher: nobody else is paid")
    if wanted.target_cost is not None and wanted.fallback != "teacher":
        raise UsageError("--target-cost needs --fallback teacher: nobody else costs anything")
    if given and wanted.min_confidence is None and (wanted.backend != "local" or wanted.adapter is None):
        raise UsageError(f"{given[0]} needs a local --adapter: the curve to choose from is stored with it")
    return bool(given)


def make_fallback(
    settings: Settings,
    first: Sequence[Task],
    todo: Callable[[], Iterable[Task]] | None,
    progress: Progress = SILENT,
    confirm: Confirm | None = None,
) -> Fallback:
    """The fallback that `infer.fallback` names. Nothing is sent yet, but a paid teacher's bill is agreed to.

    `first` tasks stand for the price of all; `todo` gives those to be decided (None: a stream, of unknown length).
    Raises UsageError for what cannot be kept or is not confirmed, and what `make_teacher` raises.
    """
    wanted = settings.infer
    meta = read_meta(wanted.adapter) if wanted.adapter else {}
    space = space_of(meta) if meta else space_from(settings)
    calibration = calibration_of(meta) if wanted.backend == "local" else None
    fixed = None if wanted.fallback in ("teacher", "heuristic", "abstain") else _fixed(wanted.fallback or "", space)
    if wanted.fallback != "teacher":
        return Fallback(settings, space, _threshold(settings, calibration, None, progress), None, fixed)
    settings = settings.with_values(label__batch=False)
    teacher = make_teacher(settings, progress)
    expected = [teacher.expected(task, space, settings.label.strategy).cost_usd for task in first]
    known = [cost for cost in expected if cost is not None]
    price = fmean(known) if known and len(known) == len(expected) else None
    threshold = _threshold(settings, calibration, (teacher.model, price), progress)
    estimate = None
    if todo is not None:
        estimator = Estimator(settings, teacher, space)
        for task in todo():
            estimator.look(task, 1, ())
        share, most = _share_below(threshold, calibration), estimator.made()
        if calibration is None and not most.free:
            progress.notice("how many tasks fall back cannot be foreseen; if all of them did:")
        estimate = replace(
            most,
            questions=round(most.questions * share),
            prompt_tokens=round(most.prompt_tokens * share),
            completion_tokens=round(most.completion_tokens * share),
            cost_usd=None if most.cost_usd is None else most.cost_usd * share,
            seconds=most.seconds * share,
        )
    approve(estimate, settings, progress, confirm)
    return Fallback(settings, space, threshold, teacher, None, progress)


def _fixed(text: str, space: DecisionSpace) -> Decision:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--fallback: is not JSON: {error}") from None
    resolved = space.resolve(raw)
    if resolved.decision is None:
        words = "; ".join(violation.text for violation in resolved.violations)
        raise UsageError(f"--fallback: the decision is not valid: {words}")
    return resolved.decision


def _threshold(
    settings: Settings, calibration: Calibration | None, teacher: tuple[str, float | None] | None, progress: Progress
) -> float:
    wanted = settings.infer
    if wanted.min_confidence is not None:
        if calibration is None:
            progress.warn("the probabilities are not calibrated: --min-confidence is compared with the model's own")
        return wanted.min_confidence
    if calibration is None:
        raise UsageError(
            f"{wanted.adapter}: was trained without validation tasks, so that there is no curve to choose a threshold "
            "from; give --min-confidence"
        )
    if wanted.target_agreement is not None:
        found = calibration.for_agreement(wanted.target_agreement)
        if found is None:
            best = max(calibration.curve, key=lambda point: point.agreement)
            raise UsageError(
                f"--target-agreement {wanted.target_agreement:g}: the most on the {calibration.n} calibration tasks is "
                f"{best.agreement:.3f}, with --min-confidence {best.threshold:g}"
            )
    else:
        assert wanted.target_cost is not None and teacher is not None  # `check` has seen to it
        model, price = teacher
        if not price:
            why = (
                "unknown: set label.price_in and label.price_out"
                if price is None
                else "nothing: every task can go there"
            )
            raise UsageError(f"--target-cost: the price of {model} is {why}")
        found = calibration.for_escalations(wanted.target_cost / price)
        assert found is not None  # the curve's last point hands on nothing
    _say(found, calibration, progress)
    return found.threshold


def _say(found: Point, calibration: Calibration, progress: Progress) -> None:
    progress.notice(
        f"--min-confidence {found.threshold:g}: of the {calibration.n} calibration tasks the router keeps "
        f"{found.coverage:.0%}, and agrees with the labels on {found.agreement:.0%} of these"
    )


def _share_below(threshold: float, calibration: Calibration | None) -> float:
    """The share of the calibration tasks that are less sure than the threshold; 1 where nothing is known."""
    if calibration is None:
        return 1.0
    kept = [point.coverage for point in calibration.curve if point.threshold >= threshold]
    return 1 - max(kept, default=0.0)
