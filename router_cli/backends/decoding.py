"""Decode over the decision space: a forward pass only where the decision tree branches.

At a branch the model's next-token probabilities are renormalised over the branch's valid tokens, so every answer is a
valid decision by construction, and the probability of a decision is the product over its branches. The topology is
the first choice of the text: its distribution comes out of the same pass.

The constant start of the prompt is encoded once; its keys and values are shared by all tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from router_cli import prompts
from router_cli.backends.device import ROWS_AT_ONCE
from router_cli.backends.tree import DecisionTree, Node
from router_cli.schema import Decision
from router_cli.space import DecisionSpace


@dataclass
class Row:
    """One task on its way down the tree."""

    index: int
    prompt: list[int]
    node: Node
    waiting: list[int]
    answer: list[int] = field(default_factory=list)
    probability: float = 1.0
    # Probability mass that reached this node, by topology set still open; filled while topologies are undecided.
    topologies: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """What one task got: the decision, its own probability, and the distribution over topologies (sums to 1)."""

    decision: Decision
    probability: float
    topologies: dict[str, float]


class Decoder:
    """Greedy decisions from a causal language model over the decision space of `space`."""

    def __init__(self, model: Any, tokenizer: prompts.Tokenizer, space: DecisionSpace, batch_size: int = 32) -> None:
        self._model, self._tokenizer, self._batch_size, self.space = model, tokenizer, batch_size, space
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

    def decide(self, encoded: Sequence[Sequence[int]]) -> list[Decoded]:
        """Decide for prompts given as token ids (from `prompt`), in their order."""
        root = self.tree.root
        if root.decision is not None:  # a space of one decision needs no model
            return [Decoded(root.decision, 1.0, self._certain(root.decision))] * len(encoded)
        return [self._finished(row) for row in self._descend(encoded, lambda node: node.decision is not None)]

    def topologies(self, encoded: Sequence[Sequence[int]]) -> list[str]:
        """The topologies alone of what `decide` would answer: mostly one pass instead of nine."""
        if len(self.tree.root.topologies) == 1:
            return list(self.tree.root.topologies) * len(encoded)
        return [min(row.node.topologies) for row in self._descend(encoded, lambda node: len(node.topologies) == 1)]

    def _descend(self, encoded: Sequence[Sequence[int]], finished: Callable[[Node], bool]) -> list[Row]:
        """Walk down the tree from every prompt until its node is `finished`; rows in the prompts' order."""
        import torch

        found: dict[int, Row] = {}
        # Neighbours in length share a batch, so that hardly anything is padded.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                found.update(self._batch([(i, list(encoded[i])) for i in batch], finished))
        return [found[i] for i in range(len(encoded))]

    def _batch(self, batch: list[tuple[int, list[int]]], finished: Callable[[Node], bool]) -> dict[int, Row]:
        import torch

        root = self.tree.root
        cut = len(self._prefix) if all(ids[: len(self._prefix)] == self._prefix for _, ids in batch) else 0
        rows = [
            Row(index, ids, root, [*ids[cut:], *root.run], list(root.run), 1.0, dict.fromkeys(root.topologies, 0.0))
            for index, ids in batch
        ]
        done = {row.index: row for row in rows}
        logits, cache, mask = self._encode(rows, cut)
        while True:
            for row, scores in zip(rows, logits, strict=True):
                self._choose(row, scores)
            keep = [i for i, row in enumerate(rows) if not finished(row.node)]
            if not keep:
                return done
            if len(keep) < len(rows):
                select = torch.tensor(keep, device=self._model.device)
                cache.batch_select_indices(select)
                mask = mask[select]
                rows = [rows[i] for i in keep]
            logits, mask = self._forward(rows, cache, mask)

    def _encode(self, rows: list[Row], cut: int) -> tuple[Any, Any, Any]:
        """Feed the prompts behind the first `cut` tokens: logits as `_forward` gives them, the cache, its mask.

        A CPU encodes few prompts at a time and decodes many: the caches of the parts are put together.
        """
        import torch
        from torch.nn.functional import pad

        size = ROWS_AT_ONCE if self._model.device.type == "cpu" else len(rows)
        parts = []
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            cache = self._cache(cut, len(part))
            mask = torch.ones((len(part), cut), dtype=torch.long, device=self._model.device)
            logits, mask = self._forward(part, cache, mask)
            parts.append((logits, cache, mask))
        if len(parts) == 1:
            return parts[0]
        length = max(mask.shape[1] for _, _, mask in parts)
        # Masked positions on the left: each token brings its own position, so the place in the cache means nothing.
        whole = parts[0][1]
        for number, layer in enumerate(whole.layers):
            for name in ("keys", "values"):
                each = [getattr(cache.layers[number], name) for _, cache, _ in parts]
                setattr(layer, name, torch.cat([pad(one, (0, 0, length - one.shape[-2], 0)) for one in each]))
        return (
            torch.cat([logits for logits, _, _ in parts]),
            whole,
            torch.cat([pad(mask, (length - mask.shape[1], 0)) for _, _, mask in parts]),
        )

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

    def _forward(self, rows: list[Row], cache: Any, mask: Any) -> tuple[Any, Any]:
        """Feed every row's waiting tokens; float32 logits [rows, vocabulary] after each row's last token."""
        import torch

        width = max(len(row.waiting) for row in rows)
        # Padding stands on the left of the block, so that every row's last token is in the last column.
        ids = torch.tensor([[self._pad] * (width - len(row.waiting)) + row.waiting for row in rows])
        real = torch.tensor([[0] * (width - len(row.waiting)) + [1] * len(row.waiting) for row in rows])
        mask = torch.cat([mask, real.to(mask.device)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        states = self._model.get_decoder()(
            input_ids=ids.to(mask.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        for row in rows:
            row.waiting = []
        # Two dimensions on purpose: for a slice of three, torch copies the whole head once a row (0.2 s a pass).
        return self._model.get_output_embeddings()(states[:, -1]).float(), mask

    def _choose(self, row: Row, scores: Any) -> None:
        """Take the likeliest branch of a row's node, and note the topologies' probabilities on the way."""
        import torch

        node, tokens = row.node, list(row.node.groups)
        shares = torch.softmax(scores[torch.tensor(tokens, device=scores.device)], 0).tolist()
        best = max(range(len(tokens)), key=shares.__getitem__)
        if len(node.topologies) > 1:
            for token, share in zip(tokens, shares, strict=True):
                open_ones = self.tree.topologies(node.groups[token])
                if len(open_ones) == 1:
                    row.topologies[open_ones.pop()] += row.probability * share
                elif token != tokens[best]:
                    self._spread(row, self.tree.child(node, token), row.probability * share)
        row.probability *= shares[best]
        row.node = self.tree.child(node, tokens[best])
        row.waiting = list(row.node.run)
        row.answer += row.waiting

    def _spread(self, row: Row, node: Node, mass: float) -> None:
        """Divide `mass` over the topologies of a branch that is not taken but leaves several of them open.

        Only where a tokenizer lets topology names share their first token; costs an uncached forward pass a branch.
        """
        import torch

        side = Row(row.index, row.prompt, node, [], [*row.answer, *node.run], mass, row.topologies)
        while len(side.node.topologies) > 1:
            ids = torch.tensor([[*side.prompt, *side.answer]], device=self._model.device)
            self._choose(side, self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float())

    def _finished(self, row: Row) -> Decoded:
        assert row.node.decision is not None
        total = sum(row.topologies.values())
        if total == 0:  # a space with one topology decides nothing at the first branch
            return Decoded(row.node.decision, row.probability, self._certain(row.node.decision))
        shares = {name: row.topologies.get(name, 0.0) / total for name in self.space.topologies}
        return Decoded(row.node.decision, row.probability, shares)

    def _certain(self, decision: Decision) -> dict[str, float]:
        return {name: float(name == decision.topology) for name in self.space.topologies}
