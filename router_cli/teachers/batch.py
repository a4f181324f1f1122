"""The teacher behind a provider's Batch API (OpenAI's /files and /batches): half the price, an answer within a day.

The questions and the reading of answers are those of `OpenAITeacher`; here is how they travel. What the endpoint does
not take shows in the answers of a batch, and the next batch is sent without it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from router_cli import costs
from router_cli.errors import TeacherError
from router_cli.examples import NO_EXAMPLES, Examples
from router_cli.jsonl import writing
from router_cli.progress import SILENT, Progress
from router_cli.prompts import Strategy
from router_cli.schema import Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace, Violation
from router_cli.teachers import Answer, total
from router_cli.teachers.answers import Reply, again, judge
from router_cli.teachers.connection import broken
from router_cli.teachers.dialect import MOST_TOKENS
from router_cli.teachers.endpoint import Fault, fault, final_error, shorten
from router_cli.teachers.openai import OpenAITeacher

RATE = 0.5
"""What a request of a batch costs, as a share of its online price: half at every provider that has the API."""

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
MOST_BYTES = 200_000_000
"""Size of one upload at OpenAI, at most; `label.batch_size` holds its bound on the number of requests."""

ENDED = ("completed", "failed", "expired", "cancelled")

NAME = re.compile(r"[0-9a-f]+-\d+")  # `custom_id` of a request: a sample's key and number

Result = TypeVar("Result")
Asked = tuple[str, str | None]
"""One request of a sample in a collected batch: the parameters sent as JSON, the answer's line (None: none came)."""


@dataclass
class NotMade(Exception):
    """The provider did not make a batch, for certain; `why` is what the user has to hear of."""

    why: TeacherError


class BatchPrices(costs.Prices):
    """The batch rate of the online prices."""

    def of(self, model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """US dollars for one request of `model` in a batch, or None where its price is unknown."""
        online = super().of(model, prompt_tokens, completion_tokens)
        return None if online is None else online * RATE


@dataclass(frozen=True)
class Look:
    """What the provider says of a batch: how far its requests are, the files of answers, words on a failure."""

    status: str
    total: int
    done: int
    failed: int
    files: tuple[str, ...]
    words: str
    code: str


class BatchTeacher(OpenAITeacher):
    """Hands questions over by the file and reads the files of answers; `ask` stays online and is not for a batch."""

    def __init__(
        self, settings: Settings, progress: Progress = SILENT, backoff: float = 0.5, examples: Examples = NO_EXAMPLES
    ) -> None:
        super().__init__(settings, progress, backoff, examples=examples)
        self.prices = BatchPrices(settings.label.price_in, settings.label.price_out)

    # -- questions and answers --------------------------------------------------------------------------------

    def sent(self, space: DecisionSpace) -> str:
        """The parameters that all requests of the next batch have in common, as JSON."""
        return json.dumps(self._dialect.parameters(space))

    def line(self, name: str, messages: Sequence[dict[str, str]], sent: str) -> bytes:
        """One request as a line of the upload; its answer comes under the same `name`."""
        body = {"model": self.model, "messages": messages, **json.loads(sent)}
        return json.dumps({"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"

    def next(
        self, task: Task, space: DecisionSpace, strategy: Strategy, history: Sequence[Asked]
    ) -> Answer | list[dict[str, str]]:
        """What a sample needs after its requests so far: the finished answer, or the messages to ask with next."""
        question = [message.model_dump() for message in self._question(task, space, strategy)]
        messages, spent, asked, failures, words = question, Usage(cost_usd=0.0, attempts=0), 0, 0, ""
        first: Reply | None = None
        for sent, line in history:
            parameters = json.loads(sent)
            reply = Fault("the batch ended before its turn") if line is None else self._reply(line, parameters)
            if isinstance(reply, Fault):
                words = shorten(reply.words, self._key)
                spent = total(spent, Usage(cost_usd=0.0))
                if reply.blames(parameters) is not None:
                    continue  # the next batch goes without it
                if reply.meaning == "task" or (reply.meaning == "refused" and reply.status in (400, 422)):
                    refused = Violation("request_refused", f"the endpoint refuses the task ({reply.status}: {words})")
                    return Answer(None, self.model, spent, (refused,))
                failures += 1
                continue
            spent, asked = total(spent, reply.usage), asked + 1
            first = first or reply
            resolved = judge(reply, space)
            if resolved.decision is not None or reply.failed or asked > self._reask:
                counted = self._meter.count([message["content"] for message in question])
                self._meter.answered(counted, first.usage.prompt_tokens)
                self._meter.finished(counted, spent)
                return Answer(
                    resolved.decision, reply.model, spent, resolved.violations, resolved.normalised, reply.text
                )
            messages = question + again(reply, resolved)
        if failures > self._retries:
            gone = Violation("no_answer", f"no answer in {failures} batches ({words})")
            return Answer(None, self.model, spent, (gone,), final=False)
        return messages

    def learn(self, line: str, sent: str) -> tuple[TeacherError | None, float | None]:
        """Note what the answer in a line says about the parameters that the endpoint takes.

        Returns the refusal, if it is one that no repetition changes, and the cost (None: unknown).
        """
        parameters = json.loads(sent)
        reply = self._reply(line, parameters)
        if not isinstance(reply, Fault):
            return None, reply.usage.cost_usd
        if (blamed := reply.blames(parameters)) is not None:
            self._dialect.adapt(blamed, parameters, "refuses", shorten(reply.words, self._key))
        elif reply.meaning not in ("busy", "transient", "task"):
            return final_error(reply, self.model, self._url, self._key), 0.0
        return None, 0.0

    def name_of(self, line: str) -> str | None:
        """The name of the request that a line answers, None for a damaged line."""
        try:
            name = json.loads(line)["custom_id"]
        except (ValueError, LookupError, TypeError):
            return None
        return name if isinstance(name, str) and NAME.fullmatch(name) else None

    # -- files and batches ------------------------------------------------------------------------------------

    async def upload(self, path: Path, name: str) -> str:
        """Upload a file of requests from the disk; the provider's id of it. A second upload costs nothing."""

        async def act() -> str:
            with path.open("rb") as file:
                sent = await self._client.files.create(file=(f"{name}.jsonl", file), purpose="batch")
            return sent.id

        try:
            return await self._call(act)
        except TeacherError as error:
            raise NotMade(error) from None

    async def create(self, file: str, name: str) -> str:
        """Make a batch of an uploaded file; its id. Where the answer is lost, it is looked for before a second try.

        Raises NotMade where there is none for certain, else TeacherError.
        """
        import openai

        lost = False

        async def act() -> str:
            nonlocal lost
            if lost and (found := await self._find(name)) is not None:
                return found
            lost = True
            try:
                made = await self._client.batches.create(
                    input_file_id=file, endpoint=ENDPOINT, completion_window="24h", metadata={"router": name}
                )
            except openai.APIStatusError as error:
                lost = error.status_code >= 500 or error.status_code == 408
                raise
            return made.id

        try:
            return await self._call(act)
        except TeacherError as error:
            raise error if lost else NotMade(error) from None

    async def find(self, name: str) -> str | None:
        """The id of the batch that was made under `name`, None where there is none."""
        return await self._call(lambda: self._find(name))

    async def _find(self, name: str) -> str | None:
        async for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get("router") == name:
                return batch.id
        return None

    async def look(self, batch_id: str) -> Look:
        """How a batch stands."""
        batch = await self._call(lambda: self._client.batches.retrieve(batch_id), f"the batch {batch_id}")
        counts, flaws = batch.request_counts, (batch.errors.data if batch.errors else None) or []
        said = [f"line {flaw.line}: {flaw.message}" if flaw.line else str(flaw.message) for flaw in flaws]
        return Look(
            batch.status,
            counts.total if counts else 0,
            counts.completed if counts else 0,
            counts.failed if counts else 0,
            tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
            shorten("; ".join(said) or "no explanation", self._key),
            (flaws[0].code or "") if flaws else "",
        )

    async def download(self, file: str, path: Path) -> None:
        """Append a file of answers to the file `path`, by the block."""
        whole = path.stat().st_size

        async def act() -> None:
            with writing(path):
                os.truncate(path, whole)  # what a broken connection left of it
            async with self._client.files.with_streaming_response.content(file) as response:
                async for block in response.iter_bytes():
                    with writing(path), path.open("ab") as into:
                        into.write(block)

        await self._call(act, f"the file {file}")

    async def forget(self, file: str) -> None:
        """Delete an uploaded file that no batch was made of."""
        await self._call(lambda: self._client.files.delete(file), f"the file {file}")

    def failed(self, batch_id: str, look: Look) -> TeacherError:
        """The one line for a batch that the provider does not take."""
        return TeacherError(f"{self._url} does not take the batch {batch_id}: {look.words}")

    def worst(self, messages: Sequence[dict[str, str]], sent: str) -> float:
        """The most that a request can cost in US dollars; 0 where the price is unknown.

        Raises TeacherError where `label.max_cost` cannot be kept.
        """
        parameters = json.loads(sent)
        if self.budget.limit is not None:
            return self._worst(list(messages), parameters)
        # Kept all the same: a later command may come with a cap.
        return self._ceiling.of(list(messages), parameters, MOST_TOKENS)

    # -- how it is done ---------------------------------------------------------------------------------------

    def _reply(self, line: str, sent: dict[str, Any]) -> Reply | Fault:
        """An answer's line as the reply in it, or as a Fault."""
        try:
            row = json.loads(line)
            if error := row.get("error"):
                code = str(error.get("code") or "")
                return Fault(str(error.get("message") or code), code=code)
            status, body = row["response"]["status_code"], row["response"]["body"]
            if status == 200:
                body["choices"][0]["message"].get("content")
                return self._read(body, sent, 1)
        except (ValueError, LookupError, TypeError, AttributeError):
            return Fault("what came is no chat completion", status=502)
        return fault(status, {}, json.dumps(body))

    async def _call(self, act: Callable[[], Awaitable[Result]], thing: str = "") -> Result:
        """Do a request, again after failures that pass. `thing` is what a 404 misses (empty: all of the API)."""
        import httpx2
        import openai

        failures = 0
        while True:
            try:
                return await act()
            except openai.APIStatusError as error:
                found = fault(error.status_code, error.response.headers, error.response.text)
            except (openai.APIConnectionError, httpx2.TransportError) as error:
                found = broken(error, self._timeout)
            said = f"({found.status}: {shorten(found.words, self._key)})"
            if found.status == 404 and thing:
                raise TeacherError(f"{self._url} does not know {thing} {said}: is it the same key and project?")
            if found.status in (404, 405, 501):
                raise TeacherError(f"{self._url} has no Batch API {said}: label without --batch")
            failures += 1
            if found.meaning not in ("busy", "transient") or failures > self._retries:
                raise final_error(found, self.model, self._url, self._key)
            wait = min(60.0, self._backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
            await asyncio.sleep(wait if found.wait is None else found.wait)
