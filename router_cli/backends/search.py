"""One task's way through the decision tree, whatever the model: which ends to enter next, and what was found.

The decision is that of the likeliest topology, chosen greedily below it. The most likely decisions of all come from a
best-first search: probability only falls on the way down, so that decisions likelier than every open end are the best.
A pass enters several ends of the tree at once, because the search will need most of them anyway.

A walk is a generator: it yields the ends that it wants entered, and is sent what they lead to. It knows probabilities
and the tree; tokens are fed by `decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from router_cli.backends.tree import DecisionTree, Node
from router_cli.schema import Decision

SEARCHED = 400
"""Ends of the tree that the search for the most likely decisions enters at most. The default space has 205 branching
nodes, so that it is always exact there; ten roles have millions, and a model that knows nothing would visit all."""

AT_ONCE, AHEAD = 4, 0.4
"""Ends of the tree that one pass enters for a task at most, and how likely they must be beside the greedy one. With
these the search takes 1.05 times the passes of the greedy decision, where one end a pass takes 1.7 times as many."""

Shares = dict[str, float]
Found = TypeVar("Found")


def likeliest(shares: Shares) -> str:
    """The topology of the greatest share."""
    return max(shares, key=shares.__getitem__)


@dataclass(eq=False)
class Branch:
    """An end of the tree that was seen but not entered: the probability of getting there, and what leads to it.

    `mask` says which places of the row's cache hold the prompt and the branch's ancestors.
    """

    mass: float
    parent: Node | None
    token: int
    topologies: frozenset[str]
    mask: Any = None

    def __lt__(self, other: Branch) -> bool:
        return self.mass > other.mass  # the likeliest is the first


Walk = Generator[list[Branch], list[list[Branch]], Found]
"""A task's way through the tree: yields the branches to enter in one pass, the most wanted first, is sent what each of
them leads to, as far as there was room, and returns what it found."""


@dataclass(frozen=True)
class Decoded:
    """What one task got: the decision, its own probability, and the distribution over topologies (sums to 1).

    `alternatives` are the most likely decisions of the whole space, the likeliest first, as many as were asked for;
    `exact` is False where the search for them ended at `SEARCHED`. `solving` is how likely each topology is to solve
    the task, where that was asked.
    """

    decision: Decision
    probability: float
    topologies: Shares
    alternatives: tuple[tuple[Decision, float], ...] = ()
    exact: bool = True
    solving: Shares | None = None


class Search:
    """Ways through `tree`; `calibrate` turns a model's distribution over topologies into the one to be decided by."""

    def __init__(self, tree: DecisionTree, calibrate: Callable[[Shares], Shares]) -> None:
        self.tree, self._calibrate = tree, calibrate

    def topology(self) -> Walk[tuple[Shares, list[Branch]]]:
        """The calibrated distribution over topologies, and the branches below which nothing but one is left.

        The masses of the branches are calibrated alike. Where topologies share their first token, all that are still
        open are followed until they part.
        """
        root = self.tree.root
        seen, closed = [Branch(1.0, None, 0, root.topologies)], list[Branch]()
        while seen:
            closed += (branch for branch in seen if len(branch.topologies) == 1)
            waiting = [branch for branch in seen if len(branch.topologies) > 1]
            led = (yield waiting) if waiting else []
            seen = waiting[len(led) :] + [child for children in led for child in children]
        shares = dict.fromkeys(self.tree.space.topologies, 0.0)
        for branch in closed:
            shares[min(branch.topologies)] += branch.mass
        # One role alone cannot form a team: what cannot be decided has no share in the calibrated distribution either.
        reachable = {name: share for name, share in shares.items() if name in root.topologies}
        calibrated = self._calibrate(reachable) if len(reachable) > 1 else {min(reachable): 1.0}
        for branch in closed:
            name = min(branch.topologies)
            branch.mass *= calibrated[name] / shares[name] if shares[name] else 0.0
        # Rounding must not make a sure topology more than certain.
        return {name: min(1.0, calibrated.get(name, 0.0)) for name in shares}, closed

    def decision(self, alternatives: int, pick: Callable[[Shares], str] = likeliest) -> Walk[Decoded]:
        """The decision of the topology that `pick` takes, greedy below it, and the most likely of all."""
        shares, ends = yield from self.topology()
        chosen = pick(shares)
        best, entered = min(branch for branch in ends if chosen in branch.topologies), 0
        while True:
            greedy = self.node(best).decision
            enter = [best] if greedy is None else []
            if alternatives:
                room = min(AT_ONCE, SEARCHED - entered) - len(enter)
                enter += islice(self._wanted(ends, best, alternatives), max(0, room))
            if not enter:
                assert greedy is not None  # or it would be entered
                found, exact = self._listed(ends, alternatives)
                # Where the search was cut short before any other, the greedy decision is the only one known.
                found = found or ((greedy, best.mass),) * min(1, alternatives)
                return Decoded(greedy, best.mass, shares, found, exact)
            led = yield enter
            gone = enter[: len(led)]
            entered += len(gone)
            ends = [branch for branch in ends if branch not in gone] + [child for one in led for child in one]
            if greedy is None:
                best = min(led[0])

    def _wanted(self, ends: list[Branch], best: Branch, alternatives: int) -> Iterator[Branch]:
        """The ends that may lead to one of the most likely decisions, the likeliest first.

        On the greedy way down only those nearly as likely as that are: most others will turn out to be needless.
        """
        ends.sort()
        least = 0.0 if self.node(best).decision else AHEAD * best.mass
        finished = 0
        for branch in ends:
            if finished == alternatives or branch.mass < least:
                return
            if self.node(branch).decision is not None:
                finished += 1
            elif branch is not best:
                yield branch

    def _listed(self, ends: list[Branch], alternatives: int) -> tuple[tuple[tuple[Decision, float], ...], bool]:
        """The most likely decisions, and whether they are all that were asked for."""
        found = list[tuple[Decision, float]]()
        for branch in sorted(ends):
            if len(found) == alternatives:
                break
            leaf = self.node(branch).decision
            if leaf is None:  # below it there may be likelier ones than all that follow
                return tuple(found), False
            found.append((leaf, branch.mass))
        return tuple(found), True

    def node(self, branch: Branch) -> Node:
        """The place in the tree that a branch leads to."""
        return self.tree.root if branch.parent is None else self.tree.child(branch.parent, branch.token)
