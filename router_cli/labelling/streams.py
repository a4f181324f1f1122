"""Hand the items of one iterator to many workers of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Source(Generic[T]):
    """An iterator that many workers take from. Made within the event loop.

    Standard input may be long in coming (`waits`): a thread reads it then, so that answers on their way are taken in
    meanwhile instead of timing out, and at most `ahead` items are read before somebody wants them.
    """

    def __init__(self, items: Iterator[T], waits: bool, ahead: int = 16) -> None:
        self._items, self._stopped = items, False
        self._queue: asyncio.Queue[T | BaseException | None] | None = None
        if waits:
            self._queue, self._room = asyncio.Queue(), threading.Semaphore(ahead)
            self._loop = asyncio.get_running_loop()
            # Not to be waited for: nobody knows when the next line comes.
            threading.Thread(target=self._read, daemon=True).start()

    async def next(self) -> T | None:
        """The next item, None at the end. Raises what reading raised."""
        if self._stopped:
            return None
        if self._queue is None:
            return next(self._items, None)
        found = await self._queue.get()
        self._room.release()
        if found is None or isinstance(found, BaseException):
            self._queue.put_nowait(None)  # for the other workers
        if isinstance(found, BaseException):
            raise found
        return None if self._stopped else found

    def stop(self) -> None:
        """No more items, also for those who wait for one."""
        self._stopped = True
        if self._queue is not None:
            self._queue.put_nowait(None)

    def _read(self) -> None:
        try:
            for item in self._items:
                self._put(item)
            self._put(None)
        except BaseException as error:  # it is the workers' to raise
            self._put(error)

    def _put(self, item: T | BaseException | None) -> None:
        assert self._queue is not None
        self._room.acquire()
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody wants it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
