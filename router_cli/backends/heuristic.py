"""The offline rules as a router: what every trained one has to beat, and what works where nothing else does."""

from __future__ import annotations

import time
from collections.abc import Sequence

from router_cli.backends import Choice, space_from
from router_cli.settings import Settings
from router_cli.teachers import heuristic


class HeuristicBackend:
    """Decides by `teachers.heuristic`; gives no probabilities, because rules have none."""

    name = "heuristic"
    model_name = "heuristic"

    def __init__(self, settings: Settings) -> None:
        self.space = space_from(settings)

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        """A valid decision for each text, in order."""
        found = []
        for text in texts:
            started = time.perf_counter()
            decision, _ = heuristic.decide(text, self.space)
            found.append(Choice(decision, None, (time.perf_counter() - started) * 1000))
        return found

    def close(self) -> None:
        """Nothing is open."""
