"""`label --batch`: hand the missing samples over in batches, look after them, bring their answers home.

Everything is written down before the provider hears of it (`batchstore`), so a kill at any moment loses no batch: one
that was made without its id being noted is found again by its name. One pass over the missing samples turns answers
into rows and collects what is still to be asked; a pass follows whenever a batch has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO

from router_cli import costs
from router_cli.errors import BudgetReached, TeacherError, UsageError
from router_cli.jsonl import writing
from router_cli.labelling.batchstore import COLLECTED, OPEN, PLANNED, Batch, BatchStore
from router_cli.labelling.worklist import Question, Worklist
from router_cli.progress import Bar, Progress
from router_cli.schema import Task
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import Answer, Teacher
from router_cli.teachers.batch import ENDED, MOST_BYTES, BatchTeacher, Look, NotMade

SETTLED_AT_ONCE = 500


@contextlib.contextmanager
def handed_over(settings: Settings, worklist: Worklist) -> Iterator[Callable[[Question], bool]]:
    """Whether a sample is with the provider, or its answer is there unread: it costs nothing for the time being.

    Raises UsageError where batches of these settings are under way, and the run would pay for the same online.
    """
    path = _record(settings)
    if not path.exists():
        yield lambda question: False
        return
    with _opened(settings, worklist) as store:
        if not settings.label.batch and (count := len(store.batches(PLANNED, OPEN))):
            raise UsageError(
                f"{path.name}: batches of these settings are under way ({count}): collect them with --batch"
            )
        yield lambda question: store.has(question.key, question.number)


@contextlib.contextmanager
def _opened(settings: Settings, worklist: Worklist) -> Iterator[BatchStore]:
    # The key of no task at all: what the answers to all tasks depend on.
    with contextlib.closing(BatchStore(_record(settings), worklist.key(Task(id="", text="")))) as store:
        yield store


def _record(settings: Settings) -> Path:
    output = Path(settings.label.output)
    return output.with_name(f"{output.name}.batches.sqlite")


class _Chunk:
    """The requests of the next batch, in a file on the disk."""

    def __init__(self, path: Path, sent: str) -> None:
        self.path, self.sent = path, sent
        self.requests: dict[tuple[str, int], float] = {}
        self.bytes = 0
        with writing(path):
            self._file: IO[bytes] = path.open("wb")

    def add(self, question: Question, line: bytes, worst: float) -> None:
        with writing(self.path):
            self._file.write(line)
        self.requests[question.key, question.number] = worst
        self.bytes += len(line)

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


async def run(
    settings: Settings,
    teacher: Teacher,
    worklist: Worklist,
    progress: Progress,
    bar: Bar,
    *,
    missing: Callable[[], Iterator[Question]],
    keep: Callable[[Question, Answer], Awaitable[None]],
    sync: Callable[[], Awaitable[None]],
) -> None:
    """One call of `label --batch`: until no sample is missing, or for one look without `label.wait`.

    `missing` yields the samples without a row, in the order of the input; it is called once a pass. `keep` takes a
    finished one, which does not come again in this run; `sync` brings what was kept to the disk.
    Raises TeacherError where the provider refuses for good, BudgetReached where the rest does not fit into
    `label.max_cost`; what came before is kept.
    """
    assert isinstance(teacher, BatchTeacher)
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    with _opened(settings, worklist) as store:
        await Batcher(settings, teacher, space, store, progress, missing=missing, keep=keep, sync=sync).run(bar)


class Batcher:
    """The work of `run`."""

    def __init__(
        self,
        settings: Settings,
        teacher: BatchTeacher,
        space: DecisionSpace,
        store: BatchStore,
        progress: Progress,
        *,
        missing: Callable[[], Iterator[Question]],
        keep: Callable[[Question, Answer], Awaitable[None]],
        sync: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings, self._teacher, self._space = settings.label, teacher, space
        self._store, self._progress = store, progress
        self._missing, self._keep, self._sync = missing, keep, sync
        self._most = settings.label.batch_size
        # The provider's queue takes one batch at a time; this run hands nothing more over; the cap holds some back.
        self._queue_full = self._stopped = self._too_dear = False
        self._part = store.path.with_name(f".{store.path.name}.part")

    async def run(self, bar: Bar) -> None:
        """Hand over, wait and collect until no sample is missing or nothing more can be asked."""
        try:
            await self._recover()
            await self._look(bar)
            await self._pass(bar)
            while self._store.batches(OPEN) and self._settings.wait:
                await asyncio.sleep(self._settings.batch_poll)
                if await self._look(bar):
                    await self._pass(bar)
        finally:
            self._part.unlink(missing_ok=True)
            if count := len(self._store.batches(OPEN)):
                self._progress.notice(
                    f"{self._store.waiting()} requests wait in {count} batch{'es' * (count > 1)}, which go on at the "
                    "provider: the same command collects them"
                )
        if self._too_dear and not self._store.batches(OPEN):
            raise BudgetReached(
                f"--max-cost {costs.dollars(self._settings.max_cost)} is reached: the batches of these settings have "
                f"cost {costs.dollars(self._store.committed())}, and one more request may pass it; the same command "
                "with a larger --max-cost goes on from here"
            )

    # -- what an earlier run left -----------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Find the batches that were being made when an earlier run ended, and learn from its unread answers."""
        for batch in self._store.batches(PLANNED):
            found = await self._teacher.find(batch.name)
            if found is not None:
                self._store.created(batch.number, found)
                continue
            if batch.file:
                with contextlib.suppress(TeacherError):  # it costs nothing, and providers delete it in time
                    await self._teacher.forget(batch.file)
            self._store.drop(batch.number)
        for asked in self._store.answered():
            if asked.answer is not None:
                self._teacher.learn(asked.answer, asked.sent)
        if others := self._store.elsewhere():
            self._progress.notice(
                f"batches of other settings are left alone ({others}): collect them with those settings"
            )

    # -- bringing home ----------------------------------------------------------------------------------------

    async def _look(self, bar: Bar) -> bool:
        """Look at every batch and bring home the answers of those that ended; whether there were any."""
        ended, states = False, []
        for batch in self._store.batches(OPEN):
            assert batch.id is not None
            look = await self._teacher.look(batch.id)
            states.append(f"{look.status.replace('_', ' ')} {look.done + look.failed}/{look.total}")
            if look.status in ENDED:
                ended = True
                await self._collect(batch, look)
        if states:
            bar.advance(0, "batches: " + ", ".join(states[:3]) + (" …" if len(states) > 3 else ""))
        return ended

    async def _collect(self, batch: Batch, look: Look) -> None:
        if look.status == "failed":
            requests = self._store.size(batch.number)
            self._store.drop(batch.number)
            if look.code != "token_limit_exceeded" or (requests == 1 and not self._store.batches(OPEN)):
                raise self._teacher.failed(str(batch.id), look)
            # More tokens than the account may have waiting: one batch at a time; where one alone is too much, halves.
            self._queue_full = True
            if not self._store.batches(OPEN):
                self._most = requests // 2
                self._progress.notice(f"{look.words}; going on with batches of at most {self._most} requests")
            return
        with writing(self._part):
            self._part.write_bytes(b"")
        for file in look.files:
            await self._teacher.download(file, self._part)
        if look.status == "cancelled":
            self._stopped = True
            self._progress.warn(f"the batch {batch.id} was cancelled: this run hands nothing more over")
        try:
            self._store.collect(batch.number, self._answers(batch))
        except TeacherError:
            self._store.drop(batch.number)
            raise

    def _answers(self, batch: Batch) -> Iterator[tuple[str, int, str, float | None]]:
        """A downloaded file's lines for the store. Raises TeacherError where all of them are one final refusal."""
        refusal, hopeless = None, True
        with self._part.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                name = self._teacher.name_of(line)
                if name is None:
                    self._progress.warn(f"the batch {batch.id}: a line of its answers is damaged and asked for again")
                    continue
                refusal, cost = self._teacher.learn(line, batch.sent)
                hopeless &= refusal is not None
                key, _, number = name.partition("-")
                yield key, int(number), line, cost
        if refusal is not None and hopeless:
            raise refusal

    # -- handing over -----------------------------------------------------------------------------------------

    async def _pass(self, bar: Bar) -> None:
        """Turn answers into rows, and hand over what is to be asked."""
        chunk = _Chunk(self._part, self._teacher.sent(self._space))
        done: list[tuple[str, int]] = []
        spendable = self._spendable()
        try:
            for question in self._missing():
                name = question.key, question.number
                history = self._store.history(*name)
                if name in chunk.requests or (history and history[-1].state != COLLECTED):
                    continue  # the same task further up asks, or a batch
                asked = [(one.sent, one.answer) for one in history]
                step = self._teacher.next(question.task, self._space, self._settings.strategy, asked)
                if isinstance(step, Answer):
                    await self._keep(question, step)
                    done.append(name)
                    if len(done) >= SETTLED_AT_ONCE:
                        await self._settle(done)
                    continue
                if self._stopped or (self._queue_full and self._store.batches(OPEN)):
                    continue
                worst = self._teacher.worst(step, chunk.sent)
                if worst > spendable:
                    self._too_dear = True
                    continue
                spendable -= worst
                line = self._teacher.line(f"{question.key}-{question.number}", step, chunk.sent)
                if len(chunk.requests) >= self._most or chunk.bytes + len(line) > MOST_BYTES:
                    await self._hand_over(chunk)
                    chunk = _Chunk(self._part, self._teacher.sent(self._space))
                chunk.add(question, line, worst)
            await self._settle(done)
            await self._hand_over(chunk)
        finally:
            chunk.close()

    def _spendable(self) -> float:
        self._too_dear = False
        limit = self._settings.max_cost
        # A run of batches outlives the command: what earlier commands spent on it counts.
        return float("inf") if limit is None else limit - self._store.committed() + 1e-9

    async def _settle(self, done: list[tuple[str, int]]) -> None:
        await self._sync()  # first: what is forgotten here must be on the disk there
        self._store.settle(done)
        done.clear()

    async def _hand_over(self, chunk: _Chunk) -> None:
        chunk.close()
        if not chunk.requests:
            return
        name = f"router-{uuid.uuid4().hex}"
        number = self._store.plan(name, chunk.sent, ((*who, worst) for who, worst in chunk.requests.items()))
        try:
            file = await self._teacher.upload(chunk.path, name)
            self._store.uploaded(number, file)
            batch_id = await self._teacher.create(file, name)
        except NotMade as error:
            self._store.drop(number)
            raise error.why from None
        self._store.created(number, batch_id)
        self._teacher.requests += len(chunk.requests)
        self._progress.notice(f"batch {batch_id}: {len(chunk.requests)} requests handed over")
