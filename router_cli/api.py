"""For agent frameworks: a router in Python.

from router_cli.api import Router

router = Router("outputs/quickstart/adapter")
choice = router.decide("Sort a list of integers")
print(choice.decision.topology, choice.decision.roles, choice.probability)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router_cli.backends import Choice, make_backend
from router_cli.settings import load


class Router:
    """A trained router, loaded once. Other settings go by their keys, as `**{"models.dtype": "float32"}`."""

    def __init__(self, adapter: str, **settings: Any) -> None:
        chosen = {"infer.adapter": adapter, **settings}
        self._backend = make_backend(load({key: ("Router()", value) for key, value in chosen.items()}))

    def decide(self, task: str) -> Choice:
        """The decision for one task, with the topologies' probabilities."""
        return self._backend.decide([task])[0]

    def decide_all(self, tasks: Sequence[str]) -> list[Choice]:
        """One choice a task, in order; quicker than one by one."""
        return self._backend.decide(tasks)
