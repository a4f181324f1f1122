"""For agent frameworks: a router in Python.

from router_cli.api import Router

with Router.load("outputs/quickstart/adapter") as router:
    row = router.decide("Sort a list of integers")
print(row.decision.topology, row.decision.roles, row.probability)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from router_cli import fallback
from router_cli.backends import Backend, make_backend
from router_cli.errors import TeacherError, UsageError
from router_cli.infer import predict
from router_cli.progress import SILENT, Progress
from router_cli.schema import Prediction, Task
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.tasks import stable_id

_OF_FILES = {"data", "output", "split", "limit", "skip_bad_lines", "engine", "workers", "target_cost"}
"""Settings of `infer` that say nothing about a task in hand."""


@dataclass(frozen=True)
class _Asked:
    """A task on its way, and where its row goes."""

    task: Task
    answer: Future[Prediction] = field(default_factory=Future)


_Queue = SimpleQueue[list[_Asked] | None]


class Router:
    """A router, loaded once, that any number of threads and coroutines may ask.

    One thread of its own decides: what is asked while it works waits, and is decided together as the next batch. A row
    is a `Prediction`; its `decision` is None only where a fallback was asked for and found none.
    """

    def __init__(self, settings: Settings, progress: Progress = SILENT) -> None:
        """Load what `settings.infer` names, with its fallback. `Router.load` makes the settings."""
        falls_back = fallback.check(settings)
        if settings.infer.target_cost is not None:
            raise UsageError("target_cost needs the tasks that it is to hold for: give min_confidence")
        with ExitStack() as open_:
            backend = make_backend(settings, progress)
            open_.callback(backend.close)
            unsure = fallback.make_fallback(settings, [], None, progress) if falls_back else None
            self._open = open_.pop_all()
        self.space: DecisionSpace = backend.space
        self._batch_size = settings.infer.batch_size
        self._queue: _Queue = SimpleQueue()
        self._waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Asked]] = weakref.WeakKeyDictionary()
        self._lock, self._closed = threading.Lock(), False
        # The thread knows nothing of this object, so that one that is forgotten goes, and its model with it.
        work = (self._queue, backend, unsure, self._batch_size, self._open)
        self._thread = threading.Thread(target=_work, args=work, name="router", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._queue.put, None)

    @classmethod
    def load(cls, adapter: str | Path | None = None, *, progress: Progress = SILENT, **settings: Any) -> Router:
        """The router of an adapter's folder; without one, as the settings say.

        `settings` are those of `router infer` (`min_confidence=0.7`, `backend="remote"`) and, with their section, all
        others (`models__dtype="float32"`). They are stronger than the environment and `router.toml`. Raises
        SettingsError and UsageError for what makes no sense, ModelError for what cannot be loaded.
        """
        if adapter is not None:
            settings["adapter"] = str(adapter)
        if strange := sorted(_OF_FILES & settings.keys()):
            raise UsageError(f"Router.load({strange[0]}=...): is about files of tasks; a Router decides single tasks")
        keys = {key.replace("__", ".") if "__" in key else f"infer.{key}": key for key in settings}
        return cls(load({key: (f"Router.load({name}=...)", settings[name]) for key, name in keys.items()}), progress)

    def decide(self, task: str) -> Prediction:
        """The decision for one task, with the topologies' probabilities. Raises UsageError for an empty task."""
        return self.decide_many([task])[0]

    def decide_many(self, tasks: Iterable[str]) -> list[Prediction]:
        """One row a task, in order; much quicker than one by one."""
        asked = [_asked(task) for task in tasks]
        for start in range(0, len(asked), self._batch_size):
            self._send(asked[start : start + self._batch_size])
        return [one.answer.result() for one in asked]

    async def adecide(self, task: str) -> Prediction:
        """`decide` for coroutines: the calls that an event loop has at hand are decided together."""
        asked, loop = _asked(task), asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, [])
        if not waiting:
            # Runs once all coroutines that are ready by now have asked.
            loop.call_soon(self._send_waiting, loop)
        waiting.append(asked)
        return await asyncio.wrap_future(asked.answer)

    def close(self) -> None:
        """Decide what was asked, then let go of the model and the connections. Twice is once."""
        with self._lock:
            self._closed = True
            self._end()
        self._thread.join()

    def __enter__(self) -> Router:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        asked = self._waiting.pop(loop)
        for start in range(0, len(asked), self._batch_size):
            try:
                self._send(asked[start : start + self._batch_size])
            except UsageError as error:
                for one in asked[start : start + self._batch_size]:
                    one.answer.set_exception(error)

    def _send(self, asked: list[_Asked]) -> None:
        with self._lock:
            if self._closed:
                raise UsageError("the router is closed")
            self._queue.put(asked)


def _asked(text: str) -> _Asked:
    if not text.strip():
        raise UsageError("the task is empty")
    return _Asked(Task(id=stable_id(text), text=text))


def _work(queue: _Queue, backend: Backend, unsure: fallback.Fallback | None, batch_size: int, open_: ExitStack) -> None:
    """Decide what comes, in batches, until None does; close in the thread that has used it all."""
    with open_:
        if unsure is not None:
            open_.enter_context(unsure)
        while (batch := queue.get()) is not None:
            last = False
            while len(batch) < batch_size:
                try:
                    more = queue.get_nowait()
                except Empty:
                    break
                if more is None:
                    last = True
                    break
                batch = [*batch, *more]
            _answer([one for one in batch if one.answer.set_running_or_notify_cancel()], backend, unsure)
            if last:
                return


def _answer(batch: list[_Asked], backend: Backend, unsure: fallback.Fallback | None) -> None:
    waiting = iter(batch)
    try:
        for row in _outcomes(backend, unsure, [one.task for one in batch]):
            answer = next(waiting).answer
            if isinstance(row, BaseException):
                answer.set_exception(row)
            else:
                answer.set_result(row)
    except BaseException as error:  # a thread has nobody to raise to but those who wait
        for one in waiting:
            one.answer.set_exception(error)


def _outcomes(
    backend: Backend, unsure: fallback.Fallback | None, tasks: Sequence[Task]
) -> Iterator[Prediction | BaseException]:
    """One row a task or what went wrong with it, in order: those who ask know nothing of each other."""
    found = decide_each(backend, tasks)
    kept = [(task, row) for task, row in zip(tasks, found, strict=True) if isinstance(row, Prediction)]
    rows: Iterator[Prediction | BaseException] = iter([row for _, row in kept])
    if unsure is not None:
        rows = unsure.outcomes([task for task, _ in kept], [row for _, row in kept])
    for row in found:
        yield next(rows) if isinstance(row, Prediction) else row


def decide_each(backend: Backend, tasks: Sequence[Task]) -> list[Prediction | BaseException]:
    """One row a task, in order; in the place of one that makes the model fail, its error."""
    try:
        return list(predict(backend, list(tasks)))
    except TeacherError as error:  # a model server that refuses one refuses all
        return [error] * len(tasks)
    except Exception as error:
        if len(tasks) == 1:
            return [error]
    # One that makes the model fail (a text too long for the memory) is not to take its neighbours with it. Outside the
    # handler: until here the exception keeps the failed pass's tensors alive.
    return [row for task in tasks for row in decide_each(backend, [task])]
