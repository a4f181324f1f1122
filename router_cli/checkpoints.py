"""The folder of one training run: is it finished, can it be continued, from where.

The trainer writes checkpoints straight into their final folder, and takes the newest one without a look: one that lost
its optimizer file resumes in silence with other losses. Here a checkpoint counts only once `complete.json` stands in
it, which is written last.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from router_cli.backends.local import META
from router_cli.errors import InputError, TrainingError
from router_cli.jsonl import read_json, write_json, writing

MARK = "complete.json"


class Run:
    """A training run in `folder` with everything that identifies it in `fingerprint`."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.checkpoints = folder / "checkpoints"

    def finished(self) -> dict[str, Any] | None:
        """The description of the adapter that stands here if it is this run's; None if there is none.

        Raises TrainingError where an adapter of another run stands here: it is not overwritten.
        """
        if not (self.folder / META).is_file():
            return None
        try:
            meta = read_json(self.folder / META)
        except InputError as error:
            raise TrainingError(f"{error}; move the folder away or choose another --output-dir") from None
        self._compare(meta.get("fingerprint", {}), "holds an adapter trained with")
        return meta

    def begin(self) -> None:
        """Open the run, new or continued. Raises TrainingError where the unfinished run here is another one."""
        identity = self.checkpoints / "run.json"
        if identity.is_file():
            self._compare(read_json(identity), "holds an unfinished run with")
        else:
            with writing(self.checkpoints):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(identity, self.fingerprint)

    def _compare(self, theirs: dict[str, Any], what: str) -> None:
        changed = sorted(key for key in {*theirs, *self.fingerprint} if theirs.get(key) != self.fingerprint.get(key))
        if changed:
            one = (
                f" ({theirs.get(changed[0])!r}, now {self.fingerprint.get(changed[0])!r})" if len(changed) == 1 else ""
            )
            words = "another data file" if changed == ["data"] else f"other {', '.join(changed)}{one}"
            raise TrainingError(f"{self.folder}: {what} {words}; choose another --output-dir or delete the folder")

    def newest(self) -> Path | None:
        """The newest complete checkpoint; incomplete ones, which a kill left, are removed."""
        best: Path | None = None
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=_step):
            if (folder / MARK).is_file():
                best = folder
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return best

    def mark(self, step: int, keep: int) -> None:
        """Declare the checkpoint of `step` complete, and only then drop all but the newest `keep`."""
        write_json(self.checkpoints / f"checkpoint-{step}" / MARK, {"step": step})
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=_step)[:-keep]:
            (folder / MARK).unlink(missing_ok=True)  # a kill must not leave a marked one with half its files
            shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        """Drop the checkpoints of a finished run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _step(folder: Path) -> int:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
