"""The cheapest formation first, the decided one on evidence: what a cascade looks at, and what it costs.

Text alone hardly tells where a team helps; a cheap try does (docs/worth.md). What may be looked at is the task's own
text and the cheap answer: never a hidden test. Each trigger is an option:

    examples   an example that the task shows (a doctest, `assert f(1) == 2`) fails
    runs       the code does not load
    disagree   two cheap answers act differently on the task's examples, or are different code where it has none
    unsure     the router gives the cheap formation less than `run.unsure_below`; then the cheap try is left out
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from router_cli.errors import UsageError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace
from router_cli.teams.formations import Code, code_of
from router_cli.teams.given import given_decision
from router_cli.teams.problems import examples_in
from router_cli.teams.sandbox import Sandbox
from router_cli.teams.team import Work

Try = Callable[[Decision, int], Awaitable[Work]]
"""Lets a team work; another sample of the same team is another draw."""


@dataclass
class Climb:
    """How a cascade went: every team that worked, in order, and which triggers fired (none: the cheap try stands)."""

    works: list[Work] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)

    @property
    def last(self) -> Work:
        """The work whose result counts."""
        return self.works[-1]


@dataclass(frozen=True)
class Evidence:
    """What a cheap answer shows by itself. None is unknown: nothing to look at, or no leave to run code."""

    runs: bool | None = None
    examples: bool | None = None


def rungs(decision: Decision, space: DecisionSpace) -> tuple[Decision, Decision]:
    """What a cascade tries first, and what it escalates to: one agent, then the decided team.

    Where one agent is what was decided, the plain team of the next topology is the one to escalate to.
    Raises UsageError where the space has no `single`.
    """
    if "single" not in space.topologies:
        raise UsageError("--cascade tries a single agent first: --topologies leaves that out")
    if decision.topology != "single":
        return given_decision("single", space), decision
    larger = [name for name in space.topologies if name != "single"]
    return decision, given_decision(larger[0], space) if larger and len(space.roles) > 1 else decision


async def climb(
    task: str,
    cheap: Decision,
    dear: Decision,
    triggers: Sequence[str],
    attempt: Try,
    box: Sandbox | None,
    share: float | None = None,
    unsure_below: float = 0.5,
) -> Climb:
    """Try `cheap`; where one of the `triggers` fires, let `dear` work too, and its result counts.

    `share` is the router's probability of the cheap formation (None: unknown, never unsure). Without a `box` no code
    runs, and what needs it is unknown and fires nothing. A cheap team that came to no result always escalates.
    """
    went = Climb()
    if cheap == dear:
        went.works.append(await attempt(cheap, 0))
        return went
    if "unsure" in triggers and share is not None and share < unsure_below:
        went.fired.append("unsure")
    else:
        first = await attempt(cheap, 0)
        went.works.append(first)
        if first.ended == "budget":
            return went
        if first.ended == "failed":
            went.fired.append("failed")
        elif needs := {"examples", "runs"} & set(triggers):
            seen = await look(task, first.result, box)
            went.fired += [name for name in sorted(needs) if getattr(seen, name) is False]
        if "disagree" in triggers and not went.fired:
            second = await attempt(cheap, 1)
            went.works.append(second)
            if second.ended != "finished" or not await alike(task, first.result, second.result, box):
                went.fired.append("disagree")
    if went.fired:
        went.works.append(await attempt(dear, 0))
    elif len(went.works) > 1:
        went.works.append(went.works.pop(0))  # the two agree: the first one's result stands
    return went


async def look(task: str, result: str, box: Sandbox | None) -> Evidence:
    """What the code of a result shows when it is loaded, and on the task's own examples."""
    code = code_of(result)
    if box is None or not is_python(code):
        return Evidence()
    examples = examples_in(task)
    runs = (await asyncio.to_thread(box.run_tests, code.text, "")).passed
    if not (examples and runs):
        return Evidence(runs, False if examples else None)
    return Evidence(runs, (await asyncio.to_thread(box.run_tests, code.text, examples)).passed)


async def alike(task: str, first: str, second: str, box: Sandbox | None) -> bool:
    """Whether two results do the same, as far as that can be seen without hidden tests."""
    same = normal(code_of(first).text) == normal(code_of(second).text)
    if same or box is None or not examples_in(task):
        return same
    seen = [await look(task, text, box) for text in (first, second)]
    return seen[0].examples is not None and seen[0] == seen[1]


def is_python(code: Code) -> bool:
    """Whether this is meant to be a Python program: as its fence says, else by what stands in it."""
    if code.language is not None:
        return code.language in ("python", "py", "python3") or (not code.language and parses(code.text))
    made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
    return parses(code.text) and any(isinstance(node, made) for node in ast.parse(code.text).body)


def normal(code: str) -> str:
    """What is left of code where comments and layout do not count."""
    return ast.dump(ast.parse(code)) if parses(code) else " ".join(code.split())


def parses(code: str) -> bool:
    """Whether a text is Python."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
