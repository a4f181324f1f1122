"""The folder of one training run: is it finished, can it be continued, from where.

The trainer writes checkpoints straight into their final folder, and takes the newest one without a look: one that lost
its optimizer file resumes in silence with other losses. Here a checkpoint counts only once `complete.json` stands in
it, which is written last and lists every file with its size; one whose files are missing or cut counts no more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_cli.backends.local import META
from router_cli.errors import InputError, OutputError, TrainingError
from router_cli.jsonl import read_json, reason, write_json, writing
from router_cli.progress import SILENT, Progress

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
            words = _data(theirs, self.fingerprint) if changed == ["data"] else f"other {', '.join(changed)}{one}"
            raise TrainingError(f"{self.folder}: {what} {words}; choose another --output-dir or delete the folder")

    def compare_base(self, theirs: str | None, mine: str, name: str) -> None:
        """Raises TrainingError where this run began on other weights (`models.content`) than `name` has now."""
        if theirs not in (None, mine):
            raise TrainingError(
                f"{self.folder}: was trained on other weights than {name} has now; "
                "choose another --output-dir or delete the folder"
            )

    def pinned(self, name: str, value: Callable[[], Any]) -> Any:
        """What this run found out when it began (`value`, as JSON), whatever the machine would say now."""
        file = self.checkpoints / f"{name}.json"
        if not file.is_file():
            write_json(file, {name: value()})
        return read_json(file)[name]

    def newest(self, progress: Progress = SILENT) -> Path | None:
        """The newest complete checkpoint; incomplete ones, which a kill or a full disk left, are removed.

        One that was complete and has lost something since is spoken of.
        """
        best: Path | None = None
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=_step):
            lost = _lost(folder)
            if not lost:
                best = folder
                continue
            if lost != MARK:
                progress.warn(f"{folder}: {lost} is missing or cut: the checkpoint before it is taken")
            shutil.rmtree(folder, ignore_errors=True)
        return best

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the writing of the checkpoint of `step`. One that cannot be written takes no room and costs no other.

        Raises OutputError where it cannot be written.
        """
        folder = self.checkpoints / f"checkpoint-{step}"
        (folder / MARK).unlink(missing_ok=True)  # a step can be saved twice, and a kill can come in between
        try:
            with saving(folder):
                yield
        except OutputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def mark(self, step: int, keep: int, seconds: float = 0.0) -> None:
        """Declare the checkpoint of `step` complete, and only then drop all but the newest `keep`.

        `seconds` is how long the run has trained until here.
        """
        whole = self.checkpoints / f"checkpoint-{step}"
        sizes = {str(file.relative_to(whole)): file.stat().st_size for file in whole.rglob("*") if file.is_file()}
        write_json(whole / MARK, {"step": step, "seconds": round(seconds, 1), "files": sizes})
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=_step)[:-keep]:
            (folder / MARK).unlink(missing_ok=True)  # a kill must not leave a marked one with half its files
            shutil.rmtree(folder, ignore_errors=True)

    def seconds(self) -> float:
        """How long the run had trained when it wrote its newest checkpoint."""
        marks = [folder / MARK for folder in self.checkpoints.glob("checkpoint-*") if not _lost(folder)]
        return max((float(read_json(mark).get("seconds", 0.0)) for mark in marks), default=0.0)

    def clean(self) -> None:
        """Drop the checkpoints of a finished run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _data(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """In words, which of several data files is another one."""
    before, now = theirs.get("data") or [], mine.get("data") or []
    if max(len(before), len(now)) < 2:
        return "another data file"
    if len(before) != len(now):
        return f"{len(before)} data files, now {len(now)}"
    return f"another data file (number {next(i for i, one in enumerate(now) if one != before[i]) + 1} of --data)"


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn the refusals to write `folder` into an OutputError; torch and safetensors have errors of their own for them.

    Only for what writes and does nothing else.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OutputError(
            f"{folder}: cannot be written: {why}; make room, then the same command goes on from the checkpoint before"
        ) from None


def _lost(folder: Path) -> str:
    """The first file that a checkpoint lacks or that is not as long as it was; empty for a complete one."""
    try:
        files = read_json(folder / MARK).get("files", {})
    except InputError:
        return MARK
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return str(name)
    return "" if files else MARK


def _step(folder: Path) -> int:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
