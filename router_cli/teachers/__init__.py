"""Who decides while labelling: the protocol of a teacher, what it answers, and the factory.

openai     a model behind any OpenAI-compatible endpoint
heuristic  offline rules, no key
recorded   the decision that the task's own row brought along
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from router_cli.costs import Budget, Prices
from router_cli.examples import choose
from router_cli.progress import SILENT, Progress
from router_cli.prompts import Strategy
from router_cli.schema import Decision, Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace, Violation

FREE = Usage(cost_usd=0.0)
"""The cost of an answer that no endpoint was asked for."""


@dataclass(frozen=True)
class Answer:
    """What a teacher made of one task: a decision, or the violations and the raw text of its last answer.

    `model` is the model that answered, which is not always the one asked. `final` is False where nothing was learnt
    about the task (the endpoint failed for the time being), so that it is to be asked again another time.
    """

    decision: Decision | None
    model: str
    usage: Usage = FREE
    violations: tuple[Violation, ...] = ()
    normalised: tuple[str, ...] = ()
    raw: str = ""
    reason: str | None = None
    final: bool = True
    # The endpoint's own log probabilities of the answer's tokens, where they were asked for and given.
    logprobs: Any = None


class Teacher(Protocol):
    """Somebody who decides. `name` and `model` (the model asked) are part of what a label is resumed by."""

    name: str
    model: str
    # What was spent, is held by requests in flight, and may be spent at most.
    budget: Budget
    prices: Prices
    # Requests sent, and those of them that a rate limit turned away.
    requests: int
    wasted: int

    @property
    def tokenizer(self) -> str:
        """What `expected` counts tokens with."""

    @property
    def learnt(self) -> dict[str, Any]:
        """What was found out about the endpoint; empty where there is nothing that a later run should know."""

    def recall(self, learnt: dict[str, Any]) -> None:
        """Begin with what an earlier run found out about the same endpoint and model."""

    @property
    def count_error(self) -> float | None:
        """By which share it counted too many in the answers so far (too few is negative); None before the first."""

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy, sample: int = 0) -> Answer:
        """Decide one task; `sample` numbers the votes on it.

        Raises TeacherError where the endpoint refuses for good (no other task will fare better), and its BudgetReached
        where one more request could pass `label.max_cost`.
        """

    def expected(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Usage:
        """What one `ask` will use, without asking: tokens, requests, cost (None: unknown), as answers went so far."""

    def resume(self) -> None:
        """Ask again after an endpoint has refused for good, which in a long life may be over; the budget stays."""

    async def close(self) -> None:
        """Let go of connections."""


class OfflineTeacher:
    """What all teachers without an endpoint have in common: they cost nothing."""

    tokenizer = "none"
    count_error: float | None = None
    requests = wasted = 0
    learnt: dict[str, Any] = {}  # noqa: RUF012  # never written to

    def __init__(self) -> None:
        self.budget, self.prices = Budget(), Prices(0.0, 0.0)

    def expected(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Usage:
        """Nothing."""
        return FREE

    def recall(self, learnt: dict[str, Any]) -> None:
        """There is no endpoint."""

    def resume(self) -> None:
        """Nobody refuses."""

    async def close(self) -> None:
        """Nothing to let go of."""


class HeuristicTeacher(OfflineTeacher):
    """The offline rules as a teacher. They know no leaning: `strategy` changes nothing."""

    name = model = "heuristic"

    def __init__(self) -> None:
        from router_cli.teachers.heuristic import decide

        super().__init__()
        self._decide = decide

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy, sample: int = 0) -> Answer:
        """Decide by the rules."""
        decision, reason = self._decide(task.text, space)
        return Answer(decision, self.model, reason=reason)


def make_teacher(settings: Settings, progress: Progress = SILENT) -> Teacher:
    """The teacher of `label.teacher`; nothing is sent yet.

    Raises CredentialsError where the endpoint needs a key and there is none, InputError and SettingsError for few-shot
    examples that cannot be shown.
    """
    examples = choose(settings)
    if settings.label.teacher == "heuristic":
        return HeuristicTeacher()
    if settings.label.teacher == "recorded":
        from router_cli.teachers.recorded import RecordedTeacher

        return RecordedTeacher()
    if settings.label.batch:
        from router_cli.teachers.batch import BatchTeacher

        return BatchTeacher(settings, progress, examples=examples)
    from router_cli.teachers.openai import OpenAITeacher

    return OpenAITeacher(settings, progress, examples=examples)


def total(first: Usage, second: Usage) -> Usage:
    """Two usages as one. An unknown price makes the sum unknown."""
    known = first.cost_usd is not None and second.cost_usd is not None
    return Usage(
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        completion_tokens=first.completion_tokens + second.completion_tokens,
        cost_usd=(first.cost_usd or 0.0) + (second.cost_usd or 0.0) if known else None,
        attempts=first.attempts + second.attempts,
    )
