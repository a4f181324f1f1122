"""`router label --from-outcomes`: labels that recorded executions give, instead of a teacher's opinion.

A task's label is the cheapest topology that solves it not more than a margin less often than the best one does. The
runs say nothing about roles, entry and steps: those are the offline rules', for that topology.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_cli import prompts
from router_cli.errors import InputError, OutputError, UsageError
from router_cli.jsonl import read_rows, write_rows
from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Label, Message, Provenance
from router_cli.scoring.outcomes import Table, read_outcomes, tables
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import task_of
from router_cli.teachers import heuristic

TEACHER = "outcomes"
OWN = frozenset({"worker", "margin", "pairs"})
"""Options that mean something with --from-outcomes only."""


@dataclass(frozen=True)
class OutcomeLabels:
    """What was made. Left out: tasks `without_text`, and those `without_evidence`, fewer than two topologies' runs.

    `unsolved` tasks are labelled with the cheapest topology because nothing solves them; `several` had more topologies
    than one that is good enough, and got the cheapest of these. `repeats` is the mean number of runs behind a cell.
    """

    output: Path
    labelled: int
    topologies: dict[str, int]
    without_evidence: int
    without_text: int
    unsolved: int
    several: int
    repeats: float
    pairs: int
    pairs_path: Path | None


@dataclass(frozen=True)
class _Judged:
    """A task with its label: the chosen column, and the columns that lost with what speaks against them."""

    table: Table
    place: int
    best: int
    losers: tuple[tuple[int, str], ...]


def wanted(settings: Settings) -> bool:
    """Whether labels come from outcomes. Raises UsageError for an option that needs them, without them."""
    if settings.label.from_outcomes is None and (lonely := OWN & set(settings.options("label"))):
        raise UsageError(f"--{min(lonely)} needs --from-outcomes, the recorded executions to label by")
    return settings.label.from_outcomes is not None


def label_from_outcomes(settings: Settings, progress: Progress = SILENT) -> OutcomeLabels:
    """Write label rows of the tasks of `label.from_outcomes` into `label.output`, and `label.pairs` where it is set.

    Raises UsageError for options that do not go together, InputError for a file that cannot be used (several workers
    without `label.worker` among it), OutputError where labels of another origin would be overwritten.
    """
    choice = settings.label
    if choice.data:
        raise UsageError("--from-outcomes and --data exclude each other: the outcome rows bring the tasks")
    for name in settings.options("label"):
        if name not in OWN | {"from_outcomes", "output", "limit", "yes"}:
            raise UsageError(f"--{name.replace('_', '-')} says nothing beside --from-outcomes: leave it out")
    output, pairs_path = Path(choice.output), Path(choice.pairs) if choice.pairs else None
    _own(output)
    found = tables(read_outcomes(str(choice.from_outcomes), choice.worker))
    workers = list(dict.fromkeys(table.worker for table in found))
    if len(workers) > 1:
        raise InputError(
            f"{choice.from_outcomes}: holds runs of several workers ({', '.join(workers)}), and what a team is worth "
            "depends on them; pass --worker with one of them"
        )
    decision = settings.decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    judged: list[_Judged] = []
    counts: Counter[str] = Counter()
    for table in found:
        for place in range(len(table.tasks)):
            one = _judge(table, place, space, choice.margin)
            if table.texts[place] is None:
                counts["without_text"] += 1
            elif one is None:
                counts["without_evidence"] += 1
            else:
                judged.append(one)
    judged = judged[: choice.limit]
    if not judged:
        raise InputError(
            f"{choice.from_outcomes}: no task can be labelled: {counts['without_text']} have no text, "
            f"{counts['without_evidence']} no runs of two topologies of {', '.join(space.topologies)}"
        )
    with progress.bar("label", len(judged)) as bar:
        rows = []
        for one in judged:
            rows.append(_row(one, space, choice.margin))
            bar.advance()
    write_rows(output, rows)
    written = 0
    if pairs_path is not None:
        written = write_rows(pairs_path, (pair for one in judged for pair in _pairs(one, space)))
    cells = [int(count) for one in judged for count in one.table.repeats[one.place] if count]
    return OutcomeLabels(
        output=output,
        labelled=len(rows),
        topologies={name: sum(row["decision"]["topology"] == name for row in rows) for name in space.topologies},
        without_evidence=counts["without_evidence"],
        without_text=counts["without_text"],
        unsolved=sum(_rate(one, one.best) == 0 for one in judged),
        several=sum(any(why == "costs more" for _, why in one.losers) for one in judged),
        repeats=sum(cells) / len(cells),
        pairs=written,
        pairs_path=pairs_path,
    )


def _own(output: Path) -> None:
    """Refuse to write over labels that somebody may have paid for."""
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, expected a file to write the labels to")
    if output.exists() and output.stat().st_size:
        first = next((row for _, row in read_rows(str(output))), {})
        origin = first.get("provenance")
        if not isinstance(origin, dict) or origin.get("teacher") != TEACHER:
            raise OutputError(f"{output}: holds labels of another origin: move it away or choose another --output")


def _judge(table: Table, place: int, space: DecisionSpace, margin: float) -> _Judged | None:
    """The label of a task; None where fewer than two of the allowed topologies were executed."""
    solved, executed = table.solved[place], table.executed[place]
    columns = [j for j, name in enumerate(table.topologies) if executed[j] and name in space.topologies]
    if len(columns) < 2:
        return None
    best = max(solved[j] for j in columns)
    good = [j for j in columns if solved[j] >= best - margin - 1e-9]  # columns stand from the cheapest on
    losers = [(j, "costs more" if j in good else "solves less") for j in columns if j != good[0]]
    return _Judged(table, place, good[0], tuple(losers))


def _rate(one: _Judged, column: int) -> float:
    return float(one.table.solved[one.place, column])


def _row(one: _Judged, space: DecisionSpace, margin: float) -> dict[str, Any]:
    table, place = one.table, one.place
    text = str(table.texts[place])
    evidence = {
        name: {
            "solved": _rate(one, j),
            "runs": int(table.repeats[place, j]),
            table.unit.lower(): float(table.price[place, j]),
        }
        for j, name in enumerate(table.topologies)
        if table.executed[place, j]
    }
    seen = ", ".join(f"{name} {round(each['solved'] * each['runs'])}/{each['runs']}" for name, each in evidence.items())
    decision = _decision(text, table.topologies[one.best], space)
    # The same check as for every other label: ids of benchmarks name their source.
    task = task_of({"task_id": table.tasks[place], "task": text})
    provenance = Provenance(
        teacher=TEACHER,
        model=table.worker or "unnamed",
        prompt_version=prompts.PROMPT_VERSION,
        roles=space.roles,
        strategy=f"margin {margin:g}",
        key=_key(table, task.id, text, evidence, margin, space),
        reason=f"cheapest within {margin:g} of the best: solved {seen}",
    )
    label = Label(
        messages=(*prompts.router_messages(text, space), _answer(decision)),
        sample_type=("" if task.source == "generic" else f"{task.source}_") + "outcome_distilled",
        origin_task_id=task.id,
        decision=decision,
        split=table.splits[place],
        provenance=provenance,
    )
    return {**label.model_dump(mode="json"), "evidence": evidence}


def _pairs(one: _Judged, space: DecisionSpace) -> Iterator[dict[str, Any]]:
    """The label before each topology that lost, in the shape that TRL's DPOTrainer reads.

    A task that nothing solves prefers nothing.
    """
    table, text = one.table, str(one.table.texts[one.place])
    if _rate(one, one.best) == 0:
        return
    question = [message.model_dump() for message in prompts.router_messages(text, space)]
    chosen = _answer(_decision(text, table.topologies[one.best], space)).model_dump()
    for column, why in one.losers:
        yield {
            "prompt": question,
            "chosen": [chosen],
            "rejected": [_answer(_decision(text, table.topologies[column], space)).model_dump()],
            "origin_task_id": table.tasks[one.place],
            "because": why,
            "solved": [_rate(one, one.best), _rate(one, column)],
        }


def _decision(text: str, topology: str, space: DecisionSpace) -> Decision:
    return heuristic.decide(text, DecisionSpace(space.roles, (topology,), space.step_bound))[0]


def _answer(decision: Decision) -> Message:
    return Message(role="assistant", content=prompts.render(decision))


def _key(table: Table, task: str, text: str, evidence: object, margin: float, space: DecisionSpace) -> str:
    parts = [table.benchmark, table.worker, task, text, evidence, margin, *space.roles, *space.topologies]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
