"""One shard: read, decided and written as a whole, or not at all; one that stands is not decided again."""

from __future__ import annotations

import contextlib
import gzip
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO

from router_cli import fallback
from router_cli.backends import Backend, make_backend
from router_cli.badlines import BadLines
from router_cli.errors import OutputError, RouterError
from router_cli.infer import WINDOW, decisions
from router_cli.jsonl import dumps, read_lines, read_rows, replacing
from router_cli.progress import SILENT, Progress
from router_cli.schema import Prediction, Task
from router_cli.settings import Settings


@dataclass(frozen=True)
class Done:
    """One shard: what became of it. `error` and its `kind` (a class of errors.py) where nothing did."""

    shard: str
    decided: int = 0
    stood: bool = False
    skipped: int = 0
    fallbacks: int = 0
    # Who decided below the threshold, and how often.
    unsure: dict[str, int] = field(default_factory=dict)
    threshold: float | None = None
    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    error: str = ""
    kind: str = ""


class Worker:
    """Decides shards, with a router that is loaded for the first that does not stand."""

    def __init__(self, settings: Settings, progress: Progress = SILENT) -> None:
        self._settings, self._progress = settings, progress
        self._data, self._output = Path(settings.infer.data[0]), Path(settings.infer.output or "")
        self._backend: Backend | None = None
        self._unsure: fallback.Fallback | None = None

    def decide(self, name: str) -> Done:
        """Decide a shard, or see that its predictions stand; the lines that were passed over are recorded beside it."""
        source, target = self._data / name, self._output / name
        skipped = BadLines([str(source)], self._settings.infer.skip_bad_lines)
        tasks = self._tasks(source, skipped)
        if target.exists():
            stood = _stands(target, tasks)
            skipped.record(target)  # once more: a kill can have come between the two
            return Done(name, stood=stood, skipped=len(skipped))
        before = Counter(self._unsure.counts) if self._unsure else Counter[str]()
        decided = fallbacks = 0
        with _shard(target) as file:
            for row in self._rows(tasks):
                file.write((dumps(row) + "\n").encode())
                decided += 1
                fallbacks += row.fallback is not None
        skipped.record(target)
        if self._unsure is None:
            return Done(name, decided, skipped=len(skipped), fallbacks=fallbacks)
        counts = dict(self._unsure.counts - before)
        return Done(name, decided, False, len(skipped), fallbacks, counts, self._unsure.threshold)

    def attempt(self, name: str) -> Done:
        """`decide`, with a failure as a `Done` that says so: it has to reach the one who can be heard."""
        try:
            return self.decide(name)
        except RouterError as error:
            return Done(name, error=str(error), kind=type(error).__name__)

    def close(self) -> None:
        """Let go of the router."""
        if self._backend is not None:
            self._backend.close()

    def _tasks(self, source: Path, skipped: BadLines) -> Iterator[Task]:
        if _empty(source):
            return iter(())  # other programs write empty shards
        wanted = self._settings.infer.split
        return (task for task in skipped.tasks() if wanted in ("all", task.split))

    def _rows(self, tasks: Iterator[Task]) -> Iterator[Prediction]:
        while batch := list(islice(tasks, self._settings.infer.batch_size * WINDOW)):
            if self._backend is None:
                if self._settings.infer.fallback is not None:
                    self._unsure = fallback.make_fallback(self._settings, batch, None, self._progress)
                self._backend = make_backend(self._settings, self._progress)
            yield from decisions(self._backend, self._unsure, batch)


def _empty(source: Path) -> bool:
    bad: list[int] = []
    return next(read_lines(str(source), lambda number, text, why: bad.append(number)), None) is None and not bad


def _stands(target: Path, tasks: Iterable[Task]) -> bool:
    """True. Raises OutputError where the predictions are about other tasks than the shard."""
    known = (str(row.get("task_id")) for _, row in read_rows(str(target)))
    for number, (id_, task) in enumerate(zip_longest(known, tasks), start=1):
        if task is None or id_ != task.id:
            there = "no more task" if task is None else f"the task {task.id}"
            raise OutputError(
                f"{target}:{number}: is about the task {id_}, but the shard has {there} there: delete it to decide anew"
            )
    return True


@contextlib.contextmanager
def _shard(path: Path) -> Iterator[IO[bytes]]:
    """Write a shard that stands as a whole or not at all, compressed where its name says so."""
    with replacing(path, "wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:  # the same rows, the same bytes
            yield packed  # type: ignore[misc]  # takes bytes, as a file does
