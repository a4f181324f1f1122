from __future__ import annotations

import numpy as np
import pytest

from router_cli.scoring.baselines import fit_baselines, out_of_fold

CLASSES = ("single", "chain", "decentralized", "centralized")
WORDS = ("write one function", "first export then load then verify", "each module alone", "keep services in step")
CHINESE = ("写一个函数", "先导出再转换最后校验", "各个模块分别处理", "多个服务保持一致")


def tasks(count: int, phrases=WORDS, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = [int(kind) for kind in rng.integers(len(phrases), size=count)]
    return [f"{phrases[kind]} {'xyz'[i % 3]}{rng.integers(1000)}" for i, kind in enumerate(y)], y


def accuracy(judged, y):
    return {one.name: float((one.labels == np.array(y)).mean()) for one in judged}


def test_every_baseline_gives_a_distribution_and_the_linear_probe_only_with_features():
    (train, y), (test, _) = tasks(80), tasks(30, seed=1)
    without = fit_baselines(train, y, test, CLASSES, seed=0)
    assert [one.name for one in without] == ["majority", "random", "length", "tf-idf + lr", "tf-idf + knn"]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 200)), rng.normal(size=(30, 200))
    for one in fit_baselines(train, y, test, CLASSES, seed=0, features=features):
        assert one.labels.shape == (30,)
        assert one.probabilities.shape == (30, 4)
        assert one.probabilities.sum(1) == pytest.approx(1)
    assert one.name == "linear probe"


@pytest.mark.parametrize("phrases", [WORDS, CHINESE])
def test_words_tell_the_classes_apart_in_english_and_chinese(phrases):
    (train, y), (test, gold) = tasks(80, phrases), tasks(40, phrases, seed=1)
    found = accuracy(fit_baselines(train, y, test, CLASSES, seed=0), gold)
    assert found["tf-idf + lr"] > 0.95
    assert found["tf-idf + knn"] > 0.9
    assert found["majority"] < 0.6


def test_the_length_rule_learns_from_length_alone():
    train = ["a" * (10 if i % 2 else 90) for i in range(60)]
    y = [i % 2 for i in range(60)]
    found = accuracy(fit_baselines(train, y, ["b" * 12, "b" * 80], CLASSES, seed=0), [1, 0])
    assert found["length"] == 1.0


def test_the_linear_probe_finds_a_direction_among_more_columns_than_rows():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=160)
    features = rng.normal(size=(160, 300))
    features[:, 5:15] += 2 * y[:, None]
    texts = ["the same text"] * 160
    judged = fit_baselines(
        texts[:100], y[:100].tolist(), texts[100:], CLASSES, seed=0, features=(features[:100], features[100:])
    )
    assert accuracy(judged, y[100:])["linear probe"] > 0.9


def test_a_fit_repeats_for_a_seed():
    (train, y), (test, _) = tasks(60), tasks(20, seed=1)
    first, again = (fit_baselines(train, y, test, CLASSES, seed=3) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert one.probabilities.tolist() == other.probabilities.tolist()


def test_rotated_vectors_give_the_fit_that_all_columns_give():
    from sklearn.linear_model import LogisticRegression

    from router_cli.scoring.baselines import _rotated

    rng = np.random.default_rng(0)
    train, test, y = rng.normal(size=(40, 90)), rng.normal(size=(15, 90)), rng.integers(3, size=40)
    near, far = _rotated(train, test)
    assert near.shape[1] <= 40
    whole = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(train, y).predict_proba(test)
    small = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(near, y).predict_proba(far)
    assert small == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("y", [[2], [2, 2, 2], [0, 1], [0, 0, 0, 0, 3]])
def test_tiny_and_one_class_training_sets_fit_without_a_crash(y):
    texts = [f"task number {i}" for i in range(len(y))]
    features = np.arange(len(y) * 3.0).reshape(-1, 3), np.ones((2, 3))
    judged = fit_baselines(texts, y, ["another task", ""], CLASSES, seed=0, features=features)
    assert all(np.isfinite(one.probabilities).all() for one in judged)
    if len(set(y)) == 1:
        for one in judged[2:]:
            assert one.labels.tolist() == [2, 2]
            assert "one class" in one.note


def test_texts_without_anything_in_common_fall_back_to_the_majority_and_say_so():
    judged = fit_baselines(["", "", ""], [0, 1, 1], ["x"], CLASSES, seed=0)
    words = next(one for one in judged if one.name == "tf-idf + lr")
    assert words.labels.tolist() == [1]
    assert words.note.startswith("majority instead")


def test_no_training_row_is_refused():
    with pytest.raises(ValueError, match="at least one training row"):
        fit_baselines([], [], ["x"], CLASSES, seed=0)


def test_out_of_fold_answers_come_from_fits_that_have_not_seen_the_row():
    rng = np.random.default_rng(0)
    y = [0, 1] * 20
    noise = rng.normal(size=(40, 400))  # enough columns to know every seen row by heart
    found = accuracy(out_of_fold(["the same text"] * 40, y, CLASSES, seed=0, features=noise), y)
    assert found["linear probe"] < 0.8
    texts, y = tasks(60)
    judged = out_of_fold(texts, y, CLASSES, seed=0, features=np.eye(4)[y])
    assert accuracy(judged, y)["tf-idf + lr"] > 0.9
    assert accuracy(judged, y)["linear probe"] == 1.0
    assert all(one.note.endswith("(out of fold)") for one in judged)
