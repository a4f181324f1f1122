"""Unreadable lines of the input that a command passes over, and where it records them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from router_cli.jsonl import write_rows, writing
from router_cli.schema import Task
from router_cli.tasks import read_tasks

KEPT = 1000
"""Characters of a line that are recorded."""

ENDING = ".bad-lines.jsonl"
"""What the name of the record ends in, behind that of the output."""


@dataclass
class BadLines:
    """The lines that were passed over while `paths` were read; each once, however often they are.

    With `skip` False the first one raises InputError instead.
    """

    paths: Sequence[str]
    skip: bool
    _met: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._met)

    def tasks(self) -> Iterator[Task]:
        """The tasks of all paths, read lazily."""

        def read(path: str) -> Iterator[Task]:
            def note(number: int, text: str, why: str) -> None:
                self._met[path, number] = (text[:KEPT], why)

            return read_tasks([path], on_bad=note if self.skip else None)

        return chain.from_iterable(map(read, self.paths))

    def __iter__(self) -> Iterator[str]:
        """A sentence for each."""
        return (f"{path}:{number}: skipped: {why}" for (path, number), (_, why) in self._met.items())

    def record(self, output: Path) -> None:
        """Write them beside `output`; no file stands there without any."""
        file = output.with_name(output.name + ENDING)
        if self._met:
            names = ("file", "line", "text", "reason")
            write_rows(file, (dict(zip(names, (*place, *said), strict=True)) for place, said in self._met.items()))
        else:
            with writing(file):
                file.unlink(missing_ok=True)
