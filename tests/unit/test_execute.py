"""`router eval --execute`: a worker with known solve rates, tests that stay hidden, money and kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from router_cli.cli import main
from router_cli.errors import BudgetReached, InputError, OutputError, UsageError
from router_cli.execute import CALLS, execute
from router_cli.executing import judge_executed
from router_cli.jsonl import alone
from router_cli.schema import Message, Usage
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.teams.given import given_decision
from router_cli.teams.problems import read_problems
from router_cli.teams.workers import Said
from router_cli.train import train
from tests import training
from tests.fake_teacher import Call, FakeTeacher, Reply

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs Linux or macOS")

RATES = {"single": 0.35, "chain": 0.6, "centralized": 0.9, "decentralized": 0.15}
KILLS = 20
KINDS = {"alone": "single", "stage": "chain", "lead": "centralized", "peers": "decentralized"}


def write_problems(path: Path, count: int) -> Path:
    rows = [
        {
            "task_id": f"T/{i}",
            "prompt": f'def f{i}(x):\n    """Add {i}.\n    >>> f{i}(1)\n    {i + 1}\n    """\n',
            "entry_point": f"f{i}",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(9) == {i + 9}\n",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Simulated:
    """Solves a task with the known rate of the topology that its prompt shows; each (task, sample) is drawn once."""

    model = "simulated"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def answer(self, messages: Sequence[Message], sample: int = 0) -> Said:
        system, user = (message.content for message in messages)
        self.prompts.append(system + user)
        return Said(self.text(system, user, sample), self.model, Usage(prompt_tokens=100, completion_tokens=50), 0.1)

    def rate(self, number: int, topology: str) -> float:
        return RATES[topology]

    def text(self, system: str, user: str, sample: int) -> str:
        number = re.search(r"def f(\d+)", user)[1]  # type: ignore[index]
        topology = KINDS[next(word for word in KINDS if word in system.partition("team.")[2])]
        key = f"{number} {topology} {sample}"
        solved = random.Random(hashlib.sha256(key.encode()).hexdigest()).random() < self.rate(int(number), topology)
        code = f"```python\ndef f{number}(x):\n    return x + {number if solved else -1}\n```"
        return {"centralized": f"FINISH\n{code}", "decentralized": f"{code}\nNEXT: finish"}.get(topology, code)

    async def close(self) -> None:
        pass


def settings(data: Path, **values: Any) -> Settings:
    chosen: dict[str, Any] = {
        "eval.data": str(data),
        "eval.output_dir": str(data.parent / "out"),
        "eval.execute": True,
        "eval.allow_code_execution": True,
        "eval.resamples": 200,
        "eval.split": "all",
        "run.price_in": 1.0,
        "run.price_out": 2.0,
    }
    chosen |= {key.replace("__", "."): value for key, value in values.items()}
    return load({key: (f"--{key.split('.')[1].replace('_', '-')}", v) for key, v in chosen.items()}, environ={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_true_ranking_of_the_topologies_comes_out(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 50)
    done, report = judge_executed(settings(data, eval__repeats=2), worker=Simulated())
    found = rows(done.outcomes)
    assert len(found) == 50 * 4 * 2 and {row["repeat"] for row in found} == {0, 1}
    rate = {name: sum(row["solved"] for row in found if row["topology"] == name) / 100 for name in RATES}
    assert all(abs(rate[name] - RATES[name]) < 0.15 for name in RATES)
    [table] = report.tables
    judged = {policy.name: policy.solved.value for policy in table.policies}
    ranking = sorted(RATES, key=RATES.__getitem__)
    fixed = {name: next(v for key, v in judged.items() if key.endswith(f" {name}")) for name in RATES}
    assert sorted(fixed, key=fixed.__getitem__) == ranking
    # A broken answer fails on the visible example too: the evidence says so.
    assert all(row["evidence"] is row["solved"] for row in found)
    acts = {row["solved"]: row["acts"] for row in found}
    assert all(row["acts"] == acts[row["solved"]] for row in found) and acts[True] != acts[False]
    assert {"random", "cascade", "cascade by doubt", "oracle"} <= judged.keys()


class Uneven(Simulated):
    """Every third task needs a team, every third is hard for all, every third is easy for all."""

    def rate(self, number: int, topology: str) -> float:
        return (0.9 if topology == "centralized" else 0.2, 0.1, 0.8)[number % 3]


@pytest.mark.slow
def test_the_oracle_of_executions_is_worth_what_its_choices_are(tmp_path: Path) -> None:
    data, worker = write_problems(tmp_path / "toy.jsonl", 60), Uneven()
    done, report = judge_executed(settings(data, eval__repeats=3), worker=worker)
    [table] = report.tables
    cells: dict[tuple[str, str], dict[int, bool]] = {}
    for row in rows(done.outcomes):
        cells.setdefault((row["task_id"], row["topology"]), {})[row["repeat"]] = row["solved"]
    worth = flattered = 0.0
    for i in range(60):
        runs = {name: cells[f"T/{i}", name] for name in table.topologies}  # the cheapest first
        flattered += max(sum(one.values()) / 3 for one in runs.values()) / 60
        for held in range(3):
            best = max(runs, key=lambda name: sum(solved for r, solved in runs[name].items() if r != held))
            worth += worker.rate(i, best) / 180
    oracle = next(row for row in table.policies if row.name == "oracle").solved
    assert oracle.low < worth < oracle.high < flattered and table.oracle.cross_fitted
    assert table.oracle.optimism == pytest.approx(flattered - oracle.value)


def test_a_router_that_equals_always_single_is_named_as_such(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 10)
    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    single = given_decision("single", space).model_dump(mode="json")
    lines = [json.dumps({"task_id": f"T/{i}", "decision": single}) for i in range(10)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    _, report = judge_executed(settings(data, eval__predictions=str(tmp_path / "p.jsonl")), worker=Simulated())
    [table] = report.tables
    fixed = next(row for row in table.policies if row.name == "always single")
    assert "every task gets single, so it is worth what always single is" in table.warnings[0]
    assert table.policies[0].solved == fixed.solved and fixed.solved_difference is not None
    assert fixed.solved_difference.verdict == "cannot tell" and fixed.solved_difference.score.value == 0
    assert {"random", "cascade", "oracle"} <= {row.name for row in table.policies}


def test_a_routers_own_team_works_where_its_topology_is_tried(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 3)
    decision = {
        "topology": "chain",
        "roles": ["tester", "builder"],
        "manager_role": None,
        "entry_role": "tester",
        "max_steps": 2,
    }
    lines = [json.dumps({"task_id": f"T/{i}", "decision": decision}) for i in range(2)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    chosen = settings(data, eval__predictions=str(tmp_path / "p.jsonl"))
    done, report = judge_executed(chosen, worker=Simulated())
    chains = [row["decision"]["roles"] for row in rows(done.outcomes) if row["topology"] == "chain"]
    assert chains == [["tester", "builder"], ["tester", "builder"], ["planner", "builder", "tester", "refractor"]]
    assert report.tables[0].policies[0].name == "router"


@pytest.mark.slow
def test_no_hidden_test_reaches_a_prompt_of_the_whole_of_humaneval(tmp_path: Path) -> None:
    class Wrong(Simulated):
        """A team that talks: the manager assigns and sees the result, peers go on, and every function is wrong."""

        def text(self, system: str, user: str, sample: int) -> str:
            name = re.findall(r"def (\w+)", user.partition("Result of")[0])[-1]
            code = f"```python\ndef {name}(*given):\n    return given\n```"
            if "You lead" in system:
                return f"FINISH\n{code}" if "Result of" in user else "ASSIGN builder: write it\nASSIGN tester: try it"
            return code + ("\nNEXT: finish" if "Result of" in user else "\nNEXT: tester") * ("Your peers" in system)

    worker = Wrong()
    execute(settings(tmp_path / "x", eval__data="humaneval", eval__output_dir=str(tmp_path / "out")), {}, worker=worker)
    assert len(worker.prompts) == 164 * (1 + 4 + 4 + 2)
    said = "\n".join(row["answer"] + str(row["messages"]) for row in rows(tmp_path / "out" / CALLS))
    everything = "\n".join(worker.prompts) + said
    tests = [line.strip() for one in read_problems(["humaneval"]) for line in one.tests.splitlines()]
    hidden = {line for line in tests if line.startswith("assert ") and line not in ("assert True", "assert False")}
    assert len(hidden) > 900 and not [line for line in hidden if line in everything]


def test_what_was_answered_is_never_paid_for_again(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 4)
    with FakeTeacher(behave=lambda call: Reply("pass")) as server:
        chosen = settings(data, endpoint__base_url=server.url, eval__repeats=2)
        first = execute(chosen, {})
        calls = len(server.calls)
        assert first.paid.cost_usd == pytest.approx(calls * (400 * 1.0 + 40 * 2.0) / 1e6) and not first.failed
        before = first.outcomes.read_bytes()
        again = execute(chosen, {})
        assert len(server.calls) == calls and again.paid.attempts == 0 and first.outcomes.read_bytes() == before
        execute(settings(data, endpoint__base_url=server.url, eval__repeats=3), {})
        assert len(server.calls) == calls * 3 // 2  # the third repeat alone


def test_a_cap_ends_it_in_order_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 6)
    with FakeTeacher(behave=lambda call: Reply("pass"), delay=0.02) as server:
        chosen = {"endpoint__base_url": server.url, "run__answer_tokens": 100, "run__concurrency": 4}
        with pytest.raises(BudgetReached):
            execute(settings(data, run__max_cost=0.012, **chosen), {})
        kept = len(rows(tmp_path / "out" / CALLS))
        # Nothing that was paid for is lost: those on their way were waited for.
        assert kept == len(server.calls) and 0 < kept * 480 / 1e6 <= 0.012
        # The cap is the folder's: said again it buys nothing more than what still fits.
        with pytest.raises(BudgetReached, match="by earlier calls"):
            execute(settings(data, run__max_cost=0.012, **chosen), {})
        assert len(server.calls) * 480 / 1e6 <= 0.012
        done = execute(settings(data, **chosen), {})
        assert len(rows(done.outcomes)) == 24 and len(server.calls) == len(rows(tmp_path / "out" / CALLS))


def test_a_worker_without_an_answer_is_a_task_unsolved(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 2)

    def silent(call: Call) -> Reply:
        return Reply("" if "f0" in call.messages[1]["content"] else "pass")

    with FakeTeacher(behave=silent) as server:
        done = execute(settings(data, endpoint__base_url=server.url), {})
    assert done.failed == 4 and Counter(row["reason"] for row in rows(done.outcomes))["missing"] >= 4


@pytest.mark.slow
def test_a_killed_run_pays_again_only_for_what_was_on_its_way(tmp_path: Path) -> None:
    data, drawn = write_problems(tmp_path / "toy.jsonl", 80), random.Random(4)
    out = tmp_path / "out"
    with FakeTeacher(behave=lambda call: Reply("pass", delay=0.05)) as server:
        command = [
            sys.executable,
            "-m",
            "router_cli",
            "eval",
            "--execute",
            "--allow-code-execution",
            "--data",
            str(data),
        ]
        command += ["--output-dir", str(out), "--base-url", server.url, "--concurrency", "6", "--resamples", "100"]
        environ = {**os.environ, "OPENAI_API_KEY": "none"}
        for _ in range(KILLS):
            with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
                calls = len(server.calls)
                while len(server.calls) == calls and child.poll() is None:
                    time.sleep(0.01)
                time.sleep(drawn.uniform(0, 0.25))
                child.send_signal(signal.SIGKILL)
                assert child.wait() == -signal.SIGKILL  # each moment was one of a run at work
        assert subprocess.run(command, env=environ, capture_output=True).returncode == 0
    keys = [row["key"] for row in rows(out / CALLS)]
    assert len(keys) == len(set(keys)) and len(server.calls) <= len(keys) + KILLS * 6
    assert len(rows(out / "outcomes.jsonl")) == len(RATES) * 80


@pytest.mark.slow
def test_an_adapter_decides_first_and_a_cascade_is_chosen_on_the_training_tasks(
    tmp_path: Path, tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    labels = training.write_rows(tmp_path / "labels.jsonl", training.label_rows(8, 0))
    train(training.train_settings(labels, tiny_folder("smollm"), tmp_path / "adapter", validation_share=0))
    data = write_problems(tmp_path / "toy.jsonl", 34)
    splits = [{**row, "split": "train" if i < 30 else "test"} for i, row in enumerate(rows(data))]
    data.write_text("".join(json.dumps(row) + "\n" for row in splits))

    def odd_ones_need_a_team(call: Call) -> Reply:
        number = int(re.search(r"def f(\d+)", call.messages[1]["content"])[1])  # type: ignore[index]
        solved = number % 2 == 0 or "work alone" not in call.messages[0]["content"]
        return Reply(f"```python\ndef f{number}(x):\n    return x + {number if solved else -1}\n```")

    command = ["eval", "--execute", "--allow-code-execution", "--data", str(data), "--resamples", "100", "--json", "-q"]
    command += ["--adapter", str(tmp_path / "adapter"), "--output-dir", str(tmp_path / "out")]
    with FakeTeacher(behave=odd_ones_need_a_team) as server:
        assert main([*command, "--base-url", server.url, "--unsolved-penalty", "1"]) == 0
    [table] = json.loads(capsys.readouterr().out)["tables"]
    policies = {row["name"]: row for row in table["policies"]}
    assert table["policies"][0]["name"] == "router" and table["counts"]["judged"] == 4
    decided = {row["task_id"]: row["decision"] for row in rows(tmp_path / "out" / "predictions.jsonl")}
    assert len(decided) == 34 and policies["router"]["mix"].keys() <= RATES.keys()
    for row in rows(tmp_path / "out" / "outcomes.jsonl"):
        own = decided[row["task_id"]]
        assert row["topology"] != own["topology"] or row["decision"] == own
    assert "30 training tasks at $1 an unsolved one" in policies["priced cascade"]["note"]
    assert policies["priced cascade"]["solved"]["value"] == policies["cascade"]["solved"]["value"] == 1.0


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 1)
    (tmp_path / "out").mkdir()
    with alone(tmp_path, tmp_path / "out" / ".execute.lock", ""), pytest.raises(OutputError, match="another command"):
        execute(settings(data), {}, worker=Simulated())


def test_what_makes_no_sense_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 1)
    with pytest.raises(UsageError, match="--allow-code-execution"):
        execute(settings(data, eval__allow_code_execution=False), {}, worker=Simulated())
    (tmp_path / "none.jsonl").write_text('{"task": "Sort a list."}\n')
    with pytest.raises(InputError, match=r"none.jsonl:1: has no tests"):
        execute(settings(tmp_path / "none.jsonl"), {}, worker=Simulated())
    with pytest.raises(UsageError, match="--outcomes"):
        judge_executed(settings(data, eval__outcomes="humaneval-mapcoder"), worker=Simulated())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CALLS).write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="is no recorded answer"):
        execute(settings(data), {}, worker=Simulated())


def test_the_command_prints_the_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_problems(tmp_path / "toy.jsonl", 3)
    command = [
        "eval",
        "--execute",
        "--allow-code-execution",
        "--data",
        str(data),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    with FakeTeacher(behave=lambda call: Reply("pass")) as server:
        assert main([*command, "--base-url", server.url, "--resamples", "100"]) == 0
    said = capsys.readouterr()
    assert "single" in said.out and "12 executions" in said.err
