"""What `router eval` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from router_cli.scoring.worth_words import mix, money, solving
from router_cli.settings import Settings
from router_cli.summaries.shown import Shown

if TYPE_CHECKING:
    from router_cli.scoring.results import Report
    from router_cli.scoring.worth_results import PolicyRow, Replayed, WorthReport


def judged(report: Report, settings: Settings) -> Shown:
    """The comparison and where the report lies."""
    folder = settings.eval.output_dir
    parts: list[RenderableType] = [Text(report.summary[0], style="bold"), Text(report.summary[1]), comparison(report)]
    parts.append(Text(f"{folder / 'report.html'} and {folder / 'report.json'}"))
    return Group(*parts), report.model_dump(mode="json")


def comparison(report: Report) -> Table:
    """Every system with its macro-F1 and accuracy, and what its difference to the router says; 76 columns wide."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for name in ("system", "macro-F1", "accuracy", "router is", "by macro-F1 of"):
        table.add_column(name, no_wrap=True)
    for system in sorted(report.systems, key=lambda one: -one.macro_f1.value):
        found, score = system.macro_f1_difference, system.macro_f1
        table.add_row(
            Text(system.name, style="bold" if system.kind == "router" else ""),
            f"{score.value:.3f} ({score.low:.2f}-{score.high:.2f})",
            f"{system.accuracy.value:.3f}",
            found.verdict if found else "",
            f"{found.score.value:+.2f} ({found.score.low:+.2f} to {found.score.high:+.2f})" if found else "",
        )
    return table


def weighed(report: WorthReport, settings: Settings) -> Shown:
    """Every table's policies and verdicts, and where the report lies."""
    folder = settings.eval.output_dir
    parts: list[RenderableType] = []
    for one in report.tables:
        parts += [Text(one.summary[0], style="bold"), Text(one.summary[1]), worth_table(one), Text("")]
        if one.solving is not None:
            parts += [Text(solving(one.solving)), Text("")]
    parts += [Text(note) for note in report.notes]
    parts.append(Text(f"{folder / 'report.html'} and {folder / 'report.json'}"))
    return Group(*parts), report.model_dump(mode="json")


def worth_table(found: Replayed) -> Table:
    """Every policy with what it solves and costs a task, and what the first row's difference to it says; 78 columns."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    first = found.policies[0]
    paid = "$ a task" if found.unit == "USD" else "tokens" if found.unit == "tokens" else ""
    for name in ("policy", "solved", paid, "first row is", "by solved"):
        table.add_column(name, no_wrap=True)
    for row in found.policies:
        difference, solved = row.solved_difference, row.solved
        cost = row.dollars if found.unit == "USD" else row.tokens
        table.add_row(
            Text(row.name, style="bold" if row is first else ""),
            f"{solved.value:.3f} ({solved.low:.2f}-{solved.high:.2f})",
            "" if cost is None or not paid else f"{cost.value:.4f}" if found.unit == "USD" else f"{cost.value:,.0f}",
            difference.verdict if difference else "",
            f"{difference.score.value:+.2f} ({difference.score.low:+.2f} to {difference.score.high:+.2f})"
            if difference
            else "",
        )
    return table


def worth_line(found: Replayed) -> str:
    """One table in a few words: what the router and the fixed topologies solve and cost, and what that can tell."""

    def told(row: PolicyRow) -> str:
        return f"{row.solved.value:.3f}" + (f" at {money(row.dollars.value)}" if row.dollars else "")

    first, *others = found.policies
    fixed = "; ".join(f"{row.name} {told(row)}" for row in others if row.kind == "fixed")
    coin = next(
        (row.solved_difference.words for row in others if row.name == "same-mix coin" and row.solved_difference), ""
    )
    return (
        f"On recorded runs of {found.worker} on {found.counts.judged} tasks of {found.benchmark}, {first.name} "
        f"solves {told(first)} a task ({mix(first)}); {fixed}. Against a coin of its own mix: {coin or 'not known'}."
    )
