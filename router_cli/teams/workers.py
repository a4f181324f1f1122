"""Who speaks in a team: a model behind an endpoint, or a recorded run said again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router_cli import costs
from router_cli.errors import InputError, SettingsError, TeacherError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Message, Usage
from router_cli.settings import Settings
from router_cli.teachers.caller import Caller


@dataclass(frozen=True)
class Said:
    """One answer of a worker: its text, the model that gave it, what it used, and how long it took (seconds)."""

    text: str
    model: str
    usage: Usage
    seconds: float


class WorkerFailedError(TeacherError):
    """A worker gave no answer to one prompt; another prompt may fare better. `spent` is what it used all the same."""


class Worker(Protocol):
    """Somebody who answers. `model` is the model asked."""

    model: str

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        """Answer a dialogue; another `sample` of the same dialogue is another draw.

        Raises WorkerFailedError where this dialogue has no answer, TeacherError where no other will have one either,
        and its BudgetReached where one more request could pass the cap.
        """

    async def close(self) -> None:
        """Let go of connections."""


def check_budget(settings: Settings) -> None:
    """Refuse a cap on money that cannot be kept. Raises SettingsError."""
    wanted = settings.run
    if (
        wanted.max_cost is not None
        and costs.Prices(wanted.price_in, wanted.price_out).of(wanted.worker_model, 1, 1) is None
    ):
        raise SettingsError(
            f"run.max_cost ({settings.origin('run.max_cost')}): the price of {wanted.worker_model} is unknown: "
            "give --price-in and --price-out, in US dollars for a million tokens"
        )


class EndpointWorker(Caller):
    """A model behind `endpoint.base_url`, asked with the retries, the pace and the budget of all requests."""

    def __init__(self, settings: Settings, progress: Progress = SILENT, backoff: float = 0.5) -> None:
        wanted = settings.run
        super().__init__(
            settings,
            progress,
            wanted.worker_model,
            costs.Budget(wanted.max_cost),
            costs.Prices(wanted.price_in, wanted.price_out),
            wanted.temperature,
            wanted.concurrency,
            rpm=wanted.rpm,
            backoff=backoff,
            tokens=wanted.answer_tokens,
        )

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        """Ask the endpoint; a `sample` above 0 is the request's seed. An answer that was cut is an answer."""
        clock = asyncio.get_running_loop().time
        started = clock()
        reply = await self._send([message.model_dump() for message in messages], None, sample)
        if reply.violation is not None and (reply.violation.name != "truncated" or not reply.text.strip()):
            failed = WorkerFailedError(f"{self.model} gives no answer: {reply.violation.text}")
            failed.spent = reply.usage
            raise failed
        return Said(reply.text, reply.model, reply.usage, clock() - started)


class RecordedWorker:
    """Says again what a trace recorded, turn by turn, and costs nothing.

    Raises InputError at the first turn whose prompt is not the recorded one: the run would be another.
    """

    def __init__(self, turns: Sequence[tuple[Sequence[Message], Said]]) -> None:
        self._turns, self._next = turns, 0
        self.model = turns[0][1].model if turns else "recorded"

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        """The recorded answer."""
        self._next += 1
        if self._next > len(self._turns):
            raise InputError(f"the trace has {len(self._turns)} turns, and the run asks for another one")
        asked, said = self._turns[self._next - 1]
        if list(asked) != list(messages):
            raise InputError(f"turn {self._next} of the trace answers another prompt: it was made by another version")
        return said

    async def close(self) -> None:
        """Nothing to let go of."""
