"""Decode over the decision space: a forward pass only where the decision tree branches.

At a branch the model's next-token probabilities are renormalised over the branch's valid tokens, so every answer is a
valid decision by construction, and the probability of a decision is the product over its branches. The topology is
the first choice of the text: its distribution comes out of the same pass, and is calibrated there. Which way each task
takes is `search`'s to say.

The constant start of the prompt is encoded once; its keys and values are shared by all tasks. Within a task every token
is fed once: the ends of the tree share one cache, and a mask shows each of them its own ancestors alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from router_cli import prompts
from router_cli.backends.activated import activated
from router_cli.backends.device import ROWS_AT_ONCE, give_back, out_of_memory
from router_cli.backends.library import filling
from router_cli.backends.search import Branch, Decoded, Found, Search, Shares, Walk
from router_cli.backends.tree import DecisionTree
from router_cli.errors import ModelError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace

CHEAP = 32
"""Tokens that a pass can take, over all rows, before they cost more than what every pass costs."""


@dataclass
class Run:
    """Tokens to be fed, and which places of the row's cache they may see; once fed, they are among these."""

    tokens: list[int]
    mask: Any


@dataclass
class Row:
    """One task on its way: the branches it waits at, and the tokens to be fed there.

    `solving` is how likely each topology is to solve it, once asked.
    """

    prompt: list[int]
    walk: Any = None
    branches: list[Branch] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    solving: Shares = field(default_factory=dict)


class Decoder:
    """Decisions from a causal language model over the decision space of `space`.

    `calibrate` turns the model's own distribution over topologies into the one to be decided by. Prompts take at most
    `max_length` tokens with their answer, as in training, or fewer where the model sees no more at once: `limit` is
    what holds. `batch_size` tasks are decided at once, or as many as memory turned out to hold. Raises ModelError for
    a model that is not one of attention alone: the ends of a tree can share nothing else.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: prompts.Tokenizer,
        space: DecisionSpace,
        batch_size: int = 32,
        calibrate: Callable[[Shares], Shares] = dict,
        max_length: int | None = None,
    ) -> None:
        self._activated = activated(model)
        self._model = self._activated.base if self._activated else model
        self._tokenizer, self.batch_size, self.space = tokenizer, batch_size, space
        self._pad = prompts.end_token(tokenizer)
        self.tree = DecisionTree(space, tokenizer)
        self._search = Search(self.tree, calibrate)
        context = _context(model.config)
        self.limit = min(context, max_length or context)
        self._room = self.limit - self._longest()
        one, two = (prompts.encode_prompt(text, space, tokenizer) for text in ("a", "1"))
        common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
        self._prefix = one[:common]
        self._prefix_cache: Any = None
        self.cut = 0

    def _longest(self) -> int:
        """A bound on the tokens of any answer: no valid decision says so much, and others are put otherwise."""
        roles = self.space.roles
        longest = max(roles, key=lambda role: len(role.encode()))
        most = Decision(
            topology="decentralized",
            roles=roles,
            manager_role=longest,
            entry_role=longest,
            max_steps=max(self.space.step_bound, len(roles)),
        )
        return len(prompts.encode_answer(most, self._tokenizer)) + 8

    def prompt(self, text: str) -> list[int]:
        """The token ids to ask with; a task too long for them is shortened in its middle, and counted in `cut`.

        Raises ModelError where the model cannot hold even an empty task.
        """
        try:
            found, cut = prompts.fit_prompt(text, self.space, self._tokenizer, self._room)
        except ValueError:
            raise ModelError(
                f"the prompt without any task takes more than the {self._room} tokens that the model and --max-length "
                "of its training leave for it"
            ) from None
        self.cut += cut > 0
        return found

    def decide(
        self, encoded: Sequence[Sequence[int]], alternatives: int = 0, pick: Callable[[Shares], str] | None = None
    ) -> list[Decoded]:
        """Decide for prompts given as token ids (from `prompt`), in their order, each with so many `alternatives`.

        `pick` chooses the topology by how likely each is to solve the task, as the model says (not calibrated).
        """
        if pick is None:
            return self._run(encoded, lambda row: self._search.decision(alternatives))

        def walk(row: Row) -> Walk[Decoded]:
            found = yield from self._search.decision(alternatives, lambda shares: pick(row.solving))
            return replace(found, solving=row.solving)

        return self._run(encoded, walk, asks_solving=True)

    def solving(self, encoded: Sequence[Sequence[int]]) -> list[Shares]:
        """How likely each topology is to solve the tasks of these prompts, as the model says (not calibrated)."""

        def walk(row: Row) -> Walk[Shares]:
            yield from self._search.topology()
            return row.solving

        return self._run(encoded, walk, asks_solving=True)

    def distributions(self, encoded: Sequence[Sequence[int]]) -> list[Shares]:
        """The distributions over topologies alone of what `decide` would answer: mostly one pass instead of five."""

        def walk(row: Row) -> Walk[Shares]:
            return (yield from self._search.topology())[0]

        return self._run(encoded, walk)

    def topologies(self, encoded: Sequence[Sequence[int]]) -> list[str]:
        """The topologies alone of what `decide` would answer."""
        return [max(shares, key=shares.__getitem__) for shares in self.distributions(encoded)]

    # -- many tasks at once -----------------------------------------------------------------------------------

    def _run(
        self, encoded: Sequence[Sequence[int]], walk: Callable[[Row], Walk[Found]], asks_solving: bool = False
    ) -> list[Found]:
        """Go every prompt's way through the tree; what they found, in the prompts' order."""
        import torch

        found: dict[int, Found] = {}
        # Neighbours in length share a batch, so that hardly anything is padded.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        with torch.inference_mode():
            while batch := order[len(found) : len(found) + self.batch_size]:
                made = self._within_memory([list(encoded[i]) for i in batch], walk, asks_solving)
                found.update(zip(batch, made, strict=False))
        return [found[i] for i in range(len(encoded))]

    def _within_memory(
        self, encoded: list[list[int]], walk: Callable[[Row], Walk[Found]], asks_solving: bool
    ) -> list[Found]:
        """What the first rows of a batch found: all of them, unless memory holds fewer at once, now and from now on."""
        size = min(self.batch_size, len(encoded))
        while True:
            try:
                found = self._batch(encoded[:size], walk, asks_solving)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
            else:
                if size < min(self.batch_size, len(encoded)):
                    self.batch_size = size
                return found
            # Outside the handler: until here the exception keeps the pass's tensors alive.
            size //= 2
            give_back()

    def _batch(self, encoded: list[list[int]], walk: Callable[[Row], Walk[Found]], asks_solving: bool) -> list[Found]:
        import torch

        found: dict[int, Found] = {}
        rows: dict[int, Row] = {}
        for number, prompt in enumerate(encoded):
            row = Row(prompt)
            row.walk = walk(row)
            try:
                row.branches = next(row.walk)
                rows[number] = row
            except StopIteration as end:  # a space of one decision needs no model
                found[number] = end.value
        if rows:
            scores, cache = self._encode(list(rows.values()))
            if asks_solving:
                self._ask_solving(list(rows.values()), cache)
        while rows:
            led, keep, before = self._children(list(rows.values()), scores), [], len(rows)
            for place, (number, row) in enumerate(list(rows.items())):
                try:
                    row.branches = row.walk.send([next(led) for _ in row.branches])
                except StopIteration as end:
                    found[number] = end.value
                    del rows[number]
                else:
                    keep.append(place)
            if rows:
                self._make_room(list(rows.values()))
                if len(keep) < before:
                    cache.batch_select_indices(torch.tensor(keep, device=self._model.device))
                scores = self._forward([row.runs for row in rows.values()], cache, self._choices(rows.values()))
        return [found[number] for number in range(len(encoded))]

    def _ask_solving(self, rows: list[Row], cache: Any) -> None:
        """Set how likely each topology is to solve the rows' tasks; what is fed for it no other run sees."""
        import torch

        ways, begun = list(self._verdicts.values()), len(self.tree.root.run)
        prompted = [row.runs for row in rows]
        for row in rows:
            row.runs = [Run(way.start[begun:], row.runs[0].mask) for way in ways]
        asked = [(way.solved, way.unsolved) for way in ways] * len(rows)
        scores = self._forward([row.runs for row in rows], cache, asked)
        shares = torch.softmax(scores, 1)[:, 0].view(len(rows), len(ways))
        for row, runs, own in zip(rows, prompted, shares.tolist(), strict=True):
            row.runs, row.solving = runs, dict(zip(self._verdicts, own, strict=True))

    @cached_property
    def _verdicts(self) -> dict[str, prompts.Verdict]:
        return {name: prompts.encode_verdict(name, self._tokenizer) for name in sorted(self.tree.root.topologies)}

    def _make_room(self, rows: list[Row]) -> None:
        """Set the runs of the next pass: what each row wants most, and of the rest what costs next to nothing.

        All rows are as wide as the widest, so that what fits into that width is free.
        """
        width = max(CHEAP // len(rows), *(len(self._search.node(row.branches[0]).run) for row in rows))
        for row in rows:
            row.runs = []
            for branch in row.branches:
                run = Run(list(self._search.node(branch).run), branch.mask)
                if row.runs and sum(len(one.tokens) for one in row.runs) + len(run.tokens) > width:
                    break
                row.runs.append(run)
            del row.branches[len(row.runs) :]

    def _choices(self, rows: Iterable[Row]) -> list[list[int]]:
        """The tokens that may follow each of the rows' runs."""
        return [list(self._search.node(branch).groups) for row in rows for branch in row.branches]

    def _children(self, rows: list[Row], logits: Any) -> Iterator[list[Branch]]:
        """What the rows' branches lead to, in turn, from the logits at their ends, as `_forward` gives them."""
        import torch

        ends = [(branch, run.mask) for row in rows for branch, run in zip(row.branches, row.runs, strict=True)]
        nodes = [self._search.node(branch) for branch, _ in ends]
        if not logits.isfinite().all():
            raise ModelError(
                f"{self._model.config.name_or_path}: computes no finite numbers in {self._model.dtype}: "
                "try another --dtype, such as float32"
            )
        for (branch, mask), node, own in zip(ends, nodes, logits, strict=True):
            shares = torch.softmax(own[: len(node.groups)], 0).tolist()
            yield [
                Branch(branch.mass * share, node, token, frozenset(self.tree.topologies(group)), mask)
                for (token, group), share in zip(node.groups.items(), shares, strict=True)
            ]

    def _encode(self, rows: list[Row]) -> tuple[Any, Any]:
        """Feed the prompts and what every answer begins with: logits as `_forward` gives them, and the cache.

        A CPU encodes few prompts at a time and decodes many: the caches of the parts are put together.
        """
        import torch
        from torch.nn.functional import pad

        start = self.tree.root.run
        cut = len(self._prefix) if all(row.prompt[: len(self._prefix)] == self._prefix for row in rows) else 0
        for row in rows:
            row.runs = [Run([*row.prompt[cut:], *start], torch.ones(cut, dtype=torch.bool))]
        size = ROWS_AT_ONCE if self._model.device.type == "cpu" else len(rows)
        parts = []
        for part in (rows[at : at + size] for at in range(0, len(rows), size)):
            cache = self._cache(cut, len(part))
            if self._activated:
                self._encode_resting(part, cache)
            parts.append((self._forward([row.runs for row in part], cache, self._choices(part)), cache))
        if len(parts) == 1:
            return parts[0]
        whole, length = parts[0][1], max(cache.get_seq_length() for _, cache in parts)
        for number, layer in enumerate(whole.layers):
            for name in ("keys", "values"):
                each = [getattr(cache.layers[number], name) for _, cache in parts]
                # No mask shows what is padded.
                setattr(layer, name, torch.cat([pad(one, (0, 0, 0, length - one.shape[-2])) for one in each]))
        return torch.cat([scores for scores, _ in parts]), whole

    def _encode_resting(self, rows: list[Row], cache: Any) -> None:
        """Feed the prompts up to where an activated adapter becomes active, which waits then with what follows."""
        assert self._activated
        for row in rows:
            (run,) = row.runs
            end = len(run.tokens) - len(self._activated.invocation) - len(self.tree.root.run)
            row.runs = [Run(run.tokens[:end], run.mask), Run(run.tokens[end:], run.mask)]
        with self._activated.resting():
            self._forward([row.runs[:1] for row in rows], cache, [()] * len(rows))
        for row in rows:
            row.runs = [Run(row.runs[1].tokens, row.runs[0].mask)]

    def _cache(self, length: int, rows: int) -> Any:
        """A fresh cache that holds the first `length` tokens of the constant prefix for `rows` tasks."""
        import torch
        from transformers import DynamicCache

        if length == 0:
            return DynamicCache()
        if self._prefix_cache is None:
            filled = DynamicCache()
            with self._activated.resting() if self._activated else nullcontext():
                self._forward([[Run(self._prefix, torch.ones(0, dtype=torch.bool))]], filled, [()])
            self._prefix_cache = filled
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _forward(self, rows: list[list[Run]], cache: Any, wanted: Sequence[Sequence[int]]) -> Any:
        """Feed every row's runs side by side; the logits of the `wanted` tokens after the last token of each run.

        A run sees what its mask shows of the cache, and itself up to each token. Returns float64 [runs, most wanted]
        on the CPU; where a run wants fewer tokens, its last is repeated.
        """
        import torch

        past = cache.get_seq_length()
        width = max(sum(len(run.tokens) for run in row) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        seen = torch.zeros((len(rows), 1, width, past + width), dtype=torch.bool)
        # Padding sees itself: a softmax over nothing is no number.
        seen[:, 0, :, past:] = torch.eye(width, dtype=torch.bool)
        ends = []
        for number, row in enumerate(rows):
            at = 0
            for run in row:
                to = at + len(run.tokens)
                before = int(run.mask.sum())
                ids[number, at:to] = torch.tensor(run.tokens)
                positions[number, at:to] = torch.arange(before, before + to - at)
                seen[number, 0, at:to, : len(run.mask)] = run.mask
                seen[number, 0, at:to, past + at : past + to] = torch.ones(to - at, to - at, dtype=torch.bool).tril()
                run.mask = seen[number, 0, to - 1].clone()
                ends.append((number, to - 1))
                at = to
        model, device = self._model, self._model.device
        mask = seen
        if model.config._attn_implementation != "sdpa":  # others add it to the scores
            mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
        tokens = sorted({token for own in wanted for token in own} or {0})
        with _head_of(model, torch.tensor(ends, device=device).T, torch.tensor(tokens, device=device)):
            logits = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                **filling(model, cache),
            ).logits
        widest, place = max(map(len, wanted)), {token: i for i, token in enumerate(tokens)}
        picked = [[place[token] for token in (*own, *[*own[-1:]] * (widest - len(own)))] for own in wanted]
        return logits[0].cpu().double().gather(1, torch.tensor(picked, dtype=torch.long).view(len(wanted), widest))


@contextmanager
def _head_of(model: Any, ends: Any, tokens: Any) -> Iterator[None]:
    """While open, the model's head answers for the places `ends` ([2, runs]: rows, positions) and for `tokens` alone.

    The forward pass around it stays the model's own, because some scale or cap what the head gives.
    """
    import torch

    head = model.get_output_embeddings()
    ordinary, own = head.forward, head.__dict__.get("forward")
    plain = type(head) is torch.nn.Linear and own is None

    def narrow(states: Any) -> Any:
        states = states[ends[0], ends[1]][None]
        if not plain:
            return ordinary(states)[..., tokens]
        # Of 50 to 150 thousand rows a handful can follow. They are taken here, where sharded weights are whole.
        weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
        return torch.nn.functional.linear(states, weight, bias)

    head.forward = narrow
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _context(config: Any) -> int:
    """The tokens that a model can see at once. Raises ModelError for one that does not see them by attention."""
    config = config.get_text_config(decoder=True)
    longest: int | None = getattr(config, "max_position_embeddings", None)
    foreign = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if foreign or longest is None:
        has = ", ".join(sorted(foreign)) or "no positions"
        raise ModelError(f"{config.model_type} models ({has}) cannot be asked: take one of attention alone")
    # The masks are the decoder's: a layer with a sliding window would see beyond it, so prompts stay inside.
    return min(longest, getattr(config, "sliding_window", None) or longest)
