"""Several answers of a teacher to one task become one: the topology with the most votes, and its most common decision.

The topology comes first because it is what a router is judged on: two chains with other roles are two votes for a
chain. Only where topologies have equally many votes does the most common whole decision settle it. Whatever is equal
after that is a tie, which is no label unless the user says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from router_cli.schema import Usage

Tie = Literal["reject", "first"]


def combine(samples: Sequence[dict[str, Any]], tie: Tie) -> dict[str, Any]:
    """The row of a task from the rows (JSON of `Label` or `Rejection`) of its samples, in the order of their numbers.

    `provenance.votes` holds each sample's topology (None where the answer was no use), `provenance.agreement` the share
    of all samples that have the chosen topology. The usage is that of all samples. A tie, or samples of which none was
    any use, make a `Rejection`.
    """
    votes = [json.dumps(row["decision"]) if "decision" in row else None for row in samples]
    topologies = [row["decision"]["topology"] if "decision" in row else None for row in samples]
    shared: dict[str, Any] = {"votes": topologies, "usage": _usage(samples)}
    leaders = _most(topologies)
    if not leaders:
        return _with(samples[-1], **shared)
    decisions = _most([vote if name in leaders else None for vote, name in zip(votes, topologies, strict=True)])
    # A Counter keeps the order of first votes: of decisions that differ in the roles alone, the first one given.
    chosen = samples[votes.index(decisions[0])]
    tied = {json.loads(vote)["topology"] for vote in decisions}
    if len(tied) > 1 and tie == "reject":
        return _rejected(samples, leaders, shared)
    agreement = topologies.count(chosen["decision"]["topology"]) / len(samples)
    return _with(chosen, **shared, agreement=agreement)


def tied(row: dict[str, Any]) -> bool:
    """Whether a row that `combine` made was rejected for a tie: every one of its samples may be sound."""
    return any(str(violation).startswith("tie: ") for violation in row.get("violations", ()))


def _most(votes: Sequence[str | None]) -> list[str]:
    """What has the most votes, the first given first; None is no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    return [vote for vote, count in counts.items() if count == max(counts.values())]


def _usage(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from router_cli.teachers import total

    usages = [Usage(**row["provenance"]["usage"]) for row in samples]
    summed = usages[0]
    for usage in usages[1:]:
        summed = total(summed, usage)
    return summed.model_dump(mode="json")


def _with(row: dict[str, Any], **provenance: Any) -> dict[str, Any]:
    return {**row, "provenance": {**row["provenance"], **provenance}}


def _rejected(samples: Sequence[dict[str, Any]], leaders: Sequence[str], shared: dict[str, Any]) -> dict[str, Any]:
    """A tie as a rejection, with the decisions one a line as its raw text."""
    from router_cli.prompts import task_text
    from router_cli.schema import Message

    first = next(row for row in samples if "decision" in row)
    words = f"tie: {' and '.join(leaders)} have equally many of the {len(samples)} votes"
    return {
        "origin_task_id": first["origin_task_id"],
        "task": task_text([Message(**message) for message in first["messages"]]),
        "violations": [words],
        "raw": "\n".join(json.dumps(row["decision"]) if "decision" in row else row["raw"] for row in samples),
        "provenance": {**first["provenance"], **shared, "normalised": [], "reason": None},
    }
