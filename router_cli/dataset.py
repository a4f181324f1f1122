"""Labels to training examples: read, check, filter, remove duplicates, split by task, look for leakage.

Rows arrive in four shapes: what `router label` writes (`schema.Label`); what the old generator wrote (`messages`,
`sample_type`, `origin_task_id` and nothing else); task rows with a `decision` (data/tasks.jsonl); and raw HumanEval
rows, which the offline rules can label on the way in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router_cli import prompts, splits, tasks
from router_cli.errors import InputError, TrainingError
from router_cli.jsonl import BadLine, refuse
from router_cli.schema import Example, Task
from router_cli.sections import DecisionSettings
from router_cli.settings import Settings
from router_cli.space import DecisionSpace, Resolved

IMBALANCE = 0.8
"""Share of one topology among the training rows from which a warning says that the router may learn only that one."""


@dataclass(frozen=True)
class Dataset:
    """What a router is trained on, and what became of every row that was read."""

    train: list[Example]
    validation: list[Example]
    rows: int
    # Rows that repeat an earlier text, and how many of them with another decision: the first is kept.
    duplicates: int
    conflicts: int
    # Rows without a usable decision, rows of other sample types, rows of the test split, and rows that are (nearly)
    # the text of one of those: none of them is trained on.
    dropped: int
    filtered: int
    test_rows: int
    leaked: int
    # Split -> topology -> rows.
    classes: dict[str, dict[str, int]]
    warnings: list[str]


# -- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One row of a label file: an example, or the problem that makes it none."""

    path: str
    line: int
    raw: str
    sample_type: str
    example: Example | None = None
    problem: str = ""

    def refuse(self, on_unusable: BadLine | None) -> None:
        hint = "" if on_unusable else "; mend the row, or leave such rows out with --drop-no-output"
        refuse(self.path, self.line, self.raw, self.problem + hint, on_unusable)


def read_labels(
    paths: list[str],
    space: DecisionSpace,
    *,
    on_unusable: BadLine | None = None,
    convert_humaneval: bool = False,
) -> Iterator[Example]:
    """Yield the examples of label files of any shape above, with the splits that the rows bring (None: none).

    `convert_humaneval` labels raw HumanEval rows by the offline rules. A row whose task or decision cannot be used
    under `space` goes to `on_unusable`, or raises InputError naming file, line and violation. Lines that are not JSON
    and files without a row always raise InputError.
    """
    for row in _read(paths, space, convert_humaneval):
        if row.example is not None:
            yield row.example
        else:
            row.refuse(on_unusable)


def _read(paths: list[str], space: DecisionSpace, convert: bool) -> Iterator[_Row]:
    for path in paths:
        empty = True
        for number, raw, row in tasks.read_entries(path):
            empty = False
            sample_type = row.get("sample_type")
            try:
                task = tasks.task_of(row)
                if sample_type is None:
                    made_here = convert and _is_raw(row, task)
                    prefix = "" if task.source == "generic" else f"{task.source}_"
                    sample_type = prefix + ("heuristic" if made_here else "teacher_distilled")
                example = _example(row, task, str(sample_type), space, convert)
            except ValueError as error:
                yield _Row(path, number, raw, str(sample_type), problem=str(error))
            else:
                yield _Row(path, number, raw, str(sample_type), example)
        if empty:
            raise InputError(f"{path}: holds no row")


def _is_raw(row: Mapping[str, Any], task: Task) -> bool:
    return task.source == "humaneval" and task.decision is None and "messages" not in row


def _example(row: Mapping[str, Any], task: Task, sample_type: str, space: DecisionSpace, convert: bool) -> Example:
    resolved = _resolve(row, task, space, convert)
    if resolved.decision is None:
        raise ValueError("; ".join(str(violation) for violation in resolved.violations))
    return Example(
        task_id=task.id,
        text=task.text,
        decision=resolved.decision,
        split=task.split,
        sample_type=sample_type,
        normalised=resolved.normalised,
        solved=_solved(row),
    )


def _solved(row: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Of each topology, its runs that solved the task, and its runs, as `router label --from-outcomes` writes them."""
    evidence, found = row.get("evidence"), dict[str, tuple[int, int]]()
    for name, each in evidence.items() if isinstance(evidence, dict) else ():
        share, runs = (each.get("solved"), each.get("runs")) if isinstance(each, dict) else (None, None)
        if not isinstance(runs, int) or runs < 1 or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"evidence of {name}: expected solved (a share) and runs (a number)")
        found[name] = (round(share * runs), runs)
    return found


def _resolve(row: Mapping[str, Any], task: Task, space: DecisionSpace, convert: bool) -> Resolved:
    if task.decision is not None:
        return space.resolve(task.decision)
    if "messages" in row:
        answer = next((one.content for one in reversed(tasks.messages_of(row)) if one.role == "assistant"), None)
        if answer is None:
            raise ValueError("has no decision: no message of the assistant")
        return prompts.parse(answer, space)
    if not _is_raw(row, task):
        raise ValueError("has no decision: expected the field decision, or messages with an answer")
    if not convert:
        raise ValueError("is a raw HumanEval row without a decision; --convert-humaneval labels it offline")
    from router_cli.teachers.heuristic import decide

    return Resolved(decide(task.text, space)[0])


# -- roles ----------------------------------------------------------------------------------------------------


def roles_of(paths: list[str]) -> tuple[str, ...]:
    """The role list that label files were made for; empty where they say nothing about roles.

    A row's own list (its provenance, else the line `Roles:` of its system message) counts; where no row has one, the
    roles that occur in the decisions, those of the default list first. Two lists of different roles raise InputError;
    in lists that differ only in order the first row's order holds.
    """
    stated: tuple[str, ...] = ()
    where, seen = "", dict[str, None]()
    for path in paths:
        for number, _, row in tasks.read_entries(path):
            if own := _stated_roles(row):
                if not stated:
                    stated, where = own, f"{path}:{number}"
                elif set(own) != set(stated):
                    raise InputError(
                        f"{path}:{number}: made for the roles {', '.join(own)}, but {where} for {', '.join(stated)}; "
                        "pass --roles with the list to train for"
                    )
            else:
                seen.update(dict.fromkeys(_used_roles(row)))
    default = [role for role in DecisionSettings().roles if role in seen]
    return stated or tuple(dict.fromkeys([*default, *seen]))


_ROLES_LINE = re.compile(r"^(?:Available roles|Roles):[ \t]*(.+?)\.?(?:\. |$)", re.MULTILINE)


def _stated_roles(row: Mapping[str, Any]) -> tuple[str, ...]:
    provenance = row.get("provenance")
    listed = provenance.get("roles") if isinstance(provenance, dict) else None
    if isinstance(listed, list) and listed and all(isinstance(role, str) for role in listed):
        return tuple(listed)
    for message in _messages(row):
        if message.get("role") == "system" and (found := _ROLES_LINE.search(str(message.get("content")))):
            return tuple(dict.fromkeys(role.strip() for role in found[1].split(",") if role.strip()))
    return ()


def _used_roles(row: Mapping[str, Any]) -> list[str]:
    answers = [str(one.get("content")) for one in _messages(row) if one.get("role") == "assistant"]
    decision = row.get("decision") or next((found[-1] for one in answers if (found := prompts.decisions_in(one))), None)
    roles = decision.get("roles") if isinstance(decision, dict) else None
    return [role for role in roles if isinstance(role, str)] if isinstance(roles, list) else []


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = row.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


# -- building -------------------------------------------------------------------------------------------------


def build(settings: Settings, space: DecisionSpace) -> Dataset:
    """Read `train.data` and make the training and validation examples that `settings.train` describes.

    Rows keep the split they bring; the others are split by task, stratified by topology, by `validation_share` and
    `seed`, whatever order they come in. Rows of the test split and their very texts are never trained on, nor are texts
    that are nearly theirs, unless those bring a split of their own: that is warned about. Raises InputError for
    unusable rows (unless `drop_no_output`), TrainingError where nothing is left.
    """
    wanted = settings.train
    rows = dropped = 0
    filtered: Counter[str] = Counter()
    usable: list[Example] = []
    for row in _read(wanted.data, space, wanted.convert_humaneval):
        rows += 1
        if wanted.sample_types and row.sample_type not in wanted.sample_types:
            filtered[row.sample_type] += 1
        elif row.example is not None:
            usable.append(row.example)
        else:
            row.refuse((lambda line, raw, problem: None) if wanted.drop_no_output else None)
            dropped += 1
    test = [example for example in usable if example.split == "test"]
    kept, duplicates, conflicts = _distinct([example for example in usable if example.split != "test"])
    tested = {tasks.normalised(example.text) for example in test}
    unseen = [example for example in kept if tasks.normalised(example.text) not in tested]
    placed, straddling = splits.place(unseen, test, wanted.validation_share, wanted.seed)
    leaked = len(kept) - len(placed)
    train = [example for example in placed if example.split == "train"]
    validation = [example for example in placed if example.split == "validation"]
    if not train:
        types = ", ".join(wanted.sample_types) + f" (there: {', '.join(filtered)})"
        reasons = {
            f"of other sample types than {types}": filtered.total(),
            "without a usable decision": dropped,
            "of the test split": len(test),
            "with a text of the test split": leaked,
            "of the validation split": len(validation),
        }
        gone = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
        raise TrainingError(f"{', '.join(wanted.data)}: no row is left to train on: of {rows} read, {gone}")
    if wanted.max_samples is not None:
        train = splits.subset(train, wanted.max_samples, wanted.seed)
    said = {
        f"{conflicts} rows repeat a task with another decision: its first decision is kept": conflicts,
        f"{dropped} rows without a usable decision are left out": dropped,
        f"{leaked} rows with a text of the test split, or nearly one, are left out": leaked,
        f"{len(straddling)} pairs of nearly the same task straddle the splits that the rows bring, such as "
        f"{' and '.join(straddling[0]) if straddling else ''}": len(straddling),
        "nothing is held out: overfitting will not show": not validation,
    }
    return Dataset(
        train=train,
        validation=validation,
        rows=rows,
        duplicates=duplicates,
        conflicts=conflicts,
        dropped=dropped,
        filtered=filtered.total(),
        test_rows=len(test),
        leaked=leaked,
        classes={"train": _classes(train, space), "validation": _classes(validation, space)},
        warnings=[text for text, holds in said.items() if holds] + _imbalance(_classes(train, space)),
    )


def _classes(examples: Sequence[Example], space: DecisionSpace) -> dict[str, int]:
    counts = Counter(example.decision.topology for example in examples)
    return {topology: counts[topology] for topology in space.topologies}  # type: ignore[index]  # a Topology each


def _imbalance(classes: dict[str, int]) -> list[str]:
    total = sum(classes.values())
    found = [
        f"{count} of {total} training rows are {topology}: the router may learn to say only that"
        for topology, count in classes.items()
        if len(classes) > 1 and count > IMBALANCE * total
    ]
    if missing := [topology for topology, count in classes.items() if not count]:
        found.append(f"no training row is {' or '.join(missing)}: the router cannot learn when to choose it")
    return found


def _distinct(examples: Sequence[Example]) -> tuple[list[Example], int, int]:
    """The first example of each text, how many were left out, and how many of those decide otherwise."""
    first: dict[str, Example] = {}
    conflicts = 0
    for example in examples:
        kept = first.setdefault(tasks.normalised(example.text), example)
        conflicts += kept.decision != example.decision
        if kept.split is None and example.split is not None:
            first[tasks.normalised(example.text)] = kept.model_copy(update={"split": example.split})
    return list(first.values()), len(examples) - len(first), conflicts


def leakage(train: Sequence[Example], other: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Every pair of a training example and an example of another split that are the same task or nearly so."""
    near = tasks.near_duplicates(example.text for example in [*train, *other])
    return [(train[i], other[j - len(train)]) for i, j, _ in near if i < len(train) <= j]
