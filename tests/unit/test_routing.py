"""The field's metrics of routing against known answers, worked out by hand or by enumeration."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_cli.scoring import routing

# Four tasks: the strong system gains on the first two, loses on the last.
WEAK = np.array([0.0, 0.0, 1.0, 1.0])
STRONG = np.array([1.0, 1.0, 1.0, 0.0])
PERFECT = np.array([0.9, 0.8, 0.2, 0.1])

close = partial(pytest.approx, rel=1e-9, abs=1e-9)


def test_pgr_is_the_recovered_share_of_the_gap():
    assert routing.pgr(np.array([1.0, 0.0, 1.0, 1.0]), WEAK, STRONG) == pytest.approx((0.75 - 0.5) / 0.25)
    assert routing.pgr(WEAK, WEAK, STRONG) == 0
    assert routing.pgr(STRONG, WEAK, STRONG) == 1
    assert np.isnan(routing.pgr(WEAK, STRONG, WEAK)), "where the strong system is not better there is no gap"


def test_the_call_curve_asks_the_strong_system_in_the_order_of_the_score():
    share, quality = routing.call_curve(PERFECT, WEAK, STRONG)
    assert share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert quality.tolist() == [0.5, 0.75, 1, 1, 0.75]


def test_apgr_is_the_area_under_pgr_by_share_of_calls():
    # PGR along the curve: 0, 1, 2, 2, 1; trapezoids of width 1/4.
    assert routing.apgr(PERFECT, WEAK, STRONG) == pytest.approx((0.5 + 1.5 + 2 + 1.5) / 4)


def test_cpt_is_the_least_share_of_calls_that_recovers_the_target():
    assert routing.cpt(PERFECT, WEAK, STRONG, 0.5) == pytest.approx(0.125)
    assert routing.cpt(PERFECT, WEAK, STRONG, 0.8) == pytest.approx(0.2)
    assert routing.cpt(PERFECT, STRONG, WEAK, 0.5) is None


def test_a_router_that_cannot_tell_tasks_apart_is_the_coin():
    score = np.full(4, 0.3)
    assert routing.apgr(score, WEAK, STRONG) == pytest.approx(0.5)
    assert routing.cpt(score, WEAK, STRONG, 0.5) == pytest.approx(0.5)
    assert routing.cpt(score, WEAK, STRONG, 0.8) == pytest.approx(0.8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=2, max_size=12),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_weights_of_the_curve_are_repeated_rows(tasks: list[tuple[int, bool, bool]], counts: list[int]) -> None:
    score, weak, strong = (np.array(column, dtype=float) for column in zip(*tasks, strict=True))
    weights = np.array(counts[: len(tasks)], dtype=float)
    weights[0] += 1
    repeated = np.repeat(np.arange(len(tasks)), weights.astype(int))
    expected = routing.apgr(score[repeated], weak[repeated], strong[repeated])
    found = routing.apgr(score, weak, strong, weights)
    assert np.isclose(expected, found, atol=1e-9, equal_nan=True)


def test_the_hull_is_what_coins_between_points_reach():
    assert routing.hull([(3, 0.7), (1, 0.5), (2, 0.55), (4, 0.6)]) == [(1, 0.5), (3, 0.7)]
    assert routing.hull([(1, 0.5), (1, 0.6), (2, 0.6)]) == [(1, 0.6)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_aiq_is_the_mean_height_of_the_best_coin(points: list[tuple[int, int]]) -> None:
    def best(cost: float) -> float:
        cheapest = min(x for x, _ in points)
        reached = [float(y) for x, y in points if x <= max(cost, cheapest)]
        for (x1, y1), (x2, y2) in itertools.permutations(points, 2):
            if x1 <= cost <= x2 and x1 < x2:
                reached.append(y1 + (y2 - y1) * (cost - x1) / (x2 - x1))
        return max(reached)

    low, high = 0.0, 10.0
    at = np.linspace(low, high, 2001)  # every corner lies on the grid
    expected = np.trapezoid([best(cost) for cost in at], at) / (high - low)
    aiq = routing.aiq([(float(x), float(y)) for x, y in points], low, high)
    assert aiq == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_aiq_of_a_line_is_its_middle_and_needs_two_costs():
    assert routing.aiq([(1, 0.4), (3, 0.8)], 1, 3) == pytest.approx(0.6)
    assert routing.aiq([(1, 0.4)], 1, 1) is None


def test_optimality_of_routerarena():
    solved = np.array([[True, True], [False, True], [False, True], [True, True], [False, False]])
    price = np.array([[1.0, 4.0]] * 5)
    found = routing.optimality(np.array([0, 1, 0, 1, 1]), solved, price)
    # Solvable: the first four. Optimal picks: the first two. Cost ratios 1, 1, 1 (cheaper but wrong), 1/4.
    assert found.selection == pytest.approx(0.5)
    assert found.cost == pytest.approx(3.25 / 4)
    assert found.accuracy == pytest.approx(3 / 4)


def test_optimality_counts_no_decision_as_wrong_and_no_saving():
    found = routing.optimality(np.array([-1, 0]), np.array([[True], [True]]), np.array([[1.0], [1.0]]))
    assert (found.selection, found.cost, found.accuracy) == (0.5, 0.5, 0.5)
    nothing = routing.optimality(np.array([0]), np.array([[False]]), np.array([[1.0]]))
    assert nothing == routing.Optimality(None, None, None)


CALLED = st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(CALLED)
def test_the_metrics_of_routellm_are_the_papers_formulas(tasks: list[tuple[int, float, float]]) -> None:
    score, weak, strong = (np.array(column, dtype=float) for column in zip(*tasks, strict=True))
    low, high = float(np.mean(weak)), float(np.mean(strong))
    if not high - low > 1e-6:
        return
    # Every threshold by itself, from nobody called to everybody: Ong et al. 2024, equations 3 to 5.
    points = []
    for threshold in (np.inf, *sorted(set(score), reverse=True)):
        quality = float(np.mean(np.where(score >= threshold, strong, weak)))
        recovered = (quality - low) / (high - low)
        assert routing.pgr(np.where(score >= threshold, strong, weak), weak, strong) == close(recovered)
        points.append((float(np.mean(score >= threshold)), recovered))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert routing.apgr(score, weak, strong) == pytest.approx(area, rel=1e-9, abs=1e-9 / (high - low))
    for target in (0.5, 0.8):
        found = routing.cpt(score, weak, strong, target)
        assert found is not None
        xs, ys = zip(*points, strict=True)
        assert np.interp(found, xs, ys) == pytest.approx(target, abs=1e-9 / (high - low))
        below = np.linspace(0, found - 1e-9, 50) if found > 1e-9 else []
        assert all(np.interp(x, xs, ys) < target + 1e-9 / (high - low) for x in below), "and no smaller share does"


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 10))
def test_the_optimality_of_routerarena_is_a_plain_sum_over_tasks(data: st.DataObject, systems: int, n: int) -> None:
    cells = st.lists(st.lists(st.booleans(), min_size=systems, max_size=systems), min_size=n, max_size=n)
    costs = st.lists(st.lists(st.floats(0.01, 9), min_size=systems, max_size=systems), min_size=n, max_size=n)
    solved, price = np.array(data.draw(cells)), np.array(data.draw(costs))
    choice = np.array(data.draw(st.lists(st.integers(-1, systems - 1), min_size=n, max_size=n)))
    selected, spared, right, can = 0, 0.0, 0, 0
    for j, row, paid in zip(choice, solved, price, strict=True):
        if not row.any():
            continue
        can += 1
        best = min(cost for cost, does in zip(paid, row, strict=True) if does)
        if j >= 0:
            right += row[j]
            selected += bool(row[j]) and paid[j] == best
            spared += min(1.0, best / paid[j])
    found = routing.optimality(choice, solved, price)
    if not can:
        assert found == routing.Optimality(None, None, None)
    else:
        assert (found.selection, found.cost, found.accuracy) == close((selected / can, spared / can, right / can))
