"""`router run`: a decision, a team behind a real server on loopback, its result, the trace and the bill."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest

from router_cli.cli import main
from router_cli.errors import UsageError
from router_cli.run import RunResult, arun
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.teams.given import given_decision
from router_cli.teams.team import read_trace
from tests.fake_teacher import Call, FakeTeacher, Reply

CHAIN = '{"topology":"chain","roles":["planner","builder"],"manager_role":null,"entry_role":"planner","max_steps":2}'


def speak(call: Call) -> Reply:
    return Reply(f"said by {call.messages[0]['content'].split()[3]}")


def command(url: str, folder: Path, *more: str) -> list[str]:
    return ["run", "Sort a list.", "--base-url", url, "--output-dir", str(folder / "runs"), *more]


def test_a_team_works_and_its_result_alone_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTeacher(behave=speak) as server:
        assert main(command(server.url, tmp_path, "--decision", CHAIN, "--worker-model", "gpt-4o")) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "said by builder"
    assert "planner" in said.err and "2 turns" in said.err and "$0.0028" in said.err
    [trace] = (tmp_path / "runs").glob("*.jsonl")
    assert [turn.role for turn in read_trace(trace).turns] == ["planner", "builder"]
    assert all(call.body["model"] == "gpt-4o" and "response_format" not in call.body for call in server.calls)
    assert all(call.body["max_tokens"] == 4096 and call.body["temperature"] == 0.2 for call in server.calls)


def test_the_router_decides_where_the_user_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTeacher(behave=speak) as server:
        code = main(command(server.url, tmp_path, "--backend", "heuristic", "--json"))
    document = json.loads(capsys.readouterr().out)
    assert code == 0 and document["decision"]["topology"] == "single" and document["result"] == "said by builder"
    assert document["usage"]["cost_usd"] == pytest.approx(server.cost) or document["usage"]["cost_usd"] is not None


def test_a_dash_is_the_task_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Sort a list.\n\nIt holds: 写.\n"
    raw = text.replace("\n", "\r\n").encode("utf-16")  # as PowerShell pipes
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))
    with FakeTeacher(behave=speak) as server:
        argv = ["run", "-", "--base-url", server.url, "--output-dir", str(tmp_path / "runs"), "--decision", CHAIN]
        assert main(argv) == 0
        assert all("Sort a list.\n\nIt holds: 写." in str(call.messages[1]["content"]) for call in server.calls)
    [trace] = (tmp_path / "runs").glob("*.jsonl")
    assert read_trace(trace).task == text.rstrip()


def test_a_coroutine_lets_teams_work_side_by_side(tmp_path: Path) -> None:
    values = {"run.decision": CHAIN, "run.output_dir": str(tmp_path / "runs")}

    async def both(url: str) -> list[RunResult]:
        settings = load(
            {key: ("mine", value) for key, value in {**values, "endpoint.base_url": url}.items()}, environ={}
        )
        return await asyncio.gather(arun(settings, "Sort a list."), arun(settings, "Sort a list."))

    with FakeTeacher(behave=speak) as server:
        found = asyncio.run(both(server.url))
    assert [one.result for one in found] == ["said by builder"] * 2 and found[0].traces != found[1].traces
    assert all(len(read_trace(one.traces[0]).turns) == one.turns == 2 for one in found)


def test_a_trace_is_shown_drawn_and_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTeacher(behave=speak) as server:
        assert main(command(server.url, tmp_path, "--decision", CHAIN)) == 0
        calls = len(server.calls)
        [trace] = (tmp_path / "runs").glob("*.jsonl")
        capsys.readouterr()
        assert main(["trace", str(trace)]) == 0
        said = capsys.readouterr()
        assert (
            "--- turn 2: builder, 400 + 40 tokens" in said.out and "--- finished\n2 turns" in said.out and not said.err
        )
        assert main(["trace", str(trace), "--draw"]) == 0
        assert capsys.readouterr().out.startswith(
            "sequenceDiagram\n    participant task\n    participant r0 as planner"
        )
        assert main(["trace", str(trace), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["turns"][0]["messages"][0]["role"] == "system"
        assert len(server.calls) == calls  # nobody was asked
    trace.write_text(trace.read_text().replace("You are stage 2", "You are the second"))
    assert main(["trace", str(trace)]) == 0
    assert "would let it run otherwise: turn 2 of the trace answers another prompt" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none.jsonl")]) == 1


def test_the_cap_on_money_holds_and_what_was_said_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--decision", "chain", "--worker-model", "gpt-4o", "--answer-tokens", "100", "--max-cost", "0.004"]
    with FakeTeacher(behave=speak) as server:
        assert main(command(server.url, tmp_path, *chosen)) == 3
    assert 0 < server.cost <= 0.004
    error = capsys.readouterr().err
    assert "--max-cost" in error and "its turns are in" in error
    [trace] = (tmp_path / "runs").glob("*.jsonl")
    assert read_trace(trace).ended == "budget" and len(read_trace(trace).turns) == len(server.ledger) > 0


def test_a_worker_that_gives_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTeacher(behave=lambda call: Reply("")) as server:
        assert main(command(server.url, tmp_path, "--decision", "single")) == 1
    assert "came to no result" in capsys.readouterr().err


def test_an_answer_that_was_cut_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTeacher(behave=lambda call: Reply("half", finish_reason="length")) as server:
        assert main(command(server.url, tmp_path, "--decision", "single")) == 0
    assert capsys.readouterr().out.strip() == "half"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--decision", "pair"], "--decision"),
        (["--decision", '{"topology":"single"}'], "missing_field"),
        (["--decision", "single", "--max-cost", "1", "--worker-model", "my-model"], "the price of my-model is unknown"),
        (["--decision", "single", "--temperature", "3"], "run.temperature"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    with FakeTeacher() as server:
        assert main(command(server.url, tmp_path, *more)) == 2
        assert not server.calls
    assert words in capsys.readouterr().err


def test_a_topology_alone_takes_all_roles() -> None:
    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    assert given_decision("single", space).roles == ("builder",)
    assert given_decision("chain", space).max_steps == 4
    central = given_decision("centralized", space)
    assert (central.manager_role, central.max_steps, len(central.roles)) == ("planner", 5, 4)
    assert given_decision("decentralized", space).entry_role == "planner"
    with pytest.raises(UsageError, match="single, chain"):
        given_decision("pair", space)
