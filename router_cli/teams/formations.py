"""The four formations: a task and a decision in, turns of workers, one result out.

What each does is laid down in docs/decision.md; here is nothing else. A formation knows neither endpoints nor files:
`speak` is all that it can do.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from router_cli.schema import Decision, Message

Speak = Callable[[str, Sequence[Message]], Awaitable[str]]
"""Lets a role answer a dialogue, and brings the text."""

Note = Callable[[str], None]
"""Takes down, with the turn just spoken, what could not be followed."""

_BRIEFS = {
    "planner": "Plan the solution: its parts, their interfaces, the edge cases. If you speak last, write it out whole.",
    "builder": "Write the complete solution.",
    "tester": "Look for faults: try the requirements and the edge cases in your mind, and mend what is wrong.",
    "refractor": "Make the solution simpler and clearer without changing what it does.",
}
_WHOLE = (
    "Hand on the whole result, not only your changes: whoever speaks last delivers it. "
    "Code goes into one fenced block, complete and ready to run."
)
FINISH = "finish"

_ASSIGN = re.compile(r"^[ \t>*#-]*ASSIGN[ \t]+([^\n:]+?)[ \t]*:[ \t]*(.*)$", re.MULTILINE)
_FINISH = re.compile(r"^[ \t>*#]*FINISH\b[ \t*:.]*$", re.MULTILINE)
_NEXT = re.compile(r"\n?^[ \t>*#]*NEXT[ \t]*:[ \t]*([^\n]*?)[ \t*.]*\s*\Z", re.MULTILINE)


async def play(task: str, decision: Decision, speak: Speak, note: Note) -> str:
    """Run the formation of a valid `decision` on a task; the result, as the last speaker delivered it."""
    formation = {"single": _single, "chain": _chain, "centralized": _centralized, "decentralized": _decentralized}
    return await formation[decision.topology](task, decision, speak, note)


async def _single(task: str, decision: Decision, speak: Speak, note: Note) -> str:
    role = decision.entry_role
    return await speak(role, _dialogue(role, task, {}, f"You work alone. {_WHOLE}"))


async def _chain(task: str, decision: Decision, speak: Speak, note: Note) -> str:
    result, before = "", ""
    for number, role in enumerate(decision.roles, start=1):
        asked = f"You are stage {number} of {len(decision.roles)}: {' -> '.join(decision.roles)}. {_WHOLE}"
        result = await speak(role, _dialogue(role, task, {before: result} if before else {}, asked))
        before = role
    return result


async def _decentralized(task: str, decision: Decision, speak: Speak, note: Note) -> str:
    latest: dict[str, str] = {}
    role, result = decision.entry_role, ""
    for turn in range(1, decision.max_steps + 1):
        last = turn == decision.max_steps
        peers = ", ".join(one for one in decision.roles if one != role)
        asked = f"Your peers: {peers}. {_WHOLE} " + (
            "This is the last turn: deliver the result."
            if last
            else "End with one line, NEXT: and the peer who goes on, or NEXT: finish where nothing is left to do."
        )
        said = await speak(role, _dialogue(role, task, latest, asked))
        result, named = _without_next(said)
        latest = {**latest, role: result}
        if last or named == FINISH:
            break
        following = next((one for one in decision.roles if named == one.lower() and one != role), None)
        if following is None:
            following = next((one for one in decision.roles if one not in latest), None)
            note(f"names no peer ({named or 'nobody'}): " + (f"{following} goes on" if following else "it ends"))
        if following is None:
            break
        role = following
    return result


async def _centralized(task: str, decision: Decision, speak: Speak, note: Note) -> str:
    manager = decision.manager_role or decision.entry_role
    workers = [role for role in decision.roles if role != manager]
    latest: dict[str, str] = {}
    result, left = "", decision.max_steps
    while left:
        # The manager's last word is kept for it, unless there is no room for two.
        room = left - 1 if decision.max_steps == 2 else left - 2
        said = await speak(manager, _dialogue(manager, task, latest, _manager_brief(workers, room)))
        left -= 1
        steps, finished = _assigned(said, workers)
        if finished is not None or room < 1 or not steps:
            if finished is None and room >= 1:
                note("neither assigns nor finishes: taken as the result")
            return said if finished is None else finished
        if len(steps) > room:
            note(f"assigns {len(steps)} steps where {room} are left: the others are dropped")
        for role, instruction in steps[:room]:
            others = {name: text for name, text in latest.items() if name != role}
            asked = f"{manager} leads and asks of you: {instruction}\n{_WHOLE}"
            result = latest[role] = await speak(role, _dialogue(role, task, others, asked))
            left -= 1
    return result


def _manager_brief(workers: Sequence[str], room: int) -> str:
    finish = f"a line FINISH, and below it the whole result. {_WHOLE}"
    if room < 1:
        return f"You lead. This is the last turn: write {finish}"
    return (
        f"You lead: {', '.join(workers)}. Either assign steps (at most {room}), each on a line of its own, "
        f"'ASSIGN role: instruction', done in that order; or write {finish}"
    )


def _assigned(said: str, workers: Sequence[str]) -> tuple[list[tuple[str, str]], str | None]:
    """The steps that a manager assigned, and the result where it finished."""
    if finish := _FINISH.search(said):
        return [], said[finish.end() :].strip()
    found = list(_ASSIGN.finditer(said))
    ends = [one.start() for one in found[1:]] + [len(said)]
    known = {role.lower(): role for role in workers}
    steps = [
        (known[one[1].strip(" *`").lower()], said[one.start(2) : end].strip())
        for one, end in zip(found, ends, strict=False)
        if one[1].strip(" *`").lower() in known
    ]
    return steps, None


def _without_next(said: str) -> tuple[str, str]:
    """An answer without its last line `NEXT: role`, and the name in that line (lower case; empty: no such line)."""
    found = _NEXT.search(said)
    return (said[: found.start()].rstrip(), found[1].strip(" `*").lower()) if found else (said, "")


def _dialogue(role: str, task: str, latest: dict[str, str], asked: str) -> list[Message]:
    brief = _BRIEFS.get(role, "Do what your role is there for.")
    parts = [f"Task: {task}"]
    parts += [f"Result of {name}:\n{text}" for name, text in latest.items()]
    return [
        Message(role="system", content=f"You are the {role} of a software team. {brief} {asked}"),
        Message(role="user", content="\n\n".join(parts)),
    ]


@dataclass(frozen=True)
class Code:
    """Code found in a result, and how."""

    text: str
    # What the fence calls it, in lower case; None without a fence.
    language: str | None


_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


def code_of(result: str, entry_point: str | None = None) -> Code:
    """The code of a result: the last fenced block that defines `entry_point`, else the last block, else all of it."""
    blocks = [Code(found[2], found[1].lower()) for found in _FENCE.finditer(result)]
    if not blocks:
        return Code(result, None)
    defines = rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry_point or '')}\b"
    wanted = [one for one in blocks if entry_point and re.search(defines, one.text, re.MULTILINE)]
    return (wanted or blocks)[-1]
