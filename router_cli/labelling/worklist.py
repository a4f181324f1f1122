"""Which tasks a label file holds, in what order, and which samples of them are finished.

A row is found again by what its answer depends on (`Worklist.key`), not by its place or its id: a file that was
reordered, renamed or added to pays only for what is new in it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from router_cli import prompts
from router_cli.labelling import voting
from router_cli.labelling.journal import Entry, Journal
from router_cli.schema import Label, Message, Provenance, Rejection, Split, Task
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.teachers import FREE, Answer, Teacher

NONE, TAKEN = -1, -2
"""In place of an offset: a sample that is not there yet, and one that this run asks for."""

UNPAID = FREE.model_copy(update={"attempts": 0})
"""What a row costs whose answer another row has paid for."""

_KINDS = [(source, split) for source in ("generic", "humaneval", "mbpp") for split in (None, *get_args(Split))]


@dataclass(frozen=True)
class Question:
    """One sample to be asked for. `number` is `sample` unless it was rejected before: it is to differ from that."""

    key: str
    task: Task
    sample: int
    number: int


class Worklist:
    """The tasks of one input under the settings in force.

    Holds 16 bytes of key, an id and an offset a sample, never a text: some 250 bytes a task.
    """

    def __init__(self, settings: Settings, teacher: Teacher, space: DecisionSpace, examples_id: str | None) -> None:
        wanted = settings.label
        self._teacher, self._space = teacher, space
        self._shared = {
            "prompt_version": prompts.PROMPT_VERSION,
            "teacher": teacher.name,
            "model": teacher.model,
            "roles": space.roles,
            "topologies": space.topologies,
            "step_bound": space.step_bound,
            "strategy": wanted.strategy,
            "temperature": wanted.temperature,
            # Left out where there are none: a later kind of part must not make everybody's rows new ones.
            **({"examples": examples_id} if examples_id else {}),
        }
        self.votes = wanted.votes
        self._slots: dict[bytes, int] = {}  # by key
        self._offsets = array("q")  # `votes` a slot: where the journal has the sample
        self._first = array("q")  # by slot: its first place in the output
        self._places = array("q")  # by place: the slot
        self._ids: list[str] = []  # by place
        self._kinds = array("B")  # by place
        self._twins: set[tuple[int, str]] = set()  # (slot, id) of further tasks with the text of another one
        self._rejected: dict[int, int] = {}  # what is asked again: place in `_offsets` -> offset of the rejection
        self._rounds: dict[int, int] = {}  # how many rows a sample has beyond its first
        self._retrying, self._tie = False, wanted.tie
        self._last: tuple[Task | None, str] = None, ""
        self._again = int(wanted.audit)  # an audit is one more round of the questions that made the file

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, task: Task) -> str:
        """What a row is found again by: everything that the teacher's answer depends on, and nothing else."""
        if task is self._last[0]:  # several questions about the same task come one after the other
            return self._last[1]
        parts = {
            "task": task.text,
            **self._shared,
            "decision": task.decision if self._shared["teacher"] == "recorded" else None,
        }
        self._last = task, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return self._last[1]

    def found(self, entry: Entry) -> None:
        """Remember where the journal has a sample; a later row of it takes the place of an earlier one."""
        if entry.sample < self.votes:
            at = self._slot(entry.key) * self.votes + entry.sample
            if self._offsets[at] >= 0:
                self._rounds[at] = self._rounds.get(at, 0) + 1
            self._offsets[at] = entry.at

    def note(self, task: Task) -> bool:
        """Give a task its place in the output, unless it has one. Whether its text is new to the input."""
        slot = self._slot(self.key(task))
        first = self._first[slot]
        if first == NONE:
            self._first[slot] = len(self._ids)
        elif self._ids[first] == task.id or (slot, task.id) in self._twins:
            return False
        else:
            self._twins.add((slot, task.id))
        self._places.append(slot)
        self._ids.append(task.id)
        self._kinds.append(_KINDS.index((task.source, task.split)))
        return first == NONE

    def missing(self, task: Task) -> Iterator[Question]:
        """The samples of a task that are to be asked for."""
        key = self.key(task)
        start = self._slot(key) * self.votes
        for sample, at in enumerate(range(start, start + self.votes)):
            if self._offsets[at] == NONE and (not self._retrying or at in self._rejected):
                # Where the endpoint takes a seed, the same number would only bring the same answer.
                rounds = self._again + (self._rounds.get(at, 0) + 1 if at in self._rejected else 0)
                yield Question(key, task, sample, sample + self.votes * rounds)

    def standing(self, task: Task) -> list[int]:
        """The samples of a task that are finished, as offsets (`Entry.at`)."""
        start = self._slot(self.key(task)) * self.votes
        return [at for at in self._offsets[start : start + self.votes] if at >= 0]

    def take(self, question: Question) -> None:
        """Mark a sample as asked for: the same task further down is not asked about once more."""
        self._offsets[self._slot(question.key) * self.votes + question.sample] = TAKEN

    def finished(self) -> int:
        """How many samples of the input are in the journal."""
        slots = set(self._places) if self._twins else self._places
        return sum(self._offsets[slot * self.votes + sample] >= 0 for slot in slots for sample in range(self.votes))

    def retry_rejected(self, journal: Journal) -> None:
        """Ask again about the tasks whose row is a rejection, and about nothing else.

        Of several votes those that were no use are asked for again; where all were sound and tied, all of them.
        """
        self._retrying = True
        with journal.reading() as read:
            for slot in range(len(self._first)):
                row, ats = self._row(slot, read), range(slot * self.votes, (slot + 1) * self.votes)
                if row is not None and "messages" not in row:
                    every = voting.tied(row)
                    self._rejected |= {
                        at: self._offsets[at] for at in ats if every or "messages" not in read(self._offsets[at])
                    }
        for at in self._rejected:
            self._offsets[at] = NONE

    def answered(self, question: Question, answer: Answer) -> Label | Rejection:
        """What the journal keeps of a final answer."""
        task, shared = question.task, self._shared
        provenance = Provenance(
            teacher=self._teacher.name,
            model=answer.model,
            prompt_version=prompts.PROMPT_VERSION,
            roles=self._space.roles,
            strategy=str(shared["strategy"]),
            key=question.key,
            usage=answer.usage,
            normalised=answer.normalised,
            reason=answer.reason,
        )
        if answer.decision is None:
            return Rejection(
                origin_task_id=task.id,
                task=task.text,
                violations=tuple(str(violation) for violation in answer.violations),
                raw=answer.raw,
                provenance=provenance,
            )
        asked = prompts.router_messages(task.text, self._space)
        return Label(
            messages=(*asked, Message(role="assistant", content=prompts.render(answer.decision))),
            sample_type=_sample_type(task.source),
            origin_task_id=task.id,
            decision=answer.decision,
            split=task.split,
            provenance=provenance,
        )

    def rows(self, journal: Journal, since: int) -> Iterator[tuple[dict[str, Any], bool]]:
        """The finished tasks' rows in the order of the input, and whether all of a row was in the journal before the
        offset `since`. A task that lacks a sample has no row.
        """
        with journal.reading() as read:
            for place, slot in enumerate(self._places):
                row = self._row(slot, read)
                if row is None:
                    continue
                # Id, source and split are the task file's to change, and cost nothing.
                row["origin_task_id"] = self._ids[place]
                if "messages" in row:
                    source, row["split"] = _KINDS[self._kinds[place]]
                    row["sample_type"] = _sample_type(source)
                if place != self._first[slot]:  # paid for once, and booked there
                    row["provenance"]["usage"] = UNPAID.model_dump(mode="json")
                yield row, all(self._at(slot, sample) < since for sample in range(self.votes))

    def clash(self) -> str | None:
        """An id that stands for several tasks, if there is one."""
        seen: set[str] = set()
        return next((one for one in self._ids if one in seen or seen.add(one)), None)  # type: ignore[func-returns-value]

    def _row(self, slot: int, read: Callable[[int], dict[str, Any]]) -> dict[str, Any] | None:
        ats = [self._at(slot, sample) for sample in range(self.votes)]
        if min(ats) < 0:
            return None
        return read(ats[0]) if self.votes == 1 else voting.combine([read(at) for at in ats], self._tie)

    def _at(self, slot: int, sample: int) -> int:
        at = slot * self.votes + sample
        # A rejection stands until its task has another answer.
        return self._offsets[at] if self._offsets[at] >= 0 else self._rejected.get(at, NONE)

    def _slot(self, key: str) -> int:
        slot = self._slots.setdefault(bytes.fromhex(key), len(self._first))
        if slot == len(self._first):
            self._first.append(NONE)
            self._offsets.extend([NONE] * self.votes)
        return slot


def _sample_type(source: str) -> str:
    return ("" if source == "generic" else f"{source}_") + "teacher_distilled"
