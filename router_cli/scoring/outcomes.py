"""Recorded executions of any system: read outcome rows, and lay them out as tables of tasks by topologies.

A row is `{"task_id", "topology", "solved", "repeat", "worker", "prompt_tokens", "completion_tokens", "cost",
"seconds"}` and optionally `evidence` (did the run pass what an agent may see?), `acts` (equal where runs act alike),
`benchmark`, `text` and `split` of the task. Only the first three are needed. Every row is one run; runs of the same
task, topology, worker and benchmark are repeats.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from router_cli import costs
from router_cli.errors import InputError
from router_cli.schema import Outcome, Split, Topology
from router_cli.sections import OUTCOME_TABLES
from router_cli.settings import nearest
from router_cli.tasks import read_entries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

TOPOLOGIES: tuple[str, ...] = get_args(Topology)
Unit = Literal["USD", "tokens", "rank"]
OUTCOMES = "outcomes.jsonl"
"""The file of rows in the folder of a run."""


@dataclass(frozen=True)
class Recorded:
    """The rows of a file. `formless` rows name no topology of the decision space (null) and are not among them.

    `texts` and `splits` are those of (benchmark, task): one row of a task may bring them, whoever ran it.
    """

    rows: tuple[Outcome, ...]
    texts: dict[tuple[str, str], str]
    splits: dict[tuple[str, str], Split]
    formless: int


@dataclass(frozen=True)
class Table:
    """The runs of one worker on one benchmark. Arrays have the shape (tasks, topologies); NaN is "not executed".

    `topologies` are those that were executed, the cheapest first by mean `price`. `solved`, `tokens`, `dollars` and
    `seconds` are means over the runs of a cell; NaN in the last three also where one of its runs does not say.
    `price` is what "cheaper" means here: dollars where all runs have them, else tokens, else the topologies' rank.
    """

    benchmark: str
    worker: str
    tasks: tuple[str, ...]
    texts: tuple[str | None, ...]
    splits: tuple[Split | None, ...]
    topologies: tuple[str, ...]
    runs: tuple[tuple[tuple[Outcome, ...], ...], ...]
    solved: Array
    repeats: Array
    tokens: Array
    dollars: Array
    seconds: Array
    price: Array
    unit: Unit

    @property
    def name(self) -> str:
        """Benchmark and worker, as far as the rows name them."""
        return ", ".join(part for part in (self.benchmark, self.worker) if part) or "recorded runs"

    @property
    def executed(self) -> Array:
        """Where a topology was executed on a task: booleans (tasks, topologies)."""
        found: Array = self.repeats > 0
        return found


def locate_outcomes(name: str) -> str:
    """The file that `name` means: itself, or the table of that name which comes with the project."""
    if name not in OUTCOME_TABLES or Path(name).exists():
        if not Path(name).exists() and name != "-" and not Path(name).suffix:
            known = ", ".join(OUTCOME_TABLES)
            raise InputError(
                f"{name}: no such file, and no carried table of that name ({known}){nearest(name, OUTCOME_TABLES)}"
            )
        return name
    own = files("router_cli") / "data" / "outcomes" / f"{name}.jsonl.gz"
    # In a checkout that is not installed the folder stands beside the package.
    beside = Path(__file__).parents[2] / "data" / "outcomes" / f"{name}.jsonl.gz"
    return str(own if own.is_file() else beside)


def read_outcomes(path: str, worker: str | None = None) -> Recorded:
    """Read the outcome rows of a file or of a folder of runs, of one `worker` alone where it is given.

    Raises InputError naming file and line of a row that is no outcome or repeats another, and for a file without any.
    """
    rows: list[Outcome] = []
    texts: dict[tuple[str, str], str] = {}
    splits: dict[tuple[str, str], Split] = {}
    seen: dict[tuple[object, ...], int] = {}
    workers: Counter[str | None] = Counter()
    formless = 0
    for file, line, raw in _entries(path):
        where = f"{file}:{line}"
        row = _outcome(raw, where)
        workers[row.worker] += 1
        if row.text is not None:
            texts.setdefault((row.benchmark or "", row.task_id), row.text)
        if row.split is not None:
            splits.setdefault((row.benchmark or "", row.task_id), row.split)
        if worker is not None and row.worker != worker:
            continue
        # Two rows of a file that both say which repeat they are cannot be the same one; others are just more runs.
        if "repeat" in raw:
            key = (file, row.benchmark, row.worker, row.task_id, row.topology, raw.get("strategy"), row.repeat)
            if key in seen:
                raise InputError(f"{where}: is the same run as line {seen[key]}; number the repeats of a run apart")
            seen[key] = line
        if row.topology is None:
            formless += 1
        else:
            rows.append(row)
    if worker is not None and worker not in workers:
        there = ", ".join(sorted(str(name) for name in workers if name)) or "none named"
        raise InputError(f"{path}: no run of the worker {worker!r} (there: {there})")
    if not rows:
        raise InputError(f"{path}: holds no outcome of a topology ({', '.join(TOPOLOGIES)})")
    return Recorded(tuple(rows), texts, splits, formless)


def _entries(path: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every row of a file, or of the runs in a folder, with its file and line."""
    for file in _files(locate_outcomes(path)):
        for line, _, raw in read_entries(file):
            yield file if Path(path).is_dir() else path, line, raw


def _files(path: str) -> list[str]:
    """A file by itself; of a folder what `router eval --execute` wrote there, and in the folders in it."""
    if not Path(path).is_dir():
        return [path]
    found = [str(one) for pattern in (OUTCOMES, f"*/{OUTCOMES}") for one in sorted(Path(path).glob(pattern))]
    if not found:
        raise InputError(f"{path}: holds no {OUTCOMES}, neither itself nor in a folder in it")
    return found


def _outcome(raw: dict[str, Any], where: str) -> Outcome:
    """One checked row; the checks say what is wrong more plainly than the record itself would."""
    values = {name: raw[name] for name in Outcome.model_fields if raw.get(name) is not None}
    name = values.get("task_id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"{where}: expected an outcome with a task_id, got {name!r}")
    values["task_id"] = str(name)
    if "topology" not in raw or raw["topology"] not in (*TOPOLOGIES, None):
        raise InputError(
            f"{where}: topology must be one of {', '.join(TOPOLOGIES)}, or null for anything else; "
            f"got {raw.get('topology')!r}"
        )
    values.setdefault("topology", None)
    for flag in ("solved", "evidence"):
        if flag in values and (not isinstance(values[flag], bool | int) or values[flag] not in (0, 1)):
            raise InputError(f"{where}: {flag} must be true or false, got {values[flag]!r}")
    if "solved" not in values:
        raise InputError(f"{where}: expected an outcome with solved (true or false)")
    for whole in ("repeat", "prompt_tokens", "completion_tokens"):
        if whole in values and (type(values[whole]) is not int or values[whole] < 0):
            raise InputError(f"{where}: {whole} must be a whole number from 0 on, got {values[whole]!r}")
    for amount in ("cost", "seconds"):
        if amount in values and (type(values[amount]) not in (int, float) or not 0 <= values[amount] < 1e12):
            raise InputError(f"{where}: {amount} must be a number from 0 on, got {values[amount]!r}")
    for text in ("worker", "benchmark", "text", "acts"):
        if text in values and not isinstance(values[text], str):
            raise InputError(f"{where}: {text} must be a string, got {values[text]!r}")
    if values.get("split", "test") not in get_args(Split):
        raise InputError(f"{where}: split must be one of {', '.join(get_args(Split))}, got {values['split']!r}")
    return Outcome.model_validate(values)


# -- tables -----------------------------------------------------------------------------------------------------


def tables(recorded: Recorded) -> list[Table]:
    """One table a benchmark and worker, in the order of the rows; tasks in the order of their first run."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for row in recorded.rows:
        groups.setdefault((row.benchmark or "", row.worker or ""), []).append(row)
    return [_table(benchmark, worker, rows, recorded) for (benchmark, worker), rows in groups.items()]


def _table(benchmark: str, worker: str, rows: Sequence[Outcome], recorded: Recorded) -> Table:
    import numpy as np

    cells: dict[tuple[str, str], list[Outcome]] = {}
    for row in rows:
        cells.setdefault((row.task_id, str(row.topology)), []).append(row)
    tasks = list(dict.fromkeys(row.task_id for row in rows))
    names = [name for name in TOPOLOGIES if any(row.topology == name for row in rows)]

    def means(value: Any) -> Array:
        return np.array(
            [[_mean([value(run) for run in cells.get((task, name), ())]) for name in names] for task in tasks]
        )

    solved = means(lambda run: float(run.solved))
    tokens, dollars, seconds = means(_tokens), means(_dollars), means(lambda run: run.seconds)
    executed = ~np.isnan(solved)
    unit: Unit = "rank"
    price = np.where(executed, np.arange(1.0, len(names) + 1), np.nan)
    for candidate, values in (("tokens", tokens), ("USD", dollars)):
        if not np.isnan(values[executed]).any():
            unit, price = ("USD" if candidate == "USD" else "tokens"), values
    # Tasks that all topologies ran on compare prices fairly; without any, each has its own.
    whole = executed.all(axis=1)
    fair = price[whole] if whole.any() else price
    order = np.argsort(np.nanmean(fair, axis=0), kind="stable")
    return Table(
        benchmark=benchmark,
        worker=worker,
        tasks=tuple(tasks),
        texts=tuple(recorded.texts.get((benchmark, task)) for task in tasks),
        splits=tuple(recorded.splits.get((benchmark, task)) for task in tasks),
        topologies=tuple(names[int(i)] for i in order),
        runs=tuple(tuple(tuple(cells.get((task, names[int(i)]), ())) for i in order) for task in tasks),
        solved=solved[:, order],
        repeats=np.array([[len(cells.get((task, names[int(i)]), ())) for i in order] for task in tasks]),
        tokens=tokens[:, order],
        dollars=dollars[:, order],
        seconds=seconds[:, order],
        price=price[:, order],
        unit=unit,
    )


def subset(table: Table, places: Sequence[int]) -> Table:
    """The same table with the tasks at `places` alone."""
    chosen = list(places)
    arrays = ("solved", "repeats", "tokens", "dollars", "seconds", "price")
    lists = ("tasks", "texts", "splits", "runs")
    kept: dict[str, Any] = {name: getattr(table, name)[chosen] for name in arrays}
    kept |= {name: tuple(getattr(table, name)[i] for i in chosen) for name in lists}
    return Table(benchmark=table.benchmark, worker=table.worker, topologies=table.topologies, unit=table.unit, **kept)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else float("nan")


def _tokens(run: Outcome) -> float | None:
    if run.prompt_tokens is None or run.completion_tokens is None:
        return None
    return float(run.prompt_tokens + run.completion_tokens)


def _dollars(run: Outcome) -> float | None:
    """What the run says, else its tokens at the worker's list price, else None."""
    if run.cost is not None:
        return run.cost
    if run.worker is None or run.prompt_tokens is None or run.completion_tokens is None:
        return None
    return _list_price(run.worker, run.prompt_tokens, run.completion_tokens)


@functools.lru_cache(maxsize=100_000)
def _list_price(worker: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    return costs.price(worker, prompt_tokens, completion_tokens)
