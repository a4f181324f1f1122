"""What each formation does: who speaks, who sees what, when it ends, and what is not followed silently."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from router_cli.errors import BudgetReached, InputError, TeacherError
from router_cli.schema import Decision, Message, Usage
from router_cli.teams.formations import Code, code_of
from router_cli.teams.team import Work, drawn, read_trace, work
from router_cli.teams.workers import RecordedWorker, Said, WorkerFailedError

TASK = "Write a parser."
USED = Usage(prompt_tokens=10, completion_tokens=5, cost_usd=0.01)


class Scripted:
    """Says its lines in order; an exception among them is raised. `heard` keeps role, system and user text."""

    model = "scripted"

    def __init__(self, *lines: str | Exception) -> None:
        self._lines = list(lines)
        self.heard: list[tuple[str, str, str]] = []
        self.closed = False

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        system, user = (message.content for message in messages)
        self.heard.append((system.split()[3], system, user))
        line = self._lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return Said(line, self.model, USED, 0.5)

    async def close(self) -> None:
        self.closed = True

    @property
    def spoke(self) -> list[str]:
        return [role for role, _, _ in self.heard]


def decided(topology: str, roles: list[str], steps: int, entry: str | None = None) -> Decision:
    manager = roles[0] if topology == "centralized" else None
    return Decision.model_validate(
        {
            "topology": topology,
            "roles": tuple(roles),
            "manager_role": manager,
            "entry_role": entry or roles[0],
            "max_steps": steps,
        }
    )


def worked(worker: Scripted, decision: Decision, trace: Path | None = None) -> Work:
    return asyncio.run(work(TASK, decision, worker, trace))


def test_a_single_agent_speaks_once_and_sees_the_task() -> None:
    worker = Scripted("done")
    found = worked(worker, decided("single", ["builder"], 1))
    assert (found.result, found.ended, worker.spoke) == ("done", "finished", ["builder"])
    assert worker.heard[0][2] == f"Task: {TASK}"


def test_a_chain_hands_each_result_to_the_next_alone() -> None:
    worker = Scripted("plan", "code", "tested")
    found = worked(worker, decided("chain", ["planner", "builder", "tester"], 3))
    assert (found.result, worker.spoke) == ("tested", ["planner", "builder", "tester"])
    assert "Result of planner:\nplan" in worker.heard[1][2]
    assert "Result of builder:\ncode" in worker.heard[2][2] and "plan" not in worker.heard[2][2].replace("planner", "")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.attempts) == (30, 15, 3)
    assert found.usage.cost_usd == pytest.approx(0.03)


def test_peers_name_the_next_speaker_until_one_finishes() -> None:
    worker = Scripted("a\nNEXT: tester", "b\n**NEXT: planner**", "c\nNEXT: finish")
    found = worked(worker, decided("decentralized", ["planner", "builder", "tester"], 12, "builder"))
    assert (found.result, worker.spoke) == ("c", ["builder", "tester", "planner"])
    assert "Result of builder:\na\n" in worker.heard[2][2] + "\n" and "Result of tester:\nb" in worker.heard[2][2]
    assert not any(turn.notes for turn in found.turns)


def test_peers_stop_at_their_last_turn_and_are_told_that_it_is_the_last() -> None:
    worker = Scripted("a\nNEXT: tester", "b\nNEXT: builder")
    found = worked(worker, decided("decentralized", ["builder", "tester"], 2))
    assert (found.result, worker.spoke) == ("b", ["builder", "tester"])
    assert "last turn" in worker.heard[1][1] and "last turn" not in worker.heard[0][1]


@pytest.mark.parametrize("said", ["a", "a\nNEXT: builder", "a\nNEXT: reviewer", "a\nNEXT:"])
def test_a_peer_that_names_nobody_passes_on_to_who_has_not_spoken(said: str) -> None:
    worker = Scripted(said, "b", "never")
    found = worked(worker, decided("decentralized", ["builder", "tester"], 8))
    assert (found.result, worker.spoke) == ("b", ["builder", "tester"])
    assert "tester goes on" in found.turns[0].notes[0] and "it ends" in found.turns[1].notes[0]


def test_a_manager_assigns_sees_the_results_and_finishes() -> None:
    worker = Scripted(
        "I plan.\nASSIGN builder: write it\nin two files\n- ASSIGN tester: try it", "code", "fine", "FINISH\nall of it"
    )
    found = worked(worker, decided("centralized", ["planner", "builder", "tester"], 4))
    assert (found.result, worker.spoke) == ("all of it", ["planner", "builder", "tester", "planner"])
    assert "write it\nin two files" in worker.heard[1][1] and "Result of builder:\ncode" in worker.heard[2][2]
    assert "Result of builder:\ncode" in worker.heard[3][2] and "Result of tester:\nfine" in worker.heard[3][2]
    assert "last turn" in worker.heard[3][1]


def test_a_managers_last_turn_is_kept_for_it() -> None:
    worker = Scripted("ASSIGN builder: a\nASSIGN tester: b\nASSIGN builder: c", "1", "2", "whole, without the word")
    found = worked(worker, decided("centralized", ["planner", "builder", "tester"], 4))
    assert (found.result, len(worker.heard)) == ("whole, without the word", 4)
    assert "the others are dropped" in found.turns[0].notes[0]


def test_with_two_turns_the_one_assigned_step_is_the_result() -> None:
    worker = Scripted("ASSIGN builder: do it", "made")
    found = worked(worker, decided("centralized", ["planner", "builder"], 2))
    assert (found.result, worker.spoke) == ("made", ["planner", "builder"])


@pytest.mark.parametrize("said", ["My own solution.", "ASSIGN stranger: do it"])
def test_a_manager_that_neither_assigns_nor_finishes_has_given_the_result(said: str) -> None:
    found = worked(Scripted(said), decided("centralized", ["planner", "builder"], 3))
    assert found.result == said and "neither assigns nor finishes" in found.turns[0].notes[0]


# -- the trace --------------------------------------------------------------------------------------------------


def test_a_trace_tells_all_and_can_be_said_again(tmp_path: Path) -> None:
    decision = decided("centralized", ["planner", "builder"], 3)
    first = worked(Scripted("ASSIGN builder: x\nASSIGN builder: y", "1", "FINISH\nend"), decision, tmp_path / "t.jsonl")
    read = read_trace(tmp_path / "t.jsonl")
    assert (read.turns, read.result, read.ended, read.decision) == (first.turns, "end", "finished", decision)
    assert read.usage == first.usage and read.turns[0].notes
    again = RecordedWorker([(turn.messages, turn.said) for turn in read.turns])
    assert asyncio.run(work(TASK, decision, again)).result == "end"
    with pytest.raises(InputError, match="turn 1 of the trace answers another prompt"):
        other = RecordedWorker([(turn.messages, turn.said) for turn in read.turns])
        asyncio.run(work("Another task.", decision, other))
    picture = drawn(read)
    assert picture.startswith("sequenceDiagram") and "planner" in picture and "are dropped" in picture


def test_what_was_said_before_a_failure_is_kept(tmp_path: Path) -> None:
    broken = WorkerFailedError("no answer")
    broken.spent = USED
    trace = tmp_path / "t.jsonl"
    found = worked(Scripted("plan", broken), decided("chain", ["planner", "builder"], 2), trace)
    assert (found.ended, found.result, found.why) == ("failed", "", "no answer")
    assert found.usage.prompt_tokens == 20 and [turn.said.text for turn in read_trace(trace).turns] == ["plan"]
    assert worked(Scripted(BudgetReached("enough")), decided("single", ["builder"], 1)).ended == "budget"
    with pytest.raises(TeacherError, match="gone"):
        worked(
            Scripted("plan", TeacherError("gone")), decided("chain", ["planner", "builder"], 2), tmp_path / "u.jsonl"
        )
    cut = read_trace(tmp_path / "u.jsonl")
    assert (cut.ended, cut.why, len(cut.turns)) == ("failed", "the run was cut off", 1)


@pytest.mark.parametrize("text", ["", '{"turn": 1}\n', '{"trace": 1}\n', '{"trace": 1, "task": "", "decision": 4}\n'])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"t\.jsonl"):
        read_trace(tmp_path / "t.jsonl")


# -- code -------------------------------------------------------------------------------------------------------


def test_the_code_is_the_last_block_that_defines_what_is_asked_for() -> None:
    text = "First:\n```python\ndef f():\n    return 1\n```\nthen\n```python\nprint(f())\n```\n"
    assert code_of(text, "f").text == "def f():\n    return 1\n"
    assert code_of(text).text == "print(f())\n" and code_of(text, "g").text == "print(f())\n"
    assert code_of("def f(): return 1", "f") == Code("def f(): return 1", None)
    assert code_of("```JS\nlet f\n```") == Code("let f\n", "js")
