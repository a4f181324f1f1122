"""Asking an endpoint of the OpenAI chat-completions shape until it answers: the requests of all who ask a model.

Retries are our own: the client's ignore the 429s of other requests, cap the back-off at 8 seconds, and give up where
Retry-After asks for more than 120 seconds. What an endpoint turns out not to take (structured output, a temperature,
`max_tokens`) is found out once, said once and remembered. Before each request its worst case is reserved from the
budget (`costs.Budget`), and its turn is waited for (`pacing.Pace`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from router_cli import costs
from router_cli.errors import TeacherError
from router_cli.progress import Progress
from router_cli.schema import Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace, Violation
from router_cli.teachers.answers import Reply, read
from router_cli.teachers.ceiling import Ceiling
from router_cli.teachers.connection import make_client, post
from router_cli.teachers.counting import Meter
from router_cli.teachers.dialect import Dialect, answer_limit
from router_cli.teachers.endpoint import Fault, api_key, final_error, shorten, shown
from router_cli.teachers.pacing import Pace, Ticket

LONGEST_WAIT = 3600.0
# So many tasks given up in a row, with no answer between, is an endpoint that is down.
GIVEN_UP_IN_A_ROW = 3
# The same request turned away again while nothing else gets through waits this many times longer than after a failure:
# the retries of a rate limit must outlast a minute.
BUSY_FACTOR = 4


class Caller:
    """Asks one model behind `endpoint.base_url`; one instance serves all workers of a run.

    `backoff` is the first wait in seconds; `extra` are more fields of the request's body, left off from there on where
    the endpoint refuses them; `rpm` and `tpm` are limits that the user told, `tokens` that of an answer (`Dialect`).
    `requests` counts what was sent, `wasted` what a rate limit turned away.
    """

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        model: str,
        budget: costs.Budget,
        prices: costs.Prices,
        temperature: float,
        connections: int,
        rpm: float | None = None,
        tpm: float | None = None,
        backoff: float = 0.5,
        extra: dict[str, Any] | None = None,
        tokens: int | None = None,
    ) -> None:
        endpoint = settings.endpoint
        self.model, self._progress = model, progress
        url = endpoint.base_url or "https://api.openai.com/v1"
        self._key, self._url = api_key(settings, url), shown(url)
        self._timeout, self._retries, self._backoff = endpoint.timeout, endpoint.retries, backoff
        self.budget, self.prices = budget, prices
        self._ceiling = Ceiling(prices, model)
        self._meter = Meter(model)
        self._pace, self._gate = Pace(rpm, tpm), asyncio.Lock()
        self.requests = self.wasted = 0
        self._dialect = Dialect(self._url, temperature, dict(extra or {}), progress, tokens)
        self._answers = self._given_up = 0
        self._said_unpriced = False
        self._stopped: TeacherError | None = None
        self._stop = asyncio.Event()
        self._client = make_client(url, self._key, endpoint.timeout, connections)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def resume(self) -> None:
        """Send again after a final refusal: what refused may have come back. What is spent stays spent."""
        self._stopped = None
        self._stop.clear()

    # -- one request, until it is answered or given up --------------------------------------------------------

    async def _send(self, messages: list[dict[str, str]], space: DecisionSpace | None, sample: int) -> Reply:
        failures, requests = Counter[str](), 0  # by kind: an endpoint that fails in turns is not down
        seen, clock = self._answers, asyncio.get_running_loop().time
        started = clock()
        while True:
            requests += 1
            sent, result = await self._paid(messages, space, sample, requests)
            if isinstance(result, Reply):
                self._answers, self._given_up = self._answers + 1, 0
                return result
            blamed = result.blames(sent)
            if blamed is not None:
                self._dialect.adapt(blamed, sent, "refuses", shorten(result.words, self._key))
                continue
            meaning = result.meaning
            if meaning == "task" or (meaning == "refused" and result.status in (400, 422) and self._answers):
                # Other tasks pass, so it is this one that the endpoint will not take.
                words = shorten(result.words, self._key)
                refused = Violation("request_refused", f"the endpoint refuses the task ({result.status}: {words})")
                return Reply("", self.model, Usage(attempts=requests, cost_usd=0.0), refused, failed=True)
            if meaning not in ("busy", "transient") or (result.wait or 0.0) > LONGEST_WAIT:
                raise self._final(result)
            if meaning == "busy" and self._answers > seen:
                # Others get through: this request waits its turn, and no turn is lost by waiting.
                failures.clear()
                seen = self._answers
            failures[meaning] += 1
            late = result.unreachable and clock() - started > self._timeout / 2
            if failures[meaning] > self._retries or late:
                return self._give_up(result, requests)
            await self._back_off(result, failures[meaning])

    async def _paid(
        self, messages: list[dict[str, str]], space: DecisionSpace | None, sample: int, requests: int
    ) -> tuple[dict[str, Any], Reply | Fault]:
        """One request, its worst case held until it is known what it cost: the parameters sent, and what came."""
        ticket, sent, worst = await self._admit(messages, space, sample)
        self.requests += 1
        cost: float | None = None  # none known: it may have been charged as much as possible
        try:
            body = {"model": self.model, "messages": messages, **sent}
            result, headers = await post(self._client, body, self._timeout)
            now = asyncio.get_running_loop().time()
            if isinstance(result, Fault):
                cost = None if result.lost else 0.0
                return sent, self._refused(result, ticket, now, headers)
            reply = self._read(result, sent, requests)
            used, cost = reply.usage, reply.usage.cost_usd
            self._pace.passed(ticket, now, headers, (used.prompt_tokens + used.completion_tokens) or None)
            self._ceiling.heard(reply.model, used.prompt_tokens, messages, sent)
            return sent, reply
        finally:
            most = worst or self._ceiling.of(messages, sent) if cost is None else cost
            self.budget.settle(worst, most, certain=cost is not None)

    async def _admit(
        self, messages: list[dict[str, str]], space: DecisionSpace | None, sample: int
    ) -> tuple[Ticket, dict[str, Any], float]:
        """Wait for money and for the turn: ticket, parameters to send, and what is reserved."""
        while True:
            self._check()
            worst = self._worst(messages, self._dialect.parameters(space, sample))
            try:
                await self.budget.reserve(worst)
            except costs.BudgetReached as error:
                raise self._halt(error) from None
            try:
                ticket = await self._turn(messages)
                # While waiting, others may have learnt what the endpoint takes.
                sent = self._dialect.parameters(space, sample)
                enough = self._worst(messages, sent) <= worst
            except BaseException:
                self.budget.settle(worst, 0.0)
                raise
            if enough:
                return ticket, sent, worst
            self.budget.settle(worst, 0.0)

    def _worst(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> float:
        if self.budget.limit is None:
            return 0.0
        if answer_limit(sent) is None:
            raise self._halt(
                TeacherError(
                    f"{self._url} takes no limit of answer tokens, so that --max-cost cannot be kept: leave it off"
                )
            )
        return self._ceiling.of(messages, sent)

    async def _turn(self, messages: list[dict[str, str]]) -> Ticket:
        """Wait until the next request may go; first come, first served. Raises once some worker met a final refusal."""
        clock = asyncio.get_running_loop().time
        tokens = 0.0
        if self._pace.tokens.rate is not None:
            used = self._meter.expected(self._meter.count([message["content"] for message in messages]))
            tokens = used.prompt_tokens + used.completion_tokens
        async with self._gate:
            self._check()
            while (wait := self._pace.wait(clock(), tokens)) > 0:
                await self._sleep(wait)
            return self._pace.take(clock(), tokens)

    def _refused(self, found: Fault, ticket: Ticket, now: float, headers: Mapping[str, str]) -> Fault:
        """What a failed request says about the pace of all."""
        if found.status == 200:
            words = f"what came is no chat completion: {shorten(found.words, self._key)}"
            # Before any answer it is the wrong address; after one, a hiccup of something in between.
            found = replace(found, words=words, status=502 if self._answers else 200)
        if found.meaning in ("busy", "transient") and found.wait is not None and found.wait <= LONGEST_WAIT:
            longer = self._pace.pause(now, found.wait)
            if longer and found.wait >= 10:
                self._progress.notice(f"{self._url} asks to slow down: all requests pause for {found.wait:.0f} seconds")
        if found.meaning == "busy":
            self.wasted += 1
            self._pace.refuse(ticket, now, headers)
        elif found.status is not None:
            self._pace.passed(ticket, now, headers, 0.0)
        return found

    # -- what an answer says ----------------------------------------------------------------------------------

    def _read(self, body: dict[str, Any], sent: dict[str, Any], requests: int) -> Reply:
        """The reply in a body, priced, and what it tells about the endpoint noted."""
        reply = read(body, self.model, requests)
        if reply.violation is not None and reply.violation.name == "truncated":
            self._dialect.allow_more(sent)
        if reply.violation is None:
            self._dialect.heard(sent, reply.structured)
        usage = reply.usage
        if not usage.prompt_tokens + usage.completion_tokens:
            if not self._said_unpriced:
                self._said_unpriced = True
                self._progress.notice(f"{self._url} reports no token usage: tokens and cost stay unknown")
            return reply
        price = self.prices.of(reply.model, usage.prompt_tokens, usage.completion_tokens)
        if price is None:
            price = self.prices.of(self.model, usage.prompt_tokens, usage.completion_tokens)
        return replace(reply, usage=usage.model_copy(update={"cost_usd": price}))

    # -- waiting and giving up --------------------------------------------------------------------------------

    async def _back_off(self, found: Fault, failures: int) -> None:
        wait = self._backoff * 2 ** (failures - 1)
        if found.meaning == "busy":
            # The pace holds this request back already, unless it knows nothing, or has nothing left to go by.
            if failures == 1 and not self._pace.free:
                return
            wait *= BUSY_FACTOR / 2
        elif found.wait is not None:
            return  # everybody pauses
        await self._sleep(min(60.0, wait) * random.uniform(0.5, 1.0))

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        self._check()

    def _check(self) -> None:
        if self._stopped is not None:
            raise type(self._stopped)(str(self._stopped))

    def _give_up(self, found: Fault, requests: int) -> Reply:
        self._given_up += 1
        if found.unreachable or self._given_up >= GIVEN_UP_IN_A_ROW:
            raise self._final(found)
        words = shorten(found.words, self._key)
        violation = Violation("no_answer", f"no answer after {requests} requests ({words})")
        return Reply("", self.model, Usage(attempts=requests, cost_usd=0.0), violation, failed=True)

    def _final(self, found: Fault) -> TeacherError:
        return self._halt(final_error(found, self.model, self._url, self._key))

    def _halt(self, error: TeacherError) -> TeacherError:
        """Let nobody send another request: what is final for one is final for all."""
        self._stopped = error
        self._stop.set()
        return error
