"""`router run`: decide which formation a task needs, let that team work on it, hand over its result."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router_cli import prompts
from router_cli.backends import make_backend, space_from
from router_cli.costs import Prices, dollars
from router_cli.errors import BudgetReached, SettingsError, TeacherError, UsageError
from router_cli.jsonl import writing
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import stable_id
from router_cli.teams.team import Work, work
from router_cli.teams.workers import EndpointWorker, Worker


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
    check(settings)
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


def check(settings: Settings) -> None:
    """Refuse a cap on money that cannot be kept. Raises SettingsError."""
    wanted = settings.run
    if wanted.max_cost is not None and Prices(wanted.price_in, wanted.price_out).of(wanted.worker_model, 1, 1) is None:
        raise SettingsError(
            f"run.max_cost ({settings.origin('run.max_cost')}): the price of {wanted.worker_model} is unknown: "
            "give --price-in and --price-out, in US dollars for a million tokens"
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


def given_decision(given: str, space: DecisionSpace) -> Decision:
    """A decision as the user wrote it: JSON, or the name of a topology, which takes all roles in their order.

    Raises UsageError naming what is not valid in it.
    """
    if given in space.topologies:
        alone = "builder" if "builder" in space.roles else space.roles[0]
        roles = (alone,) if given == "single" else space.roles
        steps = 1 if given == "single" else len(roles) + (given == "centralized")
        manager = roles[0] if given == "centralized" else None
        given = prompts.render(
            Decision(
                topology=given,  # type: ignore[arg-type]  # one of the space's
                roles=roles,
                manager_role=manager,
                entry_role=roles[0],
                max_steps=min(steps, space.step_bound),
            )
        )
    resolved = prompts.parse(given, space)
    if resolved.decision is None:
        why = "; ".join(str(violation) for violation in resolved.violations)
        raise UsageError(f"--decision: {why}; expected {', '.join(space.topologies)} or a decision as JSON")
    return resolved.decision


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
