"""Votes: what several answers to one task come to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router_cli.labelling.voting import combine
from router_cli.schema import Label, Rejection

ROLES = {"s": ["builder"], "b": ["builder", "tester"], "p": ["planner", "builder"]}
TOPOLOGIES = {"s": "single", "c": "chain", "d": "decentralized"}


def sample(answer: str) -> dict[str, Any]:
    """`cb` is a chain of builder and tester, `s` a single builder, `!` an answer that was no use."""
    origin = {
        "teacher": "openai",
        "model": f"teacher for {answer}",
        "prompt_version": "1",
        "roles": ["planner", "builder", "tester"],
        "strategy": "balanced",
        "key": "00" * 16,
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "cost_usd": 0.001, "attempts": 1},
        "normalised": [answer],
        "reason": None,
    }
    if answer == "!":
        refused = {"violations": ["no_json: the answer holds no JSON"], "raw": "nonsense"}
        return {"origin_task_id": "a", "task": "Sort it.", **refused, "provenance": origin}
    roles = ROLES.get(answer[-1], ["builder"])
    decision = {
        "topology": TOPOLOGIES[answer[0]],
        "roles": roles,
        "manager_role": None,
        "entry_role": roles[0],
        "max_steps": len(roles),
    }
    messages = [{"role": "user", "content": "Task: Sort it."}, {"role": "assistant", "content": json.dumps(decision)}]
    row = {"messages": messages, "sample_type": "teacher_distilled", "origin_task_id": "a", "decision": decision}
    return {**row, "split": None, "provenance": origin}


@pytest.mark.parametrize(
    ("answers", "winner", "agreement"),
    [
        ("s", "s", 1.0),
        ("s s s", "s", 1.0),
        ("cb s s", "s", 2 / 3),
        ("s cb cp", "cb", 2 / 3),  # two chains are two votes for a chain; of equally common ones the first
        ("s s cb cp cp", "cp", 3 / 5),
        ("s s cb cp", "s", 1 / 2),  # topologies tie, one whole decision stands out
        ("! s s", "s", 2 / 3),  # an answer that is no use is a vote for nothing
        ("! ! s", "s", 1 / 3),
    ],
)
def test_the_topology_with_most_votes_wins_and_then_its_most_common_decision(
    answers: str, winner: str, agreement: float
) -> None:
    samples = [sample(answer) for answer in answers.split()]
    row = Label.model_validate_json(json.dumps(combine(samples, "reject")))
    assert row.decision.model_dump(mode="json") == sample(winner)["decision"]
    assert json.loads(row.messages[-1].content) == row.decision.model_dump(mode="json")
    assert row.provenance is not None and row.provenance.agreement == pytest.approx(agreement)
    assert (row.provenance.model, row.provenance.normalised) == (f"teacher for {winner}", (winner,))
    assert row.provenance.votes == tuple(TOPOLOGIES.get(answer[0]) for answer in answers.split())
    assert row.provenance.usage.attempts == len(samples)
    assert row.provenance.usage.cost_usd == pytest.approx(0.001 * len(samples))


@pytest.mark.parametrize("answers", ["s cb", "cb s !", "s s cb cb", "d cb s"])
def test_a_tie_is_rejected_unless_the_first_leader_is_wanted(answers: str) -> None:
    samples = [sample(answer) for answer in answers.split()]
    row = Rejection.model_validate_json(json.dumps(combine(samples, "reject")))
    assert row.violations[0].startswith("tie: ") and row.task == "Sort it." and row.provenance.agreement is None
    assert len(row.raw.splitlines()) == len(samples) and row.provenance.usage.attempts == len(samples)
    first = Label.model_validate_json(json.dumps(combine(samples, "first")))
    assert first.decision.model_dump(mode="json") == samples[0]["decision"]
    assert first.provenance is not None and first.provenance.votes[0] == first.decision.topology


def test_without_one_usable_answer_the_last_one_is_the_rejection() -> None:
    row = Rejection.model_validate_json(json.dumps(combine([sample("!"), sample("!")], "first")))
    assert row.violations == ("no_json: the answer holds no JSON",) and row.raw == "nonsense"
    assert row.provenance.votes == (None, None) and row.provenance.usage.attempts == 2
