"""A cascade: what fires, what is left alone, and that every team that worked is counted."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from router_cli.cli import main
from router_cli.errors import UsageError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace
from router_cli.teams.cascade import Climb, Evidence, climb, is_python, look, rungs
from router_cli.teams.formations import Code
from router_cli.teams.given import given_decision
from router_cli.teams.sandbox import Sandbox
from router_cli.teams.team import Ended, Work
from tests.fake_teacher import Call, FakeTeacher, Reply

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE, CHAIN = given_decision("single", SPACE), given_decision("chain", SPACE)
TASK = "Write double(x).\n>>> double(2)\n4\n"
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"
ALSO = "```python\ndef double(x):\n    return x + x\n```"
WRONG = "```python\ndef double(x):\n    return x\n```"
BROKEN = "```python\ndef double(x:\n```"

sandboxed = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs Linux or macOS")


def climbed(
    cheap: list[str], *triggers: str, box: Any = None, task: str = TASK, ended: Ended = "finished", **more: Any
) -> Climb:
    """A cascade whose cheap team gives these answers, and whose dear one answers `team`."""

    async def attempt(team: Decision, sample: int) -> Work:
        if team == CHAIN:
            return Work(task, team, "w", result="team")
        return Work(task, team, "w", sample, result=cheap[sample] if ended == "finished" else "", ended=ended)

    return asyncio.run(climb(task, SINGLE, CHAIN, triggers, attempt, box, **more))


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(allow=True)


@sandboxed
@pytest.mark.parametrize(
    ("answer", "triggers", "fired"),
    [
        (RIGHT, ["examples", "runs"], []),
        (WRONG, ["examples"], ["examples"]),
        (WRONG, ["runs"], []),
        (BROKEN, ["runs"], ["runs"]),
        (BROKEN, ["examples", "runs"], ["examples", "runs"]),
        ("I would use a loop.", ["examples", "runs"], []),
        ("```js\nlet x = (\n```", ["examples", "runs"], []),
    ],
)
def test_the_examples_of_the_task_and_the_loading_of_the_code_fire(
    box: Sandbox, answer: str, triggers: list[str], fired: list[str]
) -> None:
    went = climbed([answer], *triggers, box=box)
    assert went.fired == fired and went.last.result == ("team" if fired else answer)
    assert len(went.works) == 1 + bool(fired)


@sandboxed
def test_a_task_without_examples_gives_no_evidence_of_them(box: Sandbox) -> None:
    went = climbed([WRONG], "examples", "runs", box=box, task="Write double(x).")
    assert not went.fired
    assert asyncio.run(look("Write double(x).", WRONG, box)) == Evidence(runs=True, examples=None)


@sandboxed
def test_two_cheap_answers_that_differ_fire(box: Sandbox) -> None:
    assert climbed([RIGHT, ALSO], "disagree", box=box).fired == []  # other code, the same on the example
    assert climbed([RIGHT, WRONG], "disagree", box=box).fired == ["disagree"]
    assert climbed([RIGHT, ALSO], "disagree").fired == ["disagree"]  # without leave to run it: other code
    same = climbed([RIGHT, RIGHT.replace("2 * x", "2*x")], "disagree")
    assert same.fired == [] and len(same.works) == 2 and same.last.result == RIGHT


def test_a_router_that_is_unsure_takes_the_team_at_once() -> None:
    went = climbed([RIGHT], "unsure", share=0.3)
    assert (went.fired, len(went.works), went.last.result) == (["unsure"], 1, "team")
    assert climbed([RIGHT], "unsure", share=0.3, unsure_below=0.2).fired == []
    assert climbed([RIGHT], "unsure", share=None).fired == [] and climbed([RIGHT], share=0.0).fired == []


def test_a_cheap_team_without_a_result_escalates_and_a_budget_ends_it() -> None:
    assert climbed([""], ended="failed").fired == ["failed"]
    assert climbed([""], ended="budget").last.ended == "budget"


def test_what_a_cascade_escalates_to() -> None:
    assert rungs(CHAIN, SPACE) == (SINGLE, CHAIN) and rungs(SINGLE, SPACE) == (SINGLE, CHAIN)
    with pytest.raises(UsageError, match="--cascade"):
        rungs(CHAIN, DecisionSpace(SPACE.roles, ("chain",)))


@pytest.mark.parametrize(
    ("code", "python"),
    [(Code("x = 1", None), True), (Code("done", None), False), (Code("a b", ""), False), (Code("a b", "py"), True)],
)
def test_prose_is_not_taken_for_a_program(code: Code, python: bool) -> None:
    assert is_python(code) is python


@sandboxed
def test_the_command_tries_one_agent_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def speak(call: Call) -> Reply:
        return Reply(WRONG if "work alone" in call.messages[0]["content"] else RIGHT)

    command = ["run", TASK, "--decision", "chain", "--cascade", "examples", "--output-dir", str(tmp_path / "runs")]
    with FakeTeacher(behave=speak) as server:
        assert main([*command, "--base-url", server.url]) == 2  # no leave to run code
        assert "--allow-code-execution" in capsys.readouterr().err and not server.calls
        assert main([*command, "--base-url", server.url, "--allow-code-execution"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == RIGHT and "single -> chain, because of examples" in said.err and "5 turns" in said.err
    assert len(list((tmp_path / "runs").glob("*.jsonl"))) == 2
    assert main([*command[:4], "--cascade", "guess"]) == 2 and "run.cascade" in capsys.readouterr().err
