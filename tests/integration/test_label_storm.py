"""Labelling through an endpoint that answers badly in every way: every task ends, and the bill is the endpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_cli.label import label
from tests.fake_teacher import FakeTeacher, Storm
from tests.unit.test_label import rows, settings, some_tasks


@pytest.mark.parametrize("tasks", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_task_ends_as_a_label_or_a_rejection_and_the_bill_is_the_servers(tmp_path: Path, tasks: int) -> None:
    data = some_tasks(tmp_path, tasks)
    with FakeTeacher(behave=Storm(seed=tasks, hang=30 if tasks > 100 else 1)) as server:
        # The long storm with the retries that users have; in the short one few others get through at its end.
        retries = {} if tasks > 100 else {"endpoint__retries": 20}
        result = label(settings(data, server.url, label__concurrency=64, endpoint__timeout=5, **retries))
        assert result.usage.cost_usd == pytest.approx(server.cost, abs=0.005)
        assert result.usage_all.cost_usd == pytest.approx(server.cost, abs=0.005)
        # To the token, where no answer was billed and lost.
        spent = sum(billed.prompt_tokens + billed.completion_tokens for billed in server.ledger)
        assert result.usage.prompt_tokens + result.usage.completion_tokens == spent
    made, refused = rows(result.output), rows(result.rejected_path) if result.rejected else []
    assert result.unanswered == 0 and sorted(row["origin_task_id"] for row in made + refused) == sorted(
        f"t{i}" for i in range(tasks)
    )
    finished = [row for row in rows(tmp_path / "labels.jsonl.journal.jsonl") if "provenance" in row]
    assert len(finished) == tasks and all(row["raw"] for row in refused)
    assert [row["origin_task_id"] for row in made] == [f"t{i}" for i in range(tasks) if f"t{i}" not in ids(refused)]
    assert 0 < result.rejected < tasks // 10 and result.wasted < result.requests / 2
    assert all(json.loads(row["messages"][-1]["content"]) == row["decision"] for row in made)


def ids(found: list[dict[str, str]]) -> set[str]:
    return {row["origin_task_id"] for row in found}
