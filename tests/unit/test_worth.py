"""What a router is worth, in worlds whose solve probabilities are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss

from router_cli.schema import Outcome
from router_cli.scoring import policies
from router_cli.scoring.intervals import mcnemar
from router_cli.scoring.oracles import best_of_noise, oracle
from router_cli.scoring.outcomes import Recorded, Table, tables
from router_cli.scoring.policies import Wish
from router_cli.scoring.worth import Choosing, System, weigh
from router_cli.scoring.worth_results import PolicyRow, Replayed
from router_cli.scoring.worth_words import frontier

HOW = Choosing(split="test", resamples=200, seed=1, penalty=None)
METRICS = ("cpt_50", "cpt_80", "aiq", "aiq_fixed", "opt_sel", "opt_cost", "opt_acc")
COST = {"single": 1.0, "chain": 4.0, "centralized": 6.0}


def world(probabilities: np.ndarray, repeats: int, seed: int, names: Sequence[str] = ("single", "chain")) -> Table:
    """Runs of tasks with these solve probabilities, shape (tasks, topologies)."""
    rng = np.random.default_rng(seed)
    rows = [
        Outcome(task_id=f"t{i}", topology=name, solved=bool(rng.random() < p[j]), repeat=r, cost=COST[name])
        for i, p in enumerate(probabilities)
        for j, name in enumerate(names)
        for r in range(repeats)
    ]
    return tables(Recorded(tuple(rows), {}, {}, 0))[0]


def needy(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A third of the tasks need the chain, a third is hard for everybody, a third is easy; and who is who (0, 1, 2)."""
    kind = np.random.default_rng(seed).integers(3, size=count)
    return np.array([[0.2, 0.8], [0.1, 0.1], [0.9, 0.9]])[kind], kind


def router(choices: Sequence[str | None], probabilities: Sequence[float] | None = None) -> System:
    shares = [None] * len(choices) if probabilities is None else [{"single": 1 - p, "chain": p} for p in probabilities]
    return System("router", "router", {f"t{i}": Wish(one, shares[i]) for i, one in enumerate(choices)})


def row(found: Replayed, name: str) -> PolicyRow:
    return next(one for one in found.policies if one.name == name)


def judged(table: Table, *systems: System, **how: Any) -> Replayed:
    found = weigh(table, systems, Choosing(**{**vars(HOW), **how}))
    assert found is not None
    return found


def test_the_replay_recovers_the_true_ranking_and_the_true_rates():
    probabilities, kind = needy(600, 3)
    good = np.where(kind == 0, "chain", "single")
    found = judged(world(probabilities, 1, 4), router(list(good), (kind == 0) * 0.6 + 0.2))
    truth = {
        "router": probabilities[np.arange(600), (good == "chain").astype(int)].mean(),
        "always single": probabilities[:, 0].mean(),
        "always chain": probabilities[:, 1].mean(),
    }
    for name, rate in truth.items():
        assert row(found, name).solved.low - 0.01 < rate < row(found, name).solved.high + 0.01
    assert row(found, "always single").solved_difference.verdict == "better"
    assert row(found, "always chain").solved_difference.verdict == "cannot tell"
    assert row(found, "same-mix coin").solved_difference.verdict == "better"
    assert row(found, "same-cost coin").solved_difference.verdict == "better"
    assert row(found, "always chain").dollars_difference.high < 0, "as good, and cheaper"
    assert row(found, "router").dollars.value == pytest.approx(1 + 3 * (kind == 0).mean())
    assert found.metrics.apgr.low > 0.5 and found.metrics.cpt_80.high < 0.6
    assert found.metrics.aiq.value > found.metrics.aiq_fixed.value
    for one in (getattr(found.metrics, name) for name in METRICS):
        assert 0 <= one.low <= one.value <= one.high <= 1 and one.high - one.low > 0.01, "every figure has its interval"
    assert not any("coin" in said or "constant" in said or "varies" in said for said in found.warnings)


def test_the_cross_fitted_oracle_is_unbiased_and_the_naive_one_is_not():
    probabilities = np.random.default_rng(5).random((100, 2))
    errors, flattery = [], []
    for seed in range(25):
        table = world(probabilities, 3, seed)
        chosen, crossed = oracle(table)
        assert crossed
        # What its own choices, made on two of three repeats in turn, are truly worth.
        worth = 0.0
        for i, runs in enumerate(table.runs):
            for held in range(3):
                rates = [np.mean([run.solved for r, run in enumerate(cell) if r != held]) for cell in runs]
                worth += probabilities[i, int(np.argmax(rates))] / 3
        errors.append(float(chosen.solved.mean()) - worth / 100)
        flattery.append(float(table.solved.max(axis=1).mean()) - probabilities.max(axis=1).mean())
    assert abs(np.mean(errors)) < 2.6 * np.std(errors) / np.sqrt(25)
    assert np.mean(flattery) > 0.02


def test_where_nothing_tells_topologies_apart_the_oracle_is_the_noise():
    probabilities = np.repeat(np.random.default_rng(2).random((400, 1)), 2, axis=1)
    single = judged(world(probabilities, 1, 3))
    assert not single.oracle.cross_fitted
    gain = row(single, "oracle").solved.value - max(
        row(single, f"always {t}").solved.value for t in ("single", "chain")
    )
    pairs = judged(world(probabilities, 2, 3)).noise
    assert pairs.cells == 800
    assert gain == pytest.approx(best_of_noise(pairs.differing, 2), abs=0.05), "all of its gain is noise"
    assert single.oracle.explained_at == pytest.approx(pairs.differing, abs=0.08)
    crossed = judged(world(probabilities, 3, 3))
    assert crossed.oracle.cross_fitted and crossed.oracle.optimism > 0.05
    assert abs(row(crossed, "oracle").solved.value - probabilities.mean()) < 0.05


def test_the_best_of_identical_runs_gains_half_of_what_differs():
    assert best_of_noise(22 / 257, 2) == pytest.approx(11 / 257)


def test_a_constant_router_is_named_and_equals_its_topology():
    table = world(needy(120, 1)[0], 1, 2)
    found = judged(table, router(["single"] * 120))
    assert found.warnings[0].startswith("The router is constant: every task gets single")
    assert row(found, "router").solved == row(found, "always single").solved
    assert row(found, "always single").solved_difference.words == "cannot tell; no difference seen"
    assert row(found, "always single").mcnemar == 1.0


def test_a_coin_is_named():
    probabilities, _ = needy(400, 1)
    choices = np.where(np.random.default_rng(0).random(400) < 0.4, "chain", "single").tolist()
    found = judged(world(probabilities, 1, 2), router(choices))
    assert any("is no better than a coin of its own mix" in warning for warning in found.warnings)


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_a_coin_is_hardly_ever_called_better_or_worse_than_itself(share: float) -> None:
    # With four tasks of 200 sent to the chain, the bootstrap by task alone said "worse" in a third of these worlds.
    said = []
    for seed in range(40):
        choices = np.where(np.random.default_rng(seed + 999).random(200) < share, "chain", "single").tolist()
        found = judged(world(needy(200, seed)[0], 1, seed), router(choices), resamples=200)
        said.append({row(found, name).solved_difference.verdict for name in ("same-mix coin", "same-cost coin")})
    assert said.count({"cannot tell"}) >= 36


def test_invalid_decisions_are_no_bad_luck() -> None:
    probabilities, kind = needy(300, 2)
    choices = [None if i % 3 == 0 else ("chain" if kind[i] == 0 else "single") for i in range(300)]
    found = judged(world(probabilities, 1, 5), router(choices))
    assert row(found, "same-mix coin").solved_difference.verdict == "worse"


def test_a_router_that_hardly_varies_is_named():
    choices = ["chain"] * 3 + ["single"] * 97
    assert any("hardly varies: 97%" in said for said in judged(world(needy(100, 1)[0], 1, 2), router(choices)).warnings)


@pytest.mark.parametrize(("gained", "inside"), [(2, True), (10, False)])
def test_a_gain_inside_rerun_noise_is_named_and_a_large_one_is_not(gained: int, inside: bool) -> None:
    # The router sends twenty tasks to the chain, of which single would have solved ten and the chain solves more.
    sent, chain = (
        set(range(50, 70)),
        {*range(30), *range(60 - gained, 60), *range(60, 70)} - set(range(50, 60 - gained)),
    )
    rows = [
        Outcome(task_id=f"t{i}", topology=name, solved=i < 60 if name == "single" else i in chain, cost=COST[name])
        for i in range(100)
        for name in ("single", "chain")
    ]
    table = tables(Recorded(tuple(rows), {}, {}, 0))[0]
    found = judged(table, router(["chain" if i in sent else "single" for i in range(100)]))
    assert found.noise.gain == pytest.approx(gained / 100)
    assert found.noise.half_width == pytest.approx(1.96 * (20 * 22 / 257) ** 0.5 / 100, abs=1e-5)
    assert any("inside rerun noise" in said for said in found.warnings) == inside
    # Every repeat divides the variance: with so many of them the noise is just below the gain.
    assert found.noise.settled_by == (2 if inside else 1) and found.noise.half_width / 2**0.5 < 0.02
    assert any("about 2 repeats of every task and topology would" in said for said in found.warnings) == inside


def test_decisions_for_what_never_ran_fall_to_the_routers_most_probable_one_that_did():
    table = world(np.full((3, 2), 0.5), 1, 0)
    wishes = {
        "t0": Wish("centralized", {"single": 0.5, "chain": 0.0, "centralized": 0.5}),
        "t1": Wish("centralized"),
        "t2": Wish(None),
    }
    found = policies.bring(table, wishes)
    assert [table.topologies[j] if j >= 0 else None for j in found.choice] == ["single", "chain", None]
    assert (found.fallen, found.invalid, found.score) == (2, 1, None)
    report = judged(table, System("router", "router", wishes))
    assert (report.counts.fallen, report.counts.invalid) == (2, 1)
    assert any("2 decisions are for a topology that was never executed" in said for said in report.warnings)


def test_an_invalid_decision_solves_and_costs_nothing():
    table = world(np.ones((40, 2)), 1, 0)
    found = judged(table, router([None] * 10 + ["chain"] * 30))
    assert row(found, "router").solved.value == 0.75
    assert row(found, "router").dollars.value == pytest.approx(3.0)


def test_only_tasks_with_a_choice_and_a_decision_are_judged():
    rows = list(world(np.ones((40, 2)), 1, 0).runs)
    one_sided = Outcome(task_id="lonely", topology="single", solved=True, cost=1.0)
    runs = [run for cells in rows for cell in cells for run in cell]
    table = tables(Recorded((*runs, one_sided), {}, {("", "t0"): "train"}, 0))[0]
    found = judged(table, router(["single"] * 39))
    assert (found.counts.tasks, found.counts.judged) == (41, 38)
    assert (found.counts.of_one_topology, found.counts.of_other_splits, found.counts.without_prediction) == (1, 1, 1)
    assert weigh(table, [System("router", "router", {"x": Wish("single")})], HOW) is None


def test_benchmarks_editions_find_each_other_by_their_number():
    wishes = policies.keyed({"HumanEval/7": Wish("chain"), "mbpp_3": Wish("single")})
    found = {name: wishes.get(policies.numbered(name) or "") for name in ("HumanEval_7_below", "mbpp_3_is_not_prime")}
    assert [wish.topology for wish in found.values() if wish] == ["chain", "single"]


def test_the_cascade_pays_for_both_runs_where_the_evidence_fails():
    cells = [(True, True, True), (False, False, True), (False, True, True), (True, False, False)]
    rows = []
    for i, (first, evidence, then) in enumerate(cells):
        rows.append(Outcome(task_id=f"t{i}", topology="single", solved=first, evidence=evidence, cost=1.0))
        rows.append(Outcome(task_id=f"t{i}", topology="chain", solved=then, cost=4.0))
    found = policies.cascade(tables(Recorded(tuple(rows), {}, {}, 0))[0], 1)
    assert found.solved.tolist() == [1, 1, 0, 0]  # the fourth gives away what it had
    assert found.dollars.tolist() == [1, 5, 1, 5]
    assert found.mix == {"single": 1.0, "chain": 0.5}
    assert policies.cascade(world(np.ones((3, 2)), 1, 0), 1) is None
    # What shows nothing fires nothing, as in `router run`: the first run stands, and the task is judged.
    rows += [Outcome(task_id="t4", topology=name, solved=True, cost=1.0) for name in ("single", "chain")]
    found = policies.cascade(tables(Recorded(tuple(rows), {}, {}, 0))[0], 1)
    assert found.solved.tolist() == [1, 1, 0, 0, 1] and found.mix["chain"] == pytest.approx(0.4)


def test_a_cascade_by_doubt_runs_twice_and_escalates_where_the_two_differ():
    cells = [((True, "a"), (True, "a")), ((True, "a"), (False, "b")), ((False, "a"), (False, "a"))]
    rows = [
        Outcome(task_id=f"t{i}", topology="single", solved=solved, acts=acts, repeat=r, cost=1.0)
        for i, pair in enumerate(cells)
        for r, (solved, acts) in enumerate(pair)
    ]
    rows += [Outcome(task_id=f"t{i}", topology="chain", solved=True, cost=4.0) for i in range(3)]
    found = policies.doubted(tables(Recorded(tuple(rows), {}, {}, 0))[0], 1)
    assert (found.solved.tolist(), found.dollars.tolist()) == ([1, 1, 0], [2, 6, 2])
    assert "on the 33% where the two act differently" in found.note
    # Of three runs every pair is a draw: two of six keep what they have, four escalate.
    rows += [Outcome(task_id="t2", topology="single", solved=True, acts="b", repeat=2, cost=1.0)]
    found = policies.doubted(tables(Recorded(tuple(rows), {}, {}, 0))[0], 1)
    assert found.solved[2] == pytest.approx(2 / 3) and found.dollars[2] == pytest.approx(2 + 4 * 2 / 3)
    assert policies.doubted(world(np.ones((3, 2)), 2, 0), 1) is None


def test_the_frontier_is_what_nothing_beats():
    # The team solves all; centralized costs more and solves less.
    solves = {"single": 50, "chain": 100, "centralized": 90}
    rows = [
        Outcome(task_id=f"t{i}", topology=name, solved=i < count, cost=COST[name])
        for name, count in solves.items()
        for i in range(100)
    ]
    found = judged(tables(Recorded(tuple(rows), {}, {}, 0))[0])
    assert [(one.name, cost) for one, cost in frontier(found)] == [
        ("always single", 1.0),
        ("random", pytest.approx(11 / 3)),
        ("always chain", 4.0),
    ]
    [note] = [said for said in found.notes if "frontier" in said]
    assert "always single (0.500 at $1.00)" in note and "centralized" not in note and "oracle" not in note
    bare = tables(Recorded(tuple(one.model_copy(update={"cost": None}) for one in rows), {}, {}, 0))[0]
    assert frontier(judged(bare)) == []


def test_the_cascade_of_measured_runs_is_what_was_found_by_hand():
    from router_cli.scoring.outcomes import read_outcomes

    (table,) = tables(read_outcomes("mbpp-et-mapcoder", "gpt-4-turbo"))
    found = policies.cascade(table, 1)
    assert (round(float(found.solved.mean()), 3), round(found.mix["chain"], 2)) == (0.607, 0.18)


def test_the_coin_of_the_same_cost_costs_the_same():
    probabilities, kind = needy(300, 1)
    found = judged(world(probabilities, 1, 2), router(np.where(kind == 0, "chain", "single").tolist()))
    coin, own = row(found, "same-cost coin"), row(found, "router")
    assert coin.dollars.value == pytest.approx(own.dollars.value)
    share = coin.mix["chain"]
    singles, chains = row(found, "always single").solved.value, row(found, "always chain").solved.value
    assert coin.solved.value == pytest.approx(share * chains + (1 - share) * singles)


def test_neighbours_vote_with_training_tasks_or_out_of_fold():
    texts = ["parse the log file", "prove the theorem"]
    kind = np.arange(100) % 2
    probabilities = np.where(kind[:, None] == 0, [[1.0, 1.0]], [[0.0, 1.0]])
    runs = [run for cells in world(probabilities, 1, 0).runs for cell in cells for run in cell]
    told = {("", f"t{i}"): f"{texts[kind[i]]} number {i}" for i in range(100)}
    recorded = Recorded(tuple(runs), told, {}, 0)
    found = judged(tables(recorded)[0])
    assert row(found, "knn").solved.value == 1.0
    assert row(found, "knn").mix == {"single": 0.5, "chain": 0.5}
    assert any("out of fold" in note for note in found.notes)
    splits: dict[tuple[str, str], Any] = {("", f"t{i}"): "train" if i < 60 else "test" for i in range(100)}
    split = judged(tables(Recorded(tuple(runs), told, splits, 0))[0])
    assert (split.counts.judged, row(split, "knn").solved.value) == (40, 1.0)
    assert "of 60 training tasks" in row(split, "knn").note


def test_a_bill_adds_the_penalty_of_what_stays_unsolved():
    found = judged(world(np.repeat([[1.0, 1.0], [0.0, 0.0]], 20, axis=0), 1, 0), penalty=10.0)
    assert row(found, "always single").bill.value == pytest.approx(1 + 0.5 * 10)
    assert row(found, "always chain").bill.value == pytest.approx(4 + 0.5 * 10)


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(0, 0, 5), (1, 4, 3), (9, 2, 0), (6, 6, 6)])
def test_mcnemar_is_the_exact_binomial_test_of_the_tasks_that_differ(only_a, only_b, both):
    first = np.array([1.0] * only_a + [0.0] * only_b + [1.0] * both)
    second = np.array([0.0] * only_a + [1.0] * only_b + [1.0] * both)
    n = only_a + only_b
    expected = binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(first, np.full(len(first), 0.5)) is None


def test_three_topologies_and_a_teacher_that_says_something_about_some(tmp_path):
    probabilities = np.random.default_rng(1).random((120, 3))
    table = world(probabilities, 1, 2, ("single", "chain", "centralized"))
    choices = [table.topologies[i % 3] for i in range(120)]
    teacher = System("teacher's labels", "labels", {f"t{i}": Wish("chain") for i in range(50)})
    found = judged(table, router(choices), teacher)
    labels = row(found, "teacher's labels")
    assert (labels.solved.n, labels.solved_difference.score.n, labels.dollars.n) == (50, 50, 50)
    assert labels.note == "says something about 50 of 120 tasks"
    rate = table.solved[:50]
    chain = table.topologies.index("chain")
    assert found.teacher.tasks == 50
    assert found.teacher.over_coin.score.value == 0, "labels that never vary are their own coin"
    assert found.teacher.regret.value == pytest.approx((rate.max(axis=1) - rate[:, chain]).mean())
    assert any("Their regret" in note for note in found.notes)
    router_part = np.array([table.solved[i, i % 3] for i in range(50)]).mean()
    assert labels.solved_difference.score.value == pytest.approx(router_part - labels.solved.value)


def sayings(chances: np.ndarray, names: Sequence[str] = ("single", "chain")) -> System:
    """A router that runs one agent everywhere, and says how likely each topology is to solve a task."""
    said = [dict(zip(names, map(float, row), strict=True)) for row in chances]
    return System("router", "router", {f"t{i}": Wish("single", None, one) for i, one in enumerate(said)})


def test_what_a_router_says_about_solving_is_judged_on_all_runs():
    chances, _ = needy(300, 4)
    table = world(chances, 4, 5)
    honest = judged(table, sayings(chances)).solving
    assert honest is not None and honest.tasks == 300
    ended = np.array([[[run.solved for run in runs] for runs in cells] for cells in table.runs], dtype=float)
    said = np.repeat(chances[:, :, None], 4, axis=2)
    measured = honest.calibration
    assert measured.n == ended.size == 2400
    wanted = brier_score_loss(ended.ravel(), said.ravel())
    assert measured.brier is not None and measured.brier.value == pytest.approx(wanted, abs=1e-9)
    assert measured.ece.low <= measured.ece_when_calibrated and measured.ece.value < 0.04
    average = ended.mean(axis=(0, 2), keepdims=True)
    assert honest.over_average.score.value == pytest.approx(((average - ended) ** 2).mean() - wanted, abs=1e-9)
    assert honest.over_average.verdict == "better"
    for place, row in enumerate(honest.topologies):
        assert row.name == ("single", "chain")[place]
        assert row.said == pytest.approx(chances[:, place].mean())
        assert row.solved.value == pytest.approx(ended[:, place].mean())


def test_a_boaster_and_one_who_knows_topologies_only_are_named():
    chances, _ = needy(300, 4)
    table = world(chances, 4, 5)
    boaster = judged(table, sayings(np.clip(chances * 3, 0.02, 0.98))).solving
    assert boaster is not None and boaster.calibration.ece.low > boaster.calibration.ece_when_calibrated
    means = np.tile(chances.mean(axis=0), (300, 1))
    dull = judged(table, sayings(means))
    assert dull.solving is not None and dull.solving.over_average.verdict != "better"
    assert "P(solved | topology), on 2,400 runs of 300 tasks: Brier" in " ".join(dull.notes)
    assert not any("about solving" in warning for warning in dull.warnings)
    shuffled = judged(table, sayings(np.random.default_rng(1).permutation(chances)))
    assert shuffled.solving is not None and shuffled.solving.over_average.verdict == "worse"
    assert any("about solving is further from these runs" in warning for warning in shuffled.warnings)


def test_who_says_nothing_about_solving_is_not_judged_by_it():
    chances, _ = needy(30, 4)
    table = world(chances, 2, 5)
    assert judged(table, router(["single"] * 30)).solving is None
    assert judged(table).solving is None
    half = sayings(chances[:, :1], ("single",))
    found = judged(table, half).solving
    assert found is not None and [row.name for row in found.topologies] == ["single"]
    assert found.calibration.n == 60, "topologies that are not named count nowhere"


def test_runs_of_one_task_are_no_independent_evidence():
    """Tasks that every run solves or none does: the interval of one run a task, not of twenty."""
    solved = (np.random.default_rng(3).random(60) < 0.6).astype(float)
    said = np.full((60, 1), 0.7)
    pairs = np.stack([solved, solved], axis=1)
    once, often = (judged(world(pairs, repeats, 5), sayings(np.tile(said, (1, 2)))).solving for repeats in (1, 20))
    assert once is not None and often is not None
    for name in ("ece", "brier"):
        one, many = getattr(once.calibration, name), getattr(often.calibration, name)
        assert many.value == pytest.approx(one.value)
        assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1), name
