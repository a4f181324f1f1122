"""What `router serve` shows when it has ended."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.text import Text

from router_cli import costs
from router_cli.summaries.shown import Shown

if TYPE_CHECKING:
    from router_cli.serve import ServeResult


def served(result: ServeResult) -> Shown:
    """What was answered until then."""
    parts = [f"{result.answered:,} requests answered", f"{result.decisions:,} decisions", f"{result.refused:,} refused"]
    if result.fallbacks or result.fallback_dollars != 0:
        price = "" if result.fallback_dollars == 0 else f" ({costs.dollars(result.fallback_dollars)})"
        parts.append(f"{result.fallbacks:,} fallbacks{price}")
    if result.gone:
        parts.append(f"{result.gone:,} given up by their clients")
    if result.cut:
        parts.append(f"{result.cut:,} cut off by the end")
    return Text(f"{', '.join(parts)}, in {result.seconds:.0f} s"), dataclasses.asdict(result)
