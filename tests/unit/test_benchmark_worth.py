"""The table of policies on the carried executions: its differences, and that docs/worth.md holds what is recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import worth
from benchmarks.worth import WORKERS, against, by_value, outcomes, shown
from router_cli.backends.local import META
from router_cli.infer import infer
from router_cli.scoring import policies
from router_cli.scoring.outcomes import read_outcomes, tables
from router_cli.sections import OUTCOME_TABLES
from router_cli.settings import load

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
    wanted |= {"router, rubric"} if texts else set()
    learnt = texts and not carried.startswith("mbpp")
    wanted |= {"router, GPT-4's labels"} if learnt else set()
    wanted |= {"router, outcomes", "router, by value"} if learnt and known else set()
    wanted |= {"cascade"} if carried == "mbpp-et-mapcoder" else set()
    assert wanted <= set(rows)
    assert any(row.startswith("cascade by tokens") for row in rows) == (known and not carried.startswith("mbpp"))
    for one in policies.always(table):
        fresh = shown("", against(table, one, {}, 2000, 42)).split(" | ")[2:]
        assert rows[one.name].split(" | ")[:2] == fresh[:2], "python -m benchmarks.worth LABELS"
    for policy, row in rows.items():
        told = re.findall(r"\d\): (better|worse|cannot tell)", row)
        assert len(told) >= 1 + (policy not in ("always single", "always chain")), f"{policy}: a verdict for each"


def test_routers_learn_from_outcomes_once_and_choose_by_value(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of --routers, with a tiny model: the same verbs, and nothing of HumanEval is learnt from."""
    monkeypatch.setattr(worth, "SMALL_MODEL", str(tiny_folder()))
    how = by_value("gpt-4-turbo")
    _, learnt = CARRIED["MBPP-ET, gpt-4-turbo"]
    cheap, dear = policies.always(learnt)
    prices = dict(zip(learnt.topologies, (cheap.dollars.mean(), dear.dollars.mean()), strict=True))
    assert how["price"] == [f"{name}={price:.6f}" for name, price in prices.items()]
    gains = [how["value_of_solving"] * one.solved.mean() - one.dollars.mean() for one in (cheap, dear)]
    assert gains[0] == pytest.approx(gains[1])

    adapter = outcomes(tmp_path / "solve", "gpt-4-turbo", "solve")
    made = (adapter / META).stat().st_mtime_ns
    assert outcomes(tmp_path / "solve", "gpt-4-turbo", "solve") == adapter
    assert (adapter / META).stat().st_mtime_ns == made, "trained once"
    meta = json.loads((adapter / META).read_text(encoding="utf-8"))
    assert meta["topologies"] == list(learnt.topologies) and meta["solving"]["n"] > 50
    assert {*meta["split"]["train"], *meta["split"]["validation"]} == set(learnt.tasks)
    settings = load().with_values(
        infer__adapter=adapter, infer__data=["rubric"], infer__limit=4, infer__output=str(tmp_path / "p.jsonl")
    )
    infer(settings.with_values(**{f"infer__{name}": value for name, value in how.items()}))
    for row in map(json.loads, (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()):
        worths = {name: how["value_of_solving"] * share - prices[name] for name, share in row["solving"].items()}
        assert row["decision"]["topology"] == max(worths, key=worths.__getitem__)
