"""Tokens to money: prices, and the budget that no request may pass.

Prices come from the maintained list of the `genai-prices` package, or from the user (`Prices`); a model that is on
neither has an unknown price, and unknown stays unknown (None), never zero.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from dataclasses import dataclass

from router_cli.errors import BudgetReached, SettingsError

__all__ = ["Budget", "BudgetReached", "Prices", "dollars", "price"]

# Sums of floats: a billionth of a dollar is no excess.
_ROUNDING = 1e-9
# Prompt tokens up to which a price is taken to be so much a token; some models are dearer from 128,000 on.
_LINEAR = 32_000


@dataclass(frozen=True)
class Prices:
    """What tokens cost: US dollars for a million of them as the user says, else as the price list has them."""

    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            missing = "label.price_in (--price-in)" if self.price_in is None else "label.price_out (--price-out)"
            raise SettingsError(f"{missing}: prices go in pairs, give --price-in and --price-out")

    def of(self, model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """US dollars for one call of `model`, or None where its price is unknown."""
        if self.price_in is not None and self.price_out is not None:
            return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6
        return price(model, prompt_tokens, completion_tokens)


def price(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    """US dollars for one call of `model` by the price list, or None where it is not on it."""
    if prompt_tokens <= _LINEAR and (rates := _rates(model)) is not None:
        return prompt_tokens * rates[0] + completion_tokens * rates[1]
    return _listed(model, prompt_tokens, completion_tokens)


@functools.cache
def _rates(model: str) -> tuple[float, float] | None:
    """Dollars for a prompt and an answer token while prompts are short: asking the list costs 0.08 ms each time.

    None where the price is unknown, or is no such sum.
    """
    one, other, both = (_listed(model, *tokens) for tokens in ((_LINEAR, 0), (0, _LINEAR), (_LINEAR // 2, _LINEAR)))
    if one is None or other is None or both is None or abs(one / 2 + other - both) > _ROUNDING:
        return None
    return one / _LINEAR, other / _LINEAR


def _listed(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    from genai_prices import Usage, calc_price

    try:
        cost = calc_price(Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens), model_ref=model)
    except LookupError:
        return None
    return float(cost.total_price)


def dollars(amount: float | None) -> str:
    """An amount for people: cents matter, so small sums keep four places."""
    if amount is None:
        return "unknown price"
    return f"${amount:.4f}" if amount < 1 else f"${amount:,.2f}"


class Budget:
    """A sum of money that requests in flight together cannot pass. For one event loop.

    Before a request is sent, its worst case is reserved; once it ended, `settle` books what it did cost. `spent` is
    booked, `reserved` is held by requests in flight, `uncertain` is the part of `spent` that was booked for requests
    whose answer was lost, and may not have been charged. A `limit` of None is no limit: sums are kept all the same.
    `earlier` is what other runs spent of the same sum.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit, self.earlier = limit, 0.0
        self.spent = self.reserved = self.uncertain = 0.0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    async def reserve(self, worst: float) -> None:
        """Hold `worst` dollars, waiting while calls in flight may still free as much, first come, first served.

        Raises BudgetReached where they cannot: what is spent already leaves less than `worst`.
        """
        if not self._waiting and self._fits(worst):
            self.reserved += worst
            return
        self._refuse(worst)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((worst, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.settle(worst, 0.0)  # the turn came in the moment of the cancellation
            raise

    def settle(self, reserved: float, actual: float, certain: bool = True) -> None:
        """Give back what `reserve` held and book the `actual` cost; not `certain` where the answer was lost."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += actual
        if not certain:
            self.uncertain += actual
        while self._waiting:
            worst, turn = self._waiting[0]
            if not turn.done():
                try:
                    self._refuse(worst)
                except BudgetReached as error:
                    turn.set_exception(error)
                else:
                    if not self._fits(worst):
                        return
                    self.reserved += worst
                    turn.set_result(None)
            self._waiting.popleft()

    def _fits(self, worst: float) -> bool:
        return self.limit is None or self.earlier + self.spent + self.reserved + worst <= self.limit + _ROUNDING

    def _refuse(self, worst: float) -> None:
        spent = self.earlier + self.spent
        if self.limit is not None and spent + worst > self.limit + _ROUNDING:
            before = f" ({dollars(self.earlier)} by earlier calls)" if self.earlier else ""
            raise BudgetReached(
                f"--max-cost {dollars(self.limit)} is reached: {dollars(spent)} are spent{before}, and one more "
                f"request may cost {dollars(worst)}; the same command with a larger --max-cost goes on from here"
            )
