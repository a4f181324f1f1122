"""What labelling will cost and how long it takes, said before the first paid call; and whether the user agrees.

The teacher tells what one question should use. Where earlier rows of the same tasks and settings are in the journal (a
pilot with `--limit 20`, say), what they really used corrects it: re-asked answers, another tokenizer, longer answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from router_cli.costs import dollars
from router_cli.errors import UsageError
from router_cli.labelling.worklist import UNPAID
from router_cli.progress import Progress
from router_cli.schema import Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import Teacher, total
from router_cli.teachers.endpoint import is_local

SECONDS_AN_ANSWER = 2.0
"""What a hosted model takes for so short an answer, roughly; only the expected time depends on it."""

A_DAY = 86_400.0
"""What a provider takes for a batch, at most."""

PILOT_ROWS, PILOT_ENOUGH = 5, 200
"""Earlier rows from which on their real usage corrects the estimate, and as many as are looked at."""

COUNTED_ALL, EVERY = 5_000, 20
"""So many tasks are all counted in tokens; beyond them one in `EVERY` is, and stands for the others."""

Confirm = Callable[[str], bool]
"""Puts a question to the user; False is no, and where nobody can be asked."""


@dataclass(frozen=True)
class Estimate:
    """What a run is to use, over `questions` to the teacher (tasks times votes, less what is finished).

    `cost_usd` is None for an unknown price. `pilot` is how many earlier rows the figures were corrected by, `tokenizer`
    what counted before that.
    """

    questions: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    seconds: float
    tokenizer: str
    pilot: int = 0

    @property
    def free(self) -> bool:
        """Whether nobody will send a bill."""
        return self.cost_usd == 0.0

    def __str__(self) -> str:
        """One line for people."""
        counted = f"corrected by {self.pilot} earlier answers" if self.pilot else f"counted by {self.tokenizer}"
        minutes = self.seconds / 60
        time = f"about {minutes:.0f} min" if minutes >= 2 else f"about {self.seconds:.0f} s"
        if self.seconds == A_DAY:
            time = "within a day"
        price = "price unknown" if self.cost_usd is None else f"about {dollars(self.cost_usd)}"
        tokens = f"about {self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        return f"{self.questions:,} questions, {tokens} ({counted}), {price}, {time}"


class Estimator:
    """Gathers what an `Estimate` is made of, task by task."""

    def __init__(self, settings: Settings, teacher: Teacher, space: DecisionSpace) -> None:
        self._settings, self._teacher, self._space = settings, teacher, space
        self.questions = self._pilot = self._open_tasks = 0
        self._expected = self._foreseen = self._used = UNPAID

    def look(self, task: Task, samples: int, rows: Iterable[dict[str, Any]]) -> None:
        """Count the `samples` of a task still to be asked for, and learn from its finished `rows` what they used."""
        usages = [Usage(**row["provenance"]["usage"]) for row in rows]
        self.questions += samples
        self._open_tasks += samples > 0
        weight = 1 if self._open_tasks <= COUNTED_ALL else EVERY if self._open_tasks % EVERY == 0 else 0
        if usages or (samples and weight):
            expected = self._teacher.expected(task, self._space, self._settings.label.strategy)
            self._open(expected, samples * weight)
            for used in usages:
                self._finished(expected, used)

    def _open(self, expected: Usage, samples: int) -> None:
        cost = expected.cost_usd
        more = Usage(
            prompt_tokens=expected.prompt_tokens * samples,
            completion_tokens=expected.completion_tokens * samples,
            cost_usd=None if cost is None else cost * samples,
            attempts=expected.attempts * samples,
        )
        self._expected = total(self._expected, more)

    @property
    def learnt(self) -> bool:
        """Whether enough finished rows were looked at."""
        return self._pilot >= PILOT_ENOUGH

    def _finished(self, expected: Usage, used: Usage) -> None:
        if used.prompt_tokens + used.completion_tokens:
            if self._settings.label.batch:  # the pilot may have been asked online, for twice the money
                teacher = self._teacher
                cost = teacher.prices.of(teacher.model, used.prompt_tokens, used.completion_tokens)
                used = used.model_copy(update={"cost_usd": cost})
            self._foreseen, self._used = total(self._foreseen, expected), total(self._used, used)
            self._pilot += 1

    def made(self) -> Estimate:
        """The estimate of everything counted so far."""
        wanted, pilot = self._settings.label, self._pilot if self._pilot >= PILOT_ROWS else 0

        def corrected(name: str) -> float:
            first, foreseen, used = (getattr(one, name) or 0.0 for one in (self._expected, self._foreseen, self._used))
            return first * used / foreseen if pilot and foreseen else first

        prompt, completion = round(corrected("prompt_tokens")), round(corrected("completion_tokens"))
        requests = corrected("attempts")
        known = self._expected.cost_usd is not None
        minutes = max(
            max(requests / wanted.concurrency, float(requests > 0)) * SECONDS_AN_ANSWER / 60,
            requests / wanted.rpm if wanted.rpm else 0.0,
            (prompt + completion) / wanted.tpm if wanted.tpm else 0.0,
        )
        return Estimate(
            questions=self.questions,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost_usd=corrected("cost_usd") if known else None,
            seconds=A_DAY if wanted.batch else 60 * minutes,
            tokenizer=self._teacher.tokenizer,
            pilot=pilot,
        )


def approve(estimate: Estimate | None, settings: Settings, progress: Progress, confirm: Confirm | None) -> None:
    """Say the estimate, and have it confirmed where it is above `label.confirm_above`; None is a stream of tasks.

    What `label.max_cost` caps costs no more than that. An unknown price counts as above everything, but for a server on
    this machine. Without `confirm` (Python) everything is agreed to.
    Raises UsageError where the user says no, or cannot be asked.
    """
    wanted = settings.label
    if estimate is not None:
        if estimate.free or not estimate.questions:
            return
        progress.notice(str(estimate))
    cost = estimate.cost_usd if estimate else None
    stake = min((one for one in (cost, wanted.max_cost) if one is not None), default=None)
    if stake is None and is_local(settings.endpoint.base_url or ""):
        return
    if wanted.yes or confirm is None or (stake is not None and stake <= wanted.confirm_above):
        return
    what = "a bill that cannot be foreseen" if stake is None else f"a bill of about {dollars(stake)}"
    if not confirm(f"This makes {what}. Go on?"):
        raise UsageError(
            f"{what}, above label.confirm_above ({dollars(wanted.confirm_above)}), is not confirmed and nothing was "
            "sent: add --yes, or a cap with --max-cost"
        )
