"""`router run`: decide which formation a task needs, let that team work on it, hand over its result."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router_cli.backends import make_backend, space_from
from router_cli.costs import dollars
from router_cli.errors import BudgetReached, TeacherError, UsageError
from router_cli.jsonl import writing
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Usage
from router_cli.settings import Settings
from router_cli.tasks import stable_id
from router_cli.teams.given import given_decision
from router_cli.teams.team import Work, work
from router_cli.teams.workers import EndpointWorker, Worker, check_budget


@dataclass(frozen=True)
class RunResult:
    """What a run made. `probability` is that of the decided topology, None where the user decided."""

    task: str
    decision: Decision
    probability: float | None
    result: str
    turns: int
    notes: tuple[str, ...]
    usage: Usage
    seconds: float
    trace: Path


def run(settings: Settings, text: str, progress: Progress = SILENT, worker: Worker | None = None) -> RunResult:
    """Decide for one task and let the team work on it; the trace goes to `run.output_dir`.

    The router is that of `infer` (adapter, backend), unless `run.decision` is given; `worker` takes the place of the
    model behind the endpoint. Raises UsageError and SettingsError for what makes no sense, ModelError for the router,
    TeacherError (BudgetReached where `run.max_cost` is) where the team came to no result: the trace stands.
    """
    if not text.strip():
        raise UsageError("the task is empty")
    check_budget(settings)
    decision, probability = _decided(settings, text, progress)
    folder = settings.run.output_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trace = _new(folder, stable_id(text))
    done = asyncio.run(_work(settings, text, decision, trace, progress, worker))
    if done.ended != "finished":
        kind = BudgetReached if done.ended == "budget" else TeacherError
        raise kind(f"the team came to no result: {done.why}; its turns are in {trace}")
    return RunResult(
        task=text,
        decision=decision,
        probability=probability,
        result=done.result,
        turns=len(done.turns),
        notes=tuple(f"turn {n} ({turn.role}): {note}" for n, turn in enumerate(done.turns, 1) for note in turn.notes),
        usage=done.usage,
        seconds=done.seconds,
        trace=trace,
    )


def _decided(settings: Settings, text: str, progress: Progress) -> tuple[Decision, float | None]:
    space, given = space_from(settings), settings.run.decision
    if given is not None:
        return given_decision(given, space), None
    backend = make_backend(settings, progress)
    try:
        [choice] = backend.decide([text])
    finally:
        backend.close()
    if choice.decision is None:
        raise TeacherError("the router gives no decision for this task")
    return choice.decision, choice.probability


async def _work(
    settings: Settings, text: str, decision: Decision, trace: Path, progress: Progress, worker: Worker | None
) -> Work:
    chosen = worker or EndpointWorker(settings, progress)
    title = f"{decision.topology} ({', '.join(decision.roles)})"
    try:
        with progress.bar(title, None) as bar:
            told = 0

            def watch(role: str, so_far: Work) -> None:
                nonlocal told
                bar.advance(len(so_far.turns) - told, f"{role} speaks, {dollars(so_far.usage.cost_usd)} so far")
                told = len(so_far.turns)
                progress.notice(f"turn {told + 1}: {role}")

            return await work(text, decision, chosen, trace, watch=watch)
    finally:
        await chosen.close()


def _new(folder: Path, task_id: str) -> Path:
    """A file name that nothing has: time and task."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9]+', '-', task_id)[:40]}"
    taken = [f"{stem}.jsonl", *(f"{stem}-{number}.jsonl" for number in range(2, 1000))]
    return next(folder / name for name in taken if not (folder / name).exists())
