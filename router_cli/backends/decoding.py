"""Decode over the decision space: a forward pass only where the decision tree branches.

At a branch the model's next-token probabilities are renormalised over the branch's valid tokens, so every answer is a
valid decision by construction, and the probability of a decision is the product over its branches. The topology is
the first choice of the text: its distribution comes out of the same pass, and is calibrated there.

The decision is that of the likeliest topology, chosen greedily below it. The most likely decisions of all come from a
best-first search: probability only falls on the way down, so the first leaf that is the likeliest open end is the best.

The constant start of the prompt is encoded once; its keys and values are shared by all tasks. Within a task every token
is fed once: the ends of the tree share one cache, and a mask shows each of them its own ancestors alone.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from router_cli import prompts
from router_cli.backends.device import ROWS_AT_ONCE
from router_cli.backends.tree import DecisionTree, Node
from router_cli.schema import Decision
from router_cli.space import DecisionSpace

SEARCH_PASSES = 400
"""Forward passes that the search for the most likely decisions takes at most. The default space has 205 branching
nodes, so that it is always exact there; ten roles have millions, and a model that knows nothing would visit all."""

Shares = dict[str, float]
Found = TypeVar("Found")


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
    entered: bool = False

    def __lt__(self, other: Branch) -> bool:
        return self.mass > other.mass  # the likeliest comes first out of a heap


Walk = Generator[Branch, list[Branch], Found]
"""A task's way through the tree: yields the branch to enter, is sent what it leads to, returns what it found."""


@dataclass
class Row:
    """One task on its way: the branch it waits at, the tokens to be fed there, and what they may see."""

    prompt: list[int]
    walk: Any
    branch: Branch
    waiting: list[int] = field(default_factory=list)
    mask: Any = None


@dataclass(frozen=True)
class Decoded:
    """What one task got: the decision, its own probability, and the distribution over topologies (sums to 1).

    `alternatives` are the most likely decisions of the whole space, the likeliest first, as many as were asked for;
    `exact` is False where the search for them ended at `SEARCH_PASSES`.
    """

    decision: Decision
    probability: float
    topologies: Shares
    alternatives: tuple[tuple[Decision, float], ...] = ()
    exact: bool = True


class Decoder:
    """Decisions from a causal language model over the decision space of `space`.

    `calibrate` turns the model's own distribution over topologies into the one to be decided by.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: prompts.Tokenizer,
        space: DecisionSpace,
        batch_size: int = 32,
        calibrate: Callable[[Shares], Shares] = dict,
    ) -> None:
        self._model, self._tokenizer, self._batch_size, self.space = model, tokenizer, batch_size, space
        self._calibrate = calibrate
        self._pad = prompts.end_token(tokenizer)
        self.tree = DecisionTree(space, tokenizer)
        one, two = (prompts.encode_prompt(text, space, tokenizer) for text in ("a", "1"))
        common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
        self._prefix = one[:common]
        self._prefix_cache: Any = None

    def prompt(self, text: str) -> list[int]:
        """The token ids to ask with; a task that the model's context cannot hold is shortened in its middle.

        Room for the answer is kept by a bound, from roles listed four times over.
        """
        room = self._model.config.max_position_embeddings - 64 - 16 * len(self.space.roles)
        return prompts.fit_prompt(text, self.space, self._tokenizer, room)[0]

    def decide(self, encoded: Sequence[Sequence[int]], alternatives: int = 0) -> list[Decoded]:
        """Decide for prompts given as token ids (from `prompt`), in their order, each with so many `alternatives`."""
        return self._run(encoded, lambda: self._decision(alternatives))

    def distributions(self, encoded: Sequence[Sequence[int]]) -> list[Shares]:
        """The distributions over topologies alone of what `decide` would answer: mostly one pass instead of nine."""

        def walk() -> Walk[Shares]:
            return (yield from self._topology())[0]

        return self._run(encoded, walk)

    def topologies(self, encoded: Sequence[Sequence[int]]) -> list[str]:
        """The topologies alone of what `decide` would answer."""
        return [max(shares, key=shares.__getitem__) for shares in self.distributions(encoded)]

    # -- one task's way through the tree ----------------------------------------------------------------------

    def _topology(self) -> Walk[tuple[Shares, list[Branch]]]:
        """The calibrated distribution over topologies, and the branches below which nothing but one is left.

        The masses of the branches are calibrated alike. Where topologies share their first token, all that are still
        open are followed until they part.
        """
        root = self.tree.root
        waiting, closed = [Branch(1.0, None, 0, root.topologies)], list[Branch]()
        while waiting:
            branch = waiting.pop()
            if len(branch.topologies) == 1:
                closed.append(branch)
            else:
                waiting += yield branch
        shares = dict.fromkeys(self.space.topologies, 0.0)
        for branch in closed:
            shares[min(branch.topologies)] += branch.mass
        # One role alone cannot form a team: what cannot be decided has no share in the calibrated distribution either.
        reachable = {name: share for name, share in shares.items() if name in root.topologies}
        calibrated = self._calibrate(reachable) if len(reachable) > 1 else {min(reachable): 1.0}
        for branch in closed:
            name = min(branch.topologies)
            branch.mass *= calibrated[name] / shares[name] if shares[name] else 0.0
        return shares | calibrated, closed

    def _decision(self, alternatives: int) -> Walk[Decoded]:
        shares, heap = yield from self._topology()
        chosen = max(shares, key=shares.__getitem__)
        best = min(branch for branch in heap if chosen in branch.topologies)
        while (node := self._node(best)).decision is None:
            children = yield best
            best.entered = True
            heap += children
            best = min(children)
        if not alternatives:
            return Decoded(node.decision, best.mass, shares)
        heapq.heapify(heap)
        found, passes = list[tuple[Decision, float]](), 0
        while heap and len(found) < alternatives:
            branch = heapq.heappop(heap)
            if branch.entered:
                continue
            if (leaf := self._node(branch).decision) is not None:
                found.append((leaf, branch.mass))
            elif passes < SEARCH_PASSES:
                passes += 1
                for child in (yield branch):
                    heapq.heappush(heap, child)
            else:
                # What was found is right as far as it goes; of the rest only the greedy decision is known.
                found = found or [(node.decision, best.mass)]
                return Decoded(node.decision, best.mass, shares, tuple(found), exact=False)
        return Decoded(node.decision, best.mass, shares, tuple(found))

    def _node(self, branch: Branch) -> Node:
        return self.tree.root if branch.parent is None else self.tree.child(branch.parent, branch.token)

    # -- many tasks at once -----------------------------------------------------------------------------------

    def _run(self, encoded: Sequence[Sequence[int]], walk: Callable[[], Walk[Found]]) -> list[Found]:
        """Go every prompt's way through the tree; what they found, in the prompts' order."""
        import torch

        found: dict[int, Found] = {}
        # Neighbours in length share a batch, so that hardly anything is padded.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                found.update(zip(batch, self._batch([list(encoded[i]) for i in batch], walk), strict=True))
        return [found[i] for i in range(len(encoded))]

    def _batch(self, encoded: list[list[int]], walk: Callable[[], Walk[Found]]) -> list[Found]:
        import torch

        found: dict[int, Found] = {}
        rows: dict[int, Row] = {}
        for number, prompt in enumerate(encoded):
            way = walk()
            try:
                rows[number] = Row(prompt, way, next(way))
            except StopIteration as end:  # a space of one decision needs no model
                found[number] = end.value
        if rows:
            scores, cache = self._encode(list(rows.values()))
        while rows:
            keep = []
            for place, (number, row) in enumerate(list(rows.items())):
                try:
                    row.branch = row.walk.send(self._children(row, scores[place]))
                except StopIteration as end:
                    found[number] = end.value
                    del rows[number]
                else:
                    keep.append(place)
                    row.waiting, row.mask = list(self._node(row.branch).run), row.branch.mask
            if rows:
                if len(keep) < len(scores):
                    cache.batch_select_indices(torch.tensor(keep, device=self._model.device))
                scores = self._forward(list(rows.values()), cache)
        return [found[number] for number in range(len(encoded))]

    def _children(self, row: Row, scores: Any) -> list[Branch]:
        """The branches that a row's branch leads to, with their probabilities."""
        import torch

        node, mass = self._node(row.branch), row.branch.mass
        tokens = list(node.groups)
        shares = torch.softmax(scores[torch.tensor(tokens, device=scores.device)], 0).tolist()
        return [
            Branch(mass * share, node, token, frozenset(self.tree.topologies(node.groups[token])), row.mask)
            for token, share in zip(tokens, shares, strict=True)
        ]

    def _encode(self, rows: list[Row]) -> tuple[Any, Any]:
        """Feed the prompts and what every answer begins with: logits as `_forward` gives them, and the cache.

        A CPU encodes few prompts at a time and decodes many: the caches of the parts are put together.
        """
        import torch
        from torch.nn.functional import pad

        run = self.tree.root.run
        cut = len(self._prefix) if all(row.prompt[: len(self._prefix)] == self._prefix for row in rows) else 0
        for row in rows:
            row.waiting, row.mask = [*row.prompt[cut:], *run], torch.ones(cut, dtype=torch.long)
        size = ROWS_AT_ONCE if self._model.device.type == "cpu" else len(rows)
        parts = []
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            cache = self._cache(cut, len(part))
            parts.append((self._forward(part, cache), cache))
        if len(parts) == 1:
            return parts[0]
        length = max(len(row.mask) for row in rows)
        # Masked positions on the left: each token brings its own position, so the place in the cache means nothing.
        for row in rows:
            row.mask = pad(row.mask, (length - len(row.mask), 0))
        whole = parts[0][1]
        for number, layer in enumerate(whole.layers):
            for name in ("keys", "values"):
                each = [getattr(cache.layers[number], name) for _, cache in parts]
                setattr(layer, name, torch.cat([pad(one, (0, 0, length - one.shape[-2], 0)) for one in each]))
        return torch.cat([scores for scores, _ in parts]), whole

    def _cache(self, length: int, rows: int) -> Any:
        """A fresh cache that holds the first `length` tokens of the constant prefix for `rows` tasks."""
        import torch
        from transformers import DynamicCache

        if length == 0:
            return DynamicCache(config=self._model.config)
        if self._prefix_cache is None:
            self._prefix_cache = DynamicCache(config=self._model.config)
            ids = torch.tensor([self._prefix], device=self._model.device)
            self._model(input_ids=ids, past_key_values=self._prefix_cache, use_cache=True, logits_to_keep=1)
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _forward(self, rows: list[Row], cache: Any) -> Any:
        """Feed every row's waiting tokens; float32 logits [rows, vocabulary] after each row's last token.

        A row's mask shows what its tokens may see of the cache, and these tokens themselves when it is done.
        """
        import torch
        from torch.nn.functional import pad

        device, past = self._model.device, cache.get_seq_length()
        width = max(len(row.waiting) for row in rows)
        # Padding stands on the left of the block, so that every row's last token is in the last column.
        ids = torch.tensor([[self._pad] * (width - len(row.waiting)) + row.waiting for row in rows])
        real = torch.tensor([[0] * (width - len(row.waiting)) + [1] * len(row.waiting) for row in rows])
        seen = torch.stack([pad(row.mask, (0, past - len(row.mask))) for row in rows])
        mask = torch.cat([seen, real], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        states = self._model.get_decoder()(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        for row, own in zip(rows, mask, strict=True):
            row.mask = own
        # Two dimensions on purpose: for a slice of three, torch copies the whole head once a row (0.2 s a pass).
        return self._model.get_output_embeddings()(states[:, -1]).float()
