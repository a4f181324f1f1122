"""Labels from recorded executions: the cheapest topology that is good enough, with its evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router_cli.cli import main
from router_cli.dataset import read_labels
from router_cli.errors import InputError, OutputError, UsageError
from router_cli.from_outcomes import OutcomeLabels, label_from_outcomes
from router_cli.jsonl import write_rows
from router_cli.settings import load
from router_cli.space import DecisionSpace

COST = {"single": 1.0, "chain": 3.0, "centralized": 5.0}


def cell(task: str, topology: str, solved: int, runs: int, **more: Any) -> list[dict[str, Any]]:
    told = {"worker": "w", "text": f"Do {task}.", "cost": COST[topology], **more}
    return [{"task_id": task, "topology": topology, "solved": r < solved, "repeat": r, **told} for r in range(runs)]


@pytest.fixture
def make(tmp_path):
    def run(*cells: list[dict[str, Any]], **options: Any) -> tuple[OutcomeLabels, list[dict[str, Any]]]:
        write_rows(tmp_path / "o.jsonl", [row for rows in cells for row in rows])
        given = {"from_outcomes": str(tmp_path / "o.jsonl"), "output": str(tmp_path / "l.jsonl"), **options}
        values = {f"label.{key}": (f"--{key}", value) for key, value in given.items() if key != "decision"}
        result = label_from_outcomes(load({**values, **given.get("decision", {})}, environ={}))
        return result, lines(tmp_path / "l.jsonl")

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_cheapest_topology_within_the_margin_of_the_best_is_the_label(make):
    cells = [
        *(cell("needs", "single", 1, 10), cell("needs", "chain", 9, 10), cell("needs", "centralized", 9, 10)),
        *(cell("easy", "single", 9, 10), cell("easy", "chain", 10, 10)),
        *(cell("close", "single", 7, 10), cell("close", "chain", 10, 10)),
    ]
    for margin, expected in ((0.1, ["chain", "single", "chain"]), (0.3, ["chain", "single", "single"])):
        result, rows = make(*cells, margin=margin)
        assert [row["decision"]["topology"] for row in rows] == expected
    assert result.repeats == 10
    _, rows = make(*cells, margin=0)
    assert [row["decision"]["topology"] for row in rows] == ["chain", "chain", "chain"]


def test_ties_go_to_the_cheaper_and_what_nothing_solves_to_the_cheapest(make):
    result, rows = make(
        *(cell("tie", "chain", 2, 2), cell("tie", "centralized", 2, 2)),
        *(cell("lost", "chain", 0, 2), cell("lost", "single", 0, 2)),
    )
    assert [row["decision"]["topology"] for row in rows] == ["chain", "single"]
    assert (result.unsolved, result.several) == (1, 2)


def test_the_row_carries_the_evidence_and_trains_like_any_other(make, tmp_path):
    _, rows = make(cell("mbpp_3_x", "single", 1, 4, split="train"), cell("mbpp_3_x", "chain", 3, 4))
    (row,) = rows
    assert row["evidence"] == {
        "single": {"solved": 0.25, "runs": 4, "usd": 1.0},
        "chain": {"solved": 0.75, "runs": 4, "usd": 3.0},
    }
    assert (row["provenance"]["teacher"], row["provenance"]["model"], row["split"]) == ("outcomes", "w", "train")
    assert row["provenance"]["reason"] == "cheapest within 0.05 of the best: solved single 1/4, chain 3/4"
    assert row["sample_type"] == "mbpp_outcome_distilled"
    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    (example,) = read_labels([str(tmp_path / "l.jsonl")], space)
    assert (example.task_id, example.text, example.decision.topology) == ("mbpp_3_x", "Do mbpp_3_x.", "chain")


def test_tasks_without_evidence_or_text_are_left_out_and_counted(make):
    bare = [{name: value for name, value in row.items() if name != "text"} for row in cell("bare", "single", 1, 1)]
    result, rows = make(cell("one", "single", 1, 1), bare, cell("two", "single", 1, 1), cell("two", "chain", 1, 1))
    assert [row["origin_task_id"] for row in rows] == ["two"]
    assert (result.without_evidence, result.without_text) == (1, 1)


def test_only_topologies_of_the_settings_become_labels(make):
    cells = (cell("t", "single", 0, 1), cell("t", "chain", 1, 1), cell("t", "centralized", 1, 1))
    allowed = {"decision.topologies": ("--set", "single,centralized")}
    result, rows = make(*cells, decision=allowed)
    assert rows[0]["decision"]["topology"] == "centralized"
    assert result.topologies == {"single": 0, "centralized": 1}


def test_pairs_prefer_the_label_over_what_solves_less_or_costs_more(make, tmp_path):
    result, _ = make(
        *(cell("a", "single", 0, 2), cell("a", "chain", 2, 2), cell("a", "centralized", 2, 2)),
        *(cell("lost", "single", 0, 1), cell("lost", "chain", 0, 1)),
        pairs=str(tmp_path / "pairs.jsonl"),
    )
    pairs = lines(tmp_path / "pairs.jsonl")
    assert result.pairs == len(pairs) == 2
    told = {json.loads(one["rejected"][0]["content"])["topology"]: one for one in pairs}
    assert {name: one["because"] for name, one in told.items()} == {
        "single": "solves less",
        "centralized": "costs more",
    }
    assert all(json.loads(one["chosen"][0]["content"])["topology"] == "chain" for one in pairs)
    assert [message["role"] for message in pairs[0]["prompt"]] == ["system", "user"]
    assert told["single"]["solved"] == [1.0, 0.0]


def test_a_limit_labels_the_first_tasks(make):
    cells = [cell(f"t{i}", name, 1, 1) for i in range(5) for name in ("single", "chain")]
    assert [row["origin_task_id"] for row in make(*cells, limit=2)[1]] == ["t0", "t1"]


def test_what_goes_wrong_is_one_line(make, tmp_path):
    both = (cell("t", "single", 1, 1), cell("t", "chain", 1, 1), cell("t", "chain", 1, 1, worker="v"))
    with pytest.raises(InputError, match="runs of several workers"):
        make(*both)
    assert make(*both, worker="w")[0].labelled == 1
    with pytest.raises(UsageError, match="exclude each other"):
        make(*both, data="humaneval")
    with pytest.raises(UsageError, match="--model says nothing beside --from-outcomes"):
        make(*both, model="gpt-4o")
    assert main(["label", "--margin", "0.1", "--data", "humaneval"]) == 2
    with pytest.raises(InputError, match="1 no runs of two topologies"):
        make(cell("t", "single", 1, 1))
    (tmp_path / "paid.jsonl").write_text('{"messages": [], "provenance": {"teacher": "openai"}}\n')
    with pytest.raises(OutputError, match="holds labels of another origin"):
        make(*both, worker="w", output=str(tmp_path / "paid.jsonl"))


def test_the_command_labels_a_carried_table(tmp_path, capsys):
    asked = [
        "label",
        "--from-outcomes",
        "mbpp-mapcoder",
        "--worker",
        "gpt-4-turbo",
        "--output",
        str(tmp_path / "l.jsonl"),
    ]
    assert main([*asked, "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["labelled"] == 397 == sum(document["topologies"].values())
    assert document["topologies"]["chain"] > 0
    assert main(asked) == 0
    assert "carry its luck" in capsys.readouterr().out
