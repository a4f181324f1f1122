"""`router label`: tasks in, chat-format training rows out, each with where it comes from.

The journal beside the output takes every finished task before it counts, and is only ever appended to. The output and
the rejected file are made from it: they hold, in the order of the input, the rows of the tasks and settings at hand.
So a kill loses no more than the answers on their way, and nothing is paid for twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from router_cli import costs, prompts
from router_cli.errors import InputError, OutputError, RouterError, UsageError
from router_cli.jsonl import Appender, dumps, replacing, write_rows, writing
from router_cli.progress import SILENT, Bar, Progress
from router_cli.schema import Label, Message, Provenance, Rejection, Task, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import read_tasks
from router_cli.teachers import FREE, Answer, Teacher, make_teacher, total

# After a final refusal, answers already on their way may still come in: they are paid for.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class LabelResult:
    """What `label` made. `labelled` and `resumed` together are the rows of `output`.

    `rejected` counts the rows of `rejected_path`, from earlier runs too; `unanswered` tasks got no answer this time
    and are asked again by the next run; `skipped` are unreadable input lines. `usage` is what this run spent,
    `usage_all` what all rows together did; a cost of None is an unknown price.
    """

    output: Path
    rejected_path: Path
    labelled: int
    resumed: int
    rejected: int
    unanswered: int
    skipped: int
    topologies: dict[str, int]
    normalised: int
    usage: Usage
    usage_all: Usage
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every task of the input has its row in `output`."""
        return not (self.rejected or self.unanswered or self.skipped)


def label(settings: Settings, progress: Progress = SILENT) -> LabelResult:
    """Label the tasks of `label.data` into `label.output`, going on where an earlier run stopped.

    Raises UsageError, InputError, OutputError, CredentialsError and TeacherError; what was finished before is kept.
    """
    if not settings.label.data:
        raise UsageError("label needs --data: task files separated by commas, humaneval, or - for standard input")
    output = Path(settings.label.output)
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, expected a file to write the labels to")
    teacher = make_teacher(settings, progress)
    with _alone(output):
        return _Run(settings, teacher, progress).go()


class _Run:
    """One call of `label`. Memory holds keys and offsets, never rows."""

    def __init__(self, settings: Settings, teacher: Teacher, progress: Progress) -> None:
        self.settings, self.teacher, self.progress = settings, teacher, progress
        decision = settings.decision
        self.space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
        self.output = Path(settings.label.output)
        self.rejected, self.journal, self.bad_lines = (
            self.output.with_name(f"{self.output.name}.{kind}.jsonl") for kind in ("rejected", "journal", "bad-lines")
        )
        self.split: dict[str, str | None] = {}  # by key, in the order of the input
        self.ids: dict[str, str] = {}  # id -> key of its first task
        self.said_clash = False
        self.bad: dict[tuple[int, str, str], None] = {}  # both passes over the input meet them
        self.usage, self.unanswered, self.refused = FREE.model_copy(update={"attempts": 0}), 0, 0

    def go(self) -> LabelResult:
        """Survey, label, derive."""
        started = time.monotonic()
        if not self.journal.exists() and self.output.exists() and self.output.stat().st_size:
            raise OutputError(
                f"{self.output}: exists, but its journal {self.journal.name} does not: "
                "move it away or choose another --output, so that nothing is overwritten"
            )
        # A first pass finds bad lines before anything is paid for, and makes an ETA possible.
        streamed = "-" in self.settings.label.data
        if not streamed:
            for key, task in self.tasks():
                self.note(key, task)
            self.check_input()
        with Appender(self.journal) as journal:
            self.index = self.read_journal(0)
            self.before = self.journal.stat().st_size
            done = sum(key in self.index for key in self.split)
            try:
                with self.progress.bar("label", None if streamed else len(self.split), done) as bar:
                    asyncio.run(self.work(journal, bar))
                self.check_input()
            except BaseException:
                self.rescue()
                raise
        self.index |= self.read_journal(self.before)
        return self.derive(started)

    # -- the input --------------------------------------------------------------------------------------------

    def tasks(self) -> Iterator[tuple[str, Task]]:
        """The tasks with their keys, read lazily."""
        wanted = self.settings.label
        on_bad = self.note_bad if wanted.skip_bad_lines else None
        for task in read_tasks(list(wanted.data), limit=wanted.limit, on_bad=on_bad):
            yield self.key(task), task

    def note_bad(self, number: int, text: str, why: str) -> None:
        """Remember an unreadable line (`jsonl.BadLine`)."""
        self.bad[number, text[:1000], why] = None

    def key(self, task: Task) -> str:
        """What a row is resumed by: everything that the answer depends on."""
        wanted = self.settings.label
        parts = {
            "task": task.text,
            "id": task.id,
            "prompt_version": prompts.PROMPT_VERSION,
            "teacher": self.teacher.name,
            "model": self.teacher.model,
            "roles": self.space.roles,
            "topologies": self.space.topologies,
            "step_bound": self.space.step_bound,
            "strategy": wanted.strategy,
            "temperature": wanted.temperature,
            "decision": task.decision if self.teacher.name == "recorded" else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def note(self, key: str, task: Task) -> None:
        """Remember a task's place in the output."""
        self.split[key] = task.split
        if self.ids.setdefault(task.id, key) != key and not self.said_clash:
            self.said_clash = True
            self.progress.notice(f"the id {task.id} and maybe others stand for different tasks: all are labelled")

    def check_input(self) -> None:
        """Refuse an input without a task, whose output would be an empty file."""
        if not self.split:
            raise InputError(f"{', '.join(self.settings.label.data)}: holds no task")

    # -- the work ---------------------------------------------------------------------------------------------

    async def work(self, journal: Appender, bar: Bar) -> None:
        """Ask for every unfinished task, `label.concurrency` of them at once."""
        todo = self.todo()
        workers = [asyncio.create_task(self.worker(todo, journal, bar)) for _ in range(self.settings.label.concurrency)]
        try:
            done, rest = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            failure = next((error for worker in done if (error := worker.exception())), None)
            if failure is not None:
                todo.close()
                if rest:
                    await asyncio.wait(rest, timeout=GRACE_SECONDS)
                raise failure
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.teacher.close()

    def todo(self) -> Generator[tuple[str, Task], None, None]:
        """The tasks that have no row yet, each once."""
        taken = set()
        for key, task in self.tasks():
            self.note(key, task)
            if key not in self.index and key not in taken:
                taken.add(key)
                yield key, task

    async def worker(self, todo: Iterator[tuple[str, Task]], journal: Appender, bar: Bar) -> None:
        """Take tasks from the shared iterator until there are none."""
        for key, task in todo:
            answer = await self.teacher.ask(task, self.space, self.settings.label.strategy)
            self.usage = total(self.usage, answer.usage)
            if answer.final:
                journal.append(self.row(key, task, answer))
            else:
                self.unanswered += 1
                self.progress.warn(f"{task.id}: {answer.violations[0].text}; the next run asks again")
            self.refused += answer.final and answer.decision is None
            rejected = f", {self.refused} rejected" if self.refused else ""
            bar.advance(1, costs.dollars(self.usage.cost_usd) + rejected)
            # Teachers that never wait would keep Ctrl-C waiting.
            await asyncio.sleep(0)

    def row(self, key: str, task: Task, answer: Answer) -> Label | Rejection:
        """What the journal keeps of an answer."""
        provenance = Provenance(
            teacher=self.teacher.name,
            model=answer.model,
            prompt_version=prompts.PROMPT_VERSION,
            roles=self.space.roles,
            strategy=self.settings.label.strategy,
            key=key,
            usage=answer.usage,
            normalised=answer.normalised,
            reason=answer.reason,
        )
        if answer.decision is None:
            return Rejection(
                origin_task_id=task.id,
                task=task.text,
                violations=tuple(str(violation) for violation in answer.violations),
                raw=answer.raw,
                provenance=provenance,
            )
        question = prompts.router_messages(task.text, self.space)
        return Label(
            messages=(*question, Message(role="assistant", content=prompts.render(answer.decision))),
            sample_type=("" if task.source == "generic" else f"{task.source}_") + "teacher_distilled",
            origin_task_id=task.id,
            decision=answer.decision,
            split=task.split,
            provenance=provenance,
        )

    # -- the files --------------------------------------------------------------------------------------------

    def read_journal(self, start: int) -> dict[str, int]:
        """Key -> offset of the journal's rows from the offset `start` on. A damaged line is said and passed over."""
        found: dict[str, int] = {}
        with self.journal.open("rb") as file:
            at = file.seek(start)
            for line in file:
                try:
                    found[str(json.loads(line)["provenance"]["key"])] = at
                except (ValueError, LookupError, TypeError):
                    self.progress.warn(f"{self.journal}: the line at byte {at} is damaged; its task is asked again")
                at += len(line)
        return found

    def rescue(self) -> None:
        """After a failure or Ctrl-C: bring what is finished into the output, and say so."""
        with contextlib.suppress(RouterError):  # the failure itself is what the user has to hear of
            self.index |= self.read_journal(self.before)
            if kept := sum(key in self.index for key in self.split):
                self.derive(time.monotonic())
                self.progress.notice(f"{kept} finished tasks are kept: the same command again goes on from there")

    def derive(self, started: float) -> LabelResult:
        """Write the output and the rejected file from the journal, and count."""
        topologies: Counter[str] = Counter()
        rejected = resumed = normalised = 0
        spent = FREE.model_copy(update={"attempts": 0})
        with self.journal.open("rb") as journal, replacing(self.output) as good, replacing(self.rejected) as bad:
            for key, split in self.split.items():
                if (at := self.index.get(key)) is None:
                    continue
                journal.seek(at)
                row = json.loads(journal.readline())
                spent = total(spent, Usage(**row["provenance"]["usage"]))
                if "messages" not in row:
                    rejected += 1
                    bad.write(dumps(row) + "\n")
                    continue
                # The split is the task file's to change, and costs nothing.
                good.write(dumps({**row, "split": split}) + "\n")
                topologies[row["decision"]["topology"]] += 1
                resumed += at < self.before
                normalised += bool(row["provenance"]["normalised"])
        with writing(self.rejected):
            if not rejected:
                self.rejected.unlink()
            self.bad_lines.unlink(missing_ok=True)
        if self.bad:
            write_rows(self.bad_lines, ({"line": at, "text": text, "reason": why} for at, text, why in self.bad))
        return LabelResult(
            output=self.output,
            rejected_path=self.rejected,
            labelled=topologies.total() - resumed,
            resumed=resumed,
            rejected=rejected,
            unanswered=self.unanswered,
            skipped=len(self.bad),
            topologies={name: topologies[name] for name in self.space.topologies},
            normalised=normalised,
            usage=self.usage,
            usage_all=spent,
            seconds=time.monotonic() - started,
        )


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold `output` against other processes. Raises OutputError where one has it."""
    from filelock import FileLock, Timeout

    path = output.with_name(f".{output.name}.lock")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(f"{output}: another `router label` is writing it; choose another --output") from None
    try:
        yield
    finally:
        lock.release()
