"""The teacher behind any endpoint of the OpenAI chat-completions shape.

Retries are our own: the client's ignore the 429s of other requests, cap the back-off at 8 seconds, and give up where
Retry-After asks for more than 120 seconds. What an endpoint turns out not to take (structured output, a temperature,
`max_tokens`) is found out once, said once and remembered for the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router_cli import costs, prompts
from router_cli.errors import TeacherError
from router_cli.progress import SILENT, Progress
from router_cli.prompts import Strategy
from router_cli.schema import Message, Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace, Resolved, Violation
from router_cli.teachers import FREE, Answer, total
from router_cli.teachers.endpoint import Fault, api_key, fault, final_error, is_local, shorten, shown

FORMATS = ("json_schema", "json_object", "plain")
LIMITS = ("max_tokens", "max_completion_tokens", "no limit")
# A decision takes 40 tokens; the rest is for models that think aloud. Raised once answers are cut.
ANSWER_TOKENS, MOST_TOKENS = 1024, 16_384
LONGEST_WAIT = 3600.0
# So many tasks given up in a row, with no answer between, is an endpoint that is down.
GIVEN_UP_IN_A_ROW = 3


@dataclass(frozen=True)
class _Reply:
    """One answer, or (`failed`) why there is none; `usage.attempts` counts every request sent for it."""

    text: str
    model: str
    usage: Usage
    violation: Violation | None = None
    failed: bool = False
    logprobs: Any = None


class OpenAITeacher:
    """Asks a model for decisions; one instance serves all workers of a run. `backoff` is the first wait in seconds.

    `extra` are more fields of the request's body; one that the endpoint refuses is left off from there on.
    """

    name = "openai"

    def __init__(
        self,
        settings: Settings,
        progress: Progress = SILENT,
        backoff: float = 0.5,
        model: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        endpoint, self.model, self._progress = settings.endpoint, model or settings.label.model, progress
        self._extra = dict(extra or {})
        url = endpoint.base_url or "https://api.openai.com/v1"
        self._key, self._url = api_key(settings, url), shown(url)
        self._timeout, self._retries, self._backoff = endpoint.timeout, endpoint.retries, backoff
        self._reask, self._temperature = settings.label.reask, settings.label.temperature
        self._adapted = {"response_format": 0, "limit": 0, "temperature": 0}
        self._tokens = ANSWER_TOKENS
        self._answers = self._given_up = 0
        self._paused_until, self._said_unpriced = 0.0, False
        self._stopped: TeacherError | None = None
        self._stop = asyncio.Event()
        self._client = AsyncOpenAI(
            api_key=self._key,
            base_url=url,
            max_retries=0,
            timeout=endpoint.timeout,
            # A proxy from the environment has no way to this machine's own servers.
            http_client=DefaultAsyncHttpxClient(trust_env=not is_local(url)),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Answer:
        """Ask, hand an invalid answer back with the validator's words at most `label.reask` times, and report."""
        question = [message.model_dump() for message in self._question(task, space, strategy)]
        messages, spent = question, FREE.model_copy(update={"attempts": 0})
        for _ in range(self._reask + 1):
            reply = await self._send(messages, space)
            spent = total(spent, reply.usage)
            resolved = prompts.parse(reply.text, space)
            violations = tuple(Violation(found.name, _clean(found.text)) for found in resolved.violations)
            if reply.violation is not None:
                resolved, violations = Resolved(None), (reply.violation,)
            if resolved.decision is not None or reply.failed:
                break
            messages = question
            if reply.violation is None or reply.violation.name != "truncated":
                again = prompts.reask_messages(reply.text, violations)
                messages = question + [message.model_dump() for message in again]
        return Answer(
            resolved.decision,
            reply.model,
            spent,
            violations,
            resolved.normalised,
            reply.text,
            final=reply.violation is None or reply.violation.name != "no_answer",
            logprobs=reply.logprobs,
        )

    def _question(self, task: Task, space: DecisionSpace, strategy: Strategy) -> Sequence[Message]:
        return prompts.teacher_messages(task.text, space, strategy)

    # -- one request, until it is answered or given up --------------------------------------------------------

    async def _send(self, messages: list[dict[str, str]], space: DecisionSpace) -> _Reply:
        failures = requests = 0
        seen = self._answers
        while True:
            await self._wait()
            sent = self._parameters(space)
            requests += 1
            result = await self._request(messages, sent)
            if not isinstance(result, Fault):
                self._answers, self._given_up = self._answers + 1, 0
                return self._read(result, sent, requests)
            blamed = result.blames(sent)
            if blamed is not None:
                self._adapt(blamed, sent, "refuses", shorten(result.words, self._key))
                continue
            meaning = result.meaning
            if meaning == "task" or (meaning == "refused" and result.status in (400, 422) and self._answers):
                # Other tasks pass, so it is this one that the endpoint will not take.
                words = shorten(result.words, self._key)
                refused = Violation("request_refused", f"the endpoint refuses the task ({result.status}: {words})")
                return _Reply("", self.model, Usage(attempts=requests, cost_usd=0.0), refused, failed=True)
            if meaning not in ("busy", "transient"):
                raise self._final(result)
            if meaning == "busy" and self._answers > seen:
                # Others get through: this request waits its turn, and no turn is lost by waiting.
                failures, seen = 0, self._answers
            failures += 1
            if failures > self._retries:
                return self._give_up(result, requests)
            await self._back_off(result, failures)

    async def _request(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> dict[str, Any] | Fault:
        import openai

        try:
            # The client's own time-out starts anew with every byte that trickles in.
            async with asyncio.timeout(self._timeout):
                create: Any = self._client.chat.completions.with_raw_response.create
                # The client knows no fields of other servers: they travel beside the ones that it checks.
                extra = {name: sent[name] for name in self._extra.keys() & sent.keys()}
                known = {name: value for name, value in sent.items() if name not in extra}
                request = create(model=self.model, messages=messages, extra_body=extra, **known)
                response = (await request).http_response
        except (TimeoutError, openai.APITimeoutError):
            return Fault(f"no answer within {self._timeout:g} seconds")
        except openai.APIConnectionError as error:
            cause = error.__cause__
            return Fault(str(cause or error), unreachable=type(cause).__name__ == "ConnectError")
        except openai.APIStatusError as error:
            return fault(error.status_code, error.response.headers, error.response.text)
        try:
            body = json.loads(response.text)
            body["choices"][0]["message"].get("content")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            found = fault(response.status_code, response.headers, response.text)
            if found.status == 200:
                words = f"what came is no chat completion: {shorten(found.words, self._key)}"
                # Before any answer it is the wrong address; after one, a hiccup of something in between.
                return Fault(words, status=502 if self._answers else 200, wait=found.wait)
            return found
        return dict(body)

    def _parameters(self, space: DecisionSpace) -> dict[str, Any]:
        sent: dict[str, Any] = dict(self._extra)
        if not self._adapted["temperature"]:
            sent["temperature"] = self._temperature
        if (limit := LIMITS[self._adapted["limit"]]) != "no limit":
            sent[limit] = self._tokens
        kind = FORMATS[self._adapted["response_format"]]
        if kind == "json_schema":
            schema = {"name": "decision", "strict": True, "schema": space.json_schema()}
            sent["response_format"] = {"type": kind, "json_schema": schema}
        elif kind == "json_object":
            sent["response_format"] = {"type": kind}
        return sent

    def _adapt(self, blamed: str, sent: dict[str, Any], verb: str, words: str = "") -> None:
        """Leave off what the endpoint does not take, once: other requests sent before may come back with the same."""
        said = f" ({words})" if words else ""
        if blamed == "temperature":
            if not self._adapted["temperature"]:
                self._adapted["temperature"] = 1
                self._progress.notice(f"{self._url} refuses a temperature{said}: asking without from here on")
            return
        if blamed not in ("response_format", *LIMITS):
            # logprobs and top_logprobs go together.
            gone = [name for name in self._extra if name == blamed or {name, blamed} <= {"logprobs", "top_logprobs"}]
            if not gone:
                return
            for name in gone:
                del self._extra[name]
            self._progress.notice(f"{self._url} refuses {blamed}{said}: asking without from here on")
            return
        step, ladder = ("response_format", FORMATS) if blamed == "response_format" else ("limit", LIMITS)
        had = sent["response_format"]["type"] if blamed == "response_format" else blamed
        if ladder[self._adapted[step]] == had:
            self._adapted[step] += 1
            new = ladder[self._adapted[step]]
            self._progress.notice(f"{self._url} {verb} {had}{said}: asking with {new} from here on")

    # -- reading an answer ------------------------------------------------------------------------------------

    def _read(self, body: dict[str, Any], sent: dict[str, Any], requests: int) -> _Reply:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = _text(message.get("content"))
        answered = _text(body.get("model")) or self.model
        usage = self._usage(body.get("usage"), answered, requests)
        if reason == "content_filter":
            violation = Violation("content_filter", "the endpoint's content filter stopped the answer")
            return _Reply(text, answered, usage, violation, failed=True)
        if message.get("refusal"):
            refusal = _text(message["refusal"])
            return _Reply(refusal, answered, usage, Violation("refusal", "the model refused to answer"))
        if reason == "length":
            self._allow_more(sent)
            return _Reply(text, answered, usage, Violation("truncated", "the answer was cut before its end"))
        if not text.strip():
            return _Reply(text, answered, usage, Violation("empty_answer", "the answer was empty"))
        if "response_format" in sent and not _is_object(text):
            self._adapt("response_format", sent, "ignores")
        return _Reply(text, answered, usage, logprobs=choice.get("logprobs"))

    def _allow_more(self, sent: dict[str, Any]) -> None:
        limit = next((sent[name] for name in LIMITS if name in sent), None)
        if limit == self._tokens and self._tokens < MOST_TOKENS:
            self._tokens *= 4
            self._progress.notice(f"an answer was cut at {limit} tokens: allowing {self._tokens} from here on")

    def _usage(self, raw: Any, answered: str, requests: int) -> Usage:
        prompt, completion = (_count(raw, name) for name in ("prompt_tokens", "completion_tokens"))
        if not prompt + completion:
            if not self._said_unpriced:
                self._said_unpriced = True
                self._progress.notice(f"{self._url} reports no token usage: tokens and cost stay unknown")
            return Usage(attempts=requests)
        price = costs.price(answered, prompt, completion)
        if price is None:
            price = costs.price(self.model, prompt, completion)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, cost_usd=price, attempts=requests)

    # -- waiting and giving up --------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Sit out the pause that a 429 of any worker called for. Raises once some worker met a final refusal."""
        clock = asyncio.get_running_loop().time
        while (left := self._paused_until - clock()) > 0:
            # Spread the workers, or they would all run into the limit again at the same moment.
            await self._sleep(left + random.uniform(0, min(1.0, left / 4)))
        await self._sleep(0)

    async def _back_off(self, found: Fault, failures: int) -> None:
        wait = min(60.0, self._backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        if found.wait is not None:
            wait = found.wait
            if wait > LONGEST_WAIT:
                raise self._final(found)
        if found.meaning == "busy" or found.wait is not None:
            until = asyncio.get_running_loop().time() + wait
            if wait >= 10 and until > self._paused_until + 1:
                self._progress.notice(f"{self._url} asks to slow down: all requests pause for {wait:.0f} seconds")
            self._paused_until = max(self._paused_until, until)
        else:
            await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stopped is not None:
            raise type(self._stopped)(str(self._stopped))

    def _give_up(self, found: Fault, requests: int) -> _Reply:
        self._given_up += 1
        if found.unreachable or found.meaning == "busy" or self._given_up >= GIVEN_UP_IN_A_ROW:
            raise self._final(found)
        words = shorten(found.words, self._key)
        violation = Violation("no_answer", f"no answer after {requests} requests ({words})")
        return _Reply("", self.model, Usage(attempts=requests, cost_usd=0.0), violation, failed=True)

    def _final(self, found: Fault) -> TeacherError:
        self._stopped = final_error(found, self.model, self._url, self._key)
        self._stop.set()
        return self._stopped


def _text(content: Any) -> str:
    """The text of a message's content, which some endpoints send in parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return _clean(content) if isinstance(content, str) else ""


def _count(usage: Any, name: str) -> int:
    found = usage.get(name) if isinstance(usage, dict) else None
    return max(0, found) if isinstance(found, int) else 0


def _clean(text: str) -> str:
    """`text` without half characters, which a model cut in the middle of an emoji leaves and no file takes."""
    return text.encode("utf-8", "replace").decode()


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
