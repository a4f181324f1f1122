"""Run `infer` first where `router eval` is given an adapter, then `evaluate`.

Verbs do not import each other: what strings two of them together stands here, beside the commands.
"""

from __future__ import annotations

from pathlib import Path

from router_cli.errors import UsageError
from router_cli.progress import SILENT, Progress
from router_cli.scoring.results import Flip, Report
from router_cli.scoring.runs import REPORT, runs
from router_cli.scoring.worth_results import WorthReport
from router_cli.settings import Settings


def with_runs(settings: Settings, more: list[str]) -> Settings:
    """The settings with `more` runs to compare, for `--compare run1 run2`. Raises UsageError without --compare."""
    if not more:
        return settings
    if not settings.eval.compare:
        raise UsageError(f"{more[0]}: expected an option; runs stand after --compare")
    return settings.with_values(eval__compare=[*settings.eval.compare, *more])


def judge(settings: Settings, progress: Progress = SILENT) -> Report:
    """Evaluate `eval.predictions`, or those that `eval.adapter` makes for `eval.data` on the way.

    With neither, the first run of `eval.compare` is the router, and its own report.json names the labels where
    `eval.labels` does not. Raises UsageError where the options do not go together.
    """
    from router_cli.backends.local import features, read_meta
    from router_cli.evaluate import ROUTER, evaluate

    wanted, loss_log, name, flip = settings.eval, None, ROUTER, None
    for option in ("worker", "unsolved_penalty"):
        if option in settings.options("eval"):
            raise UsageError(f"--{option.replace('_', '-')} needs --outcomes, the recorded executions to judge by")
    if wanted.flip is not None and wanted.adapter is None:
        raise UsageError("--flip needs --adapter, the router to be asked otherwise")
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
        flip = _flip(settings, labels, progress) if wanted.flip else None
    elif wanted.predictions is None and wanted.compare:
        settings, name, loss_log = _first_run(settings)
    probe = settings.eval.probe
    encode = (lambda texts: features(texts, probe, settings, progress)) if probe else None
    return evaluate(settings, progress, encode, loss_log, name, flip)


def _first_run(settings: Settings) -> tuple[Settings, str, Path]:
    """The settings with the first compared run as the router, its name, and where its training log may stand."""
    first, *_ = runs(settings.eval.compare[:1], (), settings.origin("eval.compare"))
    if len(settings.eval.compare) < 2:
        raise UsageError("--compare needs two runs, or --predictions beside one")
    labels, split = first.report.get("labels"), first.report.get("split")
    if not settings.eval.labels and not labels:
        raise UsageError(f"--compare needs --labels: {first.name} has no report.json that names its own")
    told = {} if settings.eval.labels or split is None else {"eval__split": split}
    settings = settings.with_values(
        eval__predictions=first.predictions,
        eval__compare=settings.eval.compare[1:],
        eval__labels=settings.eval.labels or labels,
        **told,
    )
    return settings, first.name, Path(first.predictions).with_name(REPORT)


def _flip(settings: Settings, labels: list[str], progress: Progress) -> Flip:
    """The flip test on as many judged tasks as asked for, evenly spread over them."""
    from router_cli.backends.local import LocalBackend
    from router_cli.flip import flip_test
    from router_cli.tasks import read_tasks

    wanted = settings.eval
    split = _split(labels, wanted.split)
    tasks = [task for task in read_tasks(labels) if split in ("all", task.split)]
    count = min(len(tasks), wanted.flip or 0)
    chosen = [tasks[i * len(tasks) // count] for i in range(count)]
    backend = LocalBackend(settings.with_values(infer__adapter=wanted.adapter), progress)
    return flip_test(backend, chosen, wanted.seed, progress)


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
