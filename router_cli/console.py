"""The only printer. stdout carries results, stderr carries progress, cost and warnings.

terminal    Rich progress bars with rate and remaining time, panels, colours (none under NO_COLOR)
pipe        plain lines, at most one every few seconds a bar
--json      one JSON document on stdout, nothing else there
-q          stderr is silent but for errors
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from router_cli.errors import OutputError
from router_cli.jsonl import reason
from router_cli.progress import Bar

LINE_SECONDS = 5.0
"""How often a bar says where it is when nobody watches a terminal."""


class Console:
    """Where everything that a command says goes. It is a `progress.Progress` for the verbs."""

    def __init__(self, verbosity: int = 0, as_json: bool = False) -> None:
        self.verbosity, self.as_json = verbosity, as_json
        # Paths and code go out as they are: `:key:` would become a picture of one.
        plain: dict[str, Any] = {"highlight": False, "soft_wrap": True, "emoji": False}
        self._out = RichConsole(file=sys.stdout, **plain)
        self._err = RichConsole(file=sys.stderr, stderr=True, **plain)
        self._live: Progress | None = None
        self._open = 0

    @property
    def quiet(self) -> bool:
        """Whether stderr carries errors only."""
        return self.verbosity < 0

    # -- results ----------------------------------------------------------------------------------------------

    def result(self, shown: RenderableType, document: BaseModel | dict[str, Any] | None = None) -> None:
        """Put a result on stdout: `shown` for people, `document` in its place under --json."""
        if not self.as_json:
            with _printing():
                self._out.print(shown, markup=False)
        elif document is not None:
            self._document(document, indent=2)

    def row(self, document: BaseModel) -> None:
        """Put one row of a result that comes bit by bit on stdout, as one line of JSON. Raises what `raw` does."""
        self._document(document, indent=None)

    def _document(self, document: BaseModel | dict[str, Any], indent: int | None) -> None:
        text = json.dumps(_plain(document), ensure_ascii=False, indent=indent)
        # A Windows code page, or half of an emoji: what the stream cannot take is written as \uXXXX.
        self.raw(text if _takes(sys.stdout.encoding, text) else json.dumps(_plain(document), indent=indent))

    def raw(self, text: str) -> None:
        """Put a line on stdout as it is. Raises OutputError where it takes none, BrokenPipeError where nobody reads."""
        with _printing():
            print(text, file=sys.stdout, flush=True)

    # -- progress.Progress ------------------------------------------------------------------------------------

    @contextmanager
    def bar(self, title: str, total: int | None, done: int = 0) -> Iterator[Bar]:
        """Open a bar; several may be open at once."""
        if self.quiet:
            yield _Nothing()
        elif not self._err.is_terminal:
            bar = _Lines(self._err, title, total, done)
            yield bar
            bar.close()
        else:
            live = self._shared()
            task = live.add_task(escape(title), total=total, completed=done, status="", beside="", begun=done)
            self._open += 1
            try:
                yield _Drawn(live, task)
            finally:
                live.stop_task(task)
                self._open -= 1
                if self._open == 0:
                    live.stop()
                    self._live = None

    def _shared(self) -> Progress:
        if self._live is None:
            self._live = _Live(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[beside]}", markup=False),
                console=self._err,
                # Rows go to a pipe or file as they are; on a terminal they go above the bars.
                redirect_stdout=self._out.is_terminal,
            )
            self._live.start()
        return self._live

    def notice(self, text: str) -> None:
        """Say one line that a user wants to know."""
        if not self.quiet:
            self._err.print(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Say one line that a user has to know."""
        if not self.quiet:
            self._err.print(Text.assemble(("warning: ", "yellow"), text))

    def error(self, text: str) -> None:
        """Say the one line that ends a command; never silent."""
        if self._live is not None:
            self._live.stop()
        # Markup would eat [x] out of a path or a setting.
        self._err.print(Text.assemble(("error: ", "bold red"), text))

    def confirm(self, question: str) -> bool:
        """Ask for a yes or no on the terminal; no where nobody sits at one."""
        if not (self._err.is_terminal and sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()):
            return False
        self._err.print(Text(f"{question} [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def panel(self, shown: RenderableType) -> None:
        """Show a summary on stderr."""
        if not self.quiet:
            self._err.print(shown)


class _Live(Progress):
    """Bars, and below them what a bar with several figures is at."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars as a table, then a row of figures for each bar that has them."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if figures := _several(task.fields["status"]):
                row = Table.grid(padding=(0, 3))
                row.add_row("", *(Text(figure, style="cyan", no_wrap=True) for figure in figures))
                yield row


def _several(status: str) -> list[str]:
    """The figures of a status that has more than two of them."""
    parts = status.split(", ")
    return parts if len(parts) > 2 else []


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step, since this run began."""

    def render(self, task: Task) -> Text:
        made = task.completed - task.fields["begun"]
        if not task.elapsed or made <= 0:
            return Text("")
        rate = made / task.elapsed
        return Text(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f}s each", style="cyan")


class _Nothing:
    def advance(self, steps: int = 1, status: str = "") -> None:
        """Count nothing."""


class _Drawn:
    def __init__(self, live: Progress, task: Any) -> None:
        self._live, self._task = live, task

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Move the bar."""
        self._live.update(self._task, advance=steps)
        if status:
            # A word or two stand beside the bar, more of them below it.
            self._live.update(self._task, status=status, beside="" if _several(status) else status)


class _Lines:
    """A bar for pipes: a line every few seconds, and when it ends."""

    def __init__(self, console: RichConsole, title: str, total: int | None, done: int) -> None:
        self._console, self._title, self._total, self._done, self._begun = console, title, total, done, done
        self._started = self._said = time.monotonic()
        self._status, self._said_at = "", -1

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Count, and say so from time to time."""
        self._done += steps
        self._status = status or self._status
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self._say()

    def close(self) -> None:
        """Say how it ended."""
        if self._done != self._said_at:
            self._say()

    def _say(self) -> None:
        self._said_at = self._done
        spent = time.monotonic() - self._started
        made = self._done - self._begun
        parts = [f"{self._title}: {self._done}" + (f"/{self._total}" if self._total is not None else "")]
        if made and spent > 0:
            parts.append(f"{made / spent:.1f}/s")
            if self._total is not None and self._total > self._done:
                parts.append(f"{(self._total - self._done) * spent / made:.0f} s left")
        parts.append(f"{spent:.0f} s")
        if self._status:
            parts.append(self._status)
        self._console.print(", ".join(parts), markup=False)


@contextmanager
def _printing() -> Iterator[None]:
    """Turn the refusals of standard output into an OutputError; a reader that has gone away is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output: cannot be written: {reason(error)}") from error


def _takes(encoding: str | None, text: str) -> bool:
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _plain(document: BaseModel | dict[str, Any]) -> Any:
    return document.model_dump(mode="json") if isinstance(document, BaseModel) else document
