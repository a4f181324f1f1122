"""Run `infer` first where `router eval` is given an adapter, then `evaluate`.

Verbs do not import each other: what strings two of them together stands here, beside the commands.
"""

from __future__ import annotations

from pathlib import Path

from router_cli.errors import UsageError
from router_cli.progress import SILENT, Progress
from router_cli.scoring.results import Report
from router_cli.scoring.worth_results import WorthReport
from router_cli.settings import Settings


def judge(settings: Settings, progress: Progress = SILENT) -> Report:
    """Evaluate `eval.predictions`, or those that `eval.adapter` makes for `eval.data` on the way.

    Raises UsageError where the options do not go together.
    """
    from router_cli.backends.local import features, read_meta
    from router_cli.evaluate import evaluate

    wanted, loss_log = settings.eval, None
    for name in ("worker", "unsolved_penalty"):
        if name in settings.options("eval"):
            raise UsageError(f"--{name.replace('_', '-')} needs --outcomes, the recorded executions to judge by")
    if wanted.adapter is not None:
        if wanted.predictions is not None:
            raise UsageError("--adapter and --predictions exclude each other")
        if not (labels := wanted.data or wanted.labels):
            raise UsageError("--adapter needs --data, the label files to predict and judge against")
        meta = read_meta(wanted.adapter)
        settings = settings.with_values(
            eval__predictions=_predict(settings, labels, progress),
            eval__labels=labels,
            decision__roles=meta["roles"],
            decision__topologies=meta["topologies"],
            decision__step_bound=meta["step_bound"],
        )
        loss_log = wanted.adapter / "loss.json"
    probe = settings.eval.probe
    encode = (lambda texts: features(texts, probe, settings, progress)) if probe else None
    return evaluate(settings, progress, encode, loss_log)


def weigh(settings: Settings, progress: Progress = SILENT) -> WorthReport:
    """Replay `eval.predictions` over `eval.outcomes`, or those that `eval.adapter` makes for its tasks on the way.

    Raises UsageError where the options do not go together, InputError where the tasks have no text to predict from.
    """
    from router_cli.backends.local import read_meta
    from router_cli.replay import replay, write_tasks

    wanted = settings.eval
    if wanted.adapter is not None:
        if wanted.predictions is not None:
            raise UsageError("--adapter and --predictions exclude each other")
        meta = read_meta(wanted.adapter)
        data = write_tasks(settings, Path(wanted.output_dir) / "tasks.jsonl")
        settings = settings.with_values(
            eval__predictions=_predict(settings, [data], progress),
            decision__roles=meta["roles"],
            decision__topologies=meta["topologies"],
            decision__step_bound=meta["step_bound"],
        )
    return replay(settings, progress)


def _predict(settings: Settings, labels: list[str], progress: Progress) -> str:
    from router_cli.infer import infer

    output = Path(settings.eval.output_dir) / "predictions.jsonl"
    infer(
        settings.with_values(
            infer__adapter=settings.eval.adapter,
            infer__data=labels,
            infer__split=_split(labels, settings.eval.split),
            infer__output=str(output),
        ),
        progress=progress,
    )
    return str(output)


def _split(labels: list[str], wanted: str) -> str:
    """The split to predict: the one to judge, or all rows where none of them says its split."""
    from router_cli.tasks import read_tasks

    return wanted if any(task.split for task in read_tasks(labels)) else "all"
