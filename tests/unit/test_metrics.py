from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import entropy as scipy_entropy
from sklearn import metrics as reference

from router_cli.schema import Score
from router_cli.scoring import intervals, metrics

K = 4
rows = st.lists(st.tuples(st.integers(0, K - 1), st.integers(-1, K - 1)), min_size=1, max_size=60)
shares = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


close = partial(pytest.approx, rel=1e-9, abs=1e-9)
"""What "the same as the reference" means, on figures that are at most 2."""


def arrays(pairs):
    first, second = zip(*pairs, strict=True)
    return np.array(first), np.array(second)


def seeded(n: int, skill: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(K, size=n)
    return gold, np.where(rng.random(n) < skill, gold, rng.integers(K, size=n))


@given(rows)
def test_accuracy_macro_f1_and_confusion_are_those_of_scikit_learn(pairs):
    gold, predicted = arrays(pairs)
    occurring = sorted({*gold.tolist(), *predicted.tolist()} - {-1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = reference.f1_score(gold, predicted, labels=occurring, average="macro", zero_division=0)
    assert metrics.macro_f1(gold, predicted, K) == close(wanted)
    assert metrics.accuracy(gold, predicted) == close(reference.accuracy_score(gold, predicted))
    whole = reference.confusion_matrix(gold, predicted, labels=[0, 1, 2, 3, -1])
    assert metrics.confusion(gold, predicted, K).tolist() == whole[:K].tolist()


@given(rows)
def test_per_class_figures_are_those_of_scikit_learn_and_none_where_nothing_is_counted(pairs):
    gold, predicted = arrays(pairs)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        gold, predicted, labels=range(K), zero_division=0
    )
    for number, found in enumerate(metrics.per_class(gold, predicted, K)):
        assert found.support == support[number]
        assert found.predicted == (predicted == number).sum()
        assert found.precision == (close(precision[number]) if found.predicted else None)
        assert found.recall == (close(recall[number]) if found.support else None)
        assert found.f1 == (close(f1[number]) if found.support or found.predicted else None)


@given(rows, st.integers(0, 2**32))
def test_weights_judge_resamples_as_if_the_rows_were_repeated(pairs, seed):
    gold, predicted = arrays(pairs)
    picks = np.random.default_rng(seed).integers(len(gold), size=(3, len(gold)))
    weights = np.array([np.bincount(pick, minlength=len(gold)) for pick in picks]).astype(float)
    confidence = np.linspace(0.05, 1, len(gold))
    correct = gold == predicted
    for metric in (
        lambda take, w: metrics.macro_f1(gold[take], predicted[take], K, w),
        lambda take, w: metrics.accuracy(gold[take], predicted[take], w),
        lambda take, w: metrics.ece(confidence[take], correct[take], w),
        lambda take, w: metrics.aurc(confidence[take], correct[take], w),
    ):
        at_once = metric(np.arange(len(gold)), weights)
        assert at_once == close([float(metric(pick, None)) for pick in picks])


@given(st.lists(st.tuples(st.integers(0, K - 1), st.integers(0, 2**32)), min_size=1, max_size=40))
def test_brier_is_that_of_scikit_learn(pairs):
    gold = np.array([kind for kind, _ in pairs])
    probabilities = np.array([np.random.default_rng(seed).dirichlet(np.ones(K)) for _, seed in pairs])
    wanted = reference.brier_score_loss(gold, probabilities, labels=range(K), scale_by_half=False)
    assert metrics.brier(probabilities, gold) == close(wanted)


@given(shares)
def test_ece_is_the_plain_sum_over_fifteen_bins(pairs):
    confidence, correct = arrays(pairs)
    edges, wanted = np.linspace(0, 1, 16), 0.0
    for i in range(15):
        inside = (confidence > edges[i]) & (confidence <= edges[i + 1]) | ((i == 0) & (confidence == 0))
        if inside.any():
            wanted += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert metrics.ece(confidence, correct) == close(wanted)
    bins = metrics.reliability(confidence, correct)
    assert sum(one.count for one in bins) == len(confidence)
    assert sum(one.count * abs(one.confidence - one.accuracy.value) for one in bins) / len(confidence) == close(wanted)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    edge = metrics.reliability(np.array([0.0, 3 / 15, 1.0]), np.ones(3))
    assert [round(15 * one.high) for one in edge] == [1, 3, 15]


def test_a_perfectly_calibrated_router_shows_the_known_ece_of_few_rows():
    confidence = np.random.default_rng(0).uniform(0.25, 1, size=100)
    assert 0.07 < metrics.ece_when_calibrated(confidence, seed=0) < 0.13
    assert metrics.ece_when_calibrated(np.tile(confidence, 20), seed=0) < 0.04


def test_aurc_is_the_mean_risk_over_coverages_and_rewards_knowing_ones_errors():
    correct = np.array([1, 1, 0, 1, 0])
    sure = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert metrics.aurc(sure, correct) == pytest.approx((0 + 0 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert metrics.aurc(1 - sure, correct) > metrics.aurc(sure, correct)


@given(shares)
def test_aurc_is_the_plain_mean_over_rows_of_the_risk_at_their_confidence(pairs):
    confidence, correct = arrays(pairs)
    wanted = np.mean([1 - correct[confidence >= own].mean() for own in confidence])
    assert metrics.aurc(confidence, correct.astype(float)) == close(wanted)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_that_of_scipy(n, part):
    hits = round(part * n)
    wanted = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    found = metrics.wilson(hits, n)
    assert (found.value, found.low, found.high) == (close(hits / n), close(wanted.low), close(wanted.high))


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd"))), min_size=1))
def test_role_overlap_is_the_f1_of_scikit_learn(pairs):
    gold, predicted = ([[name in one for name in "abcd"] for one in side] for side in zip(*pairs, strict=True))
    overlap, equal = metrics.role_agreement(*zip(*pairs, strict=True))
    assert overlap.mean() == close(reference.f1_score(gold, predicted, average="samples", zero_division=0))
    assert equal.mean() == close(reference.accuracy_score(gold, predicted))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_entropy_is_that_of_scipy(parts):
    shares = np.array(parts) / sum(parts)
    assert metrics.entropy(shares.tolist()) == close(scipy_entropy(shares, base=2))


@given(st.lists(st.integers(-1, K - 1), min_size=1, max_size=40), st.data())
def test_the_entropy_and_the_coin_of_a_mix_are_those_of_their_formulas(predicted, data):
    gold = data.draw(st.lists(st.integers(0, K - 1), min_size=len(predicted), max_size=len(predicted)))
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(predicted), max_size=len(predicted)).filter(any))
    rows = np.repeat(np.arange(len(predicted)), drawn)  # a weight is how often a row is there
    for weights, chosen in ((None, np.arange(len(predicted))), (np.array(drawn, dtype=float), rows)):
        g, p = np.array(gold)[chosen], np.array(predicted)[chosen]
        counts = [int((p == kind).sum()) for kind in range(K)]
        shares = [count / max(1, sum(counts)) for count in counts]
        assert metrics.mix_entropy(np.array(predicted), weights) == close(metrics.entropy(shares))
        coin = np.mean([[one == other for other in p] for one in g])
        assert metrics.coin_agreement(np.array(gold), np.array(predicted), weights) == close(coin)


def test_equal_confidences_have_the_error_share_as_risk_whatever_the_order_of_rows():
    correct = np.array([1, 0, 1, 0])
    assert metrics.aurc(np.full(4, 0.7), correct) == pytest.approx(0.5)
    coverage, risk, threshold = metrics.risk_coverage(np.array([0.9, 0.7, 0.7, 0.7]), correct)
    assert (coverage.tolist(), threshold.tolist()) == ([0.25, 1.0], [0.9, 0.7])
    assert risk.tolist() == [0.0, 0.5]


def test_roles_are_compared_as_sets_and_a_missing_decision_scores_nothing():
    overlap, equal = metrics.role_agreement([("a", "b"), ("a", "b"), ("a",)], [("b", "a"), ("b", "c"), None])
    assert overlap.tolist() == [1.0, 0.5, 0.0]
    assert equal.tolist() == [1.0, 0.0, 0.0]


def test_steps_of_a_missing_decision_are_wrong_but_at_no_distance():
    difference, equal = metrics.step_agreement([1, 5, 3], [1, 2, None])
    assert metrics.mean(difference) == pytest.approx(1.5)
    assert metrics.mean(equal) == pytest.approx(1 / 3)


def test_wilson_is_the_textbook_interval_and_does_not_collapse():
    found = metrics.wilson(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4901, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert metrics.wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert metrics.wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert metrics.wilson(10, 10).high == 1.0


def test_the_bootstrap_repeats_for_a_seed_and_has_the_normal_width():
    gold, predicted = seeded(400, 0.6)
    named = {"accuracy": partial(metrics.accuracy, gold, predicted)}
    first, again = (intervals.bootstrap(named, 400, 2000, seed=7).score("accuracy") for _ in range(2))
    assert first == again
    assert first != intervals.bootstrap(named, 400, 2000, seed=8).score("accuracy")
    share = first.value
    assert first.high - first.low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 400), rel=0.1)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32))
def test_blocks_of_resamples_do_not_change_the_number_of_draws(seed):
    gold, predicted = seeded(50, 0.5, seed)
    metrics_block = {"f1": partial(metrics.macro_f1, gold, predicted, K)}
    assert intervals.bootstrap(metrics_block, 50, 333, seed).draws["f1"].shape == (333,)


def test_a_paired_difference_is_narrower_than_the_two_intervals_apart():
    gold, good = seeded(300, 0.7)
    slightly_worse = good.copy()
    slightly_worse[np.flatnonzero(good == gold)[:12]] = -1
    found = intervals.bootstrap(
        {"good": partial(metrics.accuracy, gold, good), "worse": partial(metrics.accuracy, gold, slightly_worse)}, 300
    )
    difference = found.difference("good", "worse")
    assert difference.value == pytest.approx(12 / 300)
    assert difference.low > 0
    assert found.score("good").low < found.score("worse").high
    assert found.difference("worse", "good").high == pytest.approx(-difference.low)


def test_a_verdict_is_better_worse_or_the_number_of_tasks_that_would_tell():
    assert str(intervals.verdict(Score(value=0.1, low=0.02, high=0.2, n=100))) == "better"
    assert str(intervals.verdict(Score(value=-0.1, low=-0.2, high=-0.02, n=100))) == "worse"
    unsure = intervals.verdict(Score(value=0.05, low=-0.05, high=0.15, n=100))
    assert (unsure.word, unsure.tasks) == ("cannot tell", 400)
    assert str(unsure) == "cannot tell; about 400 tasks would"
    assert intervals.verdict(Score(value=-0.05, low=-0.15, high=0.05, n=100)).tasks == 400
    assert str(intervals.verdict(Score(value=0.0, low=-0.1, high=0.1, n=100))) == "cannot tell; no difference seen"


@pytest.mark.parametrize("value", [1e-4, -1e-4, 1e-7])
def test_a_difference_that_nobody_could_ever_tell_gets_words_and_no_absurd_number(value):
    found = intervals.verdict(Score(value=value, low=value - 0.1, high=value + 0.1, n=100))
    assert (found.word, found.tasks, found.beyond) == ("cannot tell", None, True)
    assert str(found) == "cannot tell; not even 100,000 tasks would"
    rest = intervals.verdict(Score(value=value * 1e-12, low=-0.1, high=0.1, n=100))
    assert str(rest) == "cannot tell; no difference seen", "a rest of rounding is no difference"


def test_entropy_is_in_bits():
    assert metrics.entropy([0.25] * 4) == 2.0
    assert metrics.entropy([1.0, 0.0]) == 0.0
    assert metrics.entropy([0.5, 0.5]) == 1.0


def test_that_many_tasks_do_tell():
    gold, predicted = seeded(150, 0.5)
    other, right = predicted.copy(), predicted == gold
    other[np.flatnonzero(right)[:9]] = -1
    other[~right] = np.where(np.arange((~right).sum()) < 5, gold[~right], predicted[~right])

    def difference(times: int):
        truth, first, second = (np.tile(column, times) for column in (gold, predicted, other))
        named = {"a": partial(metrics.accuracy, truth, first), "b": partial(metrics.accuracy, truth, second)}
        return intervals.bootstrap(named, len(truth)).difference("a", "b")

    unsure = intervals.verdict(difference(1))
    assert unsure.word == "cannot tell"
    assert unsure.tasks is not None
    assert intervals.verdict(difference(math.ceil(1.25 * unsure.tasks / 150))).word == "better"
    assert intervals.verdict(difference(max(1, math.floor(0.75 * unsure.tasks / 150)))).word == "cannot tell"


def test_a_coin_of_the_same_mix_is_recognised_and_a_router_is_not_taken_for_one():
    gold, predicted = seeded(200, 0.5)
    assert intervals.coin_test(gold, predicted) < 0.01
    shuffled = np.random.default_rng(1).permutation(predicted)
    assert intervals.coin_test(gold, shuffled) > 0.05
    assert metrics.coin_agreement(gold, shuffled) == pytest.approx(metrics.coin_agreement(gold, predicted))
