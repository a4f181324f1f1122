"""Pure functions on arrays: agreement, F1, calibration, selective risk; scoring/intervals.py says how sure they are.

Rows are tasks. Classes are numbered from 0; a prediction of -1 is no valid answer and counts as wrong. A metric takes
row weights of shape (..., n) and returns an array of shape (...): a bootstrap resample is nothing but a row of whole
weights, so that one matrix product judges all resamples at once, and two predictors judged under the same weights
are paired by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from router_cli.schema import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Metric = Callable[["Array"], "Array"]
"""Row weights of shape (..., n) to values of shape (...)."""

BINS = 15
NONE = -1
BLOCK = 4_000_000
"""Cells of the weight matrix that one block of resamples may hold: 32 MB of float64."""


# -- agreement ------------------------------------------------------------------------------------------------


def mean(values: Array, weights: Array | None = None) -> Array:
    """Weighted mean over rows; rows whose value is NaN are left out, and where no row is left the mean is NaN."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    weights = np.ones(len(values)) if weights is None else weights
    return _ratio(weights @ np.where(known, values, 0.0), weights @ known.astype(float))


def mean_of_sums(sums: Array, counts: Array, weights: Array) -> Array:
    """Weighted mean over what the rows count, of which row i holds `counts[i]` that sum to `sums[i]`."""
    return _ratio(weights @ sums, weights @ counts)


def accuracy(gold: Array, predicted: Array, weights: Array | None = None) -> Array:
    """Share of rows whose prediction is the gold class."""
    return mean(gold == predicted, weights)


def confusion(gold: Array, predicted: Array, classes: int, weights: Array | None = None) -> Array:
    """Counts of shape (..., classes, classes + 1): gold by prediction; the last column is "no valid answer"."""
    import numpy as np

    cells = gold * (classes + 1) + np.where(predicted == NONE, classes, predicted)
    one_hot = np.eye(classes * (classes + 1))[cells]
    counts = (np.ones(len(gold)) if weights is None else weights) @ one_hot
    shaped: Array = counts.reshape(*counts.shape[:-1], classes, classes + 1)
    return shaped


def f1(counts: Array) -> Array:
    """F1 of each class from `confusion` counts, shape (..., classes): 2 hits / (support + predicted).

    A class that occurs neither in gold nor among the predictions has no F1: NaN.
    """
    import numpy as np

    hits = np.diagonal(counts[..., :-1], axis1=-2, axis2=-1)
    return _ratio(2 * hits, counts.sum(-1) + counts[..., :-1].sum(-2))


def macro_f1(gold: Array, predicted: Array, classes: int, weights: Array | None = None) -> Array:
    """Mean of the classes' F1; classes in neither gold nor predictions are left out of the mean.

    This is scikit-learn's `f1_score(average="macro")` over the labels that occur.
    """
    import numpy as np

    each = f1(confusion(gold, predicted, classes, weights))
    known = ~np.isnan(each)
    return _ratio(np.where(known, each, 0.0).sum(-1), known.sum(-1))


@dataclass(frozen=True)
class ClassScore:
    """One class: None where a figure has nothing to be counted over."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


def per_class(gold: Array, predicted: Array, classes: int) -> list[ClassScore]:
    """Precision, recall and F1 of each class, in the classes' order."""
    counts = confusion(gold, predicted, classes)
    found = []
    for number, value in enumerate(f1(counts)):
        hits, support, taken = counts[number, number], counts[number].sum(), counts[:, number].sum()
        found.append(
            ClassScore(
                precision=float(hits / taken) if taken else None,
                recall=float(hits / support) if support else None,
                f1=None if math.isnan(value) else float(value),
                support=int(support),
                predicted=int(taken),
            )
        )
    return found


def coin_agreement(gold: Array, predicted: Array, weights: Array | None = None) -> Array:
    """Share of rows on which a coin with the predictions' own mix is expected to name the gold class."""
    import numpy as np

    weights = np.ones(len(gold)) if weights is None else weights
    kinds = np.union1d(gold, predicted)[:, None]
    shares = [_ratio(weights @ (one == kinds).T.astype(float), weights.sum(-1)[..., None]) for one in (gold, predicted)]
    found: Array = (shares[0] * shares[1]).sum(-1)
    return found


def mix_entropy(labels: Array, weights: Array | None = None) -> Array:
    """Shannon entropy, in bits, of the mix of the valid predictions; 0 where there is none."""
    import numpy as np

    weights = np.ones(len(labels)) if weights is None else weights
    counts = weights @ (labels == np.unique(labels[labels != NONE])[:, None]).T.astype(float)
    shares = np.nan_to_num(_ratio(counts, counts.sum(-1)[..., None]))
    found: Array = -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)
    return found + 0.0  # no -0.0


def role_agreement(gold: Sequence[Collection[str]], predicted: Sequence[Collection[str] | None]) -> tuple[Array, Array]:
    """Per row: F1 of the role sets (Dice coefficient), and whether they are equal. None scores 0."""
    import numpy as np

    pairs = [(set(right), set(given or ())) for right, given in zip(gold, predicted, strict=True)]
    overlap = np.array([2 * len(right & given) / max(1, len(right) + len(given)) for right, given in pairs])
    return overlap, np.array([float(right == given) for right, given in pairs])


def step_agreement(gold: Sequence[int], predicted: Sequence[int | None]) -> tuple[Array, Array]:
    """Per row: absolute difference of max_steps (NaN where there is no prediction), and equality (then 0)."""
    import numpy as np

    given = np.array([np.nan if steps is None else steps for steps in predicted], dtype=float)
    difference = np.abs(np.asarray(gold, dtype=float) - given)
    return difference, (difference == 0).astype(float)


def entropy(shares: Collection[float]) -> float:
    """Shannon entropy of a mix, in bits."""
    return 0.0 - sum(share * math.log2(share) for share in shares if share > 0)


def wilson(hits: int, n: int) -> Score:
    """A share with its 95 % score interval (Wilson 1927), which does not collapse at 0 and 1; n is at least 1."""
    z, share = 1.959963984540054, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Score(value=share, low=min(share, max(0.0, centre - half)), high=max(share, min(1.0, centre + half)), n=n)


# -- calibration and selective risk -----------------------------------------------------------------------------


def ece(confidence: Array, correct: Array, weights: Array | None = None, bins: int = BINS) -> Array:
    """Expected calibration error over equal-width bins (Guo et al. 2017): sum over bins of |confidence - accuracy|,
    weighted by the bin's share of rows."""
    import numpy as np

    weights = np.ones(len(confidence)) if weights is None else weights
    gaps = np.eye(bins)[_bin(confidence, bins)] * (confidence - correct)[:, None]
    return _ratio(np.abs(weights @ gaps).sum(-1), weights.sum(-1))


def ece_interval(
    confidence: Array,
    correct: Array,
    resamples: int = 2000,
    seed: int = 42,
    bins: int = BINS,
    groups: Array | None = None,
) -> Score:
    """The ECE with a 95 % interval for the one that endless tasks would show, in the same bins.

    On few rows the ECE is biased upwards, so that a percentile interval of it hardly ever holds the truth (in 16 of 100
    simulations at 200 rows). This inverts a test: the bins' gaps are scaled up and down, bootstrap noise is added, and
    every scale under which the measured ECE is no surprise is in. The measured value itself may lie above it. Rows of
    one group, numbered from 0 by `groups`, are drawn together: runs of one task are not independent.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = np.eye(bins)[_bin(confidence, bins)] * (confidence - correct)[:, None]
    if groups is not None:
        members = np.eye(int(groups.max()) + 1)[groups]
        rows = members.T @ rows * (members.shape[1] / len(rows))  # the mean over groups is that over rows
    n = len(rows)
    gaps = rows.mean(axis=0)
    block = max(1, BLOCK // n)
    counts = [min(block, resamples - start) for start in range(0, resamples, block)]
    noise = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size=count) @ rows for count in counts]) / n - gaps
    value = float(np.abs(gaps).sum())

    def scale(percentile: float) -> float:
        """The scale under which so many percent of the draws lie below the measured value."""

        def drawn(factor: float) -> float:
            return float(np.percentile(np.abs(factor * gaps + noise).sum(axis=1), percentile))

        low, high = 0.0, 2.0
        if value == 0 or drawn(low) >= value:
            return low
        while drawn(high) < value:  # ends: the draws grow with the factor
            high *= 2
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if drawn(middle) < value else (low, middle)
        return low

    return Score(value=value, low=scale(97.5) * value, high=min(1.0, scale(2.5) * value), n=n)


def ece_when_calibrated(confidence: Array, seed: int, simulations: int = 1000) -> float:
    """Mean ECE of a router that is right exactly as often as these confidences say.

    The ECE of few rows is far above 0 even then (.10 at 100 rows, .05 at 500), so a measured one is read against this.
    """
    import numpy as np

    rng, count = np.random.default_rng(seed), max(1, min(simulations, BLOCK // len(confidence)))
    one_hot = np.eye(BINS)[_bin(confidence, BINS)]
    gaps = (confidence - (rng.random((count, len(confidence))) < confidence)) @ one_hot
    return float(np.abs(gaps).sum(-1).mean() / len(confidence))


def brier(probabilities: Array, gold: Array, weights: Array | None = None) -> Array:
    """Multi-class Brier score (Brier 1950): squared distance to the one-hot truth, from 0 to 2, mean over rows."""
    import numpy as np

    return mean(((probabilities - np.eye(probabilities.shape[1])[gold]) ** 2).sum(-1), weights)


@dataclass(frozen=True)
class Bin:
    """One bin of the reliability diagram; `accuracy` has a Wilson interval."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: Score


def reliability(confidence: Array, correct: Array, bins: int = BINS) -> list[Bin]:
    """The bins that hold rows, from low to high confidence."""
    place = _bin(confidence, bins)
    found = []
    for number in range(bins):
        if count := int((inside := place == number).sum()):
            right = wilson(int(correct[inside].sum()), count)
            found.append(Bin(number / bins, (number + 1) / bins, count, float(confidence[inside].mean()), right))
    return found


def risk_coverage(confidence: Array, correct: Array) -> tuple[Array, Array, Array]:
    """Arrays (coverage, risk, threshold): error share among the rows answered when only those with at least
    `threshold` confidence are, from the surest on. Rows of equal confidence enter together."""
    import numpy as np

    order, ends = _surest_first(confidence)
    errors = np.cumsum(1.0 - correct[order])
    return (ends + 1) / len(order), errors[ends] / (ends + 1), confidence[order][ends]


def aurc(confidence: Array, correct: Array, weights: Array | None = None) -> Array:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017), lower is better.

    The mean, over rows, of the risk when all rows at least as sure are answered; with confidences that are all equal
    this is the error share, and confidence that says nothing about errors gives about that.
    """
    import numpy as np

    order, ends = _surest_first(confidence)
    ordered = (np.ones(len(order)) if weights is None else weights)[..., order]
    covered = np.cumsum(ordered, -1)[..., ends]
    risk = _ratio(np.cumsum(ordered * (1.0 - correct[order]), -1)[..., ends], covered)
    entering = np.diff(covered, axis=-1, prepend=0.0)
    return _ratio(np.where(entering > 0, risk * entering, 0.0).sum(-1), covered[..., -1])


# -- helpers ------------------------------------------------------------------------------------------------------


def _ratio(above: Array, below: Array) -> Array:
    import numpy as np

    above, below = np.broadcast_arrays(np.asarray(above, dtype=float), np.asarray(below, dtype=float))
    ratio: Array = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return ratio


def _bin(confidence: Array, bins: int) -> Array:
    """Bins are open to the left, (low, high], but for the first, which holds 0."""
    import numpy as np

    places: Array = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    return places


def _surest_first(confidence: Array) -> tuple[Array, Array]:
    """Rows from the surest on, and the last place of each group of equal confidence."""
    import numpy as np

    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)
    return order, ends
