"""The table of policies on the carried executions: its differences, and that docs/worth.md holds what is recorded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.worth import WORKERS, against, shown
from router_cli.scoring import policies
from router_cli.scoring.outcomes import read_outcomes, tables
from router_cli.sections import OUTCOME_TABLES

DOCS = Path(__file__).parents[2] / "docs" / "worth.md"
CARRIED = {table.name: (name, table) for name in OUTCOME_TABLES for table in tables(read_outcomes(name))}


def printed() -> dict[str, dict[str, str]]:
    """The policies of each table in docs/worth.md, with what follows the name."""
    found: dict[str, dict[str, str]] = {}
    text = DOCS.read_text(encoding="utf-8").partition("### Every policy with its paired differences")[2]
    table = ""
    for name, policy, rest in re.findall(r"^\| ([^|]*) ?\| ([^|]+) \| (.*)$", text, re.MULTILINE):
        table = name.strip() or table
        found.setdefault(table, {})[policy] = rest
    return {name: rows for name, rows in found.items() if name in CARRIED}


def test_every_difference_is_paired_by_task() -> None:
    _, table = CARRIED["MBPP-ET, gpt-4-turbo"]
    fixed = policies.always(table)
    climbs = policies.cascade(table, 1)
    assert climbs is not None
    line = against(table, climbs, {"coin": policies.same_price(table, climbs, fixed)}, 500, 1)
    assert line.solved.value == pytest.approx(np.mean(climbs.solved), abs=1e-9)
    for kind, other in zip(("single", "chain"), fixed, strict=True):
        score, words = line.over[kind]
        assert score.value == pytest.approx(np.mean(climbs.solved - other.solved), abs=1e-9)
        assert words == "better" and score.low > 0, kind
    assert line.over["coin"][1] == "better"
    assert set(against(table, fixed[0], {}, 200, 1).over) == {"chain"}, "nothing is compared with itself"


@pytest.mark.parametrize("name", CARRIED)
def test_the_docs_hold_every_policy_and_what_is_recorded(name: str) -> None:
    carried, table = CARRIED[name]
    rows, texts, known = printed()[name], None not in table.texts, table.worker in WORKERS
    wanted = {"always single", "always chain", "random", "oracle"}
    wanted |= {"rules", "knn"} if texts else set()
    wanted |= {"length rule"} if texts and known else set()
    wanted |= {"GPT-4's labels"} if carried.startswith("mbpp") else set()
    wanted |= {"cascade"} if carried == "mbpp-et-mapcoder" else set()
    assert wanted <= set(rows)
    assert any(row.startswith("cascade by tokens") for row in rows) == (known and not carried.startswith("mbpp"))
    for one in policies.always(table):
        fresh = shown("", against(table, one, {}, 2000, 42)).split(" | ")[2:]
        assert rows[one.name].split(" | ")[:2] == fresh[:2], "python -m benchmarks.worth LABELS"
    for policy, row in rows.items():
        told = re.findall(r"\d\): (better|worse|cannot tell)", row)
        assert len(told) >= 1 + (policy not in ("always single", "always chain")), f"{policy}: a verdict for each"
