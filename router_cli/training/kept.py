"""The prompts of an activated adapter, computed once: what the frozen base makes of them serves all epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from router_cli.backends.activated import Activated
from router_cli.backends.device import ROWS_AT_ONCE, available_memory
from router_cli.backends.library import filling
from router_cli.training.frozen import aside, upper_cache

MEMORY_SHARE = 0.4
"""The share of free memory that kept keys and values may take; above it, they are computed in every step."""


class Prompts:
    """Keys and values of prompts as the base makes them, and what the adapted model makes of the answers behind them.

    `shared` is how many tokens all rows begin with, `first` the lowest layer with an adapter.
    """

    def __init__(self, adapter: Activated, shared: int, pad: int, first: int = 0) -> None:
        self._adapter, self._shared, self._pad, self._first = adapter, shared, pad, first
        self._start: Any = None  # keys and values of the tokens that all rows begin with
        self._kept: dict[tuple[int, ...], Any] = {}
        # Of the answers' tokens, the states below the first adapted layer, which never change either.
        self._states: dict[tuple[int, ...], Any] = {}
        self._from = 0

    def fits(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether what `compute` keeps of these rows fits beside the model."""
        base = self._adapter.base
        config = base.config.get_text_config(decoder=True)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * (config.num_hidden_layers - self._first) * config.num_key_value_heads * size * base.dtype.itemsize
        tokens = sum(len(row) - self._shared for row in {tuple(self._prompt(row)) for row in rows})
        if self._first:
            states = sum(len(row) - len(self._prompt(row)) for row in rows)
            tokens += states * config.hidden_size * base.dtype.itemsize // token
        return bool(tokens * token < MEMORY_SHARE * available_memory())

    def compute(self, rows: Sequence[Sequence[int]], each: Callable[[int], None]) -> None:
        """Keep what never changes of whole rows; `each` is told how many rows are done since its last call."""
        self._from = self._first
        order = sorted(rows, key=len)
        for i in range(0, len(order), ROWS_AT_ONCE):
            part = order[i : i + ROWS_AT_ONCE]
            prompts_here = [self._prompt(row) for row in part]
            made = self._encoded(part if self._from else prompts_here, [len(prompt) for prompt in prompts_here])
            for row, prompt, (kept, states) in zip(part, prompts_here, made, strict=True):
                self._kept[tuple(prompt)] = kept
                if states is not None:
                    self._states[tuple(row)] = states
            each(len(part))

    def share(self, row: Sequence[int], length: int) -> None:
        """Let the first `length` tokens of a computed row be a row too."""
        if self._from:
            self._states[tuple(row[:length])] = self._states[tuple(row)][: length - len(self._prompt(row))]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the layers whose outcome is kept stand aside: only rows that were computed can be asked for."""
        with aside(self._adapter.base.get_decoder(), self._from):
            yield

    def states(self, ids: Any, mask: Any, labels: Any, ignored: int) -> tuple[Any, Any]:
        """The last hidden states from each row's invocation on, [rows, length, hidden size], and the labels there.

        `ids`, `mask` and `labels` are whole rows, padded on the right; what is padded in the result has the label
        `ignored`.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [row[:real] for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
        prompts_here = [self._prompt(row) for row in rows]
        fed = [row[len(prompt) :] for row, prompt in zip(rows, prompts_here, strict=True)]
        device = ids.device
        tokens = pad_sequence([torch.tensor(row) for row in fed], batch_first=True, padding_value=self._pad)
        ends = [one[len(prompt) : len(row)] for one, prompt, row in zip(labels, prompts_here, rows, strict=True)]
        here = pad_sequence(ends, batch_first=True, padding_value=ignored)
        inputs = {"input_ids": tokens.to(device)}
        if self._from:
            inputs = {"inputs_embeds": pad_sequence([self._states[tuple(row)] for row in rows], batch_first=True)}
        cache, before = self._cache([tuple(prompt) for prompt in prompts_here])
        length = tokens.shape[1]
        start = torch.tensor([len(prompt) for prompt in prompts_here], device=device)
        decoder = self._adapter.base.get_decoder()
        found = decoder(
            **inputs,
            attention_mask=torch.cat([before, torch.ones(len(rows), length, dtype=before.dtype, device=device)], 1),
            position_ids=start[:, None] + torch.arange(length, device=device),
            **filling(decoder, cache),
        )
        return found.last_hidden_state, here

    def _prompt(self, row: Sequence[int]) -> Sequence[int]:
        """The tokens before the last invocation of a row."""
        wanted = self._adapter.invocation
        for at in range(len(row) - len(wanted), -1, -1):
            if list(row[at : at + len(wanted)]) == wanted:
                return row[:at]
        raise AssertionError("every row holds the end of its prompt")

    def _encoded(self, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[tuple[Any, Any]]:
        """For each row, what the base makes of it: keys and values, and states.

        The keys and values are those between the shared start and its end in `ends`, [layers, 2, key heads, length,
        head size]; the states those of the tokens behind it, [length, hidden size], below the first layer that is kept,
        or None where all are.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence
        from transformers import DynamicCache

        decoder, device = self._adapter.base.get_decoder(), self._adapter.base.device
        caught: list[Any] = []
        hook = decoder.layers[self._from].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        training = decoder.training
        decoder.eval()
        try:
            with torch.no_grad(), self._adapter.resting():
                if self._start is None and self._shared:
                    cache = DynamicCache()
                    start = torch.tensor([rows[0][: self._shared]], device=device)
                    decoder(input_ids=start, **filling(decoder, cache))
                    self._start = _stacked(cache)[:, :, 0]
                # Padded on the right, where causal attention never looks: no mask is needed.
                ids = [torch.tensor(row[self._shared :]) for row in rows]
                cache = _filled(DynamicCache(), [self._start] * len(rows)) if self._shared else DynamicCache()
                padded = pad_sequence(ids, batch_first=True, padding_value=self._pad).to(device)
                decoder(input_ids=padded, **filling(decoder, cache))
        finally:
            hook.remove()
            decoder.train(training)
        made, below = _stacked(cache)[self._from :], caught[-1]
        # Clones of their own: views would keep the whole pass's storage.
        return [
            (
                made[:, :, i, :, self._shared : end].clone(),
                below[i, end - self._shared : len(row) - self._shared].clone() if self._from else None,
            )
            for i, (row, end) in enumerate(zip(rows, ends, strict=True))
        ]

    def _cache(self, rows: Sequence[tuple[int, ...]]) -> tuple[Any, Any]:
        """A cache of these prompts, padded on the left, and the mask that says where they are."""
        import torch
        from torch.nn.functional import pad

        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        made = self._encoded(missing, [len(row) for row in missing]) if missing else []
        found = {row: keys for row, (keys, _) in zip(missing, made, strict=True)}
        parts = [self._kept[row] if row in self._kept else found[row] for row in rows]
        if self._start is not None:
            parts = [torch.cat([self._start[self._from :], part], -2) for part in parts]
        longest = max(part.shape[-2] for part in parts)
        mask = torch.tensor(
            [[0] * (longest - part.shape[-2]) + [1] * part.shape[-2] for part in parts], device=parts[0].device
        )
        cache = upper_cache(self._adapter.base.get_decoder(), self._from)
        return _filled(cache, [pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts], self._from), mask


def _stacked(cache: Any) -> Any:
    """A cache as one tensor: [layers, 2, rows, key heads, length, head size]."""
    import torch

    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


def _filled(cache: Any, rows: Sequence[Any], first: int = 0) -> Any:
    """The empty `cache` with rows, each [layers, 2, key heads, length, head size], from layer `first` on."""
    import torch

    for number, (keys, values) in enumerate(torch.stack(list(rows), 2), start=first):
        cache.update(keys, values, number)
    return cache
