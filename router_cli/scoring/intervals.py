"""How sure a figure is: intervals by resampling tasks, paired differences and tests, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from router_cli.schema import Score
from router_cli.scoring.metrics import BLOCK, Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True)
class Resampled:
    """Metrics of the same `n` rows: their values, and their values under the same resamples."""

    n: int
    values: dict[str, float]
    draws: dict[str, Array]

    def score(self, name: str) -> Score:
        """A metric with its 95 % percentile interval (Efron 1979); NaN where the metric is defined nowhere."""
        return self._interval(self.values[name], self.draws[name])

    def difference(self, first: str, second: str) -> Score:
        """`first - second`, with the interval of the paired difference: both were drawn on the same rows."""
        return self._interval(self.values[first] - self.values[second], self.draws[first] - self.draws[second])

    def biased(self, name: str, most: float) -> Score:
        """As `score`, for a metric from 0 to `most` that few rows bias, such as an entropy.

        Resamples are as biased against the sample as the sample against the truth: their interval is moved back over
        both. It always holds the measured value.
        """
        value, draws = self.values[name], self.draws[name]
        moved = self._interval(value, draws + 2 * (value - float(draws.mean())))
        return moved.model_copy(
            update={"low": max(0.0, min(moved.low, value)), "high": min(most, max(moved.high, value))}
        )

    def _interval(self, value: float, draws: Array) -> Score:
        import numpy as np

        kept = draws[~np.isnan(draws)]
        low, high = np.percentile(kept, [2.5, 97.5]) if len(kept) else (math.nan, math.nan)
        return Score(value=value, low=float(low), high=float(high), n=self.n)


def bootstrap(metrics: Mapping[str, Metric], n: int, resamples: int = 2000, seed: int = 42) -> Resampled:
    """Judge the named metrics on `n` rows and on `resamples` resamples of them, the same for all metrics."""
    import numpy as np

    values = {name: float(metric(np.ones(n))) for name, metric in metrics.items()}
    draws: dict[str, list[Array]] = {name: [] for name in metrics}
    rng, block = np.random.default_rng(seed), max(1, BLOCK // n)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        rows = rng.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        weights = np.bincount(rows.ravel(), minlength=count * n).reshape(count, n).astype(float)
        for name, metric in metrics.items():
            draws[name].append(metric(weights))
    return Resampled(n, values, {name: np.concatenate(parts) for name, parts in draws.items()})


def allowing(difference: Score, luck: Array) -> Score:
    """A difference whose interval also allows for `luck`: what the same difference is where only chance makes it.

    Widened to what a test by `luck` would not reject at 5 %. The bootstrap sees too little of it where few rows differ.
    """
    import numpy as np

    low, high = np.percentile(luck, [2.5, 97.5])
    widened = {
        "low": min(difference.low, difference.value - high),
        "high": max(difference.high, difference.value - low),
    }
    return difference.model_copy(update={name: float(value) for name, value in widened.items()})


MOST_TASKS = 100_000
"""Nobody labels or runs more tasks than this: a difference that needs more is no difference to anybody."""


@dataclass(frozen=True)
class Verdict:
    """A paired difference in words. `tasks` is how many would tell where these cannot, None where nothing would.

    `beyond` says that a difference was seen, but that more than `MOST_TASKS` would have to tell it.
    """

    word: Literal["better", "worse", "cannot tell"]
    tasks: int | None = None
    beyond: bool = False

    def __str__(self) -> str:
        if self.word != "cannot tell":
            return self.word
        if self.beyond:
            return f"cannot tell; not even {MOST_TASKS:,} tasks would"
        return f"cannot tell; about {self.tasks:,} tasks would" if self.tasks else "cannot tell; no difference seen"


def verdict(difference: Score) -> Verdict:
    """Better or worse where the interval leaves 0 out, else how many tasks would tell.

    The interval's half towards 0 shrinks with 1/sqrt(n), so a difference that stays as it is leaves 0 out from about
    n (half / difference)^2 tasks on; rounded up to two digits.
    """
    if difference.low > 0:
        return Verdict("better")
    if difference.high < 0:
        return Verdict("worse")
    if abs(difference.value) < 1e-9:  # sums of shares that cancel leave a rest in the last digits
        return Verdict("cannot tell")
    half = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    # One more than now at least: an end that lies on 0 itself has a half as wide as the difference.
    needed = max(difference.n + 1, math.ceil(difference.n * (half / difference.value) ** 2))
    if needed > MOST_TASKS:
        return Verdict("cannot tell", beyond=True)
    unit = 10 ** max(0, len(str(needed)) - 2)
    return Verdict("cannot tell", -(-needed // unit) * unit)


def mcnemar(first: Array, second: Array) -> float | None:
    """Exact two-sided McNemar test (1947) of two rows of zeros and ones; rows with NaN are left out.

    None where a value is anything else: means of repeats and coins are no single outcomes.
    """
    import numpy as np

    known = ~np.isnan(first) & ~np.isnan(second)
    a, b = first[known], second[known]
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        return None
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def coin_test(gold: Array, predicted: Array, resamples: int = 2000, seed: int = 42) -> float:
    """The share of shuffled copies of the predictions that agree with gold at least as often.

    A one-sided permutation test against a coin of the predictions' own mix (Ojala and Garriga 2010).
    """
    import numpy as np

    rng, n = np.random.default_rng(seed), len(gold)
    observed, block, as_good = int((gold == predicted).sum()), max(1, BLOCK // n), 0
    for start in range(0, resamples, block):
        shuffled = rng.permuted(np.tile(predicted, (min(block, resamples - start), 1)), axis=1)
        as_good += int(((shuffled == gold).sum(1) >= observed).sum())
    return (1 + as_good) / (1 + resamples)
