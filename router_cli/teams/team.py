"""A decision becomes a running team: its formation over one worker, every turn taken down.

A trace is a JSON Lines file, appended to while the team works, so that a kill loses one turn at most:

    {"trace": 1, "task": ..., "decision": {...}, "worker": MODEL, "sample": 0}            how it began
    {"turn": 1, "role": ..., "messages": [...], "answer": ..., "model": ..., "usage": {...}, "seconds": ...}
    {"note": ...}                                                     what could not be followed in that turn
    {"ended": "finished", "result": ..., "why": ""}                                       how it ended
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from router_cli.errors import BudgetReached, InputError
from router_cli.jsonl import Appender, read_rows
from router_cli.schema import Decision, Message, Usage
from router_cli.teachers import FREE, total
from router_cli.teams.formations import play
from router_cli.teams.workers import Said, Worker, WorkerFailedError

NOTHING = FREE.model_copy(update={"attempts": 0})
"""The usage of no request."""

Ended = Literal["finished", "failed", "budget"]


@dataclass(frozen=True)
class Turn:
    """One answer of one role; `notes` are what the formation could not follow in it."""

    role: str
    messages: tuple[Message, ...]
    said: Said
    notes: list[str] = field(default_factory=list)


@dataclass
class Work:
    """What a team made of a task. `result` is empty unless it `finished`; `why` says what ended it else."""

    task: str
    decision: Decision
    worker: str
    sample: int = 0
    turns: list[Turn] = field(default_factory=list)
    result: str = ""
    ended: Ended = "finished"
    why: str = ""
    usage: Usage = NOTHING
    seconds: float = 0.0


Watch = Callable[[str, Work], None]
"""Told before a role speaks: who, and the work so far."""


async def work(
    task: str,
    decision: Decision,
    worker: Worker,
    trace: Path | None = None,
    sample: int = 0,
    watch: Watch | None = None,
) -> Work:
    """Let a team work on a task; the turns go to the file `trace`, if there is one, as they come.

    A worker without an answer, and a reached budget, end the work and are told in `ended`; other failures
    (TeacherError, OutputError) are raised, with every turn so far in the trace.
    """
    done = Work(task, decision, worker.model, sample)
    started = time.monotonic()
    file = Appender(trace) if trace else None

    def keep(row: dict[str, object]) -> None:
        if file:
            file.append(row)

    async def speak(role: str, messages: Sequence[Message]) -> str:
        if watch:
            watch(role, done)
        said = await worker.answer(messages, sample)
        done.turns.append(Turn(role, tuple(messages), said))
        done.usage = total(done.usage, said.usage)
        keep(
            {
                "turn": len(done.turns),
                "role": role,
                "messages": [message.model_dump() for message in messages],
                "answer": said.text,
                "model": said.model,
                "usage": said.usage.model_dump(),
                "seconds": round(said.seconds, 3),
            }
        )
        return said.text

    def note(text: str) -> None:
        done.turns[-1].notes.append(text)
        keep({"note": text})

    try:
        keep({"trace": 1, "task": task, "decision": decision.model_dump(), "worker": worker.model, "sample": sample})
        try:
            done.result = await play(task, decision, speak, note)
        except (WorkerFailedError, BudgetReached) as error:
            done.ended, done.why = "budget" if isinstance(error, BudgetReached) else "failed", str(error)
            done.usage = total(done.usage, error.spent or NOTHING)
        keep({"ended": done.ended, "result": done.result, "why": done.why})
    finally:
        if file:
            file.close()
    done.seconds = time.monotonic() - started
    return done


def read_trace(path: Path) -> Work:
    """The work that a trace tells of; one that was cut off in the middle has `ended` "failed".

    Raises InputError where the file is no trace.
    """
    done: Work | None = None
    ended = False
    try:
        for _, row in read_rows(str(path)):
            if "trace" in row:
                decision = Decision.model_validate_json(json.dumps(row["decision"]))
                done = Work(row["task"], decision, row["worker"], row["sample"])
            elif done is None:
                break
            elif "turn" in row:
                usage = Usage(**row["usage"])
                said = Said(row["answer"], row["model"], usage, row["seconds"])
                messages = tuple(Message(**message) for message in row["messages"])
                done.turns.append(Turn(row["role"], messages, said))
                done.usage, done.seconds = total(done.usage, usage), done.seconds + said.seconds
            elif "note" in row:
                done.turns[-1].notes.append(row["note"])
            else:
                done.ended, done.result, done.why, ended = row["ended"], row["result"], row["why"], True
    except (LookupError, TypeError, ValidationError) as error:
        raise InputError(f"{path}: is no trace of a run: {type(error).__name__} in one of its lines") from None
    if done is None:
        raise InputError(f"{path}: is no trace of a run: it does not begin with one")
    if not ended:
        done.ended, done.why = "failed", "the run was cut off"
    return done


def drawn(done: Work) -> str:
    """The run as a Mermaid sequence diagram, which GitHub and many editors draw."""
    names = {role: f"r{number}" for number, role in enumerate(done.decision.roles)}
    lines = ["sequenceDiagram", "    participant task"]
    lines += [f"    participant {name} as {role}" for role, name in names.items()]
    before = "task"
    for number, turn in enumerate(done.turns, start=1):
        tokens = turn.said.usage.completion_tokens
        lines.append(f"    {before}->>{names[turn.role]}: {number}")
        lines.append(f"    Note over {names[turn.role]}: {tokens} tokens, {turn.said.seconds:.1f} s")
        lines += [f"    Note over {names[turn.role]}: {note}" for note in turn.notes]
        before = names[turn.role]
    lines.append(f"    {before}->>task: {done.ended}")
    return "\n".join(lines)
