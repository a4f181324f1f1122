"""What never changes while the last layers are trained, computed once: the cheap way to train on a CPU.

Layers below the first adapter give the same hidden states in every epoch. For a small model they are most of the work,
so their output is kept a row and put in place of the embeddings, and the layers themselves step aside. And the start
of the prompt is the same in every row: each micro-batch encodes it once and lets all its rows attend to it.

Both are exact: losses and gradients equal those of ordinary training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from router_cli.backends.device import ROWS_AT_ONCE, available_memory
from router_cli.backends.library import filling

MEMORY_SHARE = 0.25
"""The share of free memory that the kept states may take; above it, training runs the ordinary way."""


def hidden_states(decoder: Any, ids: Any, mask: Any, shared: int, first_layer: int) -> Any:
    """Last hidden states of the positions behind the `shared` first ones, which all rows have in common.

    `ids` and `mask` are [rows, length]; the result is [rows, length - shared, hidden size]. `first_layer` is the lowest
    layer that really runs. Gradients flow through the shared part.
    """
    if shared == 0:
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    cache = upper_cache(decoder, first_layer)
    decoder(input_ids=ids[:1, :shared], **filling(decoder, cache))
    cache.batch_repeat_interleave(ids.shape[0])
    return decoder(input_ids=ids[:, shared:], attention_mask=mask, **filling(decoder, cache)).last_hidden_state


def upper_cache(decoder: Any, first_layer: int) -> Any:
    """An empty cache of keys and values for a decoder whose layers below `first_layer` stand aside."""
    from transformers import DynamicCache

    class Cache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
        """A cache whose lowest layers stand aside: lengths are read off the first one that runs."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return int(super().get_seq_length(max(layer_idx, first_layer)))

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
            return super().get_mask_sizes(query_length, max(layer_idx, first_layer))

    return Cache(config=decoder.config)


@contextmanager
def aside(decoder: Any, count: int) -> Iterator[None]:
    """While open, the lowest `count` layers hand on what they are given."""
    import torch

    class Aside(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            # Models look at their layers' kind of attention.
            self.attention_type = getattr(layer, "attention_type", None)

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

    below = [decoder.layers[i] for i in range(count)]
    for i, layer in enumerate(below):
        decoder.layers[i] = Aside(layer)
    try:
        yield
    finally:
        for i, layer in enumerate(below):
            decoder.layers[i] = layer


class FrozenLayers:
    """The hidden states below layer `keep_from` for rows of token ids, and the switch that puts them in place."""

    def __init__(self, model: Any, keep_from: int, pad: int, shared: int) -> None:
        self._decoder = model.get_decoder()
        self._keep_from, self._pad, self._shared = keep_from, pad, shared
        self._states: dict[tuple[int, ...], Any] = {}

    @staticmethod
    def fits(model: Any, rows: Sequence[Sequence[int]]) -> bool:
        """Whether the states of all rows fit beside the model."""
        size = sum(len(row) for row in rows) * model.config.hidden_size * model.dtype.itemsize
        return bool(size < MEMORY_SHARE * available_memory())

    def compute(self, rows: Sequence[Sequence[int]], each: Callable[[int], None]) -> None:
        """Run the frozen layers over every row once; `each` is told how many rows are done since its last call."""
        import torch

        caught: list[Any] = []
        hook = self._decoder.layers[self._keep_from].register_forward_pre_hook(
            lambda module, args: caught.append(args[0])
        )
        config, layers = self._decoder.config, self._decoder.config.num_hidden_layers
        # The model's loop runs over as many layers as its config says; the hook's own layer is the last one needed.
        config.num_hidden_layers = self._keep_from + 1
        training = self._decoder.training
        self._decoder.eval()  # the dropout of that last layer would draw from the generator that training draws from
        try:
            with torch.no_grad():
                start = upper_cache(self._decoder, 0)
                if self._shared:
                    self._keep([rows[0][: self._shared]], start, caught)
                order = sorted(rows, key=len)
                for i in range(0, len(order), ROWS_AT_ONCE):
                    part = order[i : i + ROWS_AT_ONCE]
                    cache = copy.deepcopy(start)
                    if self._shared:
                        cache.batch_repeat_interleave(len(part))
                    self._keep([row[self._shared :] for row in part], cache, caught)
                    each(len(part))
        finally:
            self._decoder.train(training)
            config.num_hidden_layers = layers
            hook.remove()

    def _keep(self, rows: Sequence[Sequence[int]], cache: Any, caught: list[Any]) -> None:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        caught.clear()
        # Padded on the right, where causal attention never looks: no mask is needed.
        ids = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True, padding_value=self._pad)
        self._decoder(ids.to(self._decoder.device), **filling(self._decoder, cache))
        for row, states in zip(rows, caught[0], strict=True):
            # A clone of its own: a view would keep the whole forward's storage.
            self._states[self._key(row)] = states[: len(row)].detach().clone()

    def share(self, row: Sequence[int], length: int) -> None:
        """Let the first `length` tokens of a computed row be a row too: they have the same states."""
        states = self._states[self._key(row[self._shared :])]
        self._states[self._key(row[self._shared : length])] = states[: length - self._shared]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model starts at layer `keep_from`, from the kept states of the rows that it is given."""
        hook = self._decoder.embed_tokens.register_forward_hook(lambda module, args, output: self._lookup(args[0]))
        try:
            with aside(self._decoder, self._keep_from):
                yield
        finally:
            hook.remove()

    def _lookup(self, ids: Any) -> Any:
        from torch.nn.utils.rnn import pad_sequence

        kept = [self._states[self._key(row)] for row in ids.tolist()]
        states = pad_sequence(kept, batch_first=True)
        # The batch may be padded beyond its longest row's last real token: those positions carry no loss.
        missing = ids.shape[1] - states.shape[1]
        if missing > 0:
            import torch

            states = torch.nn.functional.pad(states, (0, 0, 0, missing))
        return states[:, : ids.shape[1]]

    def _key(self, row: Sequence[int]) -> tuple[int, ...]:
        # Padding stands on the right; the end token can be the padding token, so rows are compared without either.
        end = len(row)
        while end and row[end - 1] == self._pad:
            end -= 1
        return tuple(row[:end])
