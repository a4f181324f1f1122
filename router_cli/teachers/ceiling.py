"""The most that a request can cost, known before it is sent: what `--max-cost` reserves."""

from __future__ import annotations

import json
import math
from typing import Any

from router_cli.costs import Prices
from router_cli.teachers.counting import at_most
from router_cli.teachers.dialect import answer_limit


class Ceiling:
    """The worst case of requests to one model, corrected upwards by what its answers tell."""

    def __init__(self, prices: Prices, model: str) -> None:
        self._prices = prices
        self._models = {model}  # that answered: an alias may stand for a dearer one
        self._shape: tuple[Any, str] = ("", '""')  # the last response_format, and its text
        self._over = 1.0  # how far the endpoint counted above `at_most`

    def of(self, messages: list[dict[str, str]], sent: dict[str, Any], unlimited: int = 0) -> float:
        """US dollars for a request with the parameters `sent`; 0 where the price is unknown.

        An answer that they do not limit is taken to have `unlimited` tokens.
        """
        limit = answer_limit(sent) or unlimited
        tokens = math.ceil(self._bytes(messages, sent) * self._over)
        return max(self._prices.of(model, tokens, limit) or 0.0 for model in self._models)

    def heard(self, model: str, prompt_tokens: int, messages: list[dict[str, str]], sent: dict[str, Any]) -> None:
        """A request was answered by `model`, which says how many prompt tokens it charges."""
        if prompt_tokens:
            self._models.add(model)
        self._over = max(self._over, prompt_tokens / self._bytes(messages, sent))

    def _bytes(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> int:
        # Some endpoints write the schema into the prompt.
        shape = sent.get("response_format", "")
        if shape is not self._shape[0]:
            self._shape = shape, json.dumps(shape)
        return at_most([*(message["content"] for message in messages), self._shape[1]])
