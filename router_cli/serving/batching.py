"""Dynamic batching: tasks that come one by one are worked on together, by one thread, in the order they came.

While the thread works, tasks wait; when it is free, it takes as many as fit into a batch. Only an idle thread waits for
company, and only for milliseconds. Whoever stops waiting for an answer gives the place in the queue free at once. Work
that only waits for others is done by several threads, each with a batch of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

PADDED_CHARACTERS = 65_536
"""Rows of a batch times its longest text, at most (a single text may be longer). A batch is padded to its longest row,
so that one text of 50,000 characters would make 31 short neighbours take gigabytes; it is decided alone instead."""

MOST_SECONDS = 60
"""The longest that a client is told to stay away."""


Put = TypeVar("Put")
Got = TypeVar("Got")


class QueueFull(Exception):
    """No place for that many; `seconds` is when there may be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


class Worker:
    """One thread that works off calls in their order.

    A daemon, unlike those of `concurrent.futures`: an endpoint that never answers must not keep the program.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def __call__(self, call: Callable[[], Got]) -> Got:
        """What `call()` returns or raises in the thread."""
        answer: asyncio.Future[tuple[Any, BaseException | None]] = asyncio.get_running_loop().create_future()
        self._calls.put((call, answer))
        result, error = await answer
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def end(self) -> None:
        """Let the thread end after the calls that it has."""
        self._calls.put(None)

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            call, answer = given
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = call(), None
            except BaseException as error:  # whatever it is, somebody waits for it
                outcome = None, error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                answer.get_loop().call_soon_threadsafe(_give, answer, outcome)


def _give(answer: asyncio.Future[Any], outcome: Any) -> None:
    if not answer.done():
        answer.set_result(outcome)


class Batcher(Generic[Put, Got]):
    """Hands items to `work` in batches of up to `most`, of which up to `room` items wait.

    `work` gives one result an item, in order, which may be an exception; one that it raises is that of all its items.
    Up to `at_once` threads call it. An idle thread waits up to `linger` seconds for a batch to fill. `size` is how long
    an item's text is, for the padding. `seen` is told of each batch: the results, and the seconds that it took.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Put]], Sequence[Got | BaseException]],
        most: int,
        room: int,
        linger: float = 0.0,
        size: Callable[[Put], int] = lambda item: 0,
        seen: Callable[[Sequence[Got | BaseException], float], None] = lambda results, seconds: None,
        at_once: int = 1,
    ) -> None:
        self._work, self._most, self._room, self._linger = work, most, room, linger
        self._size, self._seen, self._at_once = size, seen, at_once
        # In the order they came; a dict, because those who go away leave from anywhere in it.
        self._waiting: dict[asyncio.Future[Got | BaseException], tuple[Put, float]] = {}
        self._arrived = asyncio.Event()
        self._pace = 0.0  # seconds an item takes, as the last batches went
        self._busy_since: dict[Worker, float] = {}

    async def __aenter__(self) -> Batcher[Put, Got]:
        self.workers = [Worker("router serve") for _ in range(self._at_once)]
        self._loops = [asyncio.create_task(self._run(worker)) for worker in self.workers]
        return self

    async def __aexit__(self, *failure: object) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for worker in self.workers:
            worker.end()

    @property
    def waiting(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    @property
    def busy(self) -> float:
        """For how many seconds every thread has been at the same batch."""
        return time.monotonic() - max(self._busy_since.values()) if len(self._busy_since) == self._at_once else 0.0

    async def put(self, items: Sequence[Put]) -> list[Got | BaseException]:
        """The items' results or errors, in order. Raises QueueFull where not all of them find a place."""
        if len(self._waiting) + len(items) > self._room:
            seconds = math.ceil(self._pace * len(self._waiting) / self._at_once)
            raise QueueFull(max(1, min(MOST_SECONDS, seconds)))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        mine: list[asyncio.Future[Got | BaseException]] = [loop.create_future() for _ in items]
        self._waiting |= {one: (item, now) for one, item in zip(mine, items, strict=True)}
        self._arrived.set()
        try:
            return list(await asyncio.gather(*mine))
        finally:  # nobody waits any more: it was answered, or the client is gone
            for one in mine:
                self._waiting.pop(one, None)
                one.cancel()

    async def _run(self, worker: Worker) -> None:
        while True:
            await self._company()
            batch = self._take()
            if not batch:  # those who waited have gone
                continue
            started = self._busy_since[worker] = time.monotonic()
            results: Sequence[Got | BaseException]
            try:
                results = await worker(partial(self._work, [item for item, _ in batch.values()]))
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                results = [error] * len(batch)
            finally:
                del self._busy_since[worker]
            spent = time.monotonic() - started
            self._pace = 0.8 * self._pace + 0.2 * spent / len(batch) if self._pace else spent / len(batch)
            self._seen(results, spent)
            for answer, result in zip(batch, results, strict=True):
                _give(answer, result)  # unless the client is gone

    async def _company(self) -> None:
        """Until something waits, and then until a batch is full or the first has waited long enough."""
        while len(self._waiting) < self._most:
            first = next(iter(self._waiting.values()), None)
            left = None if first is None else first[1] + self._linger - time.monotonic()
            if left is not None and left <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()

    def _take(self) -> dict[asyncio.Future[Got | BaseException], tuple[Put, float]]:
        batch: dict[asyncio.Future[Got | BaseException], tuple[Put, float]] = {}
        longest = 0
        for answer, (item, since) in self._waiting.items():
            longest = max(longest, self._size(item))
            if len(batch) == self._most or (batch and (len(batch) + 1) * longest > PADDED_CHARACTERS):
                break
            batch[answer] = (item, since)
        for answer in batch:
            del self._waiting[answer]
        return batch
