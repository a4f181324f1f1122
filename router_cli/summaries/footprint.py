"""What `router train --estimate` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from router_cli.footprint.forecast import gb, spell
from router_cli.summaries.shown import Shown, document

if TYPE_CHECKING:
    from router_cli.footprint.forecast import Footprint

SOURCES = {
    "table": "the table that comes with this program",
    "hub": "the Hub's config.json",
    "gguf": "the .gguf file's header",
    "cache": "the cached config.json",
    "package": "the kept config.json",
    "folder": "the folder's config.json",
}


def foreseen(found: Footprint) -> Shown:
    """Memory by component, time and money."""
    table = Table(title=f"memory at the peak: {found.phase}", title_justify="left")
    table.add_column("component")
    table.add_column("GB", justify="right")
    for name, size in found.memory.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("all", f"{found.total / 1e9:.2f}", style="bold")
    free = "" if found.free is None else f"; {gb(found.free)} are free: it {'fits' if found.fits else 'does not fit'}"
    money = "no price: --price-per-hour gives one" if found.dollars is None else f"about ${found.dollars:.2f}"
    lines = [
        f"{found.model} (shape from {SOURCES[found.shape_from]}) on the {found.device.upper()}{free}",
        f"{found.examples:,} examples of {found.mean:.0f} tokens, the longest {found.longest} "
        f"(by {found.counted_by}); {found.steps:,} steps",
        f"time: very roughly {spell(found.seconds)}, from a probe of the device; training itself corrects it",
        f"money: {money}",
    ]
    more = {"total": found.total, "fits": found.fits}
    return Group(table, Text("\n".join(lines))), {**document(found), **more}
