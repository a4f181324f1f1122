"""What an endpoint takes of a request's parameters: found out as it refuses or ignores them, said once, remembered.

Nothing is asked in advance: a refused request costs nothing, a probe would cost every run a round trip.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from router_cli.progress import Progress
from router_cli.space import DecisionSpace

FORMATS = ("json_schema", "json_object", "plain")
LIMITS = ("max_tokens", "max_completion_tokens", "no limit")
# A decision takes 40 tokens; the rest is for models that think aloud. Raised once answers are cut.
ANSWER_TOKENS, MOST_TOKENS = 1024, 16_384


class Dialect:
    """The parameters for one endpoint and model. `extra` are fields of the body beside the usual ones.

    `tokens` is how many tokens an answer may have; without it as many as answers turn out to need.
    """

    def __init__(
        self, url: str, temperature: float, extra: dict[str, Any], progress: Progress, tokens: int | None = None
    ) -> None:
        self._url, self._progress = url, progress
        self._wanted = {**extra, "temperature": temperature}
        self._step = {"response_format": 0, "limit": 0}
        self._dropped: set[str] = set()
        self._kept = Counter[str]()  # by format: answers that kept to it less those that did not
        self._first_tokens = self._tokens = tokens or ANSWER_TOKENS
        self._most_tokens = tokens or MOST_TOKENS

    @property
    def learnt(self) -> dict[str, Any]:
        """What was found out, as plain values for `recall`; empty where the endpoint took everything."""
        if not any(self._step.values()) and not self._dropped and self._tokens == self._first_tokens:
            return {}
        return {"steps": dict(self._step), "dropped": sorted(self._dropped), "tokens": self._tokens}

    def recall(self, learnt: dict[str, Any]) -> None:
        """Begin with what an earlier run found out. Raises LookupError, TypeError or ValueError where it is damaged."""
        steps = {name: int(learnt["steps"][name]) for name in self._step}
        if not (0 <= steps["response_format"] < len(FORMATS) and 0 <= steps["limit"] < len(LIMITS)):
            raise ValueError("no such step")
        self._dropped, self._tokens = set(map(str, learnt["dropped"])), min(self._most_tokens, int(learnt["tokens"]))
        self._step = steps
        said = [FORMATS[steps["response_format"]], LIMITS[steps["limit"]]]
        without = "".join(f", without {name}" for name in sorted(self._dropped))
        self._progress.notice(f"{self._url} is asked with {' and '.join(said)}{without}, as an earlier run found out")

    def parameters(self, space: DecisionSpace | None, sample: int = 0) -> dict[str, Any]:
        """What a request's body has beside model and messages; a `sample` above 0 is sent as the seed.

        Without a `space` the answer may be any text.
        """
        wanted = {**self._wanted, "seed": sample} if sample else self._wanted
        sent = {name: value for name, value in wanted.items() if name not in self._dropped}
        if (limit := LIMITS[self._step["limit"]]) != "no limit":
            sent[limit] = self._tokens
        kind = FORMATS[self._step["response_format"]]
        if space is not None and (shape := _response_format(kind, space)) is not None:
            sent["response_format"] = shape
        return sent

    def adapt(self, blamed: str, sent: dict[str, Any], verb: str, words: str = "") -> None:
        """Leave off what the endpoint does not take, once: other requests sent before may come back with the same."""
        said = f" ({words})" if words else ""
        if blamed not in ("response_format", *LIMITS):
            # logprobs and top_logprobs go together.
            gone = {name for name in sent if name == blamed or {name, blamed} <= {"logprobs", "top_logprobs"}}
            if not gone <= self._dropped:
                self._dropped |= gone
                article = "a " if blamed in ("temperature", "seed") else ""
                self._progress.notice(f"{self._url} refuses {article}{blamed}{said}: asking without from here on")
            return
        step, ladder = ("response_format", FORMATS) if blamed == "response_format" else ("limit", LIMITS)
        had = sent["response_format"]["type"] if blamed == "response_format" else blamed
        if ladder[self._step[step]] == had:
            self._step[step] += 1
            new = ladder[self._step[step]]
            self._progress.notice(f"{self._url} {verb} {had}{said}: asking with {new} from here on")

    def heard(self, sent: dict[str, Any], structured: bool) -> None:
        """An answer came that is a JSON object alone, or is not. One bad one among good ones ignores nothing."""
        kind = sent.get("response_format", {}).get("type")
        if kind is not None:
            self._kept[kind] += 1 if structured else -1
            if self._kept[kind] < 0:
                self.adapt("response_format", sent, "ignores")

    def allow_more(self, sent: dict[str, Any]) -> None:
        """An answer was cut at the limit that was sent: raise it."""
        limit = answer_limit(sent)
        if limit == self._tokens and self._tokens < self._most_tokens:
            self._tokens *= 4
            self._progress.notice(f"an answer was cut at {limit} tokens: allowing {self._tokens} from here on")


@cache  # every request asks several times, and the schema is most of its body
def _response_format(kind: str, space: DecisionSpace) -> dict[str, Any] | None:
    if kind == "json_schema":
        return {"type": kind, "json_schema": {"name": "decision", "strict": True, "schema": space.json_schema()}}
    return {"type": kind} if kind == "json_object" else None


def answer_limit(sent: dict[str, Any]) -> int | None:
    """How many tokens an answer to these parameters has at most; None is no limit."""
    return next((sent[name] for name in LIMITS if name in sent), None)
