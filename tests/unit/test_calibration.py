"""Calibration: what was made too sure is found out, distributions stay distributions, the curve picks thresholds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from router_cli.scoring.calibration import BIAS_ROWS, LEAST_COVERED, Calibration, Point, fit

NAMES = ("single", "chain", "decentralized", "centralized")


def softmax(logits: Any) -> Any:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def simulated(n: int, temperature: float, biases: tuple[float, ...] = (0, 0, 0, 0), seed: int = 0) -> tuple[Any, Any]:
    """A model's distributions, and gold drawn from those that temperature and biases make of them."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, (n, 4))
    gold = np.array([rng.choice(4, p=one) for one in softmax(true)])
    return softmax((true - np.array(biases)) * temperature), gold


def calibration(**values: Any) -> Calibration:
    curve = [(0.9, 0.2, 0.95), (0.6, 0.5, 0.9), (0.5, 0.7, 0.92), (0.2, 1.0, 0.8)]
    given = {"temperature": 1.0, "biases": {}, "n": 100, "dtype": "float32"} | values
    points = tuple(Point(threshold=t, coverage=c, agreement=a) for t, c, a in curve)
    return Calibration(**{"ece_before": 0.1, "ece_after": 0.1, "ece_floor": 0.1, "curve": points, **given})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_a_model_that_is_wrongly_sure_is_recovered(temperature: float) -> None:
    found = fit(*simulated(4000, temperature), NAMES, "float32")
    assert found.temperature == pytest.approx(temperature, rel=0.08)
    assert all(abs(bias) < 0.1 for bias in found.biases.values())
    assert (found.n, found.dtype) == (4000, "float32")


def test_the_biases_of_a_model_that_favours_a_topology_are_recovered() -> None:
    biases = (0.9, -0.3, -0.3, -0.3)
    found = fit(*simulated(4000, 2.0, biases), NAMES, "float32")
    assert found.temperature == pytest.approx(2.0, rel=0.08)
    assert list(found.biases.values()) == pytest.approx(biases, abs=0.12) and tuple(found.biases) == NAMES


@pytest.mark.parametrize(("n", "slack"), [(100, 0.05), (300, 0.03), (2000, 0.015)])
def test_the_calibration_error_falls_to_its_noise_floor(n: int, slack: float) -> None:
    shares, gold = simulated(n, 4.0)
    found = fit(shares, gold, NAMES, "float32")
    assert found.ece_before > 0.2 and found.ece_after < found.ece_before / 1.5
    assert found.ece_after <= found.ece_floor + slack
    assert 0.3 / math.sqrt(n) < found.ece_floor < 1.5 / math.sqrt(n)


def test_few_tasks_get_a_temperature_alone_and_never_make_certain() -> None:
    shares, gold = simulated(BIAS_ROWS - 1, 3.0, (0.9, -0.3, -0.3, -0.3))
    assert fit(shares, gold, NAMES, "float32").biases == {}
    assert set(fit(*simulated(BIAS_ROWS, 3.0), NAMES, "float32").biases) == set(NAMES)
    # Temperature alone leaves the order of the topologies as it was.
    sure = np.array([[0.7, 0.1, 0.1, 0.1]])
    for n in (1, 3):
        found = fit(np.repeat(sure, n, 0), np.zeros(n, dtype=int), NAMES, "float32")
        assert 0.3 < found.temperature < 1
        assert 0.7 < found.apply(dict(zip(NAMES, sure[0].tolist(), strict=True)))["single"] < 0.95
        assert found.n == n and found.curve[-1].coverage == 1


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda shares: sum(shares) > 0.01),
    st.floats(0.05, 20),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_calibrated_distributions_sum_to_one(shares: list[float], temperature: float, biases: list[float]) -> None:
    given = {name: share / sum(shares) for name, share in zip(NAMES, shares, strict=True)}
    found = calibration(temperature=temperature, biases=dict(zip(NAMES, biases, strict=True))).apply(given)
    assert tuple(found) == NAMES and sum(found.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found.values())
    same = calibration().apply(given)
    assert same == pytest.approx(given, abs=1e-9)


def test_what_is_applied_is_what_was_fitted() -> None:
    shares, gold = simulated(2000, 3.0, (0.6, -0.2, -0.2, -0.2))
    found = fit(shares, gold, NAMES, "float32")
    rows = [found.apply(dict(zip(NAMES, one, strict=True))) for one in shares.tolist()]
    confidence = np.array([max(row.values()) for row in rows])
    right = np.array([max(row, key=row.__getitem__) for row in rows]) == np.array(NAMES)[gold]
    assert confidence.mean() == pytest.approx(right.mean(), abs=0.02)
    for point in found.curve:
        kept = confidence >= point.threshold
        assert kept.mean() == pytest.approx(point.coverage, abs=2e-3)
        assert right[kept].mean() == pytest.approx(point.agreement, abs=5e-3)


def test_handing_on_the_unsure_beats_handing_on_at_random() -> None:
    shares, gold = simulated(2000, 3.0)
    curve = fit(shares, gold, NAMES, "float32").curve
    overall = curve[-1].agreement
    assert [point.coverage for point in curve] == sorted(point.coverage for point in curve)
    assert curve[0].coverage * 2000 >= LEAST_COVERED and curve[-1].coverage == 1
    assert len(curve) <= 40 and curve[0].threshold > curve[-1].threshold
    assert all(point.agreement > overall for point in curve[:-1])
    assert curve[len(curve) // 2].agreement > overall + 0.05


def test_thresholds_for_an_agreement_and_for_a_share_of_escalations() -> None:
    found = calibration()
    assert found.for_agreement(0.91) == found.curve[2]  # not the first that is good enough: the one that keeps most
    assert found.for_agreement(0.94) == found.curve[0] and found.for_agreement(0.1) == found.curve[3]
    assert found.for_agreement(0.96) is None
    assert found.for_escalations(0.0) == found.curve[3] and found.for_escalations(0.3) == found.curve[2]
    assert found.for_escalations(0.79) == found.curve[1] and found.for_escalations(5.0) == found.curve[0]


@pytest.mark.parametrize(
    "change", [{"temperature": 0}, {"temperature": math.nan}, {"biases": {"single": "x"}}, {"n": 0}]
)
def test_nonsense_is_no_calibration(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate({**calibration().model_dump(), **change})
    assert Calibration.model_validate_json(calibration().model_dump_json()) == calibration()
