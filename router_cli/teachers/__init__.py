"""Who decides while labelling: the protocol of a teacher, what it answers, and the factory.

openai     a model behind any OpenAI-compatible endpoint
heuristic  offline rules, no key
recorded   the decision that the task's own row brought along
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Answer:
        """Decide one task. Raises TeacherError where the endpoint refuses for good: no other task will fare better."""

    async def close(self) -> None:
        """Let go of connections."""


class HeuristicTeacher:
    """The offline rules as a teacher. They know no leaning: `strategy` changes nothing."""

    name = model = "heuristic"

    def __init__(self) -> None:
        from router_cli.teachers.heuristic import decide

        self._decide = decide

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Answer:
        """Decide by the rules."""
        decision, reason = self._decide(task.text, space)
        return Answer(decision, self.model, reason=reason)

    async def close(self) -> None:
        """Nothing to let go of."""


def make_teacher(settings: Settings, progress: Progress = SILENT) -> Teacher:
    """The teacher of `label.teacher`; nothing is sent yet.

    Raises CredentialsError where the endpoint needs a key and there is none.
    """
    if settings.label.teacher == "heuristic":
        return HeuristicTeacher()
    if settings.label.teacher == "recorded":
        from router_cli.teachers.recorded import RecordedTeacher

        return RecordedTeacher()
    from router_cli.teachers.openai import OpenAITeacher

    return OpenAITeacher(settings, progress)


def total(first: Usage, second: Usage) -> Usage:
    """Two usages as one. An unknown price makes the sum unknown."""
    known = first.cost_usd is not None and second.cost_usd is not None
    return Usage(
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        completion_tokens=first.completion_tokens + second.completion_tokens,
        cost_usd=(first.cost_usd or 0.0) + (second.cost_usd or 0.0) if known else None,
        attempts=first.attempts + second.attempts,
    )
