"""`router eval --execute`: decisions, executions and the replay that judges them, strung together."""

from __future__ import annotations

from router_cli.backends import space_from
from router_cli.errors import UsageError
from router_cli.execute import Executed, execute
from router_cli.infer import infer
from router_cli.jsonl import dumps, replacing, writing
from router_cli.judging import weigh
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision
from router_cli.scoring.answers import read_predictions
from router_cli.scoring.worth_results import WorthReport
from router_cli.sections import EvalSettings
from router_cli.settings import Settings
from router_cli.teams.problems import read_problems
from router_cli.teams.workers import Worker


def judge_executed(
    settings: Settings, progress: Progress = SILENT, worker: Worker | None = None
) -> tuple[Executed, WorthReport]:
    """Predict with `eval.adapter` where one is given, execute `eval.data`, and judge what came of it.

    Without an adapter and without predictions the fixed policies alone are judged. Raises as `execute` and `weigh` do.
    """
    wanted = settings.eval
    if wanted.outcomes is not None:
        raise UsageError("--execute and --outcomes exclude each other: recorded executions need no new ones")
    if wanted.adapter is not None and wanted.predictions is not None:
        raise UsageError("--adapter and --predictions exclude each other")
    if wanted.adapter is not None:
        from router_cli.backends.local import read_meta

        meta = read_meta(wanted.adapter)
        settings = settings.with_values(
            eval__predictions=_predict(settings, progress),
            eval__adapter=None,
            decision__roles=meta["roles"],
            decision__topologies=meta["topologies"],
            decision__step_bound=meta["step_bound"],
        )
    decisions: dict[str, Decision] = {}
    if settings.eval.predictions is not None:
        space = space_from(settings)
        rows = read_predictions(settings.eval.predictions).by_id
        found = {task: space.resolve(row.get("decision")).decision for task, row in rows.items()}
        decisions = {task: decision for task, decision in found.items() if decision is not None}
    done = execute(settings, decisions, progress, worker)
    # What was said for the execution says nothing to the replay.
    fresh = EvalSettings()
    spoken = {f"eval__{name}": getattr(fresh, name) for name in ("data", "execute", "repeats", "limit")}
    replayed = settings.with_values(eval__outcomes=str(done.outcomes), eval__allow_code_execution=False, **spoken)
    return done, weigh(replayed, progress)


def _predict(settings: Settings, progress: Progress) -> str:
    """Predict for the tasks that are to be executed, as they are shown to the teams."""
    folder = settings.eval.output_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data, output = folder / "tasks.jsonl", folder / "predictions.jsonl"
    with replacing(data) as file:
        for problem in read_problems(settings.eval.data, settings.eval.limit):
            file.write(dumps(problem.task) + "\n")
    chosen = {"infer__adapter": settings.eval.adapter, "infer__data": [str(data)], "infer__output": str(output)}
    infer(settings.with_values(**chosen, infer__split="all"), progress=progress)
    return str(output)
