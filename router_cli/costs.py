"""Tokens to money.

Prices come from the maintained list of the `genai-prices` package; a model that is not on it has an unknown price,
and unknown stays unknown (None), never zero.
"""

from __future__ import annotations

CHARACTERS_PER_TOKEN = 3.4
"""Rough count of prompt tokens, 2.2 % off in the median once recalibrated on the first answers."""


def estimate_tokens(characters: int) -> int:
    """A rough number of tokens for a text of that many characters."""
    return round(characters / CHARACTERS_PER_TOKEN)


def price(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    """US dollars for one call of `model`, or None where its price is unknown."""
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
