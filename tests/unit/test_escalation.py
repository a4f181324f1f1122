"""The thresholds of a cascade are chosen on training tasks, for a price, and judged on others."""

from __future__ import annotations

import numpy as np
import pytest

from router_cli.schema import Outcome
from router_cli.scoring.escalation import priced_cascade
from router_cli.scoring.outcomes import Recorded, Table, subset, tables
from router_cli.scoring.policies import Wish
from router_cli.scoring.worth import Choosing, System, weigh


def world(count: int, honest: bool = True, seed: int = 1) -> tuple[Table, dict[str, Wish]]:
    """Half of the tasks need the chain. The evidence says so (or nothing); the router is right four times of five."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < 0.5
    rows, wishes, splits = [], {}, {}
    for i in range(count):
        for name, cost, solved in (("single", 0.01, not hard[i]), ("chain", 0.05, True)):
            seen = solved if honest else True
            rows.append(Outcome(task_id=f"t{i}", topology=name, solved=solved, cost=cost, evidence=seen))
        right = rng.random() < 0.8
        p = 0.9 if (not hard[i]) == right else 0.1
        wishes[f"t{i}"] = Wish("single" if p > 0.5 else "chain", {"single": p, "chain": 1 - p})
        splits["", f"t{i}"] = "train" if i % 2 else "test"
    return tables(Recorded(tuple(rows), {}, splits, 0))[0], wishes


def halves(table: Table) -> tuple[Table, Table]:
    places = range(len(table.tasks))
    return subset(table, [i for i in places if i % 2 == 0]), subset(table, [i for i in places if i % 2])


def test_honest_evidence_is_used_and_a_dear_failure_takes_the_team() -> None:
    test, train = halves(world(400)[0])
    found = priced_cascade(test, train, None, 1, penalty=0.2)
    assert found is not None and found.solved.mean() == 1.0
    assert found.dollars.mean() == pytest.approx(0.01 + 0.05 * (1 - test.solved[:, 0].mean()))
    assert "where the evidence is a failure" in found.note and "200 training tasks" in found.note
    nothing = priced_cascade(test, train, None, 1, penalty=0.001)
    assert nothing is not None and "always single" in nothing.note and nothing.dollars.mean() == pytest.approx(0.01)


def test_where_evidence_says_nothing_the_routers_probability_decides() -> None:
    table, wishes = world(400, honest=False)
    test, train = halves(table)
    found = priced_cascade(test, train, wishes, 1, penalty=0.1)
    assert found is not None and "at once below P(single)" in found.note and 0.8 < found.solved.mean() < 1.0
    dear = priced_cascade(test, train, wishes, 1, penalty=100.0)
    assert dear is not None and "always chain" in dear.note and dear.solved.mean() == 1.0


def test_too_few_training_tasks_choose_nothing() -> None:
    test, train = halves(world(40)[0])
    assert priced_cascade(test, train, None, 1, 0.1) is None
    assert priced_cascade(test, None, None, 1, 0.1) is None and priced_cascade(test, test, None, 0, 0.1) is None


def test_it_stands_among_the_policies_where_a_price_is_stated() -> None:
    table, wishes = world(400)
    systems = [System("router", "router", wishes)]
    found = weigh(table, systems, Choosing(split="test", resamples=100, seed=1, penalty=0.2))
    assert found is not None and found.counts.judged == 200
    names = [row.name for row in found.policies]
    assert "priced cascade" in names
    plain = weigh(table, systems, Choosing(split="test", resamples=100, seed=1, penalty=None))
    assert plain is not None and "priced cascade" not in [row.name for row in plain.policies]
    few = weigh(subset(table, range(40)), systems, Choosing(split="test", resamples=100, seed=1, penalty=0.2))
    words = ["No cascade was chosen for this price" in " ".join(one.notes) for one in (found, plain, few) if one]
    assert words == [False, False, True]
