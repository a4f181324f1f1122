"""Labels that a person should look at: written as task rows, the most doubtful first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_cli.errors import InputError
from router_cli.jsonl import dumps, parse_row, reason, replacing, writing
from router_cli.labelling import voting
from router_cli.tasks import task_of

WHY = ("another topology", "tie", "votes split", "no usable answer", "another decision")
"""Why a label is a candidate, the most doubtful first. Of a re-ask are the first, the fourth and the fifth."""


@dataclass
class Doubt:
    """What speaks against a label; `again` is the second decision."""

    why: list[str]
    agreement: float
    again: dict[str, Any] | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """For sorting: the gravest reason first, then the least agreement."""
        return min(WHY.index(why) for why in self.why), self.agreement


_TIE = Doubt(["tie"], 0.0)


def write(path: Path, output: Path, doubts: dict[int, Doubt]) -> Counter[str]:
    """Write the candidates as task rows, the most doubtful first; how many there are for each reason."""
    ties = [row for row in _rejected(output) if voting.tied(row)]
    counts = Counter(why for doubt in doubts.values() for why in doubt.why) + Counter({"tie": len(ties)})
    if not counts:
        with writing(path):
            path.unlink(missing_ok=True)
        return counts
    ranked: list[tuple[tuple[int, float], int, dict[str, Any] | None]] = [
        *((doubt.rank, at, None) for at, doubt in doubts.items()),
        *((_TIE.rank, number, row) for number, row in enumerate(ties)),
    ]
    with replacing(path) as file, output.open("rb") as labels:
        for _, at, row in sorted(ranked, key=lambda one: one[:2]):
            doubt = doubts[at] if row is None else _TIE
            if row is None:
                labels.seek(at)
                row = json.loads(labels.readline())
            file.write(dumps(_candidate(row, doubt)) + "\n")
    return counts


def _candidate(row: dict[str, Any], doubt: Doubt) -> dict[str, Any]:
    """A row that `label --teacher recorded` and `--examples` read once a person has put the decision right."""
    made = row["provenance"]
    return {
        "id": row["origin_task_id"],
        "task": row["task"] if "task" in row else task_of(row).text,
        "split": row.get("split"),
        "decision": row.get("decision"),
        "again": doubt.again,
        "why": doubt.why,
        "agreement": made.get("agreement"),
        "votes": list(made.get("votes") or []),
    }


def _rejected(output: Path) -> Iterator[dict[str, Any]]:
    path = output.with_name(f"{output.name}.rejected.jsonl")
    if path.exists():
        yield from (row for _, row in rows_of(path))


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file that `label` wrote, with their offsets. Raises InputError naming the line."""
    try:
        with path.open("rb") as file:
            at = 0
            for number, line in enumerate(file, start=1):
                try:
                    yield at, parse_row(line.decode())
                except ValueError as error:
                    raise InputError(f"{path}:{number}: {error}") from None
                at += len(line)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: --audit asks again about a label file that is there") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
