"""How a verb tells what it is doing, without knowing who listens.

The architecture lets no verb import Rich; a verb takes a `Progress` and the console brings one that draws.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """One running count."""

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Count `steps` more; `status` is a short text such as the cost so far."""


class Progress(Protocol):
    """Where a verb reports to."""

    def bar(self, title: str, total: int | None, done: int = 0) -> AbstractContextManager[Bar]:
        """Open a bar over `total` steps (None: unknown), `done` of them finished before this run."""

    def notice(self, text: str) -> None:
        """Say one line that a user wants to know."""

    def warn(self, text: str) -> None:
        """Say one line that a user has to know."""


class _SilentBar:
    def advance(self, steps: int = 1, status: str = "") -> None:
        pass


class Silent:
    """The progress that says nothing: the default of every verb."""

    def bar(self, title: str, total: int | None, done: int = 0) -> AbstractContextManager[Bar]:
        """Open a bar that counts nothing."""
        return nullcontext(_SilentBar())

    def notice(self, text: str) -> None:
        """Drop the line."""

    def warn(self, text: str) -> None:
        """Drop the line."""


SILENT = Silent()
