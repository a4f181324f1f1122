"""`router eval --outcomes`: judge decisions by recorded executions, without running anything.

Whatever system recorded them, each table of runs (one worker on one benchmark) says what every decision would have
solved and cost, beside fixed topologies, coins, a cascade, kNN, the teacher's labels and the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_cli import __version__
from router_cli.dataset import read_labels
from router_cli.errors import InputError, SettingsError, UsageError
from router_cli.jsonl import write_rows
from router_cli.progress import SILENT, Progress
from router_cli.scoring.answers import number, read_predictions
from router_cli.scoring.outcomes import TOPOLOGIES, read_outcomes, tables
from router_cli.scoring.policies import Wish, keyed
from router_cli.scoring.runs import runs
from router_cli.scoring.worth import Choosing, System, weigh
from router_cli.scoring.worth_report import write_report
from router_cli.scoring.worth_results import WorthReport
from router_cli.settings import Settings
from router_cli.space import DecisionSpace

ROUTER = "router"
# What `router eval` takes beside --outcomes; the rest belongs to judging by labels.
BESIDE = (
    {"outcomes", "worker", "unsolved_penalty", "predictions", "adapter", "compare", "labels"}
    | {"split", "output_dir", "resamples", "seed"}
)  # fmt: skip


def replay(settings: Settings, progress: Progress = SILENT) -> WorthReport:
    """Replay `eval.predictions` over `eval.outcomes`, and write report.json and report.html into `eval.output_dir`.

    Without predictions the policies alone are judged. Raises SettingsError for settings that do not go together,
    InputError for files that cannot be used, OutputError where the report cannot be written.
    """
    choice = settings.eval
    if choice.outcomes is None:
        raise SettingsError("eval.outcomes: needs recorded executions, pass --outcomes FILE or the name of a table")
    for name in settings.options("eval"):
        if name not in BESIDE:
            raise UsageError(f"--{name.replace('_', '-')} says nothing beside --outcomes: leave it out")
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    recorded = read_outcomes(choice.outcomes, choice.worker)
    found = tables(recorded)
    systems = _systems(settings, space)
    how = Choosing(choice.split, choice.resamples, choice.seed, choice.unsolved_penalty)
    judged, notes = [], []
    if recorded.formless:
        notes.append(f"{recorded.formless} runs name no topology (null) and were not judged.")
    with progress.bar("replay", len(found)) as bar:
        for table in found:
            one = weigh(table, systems, how)
            if one is None:
                notes.append(f"{table.name}: no task with two executed topologies and a decision; left out.")
            else:
                judged.append(one)
            bar.advance(status=table.name)
    if not judged:
        ids = f"its ids are like {found[0].tasks[0]!r}"
        mine = next((f", those of {choice.predictions} like {next(iter(one.wishes), 'none')!r}" for one in systems), "")
        raise InputError(
            f"{choice.outcomes}: nothing to judge: no task of the split {choice.split!r} was executed by two "
            f"topologies and has a decision ({ids}{mine})"
        )
    report = WorthReport(
        made_with=f"router {__version__}",
        outcomes=choice.outcomes,
        predictions=choice.predictions,
        labels=tuple(choice.labels),
        split=choice.split if recorded.splits else "all",
        seed=choice.seed,
        resamples=choice.resamples,
        unsolved_penalty=choice.unsolved_penalty,
        formless=recorded.formless,
        tables=tuple(judged),
        notes=tuple(notes),
    )
    write_report(report, choice.output_dir)
    for one in judged:
        for warning in one.warnings:
            progress.warn(f"{one.name}: {warning}")
    return report


def write_tasks(settings: Settings, output: Path, sample: int | None = None) -> str:
    """Write the tasks of `eval.outcomes` that have a text (`sample` of them, evenly spread), for `infer`; the path.

    Raises InputError where none has.
    """
    choice = settings.eval
    recorded = read_outcomes(str(choice.outcomes), choice.worker)
    split = {task: found for (_, task), found in recorded.splits.items()}
    texts = {task: text for (_, task), text in recorded.texts.items()}
    if not texts:
        raise InputError(f"{choice.outcomes}: no row brings a task's text; predict yourself and pass --predictions")
    count = min(len(texts), sample or len(texts))
    chosen = [list(texts)[i * len(texts) // count] for i in range(count)]
    write_rows(output, ({"task_id": name, "task": texts[name], "split": split.get(name)} for name in chosen))
    return str(output)


def _systems(settings: Settings, space: DecisionSpace) -> list[System]:
    choice, found = settings.eval, []
    if choice.predictions is not None:
        found.append(System(ROUTER, "router", _wishes(choice.predictions, space)))
    taken = {
        ROUTER,
        "teacher's labels",
        "oracle",
        "cascade",
        "cascade by doubt",
        "priced cascade",
        "knn",
        "random",
        "same-mix coin",
        "same-cost coin",
    }
    taken |= {f"always {name}" for name in TOPOLOGIES}
    for run in runs(choice.compare, taken, settings.origin("eval.compare")):
        found.append(System(run.name, "compare", _wishes(run.predictions, space)))
    if choice.labels:
        labelled: dict[str, Wish] = {}
        for example in read_labels(list(choice.labels), space, on_unusable=lambda *_: None):
            # The old generator names MBPP's tasks by their number alone.
            bare = example.task_id.isdigit() and example.sample_type.startswith("mbpp")
            name = f"mbpp_{example.task_id}" if bare else example.task_id
            labelled.setdefault(name, Wish(example.decision.topology))
        if not labelled:
            raise InputError(f"{', '.join(choice.labels)}: none of the labels can be used for these roles (--roles)")
        found.append(System("teacher's labels", "labels", keyed(labelled)))
    return found


def _wishes(path: str, space: DecisionSpace) -> dict[str, Wish]:
    return keyed({name: _wish(row, space) for name, row in read_predictions(path).by_id.items()})


def _wish(row: Mapping[str, Any], space: DecisionSpace) -> Wish:
    resolved = space.resolve(row["decision"])
    shares, chances = _shares(row.get("topologies")), _shares(row.get("solving"))
    whole = shares is not None and abs(sum(shares.values()) - 1) <= 0.01
    return Wish(resolved.decision.topology if resolved.decision else None, shares if whole else None, chances)


def _shares(value: object) -> dict[str, float] | None:
    """Probabilities by topology; None for anything else."""
    shares = {str(name): number(share, 0, 1) for name, share in value.items()} if isinstance(value, Mapping) else {}
    known = {name: share for name, share in shares.items() if share is not None}
    return known if known and len(known) == len(shares) else None
