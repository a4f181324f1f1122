"""Topologies chosen by value: what a solved task is worth, how likely each topology is to solve it, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from router_cli.errors import UsageError
from router_cli.scoring.calibration import Calibration
from router_cli.settings import Settings
from router_cli.space import DecisionSpace


@dataclass(frozen=True)
class Value:
    """What a solved task is worth and runs cost, and the calibration of how likely topologies are to solve it."""

    worth: float
    prices: dict[str, float]
    calibration: Calibration | None

    def solving(self, shares: dict[str, float]) -> dict[str, float]:
        """The calibrated probabilities."""
        if self.calibration is None:
            return dict(shares)
        apply = self.calibration.apply
        return {name: apply({"solved": share, "unsolved": 1 - share})["solved"] for name, share in shares.items()}

    def best(self, shares: dict[str, float]) -> str:
        """The topology of the greatest value by what the model itself says; of equal ones the cheapest."""
        chances = self.solving(shares)
        return max(chances, key=lambda name: (self.worth * chances[name] - self.prices[name], -self.prices[name]))


def value_of(
    settings: Settings, meta: dict[str, Any], space: DecisionSpace, calibration: Calibration | None
) -> Value | None:
    """How topologies are chosen by value; None where they are not. Raises UsageError for what does not go together."""
    chosen = settings.infer
    if chosen.value_of_solving is None:
        if chosen.price:
            raise UsageError("--price says nothing without --value-of-solving, what a solved task is worth")
        return None
    if "solving" not in meta:
        raise UsageError(
            "--value-of-solving needs an adapter that knows what topologies solve: train one with --objective solve"
        )
    if chosen.fallback is not None:
        raise UsageError("--value-of-solving and --fallback exclude each other")
    prices = {name: float(price) for name, _, price in (one.partition("=") for one in chosen.price)}
    if missing := [name for name in space.topologies if name not in prices]:
        raise UsageError(f"--value-of-solving needs the --price of {', '.join(missing)} too")
    return Value(chosen.value_of_solving, prices, calibration)
