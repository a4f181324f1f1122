"""What a running training is at: loss, topology accuracy, learning rate, tokens a second, memory, money so far."""

from __future__ import annotations

import time
from typing import Any

from router_cli import ranks


class Figures:
    """The figures of one run. `tokens` is what one epoch holds, `price` US dollars for an hour of one GPU.

    `earlier` seconds had been trained before the run broke off.
    """

    def __init__(self, tokens: int, price: float | None, earlier: float = 0.0) -> None:
        self._tokens, self._price, self._earlier = tokens, price, earlier
        self._started, self._epoch = time.monotonic(), 0.0
        self._logged: dict[str, float] = {}

    def begin(self, epoch: float) -> None:
        """Start the clock at `epoch`, where the run begins or goes on."""
        self._started, self._epoch = time.monotonic(), epoch

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption too."""
        return self._earlier + time.monotonic() - self._started

    def words(self, logs: dict[str, float], epoch: float) -> str:
        """The newest figures, parted by commas; what `logs` lacks stays as it was."""
        self._logged |= logs
        found, spent = self._logged, max(time.monotonic() - self._started, 1e-9)
        parts = [f"loss {found['loss']:.3f}"] if "loss" in found else []
        if "topology_accuracy" in found:
            parts.append(f"topology {found['topology_accuracy']:.0%} right")
        if "learning_rate" in found:
            parts.append(f"lr {found['learning_rate']:.1e}")
        # By the rows' known lengths: counting what passes through would make the processor wait for the GPU.
        parts.append(f"{self._tokens * (epoch - self._epoch) / spent:.0f} tokens/s")
        parts.append(f"{_memory() / 1e9:.1f} GB")
        if self._price is not None:
            parts.append(f"${self._price * ranks.count() * self.seconds / 3600:.2f}")
        return ", ".join(parts)


def _memory() -> Any:
    """Bytes that this process holds at most on its GPU, or has in memory now."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    return psutil.Process().memory_info().rss
