"""What `--compare` names: predictions files, and folders that a run left behind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_cli.errors import SettingsError
from router_cli.jsonl import read_json

PREDICTIONS, REPORT = "predictions.jsonl", "report.json"


@dataclass(frozen=True)
class Run:
    """A compared system: its predictions, and the report.json that lies beside them in a run's folder ({}: none)."""

    name: str
    predictions: str
    report: dict[str, Any]


def runs(entries: Sequence[str], taken: Collection[str], origin: str) -> list[Run]:
    """Read NAME=FILE, FILE, NAME=FOLDER or FOLDER; a folder holds predictions.jsonl, and names itself.

    Raises SettingsError, with the setting's `origin`, for an entry without a name or file, or with a name in use.
    """
    found: list[Run] = []
    for entry in entries:
        name, equals, path = (part.strip() for part in entry.partition("="))
        place = Path(path if equals else name).expanduser()
        if (equals and not (name and path)) or not (equals or place.exists()):
            raise SettingsError(
                f"eval.compare ({origin}): expected NAME=FILE, a file or the folder of a run, got {entry!r}"
            )
        folder = place if place.is_dir() else place.parent
        file = place / PREDICTIONS if place.is_dir() else place
        if place.is_dir() and not file.is_file():
            raise SettingsError(f"eval.compare ({origin}): {place} holds no {PREDICTIONS}, as a run's folder does")
        if not equals:
            name = folder.resolve().name if file.name == PREDICTIONS else file.stem
        if name in taken or name in {one.name for one in found}:
            raise SettingsError(
                f"eval.compare ({origin}): the name {name!r} is taken, choose another with NAME={path or place}"
            )
        own = file.name == PREDICTIONS and (folder / REPORT).is_file()
        found.append(Run(name, str(file), read_json(folder / REPORT) if own else {}))
    return found
