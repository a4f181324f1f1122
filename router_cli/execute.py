"""Run every formation on tasks with hidden tests: recorded executions, as `router eval --outcomes` reads them.

A cell is a task, a topology and a repeat. Its team is the router's decision where that is of the cell's topology, else
the topology's plain team (`teams.given`). What is in the folder:

    calls.jsonl       every answer of the worker, with its prompt; found again by model, prompt and sample, so that
                      nothing is paid for twice, whatever else changes
    outcomes.jsonl    one row a cell, in the order of the tasks, made anew when the run ends
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router_cli.costs import dollars
from router_cli.errors import BudgetReached, InputError, UsageError
from router_cli.jsonl import Appender, alone, dumps, replacing
from router_cli.labelling.streams import Source
from router_cli.progress import SILENT, Bar, Progress
from router_cli.schema import Decision, Message, Usage
from router_cli.scoring.outcomes import OUTCOMES
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import total
from router_cli.teams.cascade import normal
from router_cli.teams.formations import code_of
from router_cli.teams.given import given_decision
from router_cli.teams.problems import Problem, read_problems
from router_cli.teams.sandbox import Sandbox, Verdict
from router_cli.teams.team import NOTHING, Work, work
from router_cli.teams.workers import EndpointWorker, Said, Worker, check_budget

CALLS = "calls.jsonl"
GRACE_SECONDS = 10.0
"""How long answers on their way are waited for after a final refusal."""


@dataclass(frozen=True)
class Cell:
    """One execution to be made."""

    problem: Problem
    decision: Decision
    repeat: int


@dataclass(frozen=True)
class Executed:
    """What a run made. `usage` is what all cells took, `paid` the part of it that this call asked the worker for."""

    outcomes: Path
    cells: int
    failed: int
    usage: Usage
    paid: Usage


def execute(
    settings: Settings,
    decisions: Mapping[str, Decision],
    progress: Progress = SILENT,
    worker: Worker | None = None,
) -> Executed:
    """Execute `eval.data` with every topology, `eval.repeats` times, into `eval.output_dir`.

    `decisions` are the router's, by task id; `worker` takes the place of the model behind the endpoint.
    Raises UsageError without --allow-code-execution, InputError for tasks without tests, OutputError where another
    process works in the folder, TeacherError where the worker is gone for good, BudgetReached where `run.max_cost` is
    (of all that calls paid in this folder); what was answered is kept, and the same call goes on from there.
    """
    if not settings.eval.data:
        raise UsageError("--execute needs --data: humaneval, or files of tasks with tests")
    check_budget(settings)
    box = Sandbox(allow=settings.eval.allow_code_execution, progress=progress)
    problems = read_problems(settings.eval.data, settings.eval.limit)
    cells = list(_cells(settings, problems, decisions))
    folder = settings.eval.output_dir
    held = alone(
        folder, folder / ".execute.lock", f"{folder}: another command executes there; choose another --output-dir"
    )
    with held, ThreadPoolExecutor(os.cpu_count() or 1) as pool, Calls(folder / CALLS) as calls:
        return asyncio.run(_Run(settings, cells, calls, box, pool, progress, worker).go())


def _cells(settings: Settings, problems: Sequence[Problem], decisions: Mapping[str, Decision]) -> Iterator[Cell]:
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    plain = {topology: given_decision(topology, space) for topology in space.topologies}
    for problem in problems:
        routed = decisions.get(problem.task.id)
        for topology, team in plain.items():
            chosen = routed if routed is not None and routed.topology == topology else team
            yield from (Cell(problem, chosen, repeat) for repeat in range(settings.eval.repeats))


class Calls:
    """The worker's answers, each durable before it is used, found again by content."""

    def __init__(self, path: Path) -> None:
        Appender(path).close()  # cuts off what a kill left half written
        self._known: dict[str, Said] = {}
        self.paid = 0.0
        """Dollars that the answers found there cost."""
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    said = Said(row["answer"], row["model"], Usage(**row["usage"]), row["seconds"])
                    self._known[str(row["key"])] = said
                    self.paid += said.usage.cost_usd or 0.0
                except (ValueError, LookupError, TypeError):
                    raise InputError(f"{path}:{number}: is no recorded answer; choose another --output-dir") from None
        self._file = Appender(path)

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @staticmethod
    def key(parts: Sequence[Any], messages: Sequence[Message]) -> str:
        """What an answer is found again by."""
        whole = [*parts, [(message.role, message.content) for message in messages]]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]

    def find(self, key: str) -> Said | None:
        """The recorded answer, if there is one."""
        return self._known.get(key)

    def keep(self, key: str, sample: int, messages: Sequence[Message], said: Said) -> None:
        """Record an answer."""
        asked = [message.model_dump() for message in messages]
        row = {"key": key, "sample": sample, "messages": asked, "answer": said.text, "model": said.model}
        self._file.append({**row, "usage": said.usage.model_dump(), "seconds": said.seconds})
        self._known[key] = said


class _Paid:
    """A worker whose answers are recorded, and asked for only once."""

    def __init__(self, worker: Worker, calls: Calls, identity: Sequence[Any]) -> None:
        self.model, self._worker, self._calls, self._identity = worker.model, worker, calls, identity
        self.usage = NOTHING

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        key = Calls.key([*self._identity, sample], messages)
        if (known := self._calls.find(key)) is not None:
            return known
        said = await self._worker.answer(messages, sample)
        said = replace(said, seconds=round(said.seconds, 3))  # as it is recorded
        self._calls.keep(key, sample, messages, said)
        self.usage = total(self.usage, said.usage)
        return said

    async def close(self) -> None:
        await self._worker.close()


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        settings: Settings,
        cells: Sequence[Cell],
        calls: Calls,
        box: Sandbox,
        pool: ThreadPoolExecutor,
        progress: Progress,
        worker: Worker | None,
    ) -> None:
        self.settings, self.cells, self.box, self.pool, self.progress = settings, cells, box, pool, progress
        wanted = settings.run
        if worker is None:
            worker = endpoint = EndpointWorker(settings, progress)
            endpoint.budget.earlier = calls.paid
        identity = [wanted.worker_model, wanted.temperature, wanted.answer_tokens]
        self.worker = _Paid(worker, calls, identity)
        self.rows: dict[int, dict[str, Any]] = {}
        self.usage, self.failed, self.solved = NOTHING, 0, 0
        self.verdicts: dict[tuple[str, str], asyncio.Future[Verdict]] = {}

    async def go(self) -> Executed:
        """All cells, `run.concurrency` teams at once; a team's code is judged while the next one works."""
        source = Source(iter(enumerate(self.cells)), False)
        judging: set[asyncio.Task[None]] = set()
        try:
            with self.progress.bar("execute", len(self.cells)) as bar:
                teams = [
                    asyncio.create_task(self.team(source, judging, bar))
                    for _ in range(min(self.settings.run.concurrency, len(self.cells)))
                ]
                try:
                    done, rest = await asyncio.wait(teams, return_when=asyncio.FIRST_EXCEPTION)
                    if rest:
                        # Answers on their way are paid for. Whoever asks next is told that it is over.
                        source.stop()
                        enough = any(isinstance(one.exception(), BudgetReached) for one in done)
                        await asyncio.wait(rest, timeout=None if enough else GRACE_SECONDS)
                    for one in done:
                        one.result()
                    await asyncio.gather(*judging)
                finally:
                    for one in [*teams, *judging]:
                        one.cancel()
                    await asyncio.gather(*teams, *judging, return_exceptions=True)
        finally:
            await self.worker.close()
        path = self.settings.eval.output_dir / OUTCOMES
        with replacing(path) as file:
            file.writelines(dumps(self.rows[number]) + "\n" for number in range(len(self.cells)))
        return Executed(path, len(self.cells), self.failed, self.usage, self.worker.usage)

    async def team(self, source: Source[tuple[int, Cell]], judging: set[asyncio.Task[None]], bar: Bar) -> None:
        """Let one team after the other work."""
        while (found := await source.next()) is not None:
            number, cell = found
            done = await work(cell.problem.task.text, cell.decision, self.worker, sample=cell.repeat)
            if done.ended == "budget":
                raise BudgetReached(done.why)
            self.usage = total(self.usage, done.usage)
            self.failed += done.ended == "failed"
            task = asyncio.create_task(self.judge(number, cell, done, bar))
            judging.add(task)
            task.add_done_callback(judging.discard)
            await asyncio.sleep(0)

    async def judge(self, number: int, cell: Cell, done: Work, bar: Bar) -> None:
        """Run the code of a result against the task's tests, and against the examples that the task itself shows."""
        problem, verdict, seen, acts = cell.problem, Verdict("missing", done.why), None, None
        if done.ended == "finished":
            code = problem.program(code_of(done.result, problem.entry_point).text)
            verdict = await self.verdict(code, problem.tests, problem.entry_point, problem.given)
            seen = await self.verdict(code, problem.examples, None, "")
            # As `cascade.alike` sees it: by the examples, where there are any, else by the code.
            shown = (
                f"examples: {'load' if seen.reason == 'load' else seen.passed}" if problem.examples else normal(code)
            )
            acts = hashlib.sha256(shown.encode()).hexdigest()[:16]
            if not problem.examples and seen.passed:
                seen = None  # that it loads says nothing for it
        usage = done.usage
        self.rows[number] = {
            "task_id": problem.task.id,
            "topology": cell.decision.topology,
            "solved": verdict.passed,
            "repeat": cell.repeat,
            "worker": self.worker.model,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": usage.cost_usd,
            "seconds": round(sum(turn.said.seconds for turn in done.turns), 3),
            "evidence": None if seen is None else seen.passed,
            "acts": acts,
            "benchmark": problem.benchmark,
            "text": problem.task.text,
            "split": problem.task.split,
            "reason": verdict.reason,
            "turns": len(done.turns),
            "notes": sum(len(turn.notes) for turn in done.turns),
            "decision": cell.decision.model_dump(mode="json"),
        }
        self.solved += verdict.passed
        bar.advance(1, f"{self.solved} solved, {dollars(self.usage.cost_usd)}")

    async def verdict(self, code: str, tests: str, entry_point: str | None, given: str) -> Verdict:
        """The sandbox's verdict; the same code is judged by the same tests once."""
        key = code, tests
        if key not in self.verdicts:

            def judged() -> Verdict:
                return self.box.run_tests(code, tests, entry_point, setup=given)

            loop = asyncio.get_running_loop()
            self.verdicts[key] = asyncio.ensure_future(loop.run_in_executor(self.pool, judged))
        return await asyncio.shield(self.verdicts[key])
