"""How many tokens a question has, before anybody is asked, and what one ask comes to as answers went so far.

The vocabularies come inside the `toktok-rs` wheel, so that counting needs no network. A model of another family is
counted with OpenAI's newest one and corrected by its own answers; without the wheel, characters are counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

from router_cli.schema import Usage
from router_cli.teachers.answers import clean

CHARACTERS_PER_TOKEN = 3.4
"""The rough rule: 2.2 % off in the median once corrected by the first answers."""
# OpenAI's chat format: each message is wrapped in four tokens, and three open the answer.
A_MESSAGE, AN_ANSWER = 4, 3
DECISION_TOKENS = 40
"""What a decision takes as JSON, until answers tell."""
COUNTED_ALL, EVERY = 200, 10
"""So many questions are all counted while they are asked; beyond them one in `EVERY`: a count costs 0.15 ms of CPU."""

# By the model's name, without the folders that routers of models put before it.
_VOCABULARIES = (
    (r"gpt-oss", "o200k_harmony"),
    (r"gpt-3\.5|gpt-4($|-(?!o|\.))", "cl100k_base"),
    (r"gpt-|chatgpt|o\d", "o200k_base"),
    (r"qwen", "qwen3.5"),
)


class Meter:
    """Counts questions for one model; `learn` tells it what they really took."""

    def __init__(self, model: str) -> None:
        name = model.rpartition("/")[2].lower()
        known = next((vocabulary for pattern, vocabulary in _VOCABULARIES if re.match(pattern, name)), None)
        self._vocabulary = known or "o200k_base"
        try:
            import toktok  # noqa: F401
        except ImportError:
            self._vocabulary, self.name = "", f"characters / {CHARACTERS_PER_TOKEN}"
        else:
            self.name = self._vocabulary if known else f"{self._vocabulary} (another model's)"
        self._counted = self._real = self._seen = 0
        self._asks, self._foreseen, self._used = 0, 0, Usage(attempts=0)

    def count(self, texts: Sequence[str]) -> int:
        """Tokens of a chat of messages with these texts."""
        return sum(_tokens(text, self._vocabulary) for text in texts) + A_MESSAGE * len(texts) + AN_ANSWER

    def sampled(self, texts: Sequence[str]) -> int:
        """`count` for a question that is about to be asked, 0 where those before tell enough."""
        self._seen += 1
        return self.count(texts) if self._seen <= COUNTED_ALL or self._seen % EVERY == 0 else 0

    @property
    def error(self) -> float | None:
        """By which share the questions answered so far were counted too long (too short is negative)."""
        return self._counted / self._real - 1 if self._real else None

    def answered(self, counted: int, real: int) -> None:
        """One question of `counted` tokens (0: not counted) had `real` ones as the endpoint counts."""
        if real and counted:
            self._counted, self._real = self._counted + counted, self._real + real

    def finished(self, counted: int, used: Usage) -> None:
        """One ask, whose question had `counted` tokens, came to `used`, everything that was asked again included."""
        if used.prompt_tokens and counted:
            self._asks, self._foreseen = self._asks + 1, self._foreseen + counted
            self._used = Usage(
                prompt_tokens=self._used.prompt_tokens + used.prompt_tokens,
                completion_tokens=self._used.completion_tokens + used.completion_tokens,
                attempts=self._used.attempts + used.attempts,
            )

    def expected(self, counted: int) -> Usage:
        """What an ask with a question of `counted` tokens will come to, as the finished ones did; without a cost."""
        if not self._asks:
            return Usage(prompt_tokens=counted, completion_tokens=DECISION_TOKENS)
        return Usage(
            prompt_tokens=round(counted * self._used.prompt_tokens / self._foreseen),
            completion_tokens=round(self._used.completion_tokens / self._asks),
            attempts=max(1, round(self._used.attempts / self._asks)),
        )


def at_most(texts: Iterable[str]) -> int:
    """A number of tokens that a chat of messages with these texts cannot pass: a token is one byte at least."""
    return sum(len(text.encode("utf-8", "replace")) + 4 * A_MESSAGE for text in texts)


@functools.lru_cache(maxsize=64)  # the system prompt is the same for all tasks, and most of the question
def _tokens(text: str, vocabulary: str) -> int:
    if not vocabulary:
        return round(len(text) / CHARACTERS_PER_TOKEN)
    import toktok

    return int(toktok.batch_count([clean(text)], vocabulary, threads=1)[0])
