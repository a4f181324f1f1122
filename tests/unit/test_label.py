"""`label`: the rows, the files, resuming without paying twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.errors import CredentialsError, InputError, OutputError, TeacherError, UsageError
from router_cli.label import LabelResult, label
from router_cli.schema import Label, Rejection
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from tests.fake_teacher import Call, FakeTeacher, Reply

SINGLE = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}


def write_tasks(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def some_tasks(path: Path, count: int = 6) -> Path:
    write_tasks(path / "tasks.jsonl", [{"id": f"t{i}", "task": f"Write part {i}."} for i in range(count)])
    return path / "tasks.jsonl"


def settings(data: Path, url: str = "", **values: Any) -> Settings:
    chosen = {"label.data": str(data), "label.output": str(data.parent / "labels.jsonl"), "label.concurrency": 4}
    chosen |= {"endpoint.base_url": url} if url else {"label.teacher": "recorded"}
    chosen |= {key.replace("__", "."): value for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ids(result: LabelResult) -> list[str]:
    return [row["origin_task_id"] for row in rows(result.output)]


def test_a_row_is_trainable_as_it_is_and_says_where_it_comes_from(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(data, [{"id": "a", "task": "Sum a list.", "split": "validation"}])
    with FakeTeacher(Reply(json.dumps(SINGLE | {"roles": ["builder"]}), model="gpt-4o-2024-08-06")) as server:
        result = label(settings(data, server.url))
    [row] = [Label.model_validate_json(line) for line in result.output.read_text().splitlines()]
    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    assert row.messages[:2] == prompts.router_messages("Sum a list.", space)
    assert row.messages[2].role == "assistant" and row.messages[2].content == prompts.render(row.decision)
    assert (row.origin_task_id, row.split, row.sample_type) == ("a", "validation", "teacher_distilled")
    assert row.provenance is not None and row.provenance.model == "gpt-4o-2024-08-06"
    assert row.provenance.roles == space.roles and row.provenance.usage.completion_tokens == 40
    assert result.usage.cost_usd == row.provenance.usage.cost_usd == pytest.approx(0.0014)
    assert (result.labelled, result.topologies["single"], result.complete) == (1, 1, True)


def test_sample_types_follow_the_source(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(
        data,
        [
            {
                "task_id": "HumanEval/0",
                "prompt": "def f():\n",
                "entry_point": "f",
                "test": "",
                "canonical_solution": "",
            },
            {"id": "b", "task": "Sum a list."},
        ],
    )
    with FakeTeacher() as server:
        result = label(settings(data, server.url))
    kinds = [row["sample_type"] for row in rows(result.output)]
    assert kinds == ["humaneval_teacher_distilled", "teacher_distilled"]


def test_rows_stand_in_the_order_of_the_input_and_no_more_than_concurrency_are_in_flight(tmp_path: Path) -> None:
    flying, most, lock = 0, 0, threading.Lock()

    def behave(call: Call) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        threading.Event().wait(0.03 if call.number % 3 else 0.06)
        with lock:
            flying -= 1

    with FakeTeacher(behave=behave) as server:
        result = label(settings(some_tasks(tmp_path, 20), server.url))
    assert ids(result) == [f"t{i}" for i in range(20)]
    assert 2 <= most <= 4


def test_a_second_identical_call_pays_for_nothing_and_changes_nothing(tmp_path: Path) -> None:
    data = some_tasks(tmp_path)
    with FakeTeacher(behave=lambda call: Reply("no") if call.task == "Write part 2." else None) as server:
        first = label(settings(data, server.url))
        before, calls = first.output.read_bytes(), len(server.calls)
        second = label(settings(data, server.url))
        assert len(server.calls) == calls == 8
    assert second.output.read_bytes() == before
    assert (first.labelled, first.resumed, first.rejected) == (5, 0, 1)
    assert (second.labelled, second.resumed, second.rejected) == (0, 5, 1)
    assert second.usage.attempts == 0 and second.usage_all == first.usage and not second.complete


def test_what_cannot_be_used_is_rejected_with_the_raw_text(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 1)
    with FakeTeacher(behave=lambda call: Reply(json.dumps(SINGLE | {"max_steps": 9}))) as server:
        result = label(settings(data, server.url, label__reask=1))
    [row] = [Rejection.model_validate_json(line) for line in result.rejected_path.read_text().splitlines()]
    assert result.rejected_path.name == "labels.jsonl.rejected.jsonl" and result.output.read_text() == ""
    assert (row.origin_task_id, row.task, json.loads(row.raw)["max_steps"]) == ("t0", "Write part 0.", 9)
    assert row.violations[0].startswith("steps_out_of_range: ") and row.provenance.usage.attempts == 2


@pytest.mark.parametrize(
    "change",
    [
        {"label__model": "gpt-4o-mini"},
        {"label__strategy": "prefer-teams"},
        {"label__temperature": 0.7},
        {"decision__roles": "planner,builder"},
        {"decision__topologies": "single,chain"},
        {"decision__step_bound": 5},
    ],
)
def test_other_settings_start_new_rows_and_never_mix(tmp_path: Path, change: dict[str, Any]) -> None:
    data = some_tasks(tmp_path, 3)
    with FakeTeacher() as server:
        first = label(settings(data, server.url))
        before = first.output.read_bytes()
        other = label(settings(data, server.url, **change))
        assert (other.labelled, other.resumed, len(server.calls)) == (3, 0, 6)
        assert ids(other) == ["t0", "t1", "t2"]
        back = label(settings(data, server.url))
    assert len(server.calls) == 6 and back.output.read_bytes() == before


def test_changed_text_is_asked_again_and_changed_split_is_not(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    with FakeTeacher() as server:
        write_tasks(data, [{"id": "a", "task": "one", "split": "train"}, {"id": "b", "task": "two", "split": "train"}])
        label(settings(data, server.url))
        write_tasks(data, [{"id": "b", "task": "two", "split": "test"}, {"id": "a", "task": "uno", "split": "train"}])
        result = label(settings(data, server.url))
    assert [(row["origin_task_id"], row["split"]) for row in rows(result.output)] == [("b", "test"), ("a", "train")]
    assert [call.task for call in server.calls[2:]] == ["uno"]


def test_a_recorded_decision_that_changed_is_read_again(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(data, [{"id": "a", "task": "one", "decision": SINGLE}, {"id": "b", "task": "two"}])
    first = label(settings(data))
    assert (first.labelled, first.rejected, first.usage.cost_usd) == (1, 1, 0.0)
    write_tasks(data, [{"id": "a", "task": "one", "decision": SINGLE | {"roles": ["tester"], "entry_role": "tester"}}])
    assert [row["decision"]["roles"] for row in rows(label(settings(data)).output)] == [["tester"]]
    assert not first.rejected_path.exists()


def test_the_same_task_twice_is_one_row_and_one_id_with_two_texts_is_two(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(data, [{"id": i, "task": text} for i, text in [("a", "one"), ("a", "one"), ("a", "two"), ("b", "x")]])
    with FakeTeacher() as server:
        result = label(settings(data, server.url))
    assert ids(result) == ["a", "a", "b"] and server.answered() == {"one": 1, "two": 1, "x": 1}


def test_a_final_refusal_keeps_what_is_paid_for(tmp_path: Path) -> None:
    data = some_tasks(tmp_path)
    with FakeTeacher(Reply(), Reply(), Reply(status=401)) as server:
        with pytest.raises(CredentialsError):
            label(settings(data, server.url, label__concurrency=1))
        assert [row["origin_task_id"] for row in rows(tmp_path / "labels.jsonl")] == ["t0", "t1"]
        result = label(settings(data, server.url))
        assert set(server.answered().values()) == {1}
    assert (result.labelled, result.resumed) == (4, 2) and ids(result) == [f"t{i}" for i in range(6)]


def test_answers_on_their_way_at_a_final_refusal_are_kept(tmp_path: Path) -> None:
    quota = Reply(status=429, error={"message": "quota", "code": "insufficient_quota"}, delay=0.2)
    data = some_tasks(tmp_path)
    with FakeTeacher(behave=lambda call: quota if call.task == "Write part 0." else Reply(delay=0.8)) as server:
        with pytest.raises(TeacherError):
            label(settings(data, server.url))
        paid = len(server.answered())
    assert paid == len(rows(tmp_path / "labels.jsonl")) == 3


def test_a_refusal_before_any_row_leaves_an_older_output_alone(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with FakeTeacher(behave=lambda call: Reply(status=404) if call.body["model"] == "typo" else None) as server:
        before = label(settings(data, server.url)).output.read_bytes()
        with pytest.raises(TeacherError, match="typo"):
            label(settings(data, server.url, label__model="typo"))
    assert (tmp_path / "labels.jsonl").read_bytes() == before


def test_ctrl_c_writes_the_files_and_the_next_call_goes_on(tmp_path: Path) -> None:
    data = some_tasks(tmp_path)

    def behave(call: Call) -> Reply | None:
        if call.number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            return Reply(delay=30)
        return None

    with FakeTeacher(behave=behave) as server:
        with pytest.raises(KeyboardInterrupt):
            label(settings(data, server.url, label__concurrency=1))
        assert [row["origin_task_id"] for row in rows(tmp_path / "labels.jsonl")] == ["t0", "t1", "t2"]
    with FakeTeacher() as server:
        assert label(settings(data, server.url)).resumed == 3 and len(server.calls) == 3


def test_a_task_without_an_answer_is_asked_again_by_the_next_call(tmp_path: Path) -> None:
    data, bad = some_tasks(tmp_path, 3), [Reply(status=500)]
    with FakeTeacher(behave=lambda call: bad[0] if bad and call.task == "Write part 1." else None) as server:
        first = label(settings(data, server.url, endpoint__retries=0))
        assert (first.labelled, first.unanswered, first.rejected, first.complete) == (2, 1, 0, False)
        bad.clear()
        second = label(settings(data, server.url, endpoint__retries=0))
    assert (second.labelled, second.resumed, second.unanswered) == (1, 2, 0)
    assert ids(second) == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    ("harm", "asked"),
    [
        (lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2]], 1),  # killed within a write
        (lambda lines: [lines[0], b"\0\0\0\n", *lines[2:]], 1),  # after a power cut
        (lambda lines: [lines[0], b'{"provenance": null}\n', *lines[2:]], 1),
        (lambda lines: lines[:0], 3),
    ],
)
def test_a_damaged_journal_costs_only_the_damaged_rows(
    tmp_path: Path, harm: Callable[[list[bytes]], list[bytes]], asked: int
) -> None:
    data = some_tasks(tmp_path, 3)
    with FakeTeacher() as server:
        first = label(settings(data, server.url))
        journal = tmp_path / "labels.jsonl.journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b'"messages"' in line]
        journal.write_bytes(b"".join([line for line in lines if line not in kept] + harm(kept)))
        second = label(settings(data, server.url))
    assert len(server.calls) == 3 + asked and ids(second) == ["t0", "t1", "t2"]
    assert second.labelled == asked and first.output == second.output


def test_two_runs_on_one_output_refuse_each_other(tmp_path: Path) -> None:
    data, errors = some_tasks(tmp_path, 2), []

    def behave(call: Call) -> None:
        if call.number == 0:
            with pytest.raises(OutputError, match="another") as caught:
                label(settings(data, server.url))
            errors.append(str(caught.value))

    with FakeTeacher(behave=behave) as server:
        assert label(settings(data, server.url)).labelled == 2
    assert len(errors) == 1 and str(tmp_path / "labels.jsonl") in errors[0]


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 1)
    (tmp_path / "labels.jsonl").write_text("precious\n")
    with pytest.raises(OutputError, match="journal"):
        label(settings(data))
    assert (tmp_path / "labels.jsonl").read_text() == "precious\n"


def test_bad_lines_stop_before_anything_is_paid_or_are_recorded(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with data.open("a") as file:
        file.write('{"broken\n')
    with FakeTeacher() as server:
        with pytest.raises(InputError, match=r"tasks\.jsonl:3"):
            label(settings(data, server.url))
        assert not server.calls
        result = label(settings(data, server.url, label__skip_bad_lines=True))
    assert (result.labelled, result.skipped, result.complete) == (2, 1, False)
    [bad] = rows(tmp_path / "labels.jsonl.bad-lines.jsonl")
    assert (bad["file"], bad["line"]) == (str(data), 3) and '{"broken' in bad["text"] and bad["reason"]


def test_limit_labels_the_first_tasks_only(tmp_path: Path) -> None:
    with FakeTeacher() as server:
        result = label(settings(some_tasks(tmp_path), server.url, label__limit=2))
    assert ids(result) == ["t0", "t1"] and len(server.calls) == 2


def test_inputs_and_outputs_that_cannot_be_are_said(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 1)
    with pytest.raises(UsageError, match="--data"):
        label(settings(data, label__data=""))
    with pytest.raises(OutputError, match="folder"):
        label(settings(data, label__output=str(tmp_path)))
    with pytest.raises(OutputError, match="cannot be written"):
        label(settings(data, label__output=str(data / "labels.jsonl")))
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        label(settings(tmp_path / "missing.jsonl"))
    data.write_text("\n")
    with pytest.raises(InputError, match=r"tasks\.jsonl"):
        label(settings(data))


def test_standard_input_is_read_once_and_resumed(tmp_path: Path) -> None:
    verb = (
        "import sys; from router_cli.label import label; from router_cli.settings import load\n"
        "options = {'label.data': '-', 'label.output': sys.argv[1], 'label.teacher': 'recorded'}\n"
        "result = label(load({key: ('test', value) for key, value in options.items()}, environ={}))\n"
        "print(result.labelled, result.resumed, 'openai' in sys.modules)"
    )
    lines = "".join(
        json.dumps({"id": f"t{i}", "task": f"Write part {i}.", "decision": SINGLE}) + "\n" for i in range(3)
    )
    command = [sys.executable, "-c", verb, str(tmp_path / "labels.jsonl")]
    said = [subprocess.run(command, input=lines, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in said] == [["3", "0", "False"], ["0", "3", "False"]], said[0].stderr
