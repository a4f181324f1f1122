"""What the rows of label files say beside their decisions: data set, language, teacher, votes and cost."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_cli.scoring.answers import number, usage
from router_cli.tasks import read_entries, task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class About:
    """One label's surroundings. `agreement` is that of the teacher's votes, `spent` as in `Answers.spent`."""

    source: str
    language: str | None
    teacher: str | None
    agreement: float | None
    spent: tuple[float, float, float, float]


def read_about(paths: Sequence[str], wanted: Collection[str]) -> dict[str, About]:
    """What the label files say about the `wanted` tasks; of rows with the same id the first counts.

    Standard input cannot be read twice and says nothing.
    """
    found: dict[str, About] = {}
    for path in paths:
        if path == "-":
            continue
        for _, _, row in read_entries(path):
            try:
                task = task_of(row)
            except ValueError:  # an unusable label, counted on reading
                continue
            if task.id not in wanted or task.id in found:
                continue
            origin = row.get("provenance")
            told = origin if isinstance(origin, dict) else {}
            teacher = told.get("teacher") if isinstance(told.get("teacher"), str) else None
            if teacher is None and "messages" not in row and "decision" in row:
                teacher = "recorded"
            agreement = number(told.get("agreement"), 0, 1)
            source = Path(path).name if task.source == "generic" else task.source
            spent = (float("nan"), *usage(told.get("usage")))
            found[task.id] = About(source, task.lang, teacher, agreement, spent)
    return found


def languages(texts: Sequence[str], about: Sequence[About | None]) -> list[str]:
    """Each task's language as its row names it; where not every row does, what its script tells."""
    named = [one.language if one else None for one in about]
    if all(named):
        return [str(one) for one in named]
    return ["Chinese, Japanese or Korean" if cjk(text) else "other scripts" for text in texts]


def cjk(text: str) -> bool:
    """Whether a text is written in Chinese, Japanese or Korean: a fifth of its letters, for code is in Latin."""
    letters = sum(letter.isalpha() for letter in text)
    return len(_CJK.findall(text)) * 5 >= max(1, letters)
