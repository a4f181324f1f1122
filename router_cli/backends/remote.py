"""A router behind an OpenAI-compatible server, such as vLLM with the trained adapter.

The server cannot be made to decode over the decision space, so what it answers is checked like a teacher's answer:
structured output where it has it, an invalid decision asked again. What is still invalid after that falls back to the
offline rules, and says so in `fallback`: the caller always gets a valid decision.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Coroutine, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from router_cli import prompts
from router_cli.backends import Choice, space_from
from router_cli.errors import UsageError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Message, Task
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import Answer, heuristic
from router_cli.teachers.endpoint import shown
from router_cli.teachers.openai import OpenAITeacher

Result = TypeVar("Result")


class _RemoteRouter(OpenAITeacher):
    """The teacher's client, asking with the prompt that routers are trained on."""

    def _question(self, task: Task, space: DecisionSpace, strategy: prompts.Strategy) -> Sequence[Message]:
        return prompts.router_messages(task.text, space)


class RemoteBackend:
    """Decides by asking `infer.model` at `endpoint.base_url`.

    One client serves all calls: what the server does not take is found out once, connections are kept. It lives in an
    event loop of its own, so that `decide` may be called from any thread, and where another loop is running.
    """

    name = "remote"

    def __init__(self, settings: Settings, progress: Progress = SILENT) -> None:
        if settings.endpoint.base_url is None:
            raise UsageError("--backend remote needs the server: set LLM_API_BASE or endpoint.base_url")
        if settings.infer.model is None:
            raise UsageError("--backend remote needs --model, the name under which the server knows the router")
        self.space, self.model_name = space_from(settings), settings.infer.model
        self._calibration = None
        if settings.infer.adapter is not None:
            from router_cli.backends.local import calibration_of, read_meta, space_of

            meta = read_meta(settings.infer.adapter)
            self.space, self._calibration = space_of(meta), calibration_of(meta)
        self._settings, self._progress = settings.with_values(label__temperature=0.0), progress
        self._url = shown(settings.endpoint.base_url)
        self._said_unknown = False
        self._router = self._client()
        self._free = asyncio.Semaphore(settings.label.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote router", daemon=True)
        self._thread.start()

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        """A valid decision for each text, in order; all texts are asked at once, within `label.concurrency`."""
        return self._run(self._decide(texts))

    def close(self) -> None:
        """Close the connections."""
        if self._loop.is_closed():
            return
        self._run(self._router.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        except BaseException:  # Ctrl-C comes here, and the loop knows nothing of it
            running.cancel()
            raise

    def _client(self) -> _RemoteRouter:
        extra: dict[str, Any] = {
            "logprobs": True,
            "top_logprobs": 20,
            # Serving must render the prompt as training did: thinking off.
            "chat_template_kwargs": {"enable_thinking": False},
        }
        return _RemoteRouter(self._settings, self._progress, model=self.model_name, extra=extra)

    async def _decide(self, texts: Sequence[str]) -> list[Choice]:
        # What refused for good may have come back. The same client goes on: other threads' requests are on their way.
        self._router.resume()

        async def one(number: int, text: str) -> Choice:
            async with self._free:
                started = time.perf_counter()
                answer = await self._router.ask(Task(id=str(number), text=text), self.space, "balanced")
                return self._choice(text, answer, (time.perf_counter() - started) * 1000)

        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(one(i, text)) for i, text in enumerate(texts)]
        except* Exception as failures:
            # One refusal ends all requests alike: the first one's words are everybody's.
            raise failures.exceptions[0] from None
        return [task.result() for task in asked]

    def _choice(self, text: str, answer: Answer, milliseconds: float) -> Choice:
        if answer.decision is None:
            names = ", ".join(violation.name for violation in answer.violations)
            decision, _ = heuristic.decide(text, self.space)
            return Choice(decision, None, milliseconds, fallback=f"heuristic ({names})", usage=answer.usage)
        shares = topology_shares(answer, self.space.topologies)
        if shares is None and not self._said_unknown:
            self._said_unknown = True
            self._progress.notice(
                f"{self._url} gives no log probabilities of the topologies: how sure {self.model_name} is stays unknown"
            )
        if shares is not None and self._calibration is not None:
            shares = self._calibration.apply(shares)
        return Choice(answer.decision, shares, milliseconds, usage=answer.usage)


def topology_shares(answer: Answer, topologies: Sequence[str]) -> dict[str, float] | None:
    """The distribution over topologies, from the server's top log probabilities where the topology's name is chosen.

    Tokens that leave several names open are followed along the answer until they part; elsewhere, where nothing is
    known of how they go on, their share is divided evenly. Normalised over the names; None where the server gave no
    log probabilities, or its tokens do not show the name that was decided.
    """
    shares = dict.fromkeys(topologies, 0.0)
    try:
        tokens = answer.logprobs["content"]
        at, written, reached = _start_of_name([token["token"] for token in tokens]), "", 1.0
        while True:
            chosen = tokens[at]
            # Some servers list the chosen token only where it is among the likeliest.
            others = [one for one in chosen["top_logprobs"] if one["token"] != chosen["token"]]
            if not others and not written:
                return None
            for one in others:
                names = _meant(written + _bare(one["token"]), topologies)
                for name in names:
                    shares[name] += reached * math.exp(one["logprob"]) / len(names)
            written, reached, at = written + _bare(chosen["token"]), reached * math.exp(chosen["logprob"]), at + 1
            if len(names := _meant(written, topologies)) < 2:
                break
        if answer.decision is None or names[0] != answer.decision.topology:
            return None  # a model that thinks aloud names others too: what is said of those is not this decision's
        shares[names[0]] += reached
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
        return None
    sum_ = sum(shares.values())
    return {name: share / sum_ for name, share in shares.items()} if sum_ > 0 else None


def _bare(token: str) -> str:
    return token.strip().strip('"')


def _meant(piece: str, topologies: Sequence[str]) -> list[str]:
    """The names that `piece` begins, or that it goes on behind."""
    return [name for name in topologies if piece and (name.startswith(piece) or piece.startswith(name))]


def _start_of_name(tokens: Sequence[str]) -> int:
    """The index of the token with the first letter of the last topology's name: that of the decision, which is the
    last in an answer. Raises IndexError if there is none."""
    last = [found.end() for found in re.finditer(r'"topology"\s*:\W*(?=\w)', "".join(tokens))][-1]
    return bisect_right(list(accumulate(map(len, tokens), initial=0)), last) - 1
