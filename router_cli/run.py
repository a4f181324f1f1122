"""`router run`: decide which formation a task needs, let that team work on it, hand over its result."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router_cli.backends import make_backend, space_from
from router_cli.costs import dollars
from router_cli.errors import BudgetReached, InputError, TeacherError, UsageError
from router_cli.jsonl import writing
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Usage
from router_cli.settings import Settings
from router_cli.tasks import stable_id
from router_cli.teachers import total
from router_cli.teams.cascade import Climb, climb, rungs
from router_cli.teams.given import given_decision
from router_cli.teams.sandbox import Sandbox
from router_cli.teams.team import Work, read_trace, work
from router_cli.teams.workers import EndpointWorker, RecordedWorker, Worker, check_budget


@dataclass(frozen=True)
class RunResult:
    """What a run made. `probability` is that of the decided topology, None where the user decided.

    `decision` is that of the team whose result counts; with a cascade `teams` are all that worked, in order, and
    `fired` the triggers that escalated. `usage` and `seconds` are those of all of them.
    """

    task: str
    decision: Decision
    probability: float | None
    result: str
    teams: tuple[Decision, ...]
    fired: tuple[str, ...]
    turns: int
    notes: tuple[str, ...]
    usage: Usage
    seconds: float
    traces: tuple[Path, ...]


def run(settings: Settings, text: str, progress: Progress = SILENT, worker: Worker | None = None) -> RunResult:
    """Decide for one task and let the team work on it; the trace goes to `run.output_dir`.

    The router is that of `infer` (adapter, backend), unless `run.decision` is given; `worker` takes the place of the
    model behind the endpoint. Raises UsageError and SettingsError for what makes no sense, ModelError for the router,
    TeacherError (BudgetReached where `run.max_cost` is) where the team came to no result: the trace stands.
    """
    return asyncio.run(_team(settings, text, _begun(settings, text, progress), progress, worker))


async def arun(settings: Settings, text: str, progress: Progress = SILENT, worker: Worker | None = None) -> RunResult:
    """`run` for coroutines, and for notebooks, where an event loop runs already."""
    begun = await asyncio.to_thread(_begun, settings, text, progress)
    return await _team(settings, text, begun, progress, worker)


def retrace(path: Path, progress: Progress = SILENT) -> Work:
    """The run that a trace tells of, said again without a model: a warning says where it would go otherwise today.

    Raises InputError where the file is no trace.
    """
    done = read_trace(path)
    if done.ended == "finished":
        recorded = RecordedWorker([(turn.messages, turn.said) for turn in done.turns])
        try:
            again = asyncio.run(work(done.task, done.decision, recorded, sample=done.sample))
            why = "" if again.result == done.result else "it would have another result"
        except InputError as error:
            why = str(error)
        if why:
            progress.warn(f"{path}: this version would let it run otherwise: {why}")
    return done


@dataclass(frozen=True)
class _Begun:
    """What is known before the team works: the decision, its topology's probability and those of all topologies."""

    box: Sandbox | None
    decision: Decision
    probability: float | None
    shares: dict[str, float] | None


def _begun(settings: Settings, text: str, progress: Progress) -> _Begun:
    if not text.strip():
        raise UsageError("the task is empty")
    check_budget(settings)
    return _Begun(_sandbox(settings, progress), *_decided(settings, text, progress))


async def _team(settings: Settings, text: str, begun: _Begun, progress: Progress, worker: Worker | None) -> RunResult:
    folder = settings.run.output_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    traces: list[Path] = []

    def trace() -> Path:
        traces.append(_new(folder, stable_id(text)))
        return traces[-1]

    went = await _work(settings, text, begun, trace, progress, worker)
    done = went.last
    if done.ended != "finished":
        kind = BudgetReached if done.ended == "budget" else TeacherError
        raise kind(f"the team came to no result: {done.why}; its turns are in {traces[-1]}")
    turns = [turn for one in went.works for turn in one.turns]
    return RunResult(
        task=text,
        decision=done.decision,
        probability=begun.probability,
        result=done.result,
        teams=tuple(one.decision for one in went.works),
        fired=tuple(went.fired),
        turns=len(turns),
        notes=tuple(f"turn {n} ({turn.role}): {note}" for n, turn in enumerate(turns, 1) for note in turn.notes),
        usage=functools.reduce(total, (one.usage for one in went.works)),
        seconds=sum(one.seconds for one in went.works),
        traces=tuple(traces),
    )


def _sandbox(settings: Settings, progress: Progress) -> Sandbox | None:
    """Where the cascade looks at answers; None where none of its triggers needs it.

    Raises UsageError where one does and the user has not said --allow-code-execution.
    """
    needs = {"examples", "runs"} & set(settings.run.cascade)
    if not (needs or settings.run.allow_code_execution):
        return None
    return Sandbox(allow=settings.run.allow_code_execution, progress=progress)


def _decided(
    settings: Settings, text: str, progress: Progress
) -> tuple[Decision, float | None, dict[str, float] | None]:
    """The decision, its topology's probability and those of all topologies, as far as they are known."""
    space, given = space_from(settings), settings.run.decision
    if given is not None:
        return given_decision(given, space), None, None
    backend = make_backend(settings, progress)
    try:
        [choice] = backend.decide([text])
    finally:
        backend.close()
    if choice.decision is None:
        raise TeacherError("the router gives no decision for this task")
    return choice.decision, choice.probability, choice.topologies


async def _work(
    settings: Settings,
    text: str,
    begun: _Begun,
    trace: Callable[[], Path],
    progress: Progress,
    worker: Worker | None,
) -> Climb:
    chosen = worker or EndpointWorker(settings, progress)

    async def attempt(team: Decision, sample: int) -> Work:
        with progress.bar(f"{team.topology} ({', '.join(team.roles)})", None) as bar:
            told = 0

            def watch(role: str, so_far: Work) -> None:
                nonlocal told
                bar.advance(len(so_far.turns) - told, f"{role} speaks, {dollars(so_far.usage.cost_usd)} so far")
                told = len(so_far.turns)
                progress.notice(f"turn {told + 1}: {role}")

            return await work(text, team, chosen, trace(), sample, watch)

    wanted = settings.run
    try:
        if not wanted.cascade:
            return Climb([await attempt(begun.decision, 0)])
        cheap, dear = rungs(begun.decision, space_from(settings))
        share = begun.shares.get(cheap.topology) if begun.shares else None
        return await climb(text, cheap, dear, wanted.cascade, attempt, begun.box, share, wanted.unsure_below)
    finally:
        await chosen.close()


def _new(folder: Path, task_id: str) -> Path:
    """A file name that nothing has: time and task."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9]+', '-', task_id)[:40]}"
    taken = [f"{stem}.jsonl", *(f"{stem}-{number}.jsonl" for number in range(2, 1000))]
    return next(folder / name for name in taken if not (folder / name).exists())
