"""A router behind an OpenAI-compatible server, such as vLLM with the trained adapter.

The server cannot be made to decode over the decision space, so what it answers is checked like a teacher's answer:
structured output where it has it, an invalid decision asked again. What is still invalid after that falls back to the
offline rules, and says so in `fallback`: the caller always gets a valid decision.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

from router_cli import prompts
from router_cli.backends import Choice, space_from
from router_cli.errors import UsageError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Message, Task
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import Answer, heuristic
from router_cli.teachers.openai import OpenAITeacher


class _RemoteRouter(OpenAITeacher):
    """The teacher's client, asking with the prompt that routers are trained on."""

    def _question(self, task: Task, space: DecisionSpace, strategy: prompts.Strategy) -> Sequence[Message]:
        return prompts.router_messages(task.text, space)


class RemoteBackend:
    """Decides by asking `infer.model` at `endpoint.base_url`."""

    name = "remote"

    def __init__(self, settings: Settings, progress: Progress = SILENT) -> None:
        if settings.endpoint.base_url is None:
            raise UsageError("--backend remote needs the server: set LLM_API_BASE or endpoint.base_url")
        if settings.infer.model is None:
            raise UsageError("--backend remote needs --model, the name under which the server knows the router")
        self.space, self.model_name = space_from(settings), settings.infer.model
        if settings.infer.adapter is not None:
            from router_cli.backends.local import read_meta, space_of

            self.space = space_of(read_meta(settings.infer.adapter))
        self._settings, self._progress = settings, progress

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        """A valid decision for each text, in order; all texts are asked at once, within `label.concurrency`."""
        return asyncio.run(self._decide(texts))

    async def _decide(self, texts: Sequence[str]) -> list[Choice]:
        settings = self._settings.with_values(label__temperature=0.0)
        extra: dict[str, Any] = {
            "logprobs": True,
            "top_logprobs": 20,
            # Serving must render the prompt as training did: thinking off.
            "chat_template_kwargs": {"enable_thinking": False},
        }
        router = _RemoteRouter(settings, self._progress, model=self.model_name, extra=extra)
        free = asyncio.Semaphore(settings.label.concurrency)

        async def one(number: int, text: str) -> Choice:
            async with free:
                started = time.perf_counter()
                answer = await router.ask(Task(id=str(number), text=text), self.space, "balanced")
                return self._choice(text, answer, (time.perf_counter() - started) * 1000)

        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(one(i, text)) for i, text in enumerate(texts)]
        except* Exception as failures:
            # One refusal ends all requests alike: the first one's words are everybody's.
            raise failures.exceptions[0] from None
        finally:
            await router.close()
        return [task.result() for task in asked]

    def _choice(self, text: str, answer: Answer, milliseconds: float) -> Choice:
        if answer.decision is None:
            names = ", ".join(violation.name for violation in answer.violations)
            decision, _ = heuristic.decide(text, self.space)
            return Choice(decision, None, milliseconds, fallback=f"heuristic ({names})")
        return Choice(answer.decision, topology_shares(answer, self.space.topologies), milliseconds)


def topology_shares(answer: Answer, topologies: Sequence[str]) -> dict[str, float] | None:
    """The distribution over topologies, from the server's top log probabilities where the topology's name begins.

    Normalised over the names that can still follow; None where the server gave none, or its tokens do not show it.
    """
    try:
        tokens = answer.logprobs["content"]
        at = _start_of_value(tokens, '"topology":')
        shares = dict.fromkeys(topologies, 0.0)
        for candidate in tokens[at]["top_logprobs"]:
            piece = candidate["token"].strip().strip('"')
            meant = [name for name in topologies if piece and (name.startswith(piece) or piece.startswith(name))]
            if len(meant) == 1:
                shares[meant[0]] += math.exp(candidate["logprob"])
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None
    sum_ = sum(shares.values())
    return {name: share / sum_ for name, share in shares.items()} if sum_ > 0 else None


def _start_of_value(tokens: Sequence[dict[str, Any]], field: str) -> int:
    """The index of the token with the first letter of a field's string value. Raises ValueError if there is none."""
    text = ""
    for i, token in enumerate(tokens):
        before = text
        text += token["token"]
        found = text.find(field)
        if found >= 0 and any(ch.isalnum() for ch in text[max(found + len(field), len(before)) :]):
            return i
    raise ValueError(field)
