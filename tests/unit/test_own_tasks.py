"""The project's own tasks keep what their README promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from router_cli.jsonl import read_rows
from router_cli.space import TOPOLOGIES, DecisionSpace
from router_cli.tasks import near_duplicates

FILE = Path(__file__).parents[2] / "data" / "tasks.jsonl"
ROWS = [row for _, row in read_rows(str(FILE))]
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))


def test_sizes_and_languages() -> None:
    splits = Counter(row["split"] for row in ROWS)
    assert splits["train"] >= 240 and splits["validation"] >= 60 and splits["test"] >= 180
    assert sum(row["lang"] == "zh" for row in ROWS) >= 60
    assert len({row["id"] for row in ROWS}) == len(ROWS)


def test_every_topology_has_its_share_in_every_split() -> None:
    for split in ("train", "validation", "test"):
        found = Counter(row["decision"]["topology"] for row in ROWS if row["split"] == split)
        assert all(found[name] >= 0.15 * found.total() for name in TOPOLOGIES), (split, found)


def test_every_decision_is_valid_and_canonical() -> None:
    for row in ROWS:
        resolved = SPACE.resolve(row["decision"])
        assert resolved.decision is not None and resolved.normalised == (), row["id"]


def test_near_duplicates_never_straddle_the_split() -> None:
    pairs = near_duplicates([row["task"] for row in ROWS], threshold=0.4)
    assert [(ROWS[i]["id"], ROWS[j]["id"]) for i, j, _ in pairs if ROWS[i]["split"] != ROWS[j]["split"]] == []


def test_most_tasks_have_twenty_to_eighty_words() -> None:
    words = [len(row["task"].split()) for row in ROWS if row["lang"] == "en"]
    assert sum(20 <= count <= 80 for count in words) > 0.8 * len(words)


def test_length_does_not_give_the_topology_away() -> None:
    means = {
        name: sum(
            counts := [len(r["task"].split()) for r in ROWS if r["lang"] == "en" and r["decision"]["topology"] == name]
        )
        / len(counts)
        for name in TOPOLOGIES
    }
    assert max(means.values()) < 1.3 * min(means.values())
