"""The decision space as a prefix tree over tokens, built as it is walked.

A rendered decision has 30 to 50 tokens but only about four real choices; all other tokens are forced. The tree knows
both for any tokenizer: a node's forced run, and the tokens it branches into. It is built from structure (topology, then
roles one by one, then manager and entry, then steps), never by enumerating decisions, so ten roles work: their chains
alone number 9.9 million.

The tokens are those of the canonical text as a whole, exactly as training sees it: each choice is tokenised inside
complete decisions and compared, never glued together from pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from router_cli import prompts
from router_cli.errors import UsageError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace


@dataclass(frozen=True)
class Partial:
    """A decision of which only some choices are made, in the order in which the text states them."""

    topology: str | None = None
    roles: tuple[str, ...] = ()
    closed: bool = False
    entry: tuple[str | None, str] | None = None
    steps: int | None = None

    def decision(self) -> Decision:
        """The finished decision."""
        assert self.topology and self.entry and self.steps
        return Decision(
            topology=self.topology,  # type: ignore[arg-type]  # comes from the space
            roles=self.roles,
            manager_role=self.entry[0],
            entry_role=self.entry[1],
            max_steps=self.steps,
        )


@dataclass(frozen=True)
class Node:
    """A place in the tree: the tokens that lead on from its parent, and where it goes from there.

    `run` is the token that was chosen and all that it forces. A leaf has a decision and no branches.
    """

    run: tuple[int, ...]
    depth: int
    groups: dict[int, tuple[Partial, ...]]
    decision: Decision | None
    topologies: frozenset[str]


class DecisionTree:
    """The tree of all valid decisions of `space`, in tokens of `tokenizer`. Raises UsageError where there is none."""

    def __init__(self, space: DecisionSpace, tokenizer: prompts.Tokenizer) -> None:
        self.space, self._tokenizer = space, tokenizer
        if not self._reachable:
            raise UsageError(f"no decision is possible: {', '.join(space.topologies)} with one role alone")
        self._settled: dict[Partial, tuple[int, ...]] = {}
        self._nodes: dict[tuple[int, tuple[Partial, ...]], Node] = {}

    @cached_property
    def root(self) -> Node:
        """The start of every answer: what is forced before the first choice."""
        return self._node((self._advanced(Partial()),), 0, ())

    def child(self, node: Node, token: int) -> Node:
        """The node that `token`, one of `node.groups`, leads to."""
        # Rows meet in the same few nodes: tokenising their answers once a row would take longer than small models do.
        place = (node.depth, node.groups[token])
        if place not in self._nodes:
            self._nodes[place] = self._node(node.groups[token], node.depth, (token,))
        return self._nodes[place]

    def _node(self, partials: tuple[Partial, ...], depth: int, run: tuple[int, ...]) -> Node:
        tokens = list(run)
        while True:
            if len(partials) == 1 and not self._children(partials[0]):
                leaf = partials[0].decision()
                rest = self._settled_tokens(partials[0])[depth + len(tokens) :]
                return Node((*tokens, *rest), depth + len(tokens) + len(rest), {}, leaf, frozenset({leaf.topology}))
            groups = self._groups(partials, depth + len(tokens))
            if len(groups) > 1:
                seen = frozenset(name for group in groups.values() for name in self.topologies(group))
                return Node(tuple(tokens), depth + len(tokens), groups, None, seen)
            token, partials = next(iter(groups.items()))
            tokens.append(token)

    def _groups(self, partials: tuple[Partial, ...], depth: int) -> dict[int, tuple[Partial, ...]]:
        """The next tokens after `depth` tokens, each with what it leaves open."""
        groups: dict[int, list[Partial]] = {}
        waiting = list(reversed(partials))
        while waiting:
            partial = waiting.pop()
            settled = self._settled_tokens(partial)
            if len(settled) > depth:
                groups.setdefault(settled[depth], []).append(partial)
            else:
                waiting.extend(reversed(self._children(partial)))
        return {token: tuple(group) for token, group in groups.items()}

    def topologies(self, group: tuple[Partial, ...]) -> set[str]:
        """The topologies that a branch leaves open."""
        return {name for partial in group for name in ([partial.topology] if partial.topology else self._reachable)}

    @cached_property
    def _reachable(self) -> tuple[str, ...]:
        # One role alone cannot form a team.
        return tuple(name for name in self.space.topologies if name == "single" or len(self.space.roles) > 1)

    def _settled_tokens(self, partial: Partial) -> tuple[int, ...]:
        """The tokens that every decision below `partial` begins with (all of them for a finished one)."""
        if partial not in self._settled:
            # Of each choice the first and the last decision below it: tokens may reach across several choices.
            samples = [self._tokens(self._completed(child, at)) for child in self._children(partial) for at in (0, -1)]
            self._settled[partial] = _common(samples) if samples else self._tokens(partial)
        return self._settled[partial]

    def _tokens(self, partial: Partial) -> tuple[int, ...]:
        return tuple(prompts.encode_answer(partial.decision(), self._tokenizer))

    def _completed(self, partial: Partial, at: int) -> Partial:
        while children := self._children(partial):
            partial = children[at]
        return partial

    def _children(self, partial: Partial) -> list[Partial]:
        """The choices that a partial decision leaves open: at least two, or none for a finished one."""
        return [self._advanced(child) for child in self._next(partial)]

    def _advanced(self, partial: Partial) -> Partial:
        """`partial` with every choice made that has only one possible outcome."""
        while len(found := list(self._next(partial))) == 1:
            partial = found[0]
        return partial

    def _next(self, partial: Partial) -> Iterator[Partial]:
        """The next choice, made in every valid way."""
        topology, roles = partial.topology, partial.roles
        if topology is None:
            yield from (Partial(name) for name in self._reachable)
        elif not partial.closed:
            if len(roles) >= (1 if topology == "single" else 2):
                yield Partial(topology, roles, closed=True)
            if not (topology == "single" and roles):
                yield from (Partial(topology, (*roles, role)) for role in self._next_roles(topology, roles))
        elif partial.entry is None:
            yield from (Partial(topology, roles, True, entry) for entry in self.space.entries(topology, roles))
        elif partial.steps is None:
            low, high = self.space.steps(topology, len(roles))
            yield from (Partial(topology, roles, True, partial.entry, steps) for steps in range(low, high + 1))

    def _next_roles(self, topology: str, roles: tuple[str, ...]) -> list[str]:
        if topology in ("single", "chain"):
            return [role for role in self.space.roles if role not in roles]
        # Order carries no meaning: only the order of the list, and never a first role that leaves no second.
        start = self.space.roles.index(roles[-1]) + 1 if roles else 0
        rest = list(self.space.roles[start:])
        return rest if roles else rest[:-1]


def _common(sequences: list[tuple[int, ...]]) -> tuple[int, ...]:
    shortest = min(sequences, key=len)
    for i, token in enumerate(shortest):
        if any(sequence[i] != token for sequence in sequences):
            return shortest[:i]
    return shortest
