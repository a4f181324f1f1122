"""Probabilities that mean something: temperature and class biases, fitted on held-out tasks by likelihood.

A trained model is mostly too sure of itself. One temperature on the log probabilities mends that (Guo et al. 2017); a
bias for each topology (their vector scaling, with one temperature for all) mends that it favours one. The fit is by
maximum likelihood with a unit normal prior on inverse temperature and biases: it is worth about one task, and keeps a
handful of held-out tasks that are all right from making the router certain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from router_cli.schema import Record
from router_cli.scoring import metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BIAS_ROWS = 100
"""Held-out tasks from which on biases are fitted; with fewer, the temperature alone."""

LEAST_COVERED = 10
"""Tasks that a point of the curve is counted over at least: the surest three being right says nothing."""

_FOLDS = 5
_CURVE_POINTS = 40
_TINY = 1e-12


class Point(Record):
    """A threshold on the confidence: the share of tasks at least as sure, and that of these which agree with labels."""

    threshold: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    agreement: float = Field(ge=0, le=1)


class Calibration(Record):
    """What `train` stores of the probabilities it measured on `n` held-out tasks, and what `infer` makes of them.

    Errors are expected calibration errors of the chosen topology's probability (15 bins): the model's own, after
    calibration (each task by a fit on other tasks), and that of a perfectly calibrated router of the same confidences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(gt=0)
    biases: dict[str, float]
    n: int = Field(ge=1)
    dtype: str
    ece_before: float = Field(ge=0, le=1)
    ece_after: float = Field(ge=0, le=1)
    ece_floor: float = Field(ge=0, le=1)
    curve: tuple[Point, ...] = Field(min_length=1)

    def apply(self, shares: Mapping[str, float]) -> dict[str, float]:
        """The calibrated distribution of a distribution over topologies; sums to 1, in the same order."""
        logits = {
            name: math.log(max(share, _TINY)) / self.temperature + self.biases.get(name, 0.0)
            for name, share in shares.items()
        }
        highest = max(logits.values())
        weights = {name: math.exp(logit - highest) for name, logit in logits.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def for_agreement(self, wanted: float) -> Point | None:
        """The point that keeps most tasks with at least so much agreement; None where none has."""
        return max((p for p in self.curve if p.agreement >= wanted), key=lambda p: p.coverage, default=None)

    def for_escalations(self, share: float) -> Point | None:
        """The point that hands on the greatest share of tasks up to `share`; None where all hand on more."""
        return min((p for p in self.curve if 1 - p.coverage <= share + 1e-9), key=lambda p: p.coverage, default=None)


def fit(shares: Array, gold: Array, names: tuple[str, ...], dtype: str, seed: int = 42) -> Calibration:
    """Fit on the model's distributions `shares` [n, topologies] of tasks whose topology is `gold` [n].

    `dtype` is what the model computed in: other types give other probabilities. Needs one task at least.
    """
    import numpy as np

    with_biases = len(gold) >= BIAS_ROWS
    inverse, biases = _scaled(shares, gold, with_biases)
    held_out = np.empty_like(shares)
    folds = np.random.default_rng(seed).permutation(len(gold)) % _FOLDS
    for fold in range(_FOLDS):
        inside = folds == fold
        # Of one task alone there is no other to fit on: the prior is left.
        held_out[inside] = _probabilities(shares[inside], *_scaled(shares[~inside], gold[~inside], with_biases))
    final = _probabilities(shares, inverse, biases)
    confidence = held_out.max(1)
    return Calibration(
        temperature=round(1 / inverse, 6),
        biases={name: round(float(bias), 6) for name, bias in zip(names, biases, strict=True)} if with_biases else {},
        n=len(gold),
        dtype=dtype,
        ece_before=_ece(shares, gold),
        ece_after=_ece(held_out, gold),
        ece_floor=round(metrics.ece_when_calibrated(confidence, seed), 4),
        curve=_curve(final.max(1), final.argmax(1) == gold),
    )


def _scaled(shares: Array, gold: Array, with_biases: bool) -> tuple[float, Array]:
    """The inverse temperature and the biases of greatest posterior probability; a convex problem."""
    import numpy as np
    from scipy.optimize import minimize

    logs, classes = np.log(np.maximum(shares, _TINY)), shares.shape[1]
    truth = np.eye(classes)[gold]

    def loss(knobs: Array) -> tuple[float, Array]:
        inverse, biases = knobs[0], knobs[1:]
        error = _probabilities(shares, inverse, biases) - truth
        chosen = np.maximum(_probabilities(shares, inverse, biases)[np.arange(len(gold)), gold], _TINY)
        value = -np.log(chosen).sum() + ((inverse - 1) ** 2 + (biases**2).sum()) / 2
        return float(value), np.array([(error * logs).sum() + inverse - 1, *(error.sum(0) + biases)])

    bounds = [(0.02, 50.0), *([(None, None) if with_biases else (0.0, 0.0)] * classes)]
    found = minimize(loss, np.array([1.0, *[0.0] * classes]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(found[0]), found[1:]


def _probabilities(shares: Array, inverse: float, biases: Array) -> Array:
    import numpy as np

    logits = np.log(np.maximum(shares, _TINY)) * inverse + biases
    weights = np.exp(logits - logits.max(1, keepdims=True))
    found: Array = weights / weights.sum(1, keepdims=True)
    return found


def _ece(shares: Array, gold: Array) -> float:
    return round(float(metrics.ece(shares.max(1), shares.argmax(1) == gold)), 4)


def _curve(confidence: Array, correct: Array) -> tuple[Point, ...]:
    """The risk-coverage curve in a few points, from the surest on; its last keeps everything."""
    import numpy as np

    coverage, risk, threshold = metrics.risk_coverage(confidence, correct)
    enough = np.flatnonzero(coverage * len(confidence) >= min(LEAST_COVERED, len(confidence)) - 1e-9)
    kept = np.unique(enough[np.linspace(0, len(enough) - 1, min(_CURVE_POINTS, len(enough))).round().astype(int)])
    return tuple(
        # Rounded down, so that a task of just that confidence stays above the threshold.
        Point(
            threshold=math.floor(threshold[i] * 1e4) / 1e4,
            coverage=round(float(coverage[i]), 4),
            agreement=round(1 - float(risk[i]), 4),
        )
        for i in kept
    )
