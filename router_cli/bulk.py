"""`router infer` over a folder of shards: each becomes a predictions file of the same name.

`--engine local` takes one shard after the other in this process, `--engine ray` leaves them to a cluster's workers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_cli import errors, fallback
from router_cli.badlines import ENDING
from router_cli.errors import InputError, OutputError, PartialError, UsageError
from router_cli.infer import differing, identity
from router_cli.jsonl import alone, read_json, write_json, writing
from router_cli.progress import SILENT, Progress
from router_cli.settings import Settings
from router_cli.shards import Done, Worker

SHARDS = (".jsonl", ".jsonl.gz")
NOTE, LOCK = ".infer.json", ".infer.lock"
_OF_ONE = (InputError.__name__, PartialError.__name__)
"""Failures of one shard; any other would come again with the next."""


@dataclass(frozen=True)
class BulkResult:
    """What stands in the folder `output`: `shards` files, `resumed` of them from before, `decided` tasks in the others.

    `unsure` counts the rows below the confidence `threshold` by who decided them ("none": nobody did).
    """

    output: Path
    shards: int
    resumed: int
    decided: int
    skipped: int
    fallbacks: int
    threshold: float | None
    unsure: dict[str, int]


def wanted(settings: Settings) -> bool:
    """Whether `infer` is to go over a folder."""
    asked = settings.infer
    return asked.engine == "ray" or asked.workers is not None or any(Path(path).is_dir() for path in asked.data)


def infer_shards(settings: Settings, text: str | None = None, progress: Progress = SILENT) -> BulkResult:
    """Decide all tasks of the shards in the folder `infer.data` into the folder `infer.output`.

    Raises UsageError for options that make no sense here, OutputError where the folder is another call's, PartialError
    where some shards cannot be decided (the others stand), and what `make_backend` raises.
    """
    from router_cli.ray_engine import by_ray

    data, output = _folders(settings, text)
    names = _shards(data, progress)
    with _held(output), progress.bar("infer", len(names)) as bar:
        _noted(output, settings)
        done, heard, decided = list[Done](), set[str](), 0
        engine = by_ray if settings.infer.engine == "ray" else _here
        for one in engine(settings, names, progress):
            for say, words in ((progress.notice, one.said), (progress.warn, one.warned)):
                for line in words:
                    if line not in heard:  # every worker says the same
                        heard.add(line)
                        say(line)
            if one.error and one.kind not in _OF_ONE:
                raise getattr(errors, one.kind)(one.error)
            if one.error:
                progress.warn(one.error)
            done.append(one)
            decided += one.decided
            bar.advance(1, f"{decided:,} tasks")
    failed = [one for one in done if one.error]
    if len(failed) == len(done):
        raise getattr(errors, failed[0].kind)(failed[0].error)
    if failed:
        raise PartialError(
            f"{len(failed)} of {len(done)} shards could not be decided, the others stand in {output}: mend them and "
            "run the same command again"
        )
    counts: Counter[str] = Counter()
    for one in done:
        counts.update(one.unsure)
    return BulkResult(
        output,
        len(done),
        sum(one.stood for one in done),
        decided,
        sum(one.skipped for one in done),
        sum(one.fallbacks for one in done),
        next((one.threshold for one in done if one.threshold is not None), None),
        dict(counts),
    )


def _here(settings: Settings, names: Sequence[str], progress: Progress) -> Iterator[Done]:
    with contextlib.closing(Worker(settings, progress)) as worker:
        for name in names:
            yield worker.attempt(name)


# -- what is asked for ------------------------------------------------------------------------------------------


def _folders(settings: Settings, text: str | None) -> tuple[Path, Path]:
    asked = settings.infer
    if asked.workers is not None and asked.engine != "ray":
        raise UsageError("--workers needs --engine ray")
    if text is not None or len(asked.data) != 1 or not Path(asked.data[0]).is_dir():
        what = "--engine ray" if asked.engine == "ray" else "a folder of shards"
        raise UsageError(f"{what} needs --data FOLDER and nothing else: its *.jsonl and *.jsonl.gz are the shards")
    if asked.output is None:
        raise UsageError("--data FOLDER needs --output FOLDER, for a file a shard")
    if asked.limit is not None:
        raise UsageError("--limit counts tasks in order, and shards have none: name files instead of the folder")
    fallback.check(settings)
    if asked.fallback == "teacher":
        raise UsageError(
            "--fallback teacher keeps one budget for one stream of tasks: name files instead of the folder"
        )
    if asked.engine == "ray" and asked.backend == "remote":
        raise UsageError("--engine ray needs a router in each worker: ask a server with --engine local")
    data, output = Path(asked.data[0]), Path(asked.output)
    if output.resolve().is_relative_to(data.resolve()):
        raise UsageError(f"--output {output} lies in --data {data}: its files would be the next call's shards")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file, expected a folder to write the shards' predictions to")
    return data, output


def _shards(data: Path, progress: Progress) -> list[str]:
    """The shards' paths below `data`, in order."""
    files = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    seen = [path for path in files if not any(part.startswith((".", "_")) for part in path.parts)]
    # Records of passed-over lines lie beside what earlier commands wrote.
    names = [str(path) for path in seen if path.name.endswith(SHARDS) and not path.name.endswith(ENDING)]
    if not names:
        raise InputError(f"{data}: holds no shard: expected files named *.jsonl or *.jsonl.gz")
    if len(names) < len(seen):
        progress.notice(
            f"{data}: {len(seen) - len(names)} other files are no shards (*.jsonl, *.jsonl.gz) and are left"
        )
    return names


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """Hold the folder against other processes, and clear away what killed ones left half written."""
    with alone(output, output / LOCK, f"{output}: another `router infer` is writing it; choose another --output"):
        with writing(output):
            for left in output.rglob(".*.part"):
                left.unlink(missing_ok=True)
        yield


def _noted(output: Path, settings: Settings) -> None:
    """Note what makes the folder's rows, or raise OutputError where they come from other settings."""
    note, mine = output / NOTE, identity(settings)
    if note.is_file():
        theirs = read_json(note)
        if changed := differing(mine, theirs):
            raise OutputError(
                f"{output}: was made with other settings ({', '.join(changed)}): choose another --output or delete it"
            )
    elif any(path.name != LOCK for path in output.iterdir()):
        raise OutputError(f"{output}: holds files that `router infer` did not write: choose another --output")
    else:
        write_json(note, mine)
