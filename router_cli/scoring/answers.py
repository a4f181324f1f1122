"""What systems answered: predictions files of `router infer` or of anybody else, brought into the labels' order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from router_cli import jsonl
from router_cli.errors import InputError
from router_cli.schema import Decision, Example
from router_cli.scoring.metrics import NONE
from router_cli.space import DecisionSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Kind = Literal["router", "compare", "heuristic", "baseline"]


@dataclass(frozen=True)
class Rows:
    """A predictions file: its rows by task id (the first of each), and how many came twice."""

    by_id: dict[str, Mapping[str, Any]]
    total: int


@dataclass(frozen=True)
class Answers:
    """A system's answers in the order of the judged tasks: class numbers (-1: none), probabilities (tasks, classes)
    and the confidence in the answer given, both NaN where it named none."""

    name: str
    kind: Kind
    labels: Array
    probabilities: Array
    confidence: Array
    # Whole decisions, with what is wrong where there is none; empty for systems that only name a topology.
    decisions: tuple[Decision | None, ...] = ()
    problems: tuple[str, ...] = ()
    normalised: int = 0
    note: str = ""
    # Milliseconds, prompt tokens, completion tokens and dollars (4, tasks); NaN where the row does not say.
    spent: Array | None = None


def read_predictions(path: str) -> Rows:
    """Read rows of which only `task_id` and `decision` are needed. Raises InputError naming file and line."""
    by_id: dict[str, Mapping[str, Any]] = {}
    total = 0
    for line, row in jsonl.read_rows(path):
        name = row.get("task_id")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(f"{path}:{line}: expected a prediction with a task_id, got {name!r}")
        if "decision" not in row:
            raise InputError(f"{path}:{line}: expected a prediction with a decision (null for none)")
        total += 1
        by_id.setdefault(str(name), row)
    return Rows(by_id, total)


def in_order(
    name: str,
    kind: Kind,
    rows: Rows,
    judged: Sequence[Example],
    space: DecisionSpace,
) -> Answers:
    """Bring a system's rows into the order of the judged tasks."""
    import numpy as np

    decisions: list[Decision | None] = []
    problems: list[str] = []
    normalised = 0
    probabilities = np.full((len(judged), len(space.topologies)), np.nan)
    confidence = np.full(len(judged), np.nan)
    spent = np.full((4, len(judged)), np.nan)
    for place, example in enumerate(judged):
        row = rows.by_id.get(example.task_id)
        if row is None:
            decisions.append(None)
            problems.append("no prediction")
            continue
        resolved = space.resolve(row["decision"])
        decisions.append(resolved.decision)
        problems.append("; ".join(map(str, resolved.violations)))
        normalised += bool(resolved.decision and resolved.normalised)
        mix = row.get("topologies")
        shares = [number(mix.get(each, 0.0), 0, 1) for each in space.topologies] if isinstance(mix, Mapping) else []
        known = [share for share in shares if share is not None]
        # Rounded shares are a distribution; shares of other formations, or of something else, are not.
        if len(known) == len(space.topologies) and abs(sum(known) - 1) <= 0.01:
            probabilities[place] = np.array(known) / sum(known)
        sure = number(row.get("probability"), 0, 1)
        if sure is None and resolved.decision is not None:
            sure = float(probabilities[place, space.topologies.index(resolved.decision.topology)])
        confidence[place] = np.nan if sure is None else sure
        spent[:, place] = [number(row.get("milliseconds"), 0) or np.nan, *usage(row.get("usage"))]
    labels = np.array([NONE if one is None else space.topologies.index(one.topology) for one in decisions])
    return Answers(
        name, kind, labels, probabilities, confidence, tuple(decisions), tuple(problems), normalised, spent=spent
    )


def usage(value: object) -> tuple[float, float, float]:
    """Prompt tokens, completion tokens and dollars of a row's `usage`; NaN for what it does not say."""
    named = value if isinstance(value, Mapping) else {}
    found = [number(named.get(name), 0) for name in ("prompt_tokens", "completion_tokens", "cost_usd")]
    first, second, dollars = (math.nan if one is None else one for one in found)
    # A label that was made without any token (by rules, or written by people) says nothing about tokens.
    return (first, second, dollars) if first or second else (math.nan, math.nan, math.nan)


def number(value: object, low: float = -math.inf, high: float = math.inf) -> float | None:
    """The value as a finite number within bounds, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and low <= value <= high else None
