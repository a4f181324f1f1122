"""What the offline rules and simpler policies are worth on the carried tables: `python -m benchmarks.worth`.

Baselines of the same run: fixed topologies, coins of the rules' own mix and cost, kNN out of fold, the cascade where
evidence is recorded, and the oracle. Files of labels given as arguments (`python -m benchmarks.worth LABELS ...`) are
judged beside as the teacher's labels; their roles are taken from `ROUTER_DECISION__ROLES`. Prints the table of
docs/worth.md.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from router_cli.errors import InputError
from router_cli.jsonl import write_rows
from router_cli.replay import replay, write_tasks
from router_cli.scoring.worth_results import Replayed
from router_cli.sections import OUTCOME_TABLES
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.tasks import read_tasks
from router_cli.teachers.heuristic import decide


def main(labels: list[str], resamples: int = 2000) -> None:
    print("| table | policy | solved | $ a task | rules minus it |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for table in OUTCOME_TABLES:
            for found in judged(table, labels, resamples, Path(scratch)):
                print("\n".join(lines(found)))


def judged(table: str, labels: list[str], resamples: int, folder: Path) -> tuple[Replayed, ...]:
    options: dict[str, Any] = {"outcomes": table, "output_dir": str(folder), "resamples": resamples}
    settings = load({f"eval.{name}": ("", value) for name, value in options.items()})
    space = DecisionSpace(tuple(settings.decision.roles))
    try:
        tasks = read_tasks([write_tasks(settings, folder / "tasks.jsonl")])
    except InputError:  # a table without texts: the policies alone
        return replay(settings).tables
    rows = ({"task_id": task.id, "decision": decide(task.text, space)[0].model_dump(mode="json")} for task in tasks)
    write_rows(folder / "rules.jsonl", rows)
    settings = settings.with_values(eval__predictions=str(folder / "rules.jsonl"))
    if labels and table.startswith("mbpp"):
        settings = settings.with_values(eval__labels=labels)
    return replay(settings).tables


def lines(found: Replayed) -> list[str]:
    made = []
    for place, row in enumerate(found.policies):
        name = "the rules" if row.kind == "router" else row.name
        cost = "" if row.dollars is None else f"{row.dollars.value:.4f}"
        some = f", {row.solved.n} tasks" if row.solved.n < found.counts.judged else ""
        verdict = ""
        if row.solved_difference is not None and found.policies[0].kind == "router":
            score = row.solved_difference.score
            verdict = f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f}): {row.solved_difference.words}"
        solved = f"{row.solved.value:.3f} ({row.solved.low:.3f} to {row.solved.high:.3f})"
        made.append(f"| {found.name if place == 0 else ''} | {name} | {solved}{some} | {cost} | {verdict} |")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
