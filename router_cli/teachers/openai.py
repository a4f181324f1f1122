"""The teacher behind any endpoint of the OpenAI chat-completions shape. How it is asked is in `caller`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from router_cli import costs, prompts
from router_cli.errors import SettingsError, TeacherError
from router_cli.examples import NO_EXAMPLES, Examples
from router_cli.progress import SILENT, Progress
from router_cli.prompts import Strategy
from router_cli.schema import Message, Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import FREE, Answer, total
from router_cli.teachers.answers import again, judge
from router_cli.teachers.caller import Caller


class OpenAITeacher(Caller):
    """Asks a model for decisions; one instance serves all workers of a run. `backoff` is the first wait in seconds.

    `extra` are more fields of the request's body; one that the endpoint refuses is left off from there on. `examples`
    are shown before every task. The budget is that of labelling: another `model` than the teacher's has none.
    """

    name = "openai"

    def __init__(
        self,
        settings: Settings,
        progress: Progress = SILENT,
        backoff: float = 0.5,
        model: str | None = None,
        extra: dict[str, Any] | None = None,
        examples: Examples = NO_EXAMPLES,
    ) -> None:
        wanted = settings.label
        self._examples, self._reask = examples, wanted.reask
        budget = costs.Budget(wanted.max_cost if model is None else None)
        prices = costs.Prices(wanted.price_in, wanted.price_out)
        super().__init__(
            settings,
            progress,
            model or wanted.model,
            budget,
            prices,
            wanted.temperature,
            wanted.concurrency,
            wanted.rpm,
            wanted.tpm,
            backoff,
            extra,
        )
        if budget.limit is not None and prices.of(self.model, 1, 1) is None:
            raise SettingsError(
                f"label.max_cost ({settings.origin('label.max_cost')}): the price of {self.model} is unknown: "
                "give --price-in and --price-out, in US dollars for a million tokens"
            )

    @property
    def tokenizer(self) -> str:
        """What `expected` counts with."""
        return self._meter.name

    @property
    def learnt(self) -> dict[str, Any]:
        """What the endpoint turned out not to take, and whose endpoint and model that is."""
        found = self._dialect.learnt
        return {"endpoint": self._url, "model": self.model, **found} if found else {}

    def recall(self, learnt: dict[str, Any]) -> None:
        """Begin with what an earlier run learnt, if it asked the same endpoint and model."""
        if (learnt.get("endpoint"), learnt.get("model")) == (self._url, self.model):
            with contextlib.suppress(LookupError, TypeError, ValueError):  # damaged: it is found out again
                self._dialect.recall(learnt)

    @property
    def count_error(self) -> float | None:
        """By which share it counted too many tokens so far (too few is negative); None before the first answer."""
        return self._meter.error

    def expected(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Usage:
        """What one `ask` will use, as answers went so far."""
        counted = self._meter.count([message.content for message in self._question(task, space, strategy)])
        usage = self._meter.expected(counted)
        price = self.prices.of(self.model, usage.prompt_tokens, usage.completion_tokens)
        return usage.model_copy(update={"cost_usd": price})

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy, sample: int = 0) -> Answer:
        """Ask, hand an invalid answer back with the validator's words at most `label.reask` times, and report.

        `sample` numbers the votes on a task: above 0 it is the request's `seed`, where the endpoint takes one.
        """
        question = [message.model_dump() for message in self._question(task, space, strategy)]
        counted = self._meter.sampled([message["content"] for message in question])
        messages, spent = question, FREE.model_copy(update={"attempts": 0})
        for _ in range(self._reask + 1):
            try:
                reply = await self._send(messages, space, sample)
            except TeacherError as error:
                error.spent = spent
                raise
            spent = total(spent, reply.usage)
            resolved = judge(reply, space)
            if messages is question and not reply.failed:
                self._meter.answered(counted, reply.usage.prompt_tokens)
            if resolved.decision is not None or reply.failed:
                break
            messages = question + again(reply, resolved)
        self._meter.finished(counted, spent)
        return Answer(
            resolved.decision,
            reply.model,
            spent,
            resolved.violations,
            resolved.normalised,
            reply.text,
            final=reply.violation is None or reply.violation.name != "no_answer",
            logprobs=reply.logprobs,
        )

    def _question(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Sequence[Message]:
        return prompts.teacher_messages(task.text, space, strategy, self._examples.beside(task.text))
