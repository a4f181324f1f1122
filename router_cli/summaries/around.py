"""What the commands around the loop show: quickstart, doctor, config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from router_cli.settings import Settings, fields
from router_cli.summaries.evaluate import comparison, worth_line
from router_cli.summaries.infer import decision_table
from router_cli.summaries.shown import Shown, document

if TYPE_CHECKING:
    from router_cli.doctor import Finding
    from router_cli.quickstart import Quickstart


def started(run: Quickstart) -> Shown:
    """The closing panel of the quickstart."""
    assert run.report is not None and run.trained is not None and run.worth is not None  # the loop has ended
    adapter = run.folder / "adapter"
    made = Table(show_header=False, box=None, pad_edge=False)
    made.add_column()
    made.add_column(overflow="fold")
    for file, what in (
        ("labels.jsonl", "the teacher's decisions"),
        ("adapter/", f"LoRA on {run.base.name}, {run.trained.steps} steps"),
        ("predictions.jsonl", "its decisions for the test tasks"),
        ("report.html", "how good they are (report.json for programs)"),
        ("worth/", "what they would have been worth on recorded runs"),
    ):
        made.add_row(Text(file, style="bold"), what)
    times = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in run.seconds.items())
    decisions = [Group(_wrapped(f"\n“{text}”", "italic"), decision_table(row)) for text, row in run.examples]
    following = (
        f'router infer --adapter {adapter} "your own task"\n'
        f"router eval --outcomes humaneval-mapcoder --adapter {adapter}\n"
        "router label --data YOUR_TASKS.jsonl --output labels.jsonl\n"
        "router train --data labels.jsonl --model Qwen/Qwen3-8B --use-4bit --bf16"
    )
    body = Group(
        _wrapped(f"Made in {run.folder}", "bold cyan"),
        made,
        _wrapped(f"{sum(run.seconds.values()):.0f} s: {times}\n"),
        Text(f"How good, on {run.report.counts.judged} held-out tasks (95 % intervals)", style="bold cyan"),
        comparison(run.report),
        Text("\nThree decisions", style="bold cyan"),
        *decisions,
        Text("\nWorth, had it decided", style="bold cyan"),
        _wrapped(worth_line(run.worth.tables[0])),
    )
    shown = {
        "folder": str(run.folder),
        "base": document(run.base),
        "seconds": run.seconds,
        "training": document(run.trained),
        "examples": [{"task": text, **row.model_dump(mode="json")} for text, row in run.examples],
        "report": run.report.model_dump(mode="json"),
        "worth": run.worth.model_dump(mode="json"),
    }
    # Commands stand outside of the frame, for whoever copies them.
    return Group(Panel(body, title="router quickstart", title_align="left"), Text("Next:"), Text(following)), shown


def _wrapped(words: str, style: str = "") -> Text:
    """Text that is broken at the frame's width, though what goes to a pipe is not broken elsewhere."""
    return Text(words, style=style, no_wrap=False, overflow="fold")


def examined(findings: list[Finding]) -> Shown:
    """The doctor's findings, each with its fix."""
    marks = {"fine": ("ok", "green"), "note": ("--", "yellow"), "wrong": ("no", "bold red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = marks[finding.state]
        table.add_row(Text(mark, style=style), finding.name, Text(finding.words))
        if finding.fix:
            table.add_row("", "", Text(f"-> {finding.fix}", style="cyan"))
    return table, {"findings": [dataclasses.asdict(finding) for finding in findings]}


def configured(settings: Settings) -> Shown:
    """Every setting, its value and its origin."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    every: dict[str, Any] = {}
    for key, _ in fields():
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        plain = "********" if isinstance(value, SecretStr) else value
        origin = settings.origin(key)
        every[key] = {"value": str(plain) if isinstance(plain, Path) else plain, "from": origin}
        shown = ",".join(plain) if isinstance(plain, list) else "" if plain is None else str(plain)
        table.add_row(Text(key), Text(shown), Text(origin, style="dim" if origin == "default" else "bold"))
    return table, every
