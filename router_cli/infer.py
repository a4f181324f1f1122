"""`router infer`: tasks in, one prediction a task out, in order. It never scores: `router eval` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from router_cli import fallback
from router_cli.backends import Backend, make_backend
from router_cli.backends.local import META
from router_cli.badlines import BadLines
from router_cli.errors import InputError, OutputError, UsageError
from router_cli.jsonl import Appender, alone, read_json, read_rows, write_json
from router_cli.labelling.estimate import Confirm
from router_cli.models import file_sha256
from router_cli.progress import SILENT, Progress
from router_cli.schema import Prediction, Task, Usage
from router_cli.settings import Settings
from router_cli.tasks import stable_id
from router_cli.teachers.endpoint import shown

WINDOW = 2
"""Batches that are read at once, so that tasks of like length can share one; as many decisions a kill can cost."""


@dataclass(frozen=True)
class InferResult:
    """What `infer` made: `predictions` only where they went to no file. `resumed` rows stood in the output before.

    `unsure` counts the rows below the confidence `threshold` by who decided them ("none": nobody did), `usage` is what
    that cost.
    """

    output: Path | None
    predictions: list[Prediction]
    decided: int
    resumed: int
    skipped: int
    fallbacks: int
    threshold: float | None = None
    unsure: dict[str, int] = field(default_factory=dict)
    usage: Usage | None = None


def infer(
    settings: Settings,
    text: str | None = None,
    progress: Progress = SILENT,
    confirm: Confirm | None = None,
    take: Callable[[Prediction], None] | None = None,
) -> InferResult:
    """Decide for one `text`, or for the tasks of `infer.data`, into `infer.output` if there is one.

    A file is continued where an earlier call stopped. Rows that go to no file are given to `take`, each as soon as it
    is decided, or else kept in the result. `confirm` is asked before a dear fallback. Raises UsageError
    where there is nothing to decide, ModelError for the model, InputError and OutputError for the files, TeacherError
    (BudgetReached where the money is spent) for a fallback that does not answer: the rows before stand.
    """
    if (text is None) == (not settings.infer.data):
        raise UsageError("pass either one task as text, or --data FILE (- for standard input)")
    if text is not None and not text.strip():
        raise UsageError("the task is empty")
    falls_back = fallback.check(settings)
    skipped = BadLines(settings.infer.data, settings.infer.skip_bad_lines)
    tasks = _tasks(settings, text, skipped)
    # A missing file is said before a model is loaded for minutes. A price must not hang on `--limit`.
    first = list(islice(tasks, fallback.PRICED if settings.infer.target_cost is not None else 1))
    if not first:
        raise InputError(f"{', '.join(settings.infer.data)}: holds no task of the {settings.infer.split} split")
    tasks = islice(chain(first, tasks), settings.infer.limit)
    output = Path(settings.infer.output) if settings.infer.output else None
    found: list[Prediction] = []
    with ExitStack() as held:
        standing: list[str] = []
        if output is None:
            put = take or found.append
        else:
            held.enter_context(_held(output))
            standing = _continued(output, settings)
            put = held.enter_context(Appender(output)).append
        for number, (known, task) in enumerate(zip(standing, tasks, strict=False), start=1):
            if known != task.id:
                raise OutputError(
                    f"{output}:{number}: is about the task {known}, but the data has {task.id} there: "
                    "choose another --output or delete it"
                )
        done, fallbacks, decided = len(standing), 0, 0
        backend: Backend | None = None
        unsure: fallback.Fallback | None = None

        def rest() -> Iterator[Task]:
            return islice(_tasks(settings, text, skipped), done, settings.infer.limit)

        with progress.bar("infer", 1 if text is not None else None, done) as bar, ExitStack() as stack:
            while batch := list(islice(tasks, settings.infer.batch_size * WINDOW)):
                if falls_back and unsure is None:
                    counted = None if "-" in settings.infer.data else rest
                    unsure = fallback.make_fallback(settings, first, counted, progress, confirm)
                    stack.enter_context(unsure)
                if backend is None:
                    backend = make_backend(settings, progress)
                    stack.callback(backend.close)
                for row in decisions(backend, unsure, batch):
                    put(row)
                    decided += 1
                    fallbacks += row.fallback is not None
                bar.advance(len(batch))
        if output is None:
            for line in skipped:
                progress.warn(line)
        # A finished file that a smaller --limit looks into keeps the record of all that was read for it.
        elif decided or settings.infer.limit is None:
            skipped.record(output)
    result = InferResult(output, found, decided, done, len(skipped), fallbacks)
    if unsure is None:
        return result
    return replace(result, threshold=unsure.threshold, unsure=dict(unsure.counts), usage=unsure.usage)


def _tasks(settings: Settings, text: str | None, skipped: BadLines) -> Iterator[Task]:
    """The tasks to decide, whatever their number."""
    if text is not None:
        return iter([Task(id=stable_id(text), text=text)])
    wanted = settings.infer.split
    return (task for task in skipped.tasks() if wanted in ("all", task.split))


def decisions(backend: Backend, unsure: fallback.Fallback | None, tasks: list[Task]) -> Iterable[Prediction]:
    """One prediction a task, in order; those that are not sure enough decided by `unsure`, as they are taken."""
    rows = predict(backend, tasks)
    return unsure.apply(tasks, rows) if unsure else rows


def predict(backend: Backend, tasks: list[Task]) -> list[Prediction]:
    """One prediction a task, in order."""
    return [
        Prediction(
            task_id=task.id,
            decision=choice.decision,
            probability=choice.probability,
            topologies=choice.topologies,
            backend=backend.name,
            model=backend.model_name,
            milliseconds=round(choice.milliseconds, 3),
            fallback=choice.fallback,
            alternatives=choice.alternatives,
            usage=choice.usage,
            solving=choice.solving,
            decision_probability=choice.decision_probability,
        )
        for task, choice in zip(tasks, backend.decide([task.text for task in tasks]), strict=True)
    ]


_OF_THE_TEACHER = {"teacher", "model", "strategy", "temperature", "examples", "shots"}


def identity(settings: Settings) -> dict[str, object]:
    """What makes two calls write the same rows into one file."""
    # Whether bad lines stop the call changes nothing in the rows; that they are about the same tasks is seen to.
    neutral = {"output", "batch_size", "limit", "engine", "workers", "skip_bad_lines"}
    chosen = settings.infer.model_dump(mode="json", exclude=neutral)
    adapter = settings.infer.adapter
    # An adapter that was trained anew stands under the same name.
    trained = file_sha256(adapter / META) if adapter and (adapter / META).is_file() else None
    if settings.infer.fallback == "teacher":
        chosen["teacher"] = settings.label.model_dump(mode="json", include=_OF_THE_TEACHER)
    if settings.infer.backend == "remote" or settings.infer.fallback == "teacher":
        # Of another server, a model of the same name is another one.
        chosen["server"] = shown(settings.endpoint.base_url or "")
    if settings.infer.backend == "local":
        chosen["dtype"] = settings.models.dtype  # other types give other probabilities
    return {**chosen, "decision": settings.decision.model_dump(mode="json"), "adapter's training": trained}


def differing(mine: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """What parts two calls' identities. Notes of earlier versions do not name the server."""
    return sorted(key for key in mine if mine[key] != theirs.get(key) and (key != "server" or key in theirs))


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Hold the file against other processes. Raises OutputError for what is none, or where another one has it."""
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, expected a file to write the predictions to")
    if output.exists() and not output.is_file():
        raise OutputError(
            f"{output}: is a device, which cannot be continued; without --output rows go to standard output"
        )
    taken = f"{output}: another `router infer` is writing it; choose another --output"
    with alone(output, output.with_name(f".{output.name}.lock"), taken):
        yield


def _continued(output: Path, settings: Settings) -> list[str]:
    """The task ids of the rows of `output` that stand from an interrupted or finished call of the same settings.

    Raises OutputError where the file comes from another call: it is not mixed and not overwritten.
    """
    note = output.with_name(f".{output.name}.infer.json")
    mine = identity(settings)
    if not output.exists() or output.stat().st_size == 0:
        write_json(note, mine)
        return []
    theirs = read_json(note) if note.is_file() else {}
    changed = differing(mine, theirs)
    if changed:
        raise OutputError(
            f"{output}: exists and was made with other settings ({', '.join(changed)}): "
            "choose another --output or delete it"
        )
    Appender(output).close()  # cuts off a line that a kill left half written
    try:
        return [str(row.get("task_id")) for _, row in read_rows(str(output))]
    except InputError as error:
        raise OutputError(f"{error}: this is no predictions file; choose another --output or delete it") from None
