"""`router label`: tasks in, chat-format training rows out, each with where it comes from.

The journal beside the output takes every finished sample before it counts, and is only ever appended to. The output and
the rejected file are made from it: they hold, in the order of the input, the rows of the tasks and settings at hand.
So a kill loses no more than the answers on their way, and nothing is paid for twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator
from itertools import chain, islice

from router_cli import costs, examples
from router_cli.badlines import BadLines
from router_cli.errors import BudgetReached, InputError, RouterError, TeacherError, UsageError
from router_cli.labelling import batching
from router_cli.labelling.estimate import Confirm, Estimate, Estimator, approve
from router_cli.labelling.journal import Journal
from router_cli.labelling.labelfile import LabelFile, LabelResult
from router_cli.labelling.streams import Source
from router_cli.labelling.worklist import UNPAID, Question, Worklist
from router_cli.progress import SILENT, Bar, Progress
from router_cli.schema import Task
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import Answer, OfflineTeacher, Teacher, make_teacher, total

# After a final refusal, answers already on their way may still come in: they are paid for.
GRACE_SECONDS = 10.0


def label(settings: Settings, progress: Progress = SILENT, confirm: Confirm | None = None) -> LabelResult:
    """Label the tasks of `label.data` into `label.output`, going on where an earlier run stopped.

    `confirm` is asked about an estimate above `label.confirm_above`; without it every price is agreed to. A run that
    `label.max_cost` ends is no failure: its result says so in `stopped`.
    Raises UsageError, InputError, OutputError, CredentialsError and TeacherError; what was finished before is kept.
    """
    _check(settings)
    teacher = make_teacher(settings, progress)
    run = _Run(settings, teacher, progress)
    with run.files.alone():
        return run.go(confirm)


def estimate(settings: Settings, progress: Progress = SILENT) -> Estimate:
    """What `label` with these settings is to use. Sends nothing and writes nothing. Raises as `label` does."""
    _check(settings)
    if "-" in settings.label.data:
        raise UsageError("standard input is read only once: --dry-run needs a file")
    return _Run(settings, make_teacher(settings, progress), progress).survey()


def _check(settings: Settings) -> None:
    wanted = settings.label
    if not wanted.data:
        raise UsageError("label needs --data: task files separated by commas, humaneval, or - for standard input")
    if wanted.votes > 1 and wanted.temperature == 0:
        raise UsageError(
            f"--votes {wanted.votes} with temperature 0 asks for one answer {wanted.votes} times: set --temperature 0.7"
        )
    if wanted.batch and (wanted.teacher != "openai" or "-" in wanted.data):
        raise UsageError("--batch needs --teacher openai, and task files that can be read again when the answers come")


class _Run:
    """One call of `label`. Memory holds keys and offsets, never rows."""

    def __init__(self, settings: Settings, teacher: Teacher, progress: Progress) -> None:
        self.settings, self.teacher, self.progress = settings, teacher, progress
        decision = settings.decision
        self.space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
        self.files = LabelFile(settings.label.output)
        self.files.check()
        self.journal = Journal(self.files.journal, progress)
        self.worklist = Worklist(settings, teacher, self.space, examples.choose(settings).id)
        self.streamed, self.paid = "-" in settings.label.data, not isinstance(teacher, OfflineTeacher)
        self.bad = BadLines(settings.label.data, settings.label.skip_bad_lines)
        self.usage, self.refused, self.stopped = UNPAID, 0, ""
        self.estimate: Estimate | None = None
        self.lost: list[str] = []
        self.under_way = 0  # questions that batches hold: they cost nothing more
        self.before = 0  # the journal's length when this run began
        self.started = time.monotonic()

    def go(self, confirm: Confirm | None) -> LabelResult:
        """Survey, agree on the price, ask, derive."""
        self.estimate = self.survey()
        if self.paid:
            # The store of batches counts for itself.
            self.teacher.budget.earlier = 0.0 if self.settings.label.batch else self.journal.paid
            approve(None if self.streamed else self.estimate, self.settings, self.progress, confirm)
        with self.journal.open():
            self.before = self.journal.size
            if self.paid:
                self.journal.begin()
                self.teacher.recall(self.journal.learnt)
            done = self.worklist.finished()
            count = None if self.streamed else done + self.under_way + self.estimate.questions
            try:
                with self.progress.bar("label", count, done) as bar:
                    asyncio.run(self.work_in_batches(bar) if self.settings.label.batch else self.work(bar))
                self.check_input()
            except BaseException:
                self.rescue()
                raise
            finally:
                with contextlib.suppress(RouterError):  # it is only found out again
                    self.journal.learns(self.teacher.learnt)
                    self.journal.went_astray(self.astray)
        self.reread()
        if self.stopped and not any(True for _ in self.worklist.rows(self.journal, 0)):
            raise BudgetReached(self.stopped)
        return self.derive()

    # -- the input --------------------------------------------------------------------------------------------

    def survey(self) -> Estimate:
        """Read the journal, and a file once: bad lines and the bill are known before anything is paid for."""
        for entry in self.journal.entries():
            self.worklist.found(entry)
        self.lost = self.journal.lost
        if self.lost:
            named = ", ".join(self.lost[:3]) + (f" and {len(self.lost) - 3} more" if len(self.lost) > 3 else "")
            self.progress.warn(
                f"an interrupted run had asked {len(self.lost)} questions whose answers were not kept ({named}): "
                "they may have been paid for, and are asked again"
            )
        if self.settings.label.retry_rejected:
            self.worklist.retry_rejected(self.journal)
        estimator = Estimator(self.settings, self.teacher, self.space)
        with batching.handed_over(self.settings, self.worklist) as paid, self.journal.reading() as read:
            if not self.streamed:
                for task in self.tasks():
                    if self.worklist.note(task):
                        questions = list(self.worklist.missing(task))
                        asked = sum(map(paid, questions))
                        self.under_way += asked
                        rows = map(read, self.worklist.standing(task) if self.paid and not estimator.learnt else ())
                        estimator.look(task, len(questions) - asked, rows)
                self.check_input()
        return estimator.made()

    def tasks(self) -> Iterator[Task]:
        """The tasks, read lazily."""
        return islice(self.bad.tasks(), self.settings.label.limit)

    def check_input(self) -> None:
        """Refuse an input without a task, whose output would be an empty file."""
        if not len(self.worklist):
            raise InputError(f"{', '.join(self.settings.label.data)}: holds no task")

    # -- the work ---------------------------------------------------------------------------------------------

    async def work(self, bar: Bar) -> None:
        """Ask everything that is to be asked, `label.concurrency` questions at once."""
        source = Source(self.questions(), self.streamed)
        count = self.settings.label.concurrency
        async with self.journal.kept_in_time():
            # The collector would walk over all that the libraries made again and again: a tenth of the CPU time.
            gc.freeze()
            workers = [asyncio.create_task(self.worker(source, bar)) for _ in range(count)]
            try:
                _, rest = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                source.stop()
                if rest:
                    # Answers on their way are paid for. A budget is nobody's failure: there they all come in.
                    enough = isinstance(_failure(workers), BudgetReached)
                    await asyncio.wait(rest, timeout=None if enough else GRACE_SECONDS)
                failure = _failure(workers)
                if isinstance(failure, BudgetReached):
                    self.stopped = str(failure)
                elif failure is not None:
                    raise failure
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                gc.unfreeze()
                await self.teacher.close()

    async def work_in_batches(self, bar: Bar) -> None:
        """Ask everything that is to be asked through the provider's Batch API."""

        async def keep(question: Question, answer: Answer) -> None:
            self.worklist.take(question)
            await self.keep(question, answer)
            bar.advance(1, self.status())

        try:
            await batching.run(
                self.settings,
                self.teacher,
                self.worklist,
                self.progress,
                bar,
                missing=lambda: chain.from_iterable(self.worklist.missing(task) for task in self.tasks()),
                keep=keep,
                sync=self.journal.sync,
            )
        except BudgetReached as error:
            self.stopped = str(error)
        finally:
            await self.teacher.close()

    def questions(self) -> Iterator[Question]:
        """What has no answer yet, each once."""
        for task in self.tasks():
            self.worklist.note(task)
            for question in self.worklist.missing(task):
                self.worklist.take(question)
                yield question

    async def worker(self, source: Source[Question], bar: Bar) -> None:
        """Take questions until there are none."""
        while (question := await source.next()) is not None:
            if self.paid:
                self.journal.asks(question.key, question.sample, question.task.id)
            try:
                answer = await self.teacher.ask(
                    question.task, self.space, self.settings.label.strategy, question.number
                )
            except RouterError as error:
                if self.paid:
                    spent = (error.spent if isinstance(error, TeacherError) else None) or UNPAID
                    self.usage = total(self.usage, spent)
                    self.journal.unanswered(question.key, question.sample, str(error), spent)
                raise
            await self.keep(question, answer)
            bar.advance(1, self.status())
            # Teachers that never wait would keep Ctrl-C waiting.
            await asyncio.sleep(0)

    async def keep(self, question: Question, answer: Answer) -> None:
        """Bring an answer into the journal, and count what it cost."""
        self.usage = total(self.usage, answer.usage)
        if answer.final:
            await self.journal.finished(self.worklist.answered(question, answer), question.sample)
        else:
            why = answer.violations[0].text
            self.journal.unanswered(question.key, question.sample, why, answer.usage)
            self.progress.warn(f"{question.task.id}: {why}; the next run asks again")
        self.refused += answer.final and answer.decision is None

    @property
    def astray(self) -> float:
        """Dollars that may have been charged for answers that did not arrive or were not kept."""
        budget, known = self.teacher.budget, self.usage.cost_usd
        return budget.uncertain if known is None else max(0.0, budget.spent - known)

    def status(self) -> str:
        """Cost, tokens and rejections so far."""
        spent, cap, parts = self.usage, self.settings.label.max_cost, []
        if self.paid:
            of = "" if cap is None else f" of {costs.dollars(max(0.0, cap - self.teacher.budget.earlier))}"
            parts.append(costs.dollars(spent.cost_usd) + of)
            parts.append(f"{spent.prompt_tokens + spent.completion_tokens:,} tokens")
        if self.refused:
            parts.append(f"{self.refused} rejected")
        return ", ".join(parts)

    # -- the files --------------------------------------------------------------------------------------------

    def reread(self) -> None:
        """Take in what this run has added to the journal."""
        for entry in self.journal.entries(self.before):
            self.worklist.found(entry)

    def rescue(self) -> None:
        """After a failure or Ctrl-C: bring what is finished into the output, and say so."""
        with contextlib.suppress(RouterError):  # the failure itself is what the user has to hear of
            self.reread()
            if lost := len(self.journal.lost):
                self.progress.notice(f"{lost} questions were on their way: they may be paid for, and are asked again")
            if any(True for _ in self.worklist.rows(self.journal, 0)):
                kept = self.derive()
                self.progress.notice(
                    f"{kept.labelled + kept.resumed + kept.rejected} finished tasks are kept: "
                    "the same command again goes on from there"
                )

    def derive(self) -> LabelResult:
        """Write the output and the rejected file from the journal, and count."""
        counts = self.files.write(self.worklist.rows(self.journal, self.before), self.bad)
        if clash := self.worklist.clash():
            self.progress.notice(f"the id {clash} and maybe others stand for different tasks: all are labelled")
        teacher, labels = self.teacher, counts.topologies.total()
        return LabelResult(
            output=self.files.output,
            rejected_path=self.files.rejected,
            labelled=labels - counts.resumed,
            resumed=counts.resumed,
            rejected=counts.rejected,
            unanswered=len(self.worklist) - labels - counts.rejected,
            skipped=len(self.bad),
            topologies={name: counts.topologies[name] for name in self.space.topologies},
            normalised=counts.normalised,
            split_votes=counts.split_votes,
            usage=self.usage,
            usage_all=counts.usage,
            astray_usd=self.astray,
            requests=teacher.requests,
            wasted=teacher.wasted,
            estimate=self.estimate if self.paid and not self.streamed else None,
            tokenizer=teacher.tokenizer,
            count_error=teacher.count_error,
            lost=len(self.lost),
            stopped=self.stopped or None,
            seconds=time.monotonic() - self.started,
        )


def _failure(workers: list[asyncio.Task[None]]) -> BaseException | None:
    """What ended the workers: a budget only where nothing worse did."""
    ended = [one for one in workers if one.done() and not one.cancelled()]
    errors = [error for one in ended if (error := one.exception()) is not None]
    return next((error for error in errors if not isinstance(error, BudgetReached)), errors[0] if errors else None)
