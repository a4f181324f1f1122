"""Who decides: a model on this machine, a model behind a server, or the offline rules. All answer alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router_cli.errors import UsageError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Alternative, Decision, Usage
from router_cli.settings import Settings
from router_cli.space import DecisionSpace


@dataclass(frozen=True)
class Choice:
    """A decision and how it came about. `topologies` sums to 1 over the space's topologies, where it is known."""

    decision: Decision
    topologies: dict[str, float] | None
    milliseconds: float
    # What decided instead, where the backend itself had no valid answer.
    fallback: str | None = None
    # The most likely decisions of all, where they were asked for.
    alternatives: tuple[Alternative, ...] | None = None
    # What the answer took; None where nobody counted.
    usage: Usage | None = None
    # How likely each topology is to solve the task, where the topology was chosen by value.
    solving: dict[str, float] | None = None
    # Probability of the whole decision, not of its topology alone, where it is known.
    decision_probability: float | None = None

    @property
    def probability(self) -> float | None:
        """Probability of the chosen topology."""
        return None if self.topologies is None else self.topologies[self.decision.topology]


class Backend(Protocol):
    """Decides for texts. Every decision is valid for `space`; one by the backend itself, or marked as a `fallback`."""

    name: str
    model_name: str
    space: DecisionSpace

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        """One choice a text, in order."""

    def close(self) -> None:
        """Let go of what is open: connections, threads."""


def space_from(settings: Settings) -> DecisionSpace:
    """The decision space that the settings describe."""
    decision = settings.decision
    return DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)


def make_backend(settings: Settings, progress: Progress = SILENT) -> Backend:
    """The backend that `infer.backend` names, loaded and ready."""
    kind = settings.infer.backend
    if settings.infer.alternatives and kind != "local":
        raise UsageError(f"--alternatives needs --backend local: {kind} does not know how likely other decisions are")
    if settings.infer.value_of_solving is not None and kind != "local":
        raise UsageError(f"--value-of-solving needs --backend local: {kind} does not know what topologies solve")
    if kind == "heuristic":
        from router_cli.backends.heuristic import HeuristicBackend

        return HeuristicBackend(settings)
    if kind == "remote":
        from router_cli.backends.remote import RemoteBackend

        return RemoteBackend(settings, progress)
    from router_cli.backends.local import LocalBackend

    return LocalBackend(settings, progress)
