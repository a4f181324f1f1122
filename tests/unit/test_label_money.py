"""`label` and money: the estimate, its confirmation, votes, and what is never paid for twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from router_cli.cli import main
from router_cli.errors import BudgetReached, SettingsError, TeacherError, UsageError
from router_cli.label import estimate, label
from router_cli.progress import Silent
from router_cli.schema import Label
from router_cli.summaries.label import labelled
from tests.fake_teacher import Call, FakeTeacher, Reply, Storm, decision
from tests.unit.test_label import SINGLE, ids, rows, settings, some_tasks, write_tasks

CHAIN = decision("c", ["planner", "builder"])
VOTES = {"label__votes": 3, "label__temperature": 0.7}


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    warn = notice


def refuse(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


# -- the estimate and its confirmation --------------------------------------------------------------------------


def test_an_estimate_sends_nothing_and_writes_nothing(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 10)
    with FakeTeacher() as server:
        found = estimate(settings(data, server.url, label__votes=2, label__rpm=60, label__concurrency=1024))
        assert not server.calls
    assert list(tmp_path.iterdir()) == [data]
    assert (found.questions, found.pilot, found.seconds) == (20, 0, pytest.approx(20))
    assert 20 * 300 < found.prompt_tokens < 20 * 900 and found.cost_usd is not None and 0 < found.cost_usd < 0.1
    assert estimate(settings(data, label__limit=1)).seconds == 2  # no answer comes sooner
    assert "20 questions" in str(found) and found.tokenizer in str(found) and "about 20 s" in str(found)


def test_of_very_many_tasks_a_part_stands_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "tasks.jsonl"
    texts = [f"Sort list {i}, " + "then reverse it, " * (i % 7 + 20 * (i >= 40)) for i in range(240)]
    write_tasks(data, [{"task": text} for text in texts])
    whole = estimate(settings(data, "http://127.0.0.1:9/v1"))
    monkeypatch.setattr("router_cli.labelling.estimate.COUNTED_ALL", 40)
    monkeypatch.setattr("router_cli.labelling.estimate.EVERY", 5)
    part = estimate(settings(data, "http://127.0.0.1:9/v1"))
    assert part.questions == whole.questions == 240
    assert part.cost_usd == pytest.approx(whole.cost_usd, rel=0.01) and part.cost_usd != whole.cost_usd
    assert part.prompt_tokens == pytest.approx(whole.prompt_tokens, rel=0.01)


def test_a_pilot_corrects_the_estimate_of_the_rest_to_a_tenth_of_the_bill(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 60)
    storm = Storm(3, busy=0, down=0, reset=0, hung=0, cut=0, broken=0.2, invalid=0.1)
    with FakeTeacher(behave=storm) as server:
        before = estimate(settings(data, server.url))
        label(settings(data, server.url, label__limit=20))
        after = estimate(settings(data, server.url))
        paid = server.cost
        result = label(settings(data, server.url))
        bill = server.cost - paid
    assert before.cost_usd is not None and after.cost_usd is not None and after.pilot == 20
    assert result.usage.cost_usd == pytest.approx(bill) and result.estimate == after
    assert abs(after.cost_usd - bill) < min(0.1 * bill, abs(before.cost_usd * 40 / 60 - bill))
    assert "earlier answers" in str(after) and "estimate" in str(labelled(result)[0])


def test_a_bill_above_the_bound_is_confirmed_first(tmp_path: Path) -> None:
    data, asked = some_tasks(tmp_path, 3), []

    def confirm(question: str) -> bool:
        asked.append(question)
        return len(asked) > 1

    with FakeTeacher() as server:
        low = settings(data, server.url, label__confirm_above=0.001)
        with pytest.raises(UsageError, match="--yes"):
            label(low, confirm=confirm)
        assert not server.calls and not (tmp_path / "labels.jsonl").exists()
        assert label(low, confirm=confirm).labelled == 3 and len(asked) == 2 and "$" in asked[0]
        assert label(low, confirm=refuse).resumed == 3, "the finished file costs nothing"
    data = some_tasks(tmp_path, 20)
    with FakeTeacher() as server:
        cents = {"label__confirm_above": 0.02, "label__output": str(tmp_path / "other.jsonl")}
        with pytest.raises(UsageError):
            label(settings(data, server.url, **cents), confirm=lambda question: False)
        assert label(settings(data, server.url, label__max_cost=0.0199, **cents), confirm=refuse).stopped
        assert label(settings(data, server.url, label__yes=True, **cents), confirm=refuse).complete


def test_an_unknown_price_is_said_and_counts_as_above_every_bound(tmp_path: Path) -> None:
    data, heard = some_tasks(tmp_path, 2), Heard()
    unknown = {"label__model": "nobody-knows-it", "endpoint__api_key": "k"}
    with FakeTeacher() as server:
        assert label(settings(data, server.url, **unknown), heard, refuse).labelled == 2  # this machine sends no bill
    assert any("price unknown" in line for line in heard.said)
    with pytest.raises(UsageError, match="cannot be foreseen"):
        other = str(tmp_path / "other.jsonl")
        label(settings(data, "http://203.0.113.1/v1", label__output=other, **unknown), confirm=lambda question: False)


def test_offline_teachers_are_never_confirmed(tmp_path: Path) -> None:
    result = label(settings(some_tasks(tmp_path, 2), label__confirm_above=0), confirm=refuse)
    assert result.estimate is None and result.rejected == 2


def test_off_a_terminal_the_command_line_needs_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = some_tasks(tmp_path, 3)
    with FakeTeacher() as server:
        command = ["label", "--data", str(data), "--output", str(tmp_path / "l.jsonl"), "--base-url", server.url]
        command += ["--confirm-above", "0.001"]
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.splitlines()[-1].startswith("error: ") and "--yes" in said.err
        assert main([*command, "--dry-run"]) == 0
        assert "3 questions" in capsys.readouterr().out and not server.calls
        assert main([*command, "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["questions"] == 3
        assert main([*command, "--yes"]) == 0
        said = capsys.readouterr()
    assert "3 questions" in said.err and "estimate $" in said.out and "bill $" in said.out
    assert "prompt tokens as counted by" in said.out


def test_standard_input_cannot_be_estimated(tmp_path: Path) -> None:
    data = settings(Path("-"), "http://203.0.113.1/v1", label__output=str(tmp_path / "l"), endpoint__api_key="k")
    with pytest.raises(UsageError, match="read only once"):
        estimate(data)
    with pytest.raises(UsageError, match="cannot be foreseen"):
        label(data, confirm=lambda question: False)


def at_a_terminal(answer: bytes, command: list[str]) -> tuple[int, str]:
    """Run the program on a terminal, type `answer` once it has asked; its exit code and what stood there."""
    main_end, own_end = os.openpty()
    process = subprocess.Popen(command, stdin=own_end, stdout=own_end, stderr=own_end)
    os.close(own_end)
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that a terminal was left
        while part := os.read(main_end, 4096):
            said += part
            if b"[y/N]" in part:
                os.write(main_end, answer)
    os.close(main_end)
    return process.wait(), said.decode()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="terminals of Unix")
def test_on_a_terminal_the_user_is_asked(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 3)
    with FakeTeacher() as server:
        command = [sys.executable, "-m", "router_cli", "label", "--data", str(data), "--base-url", server.url]
        command += ["--output", str(tmp_path / "l.jsonl"), "--confirm-above", "0.001"]
        code, said = at_a_terminal(b"n\n", command)
        assert code == 2 and "Go on? [y/N]" in said and "$0.00" in said and not server.calls
        code, said = at_a_terminal(b"y\n", command)
        assert code == 0 and "3 labels" in said and len(server.calls) == 3


# -- the endpoint -----------------------------------------------------------------------------------------------


def test_what_an_endpoint_refuses_is_asked_once_for_a_file_and_its_continuations(tmp_path: Path) -> None:
    data, said = some_tasks(tmp_path, 3), Heard()

    def refuse(call: Call) -> Reply | None:
        for name in ("response_format", "max_tokens", "temperature"):
            if name in call.body:
                return Reply(status=400, error={"message": f"{name} is not supported", "param": name})
        return None

    with FakeTeacher(behave=refuse) as server:
        label(settings(data, server.url, label__limit=2, label__concurrency=1))
        assert len(server.calls) > 4
        before = len(server.calls)
        label(settings(data, server.url), said)
        assert len(server.calls) == before + 1 and len(said.said) == 2 and "an earlier run" in said.said[1]
        label(settings(data, server.url, label__model="gpt-4o-mini"))
        assert len(server.calls) > before + 6  # another model may take more
        journal = next(tmp_path.glob("*.journal.jsonl"))
        journal.write_text(journal.read_text().replace('"dropped": ["temperature"]', '"dropped": 7'))
        chosen = {"label__model": "gpt-4o-mini", "label__strategy": "prefer-teams"}
        assert label(settings(data, server.url, **chosen)).labelled == 3


# -- the cap ----------------------------------------------------------------------------------------------------


def test_a_reached_budget_keeps_everything_and_a_larger_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = some_tasks(tmp_path, 12)
    with FakeTeacher() as server:
        first = label(settings(data, server.url, label__max_cost=0.025))
        spent = server.cost
        assert first.stopped is not None and "--max-cost" in first.stopped and not first.complete
        assert 0 < first.labelled < 12 and first.labelled + first.unanswered == 12 and spent <= 0.025
        assert len(rows(first.output)) == first.labelled == len(server.ledger)
        command = ["label", "--data", str(data), "--output", str(first.output), "--base-url", server.url]
        assert main([*command, "--concurrency", "4", "--max-cost", "0.017"]) == 3
        assert "--max-cost" in capsys.readouterr().out
        second = label(settings(data, server.url))
    assert second.stopped is None and second.complete and set(server.answered().values()) == {1}


def test_a_budget_holds_over_all_calls_of_an_output(tmp_path: Path) -> None:
    """Also over what earlier calls paid without a label, or for answers that got lost."""
    data, cap = some_tasks(tmp_path, 12), 0.05
    bad = {"Write part 1.": Reply(drop=True), "Write part 2.": Reply(content="{}")}
    chosen = {"label__max_cost": cap, "endpoint__retries": 0, "label__concurrency": 1, "label__reask": 0}
    stopped = []
    with FakeTeacher(behave=lambda call: bad.get(call.task), bill_lost=True) as server:
        for limit in (1, 2, 4, 12, 12, 12):
            with contextlib.suppress(BudgetReached):
                stopped.append(label(settings(data, server.url, label__limit=limit, **chosen)).stopped)
            assert server.cost <= cap
        count = len(server.calls)
        assert not any(stopped[:2]) and "by earlier calls" in str(stopped[-1])
        last = label(settings(data, server.url, label__limit=12, **{**chosen, "label__max_cost": 1.0}))
    assert count < 12 and not last.stopped and len(server.calls) > count


def test_answers_on_their_way_at_a_reached_budget_are_kept(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(
        data, [{"id": "a", "task": "Sort it."}, {"id": "b", "task": "Sort it. " * 9000}]
    )  # the second costs too much
    with FakeTeacher(delay=0.5) as server:
        result = label(settings(data, server.url, label__max_cost=0.03))
    assert (result.labelled, result.unanswered, ids(result)) == (1, 1, ["a"]) and result.stopped


def test_an_invalid_answer_that_the_budget_leaves_alone_is_on_the_bill(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with FakeTeacher(behave=lambda call: None if call.task == "Write part 0." else Reply("{}")) as server:
        found = label(settings(data, server.url, label__max_cost=0.025, label__reask=9, label__concurrency=1))
    assert found.stopped and (found.labelled, found.unanswered) == (1, 1)
    # One answer for the label, and all that were paid for without one.
    assert found.usage.attempts == len(server.calls) > 2 and found.usage.cost_usd == pytest.approx(server.cost)
    assert found.astray_usd == pytest.approx(0)


def test_a_budget_for_not_one_question_leaves_an_older_output_alone(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with FakeTeacher() as server:
        before = label(settings(data, server.url)).output.read_bytes()
        with pytest.raises(BudgetReached):
            label(settings(data, server.url, label__max_cost=0.0001, label__strategy="prefer-teams"))
    assert (tmp_path / "labels.jsonl").read_bytes() == before and len(server.calls) == 2


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_no_random_budget_is_passed_by_the_servers_own_ledger(tmp_path: Path, count: int) -> None:
    data, drawn = some_tasks(tmp_path, 6), random.Random(5)
    storm = Storm(5, busy=0, down=0.1, hung=0, broken=0.2)
    reached = 0
    for number in range(count):
        cap = drawn.uniform(0.0, 0.08)
        chosen = {"label__max_cost": cap, "label__output": str(tmp_path / f"{number}.jsonl"), "endpoint__retries": 0}
        with FakeTeacher(behave=storm, bill_lost=True) as server:
            try:
                reached += label(settings(data, server.url, **chosen)).stopped is not None
            except TeacherError as error:
                reached += isinstance(error, BudgetReached)
            assert server.cost <= cap + 1e-9, f"budget {number}: {server.cost} of {cap}"
    assert count // 5 < reached < count


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(status=401), "refuses the API key"),
        (Reply(status=429, error={"message": "pay", "code": "insufficient_quota"}), "no quota left"),
        (Reply(status=404), "does not know the model"),
        (None, "cannot be reached"),
    ],
)
def test_a_final_refusal_is_one_line_and_nothing_is_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply | None, said: str
) -> None:
    data, output = some_tasks(tmp_path, 3), tmp_path / "labels.jsonl"
    before = label(settings(data)).rejected_path.read_bytes()
    with FakeTeacher(behave=lambda call: reply) as server:
        url = server.url if reply else "http://127.0.0.1:9/v1"
        command = ["label", "--data", str(data), "--output", str(output), "--base-url", url, "--retries", "0"]
        assert main(command) == 1
        assert len(server.calls) <= 16
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and shown.out == ""
    assert output.read_bytes() == b"" and (tmp_path / "labels.jsonl.rejected.jsonl").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits are Unix's")
def test_a_disk_that_fills_up_keeps_what_was_paid_for(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 20)
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from router_cli.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with FakeTeacher() as server:
        command = ["label", "--data", str(data), "--output", str(tmp_path / "labels.jsonl"), "--base-url", server.url]
        full = subprocess.run([sys.executable, "-B", "-c", script, *command, "--concurrency", "2"], capture_output=True)
        lines = full.stderr.decode().splitlines()
        assert full.returncode == 1 and lines[-1].startswith("error: ") and "cannot be written" in lines[-1], lines
        whole = (tmp_path / "labels.jsonl.journal.jsonl").read_text().rpartition("\n")[0]
        kept, paid = whole.count('"messages"'), len(server.ledger)
        assert 4 < kept <= paid <= kept + 2, "answers on their way are all that is lost"
        result = label(settings(data, server.url))
    assert result.labelled + result.resumed == 20 and len(server.ledger) == 20 + paid - kept


# -- votes ------------------------------------------------------------------------------------------------------


def two_against_one(call: Call) -> Reply | None:
    return Reply(CHAIN if call.body.get("seed", 0) == 1 else json.dumps(SINGLE))


def test_votes_are_kept_one_by_one_and_counted(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with FakeTeacher(behave=two_against_one) as server:
        result = label(settings(data, server.url, **VOTES))
    made = [Label.model_validate_json(line) for line in result.output.read_text().splitlines()]
    assert [row.decision.topology for row in made] == ["single", "single"] and result.split_votes == 2
    assert all(
        row.provenance and sorted(map(str, row.provenance.votes)) == ["chain", "single", "single"] for row in made
    )
    assert all(row.provenance and row.provenance.agreement == pytest.approx(2 / 3) for row in made)
    assert len(server.calls) == 6 == sum("messages" in row for row in rows(tmp_path / "labels.jsonl.journal.jsonl"))
    assert result.usage.cost_usd == result.usage_all.cost_usd == pytest.approx(server.cost)
    assert len({json.dumps([call.task, call.body.get("seed", 0)]) for call in server.calls}) == 6


def test_more_votes_pay_only_for_those_that_are_new(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 2)
    with FakeTeacher(behave=two_against_one) as server:
        one = label(settings(data, server.url, label__temperature=0.7))
        before = one.output.read_bytes()
        three = label(settings(data, server.url, **VOTES))
        assert len(server.calls) == 6 and three.estimate is not None and three.estimate.questions == 4
        assert label(settings(data, server.url, label__temperature=0.7)).output.read_bytes() == before
    assert len(server.calls) == 6


def test_a_task_that_lacks_a_vote_has_no_row_yet(tmp_path: Path) -> None:
    data, bad = some_tasks(tmp_path, 2), [True]

    def behave(call: Call) -> Reply | None:
        down = bad and call.task == "Write part 1." and call.body.get("seed", 0) == 2
        return Reply(status=500) if down else two_against_one(call)

    with FakeTeacher(behave=behave) as server:
        first = label(settings(data, server.url, endpoint__retries=0, **VOTES))
        assert (ids(first), first.unanswered, len(server.ledger)) == (["t0"], 1, 5)
        bad.clear()
        second = label(settings(data, server.url, endpoint__retries=0, **VOTES))
    assert ids(second) == ["t0", "t1"] and len(server.ledger) == 6


def test_a_tie_is_rejected_or_broken_without_a_new_question(tmp_path: Path) -> None:
    data, two = some_tasks(tmp_path, 1), {"label__votes": 2, "label__temperature": 0.7}
    with FakeTeacher(behave=two_against_one) as server:
        tied = label(settings(data, server.url, **two))
        [row] = rows(tied.rejected_path)
        assert row["violations"][0].startswith("tie: ") and (tied.labelled, tied.rejected) == (0, 1)
        first = label(settings(data, server.url, label__tie="first", **two))
    assert first.labelled + first.resumed == 1 and len(server.calls) == 2 and not tied.rejected_path.exists()


def test_votes_at_temperature_0_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="temperature 0"):
        label(settings(some_tasks(tmp_path, 1), "http://localhost:1/v1", label__votes=3, label__temperature=0))


# -- never twice ------------------------------------------------------------------------------------------------


def test_a_renamed_reordered_file_with_one_task_more_pays_for_that_one(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 4)
    with FakeTeacher() as server:
        label(settings(data, server.url))
        write_tasks(data, [{"id": f"n{i}", "task": f"Write part {i}."} for i in (4, 2, 1, 3, 0)])
        result = label(settings(data, server.url))
    assert [call.task for call in server.calls[4:]] == ["Write part 4."] and (result.labelled, result.resumed) == (1, 4)
    assert ids(result) == ["n4", "n2", "n1", "n3", "n0"]


def test_one_text_under_two_ids_is_asked_once_and_booked_once(tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    write_tasks(
        data, [{"id": "a", "task": "one"}, {"id": "b", "task": "one", "split": "test"}, {"id": "a", "task": "one"}]
    )
    with FakeTeacher() as server:
        result = label(settings(data, server.url))
        assert result.estimate is not None and result.estimate.questions == len(server.calls) == 1
    assert [(row["origin_task_id"], row["split"]) for row in rows(result.output)] == [("a", None), ("b", "test")]
    assert result.usage_all.cost_usd == result.usage.cost_usd == pytest.approx(server.cost)


def test_only_the_rejected_are_asked_again_and_with_another_seed(tmp_path: Path) -> None:
    data, bad = some_tasks(tmp_path, 3), [True]
    behave = lambda call: Reply("no") if bad and call.task == "Write part 1." else None  # noqa: E731
    with FakeTeacher(behave=behave) as server:
        first = label(settings(data, server.url, label__reask=0, label__limit=2))
        assert (first.labelled, first.rejected) == (1, 1)
        bad.clear()
        second = label(settings(data, server.url, label__reask=0, label__retry_rejected=True))
        assert [call.task for call in server.calls[2:]] == ["Write part 1."] and server.calls[2].body["seed"] == 1
        assert (second.labelled, second.resumed, second.rejected, second.unanswered) == (1, 1, 0, 1)
        assert not second.rejected_path.exists() and ids(second) == ["t0", "t1"]
        again = label(settings(data, server.url, label__reask=0, label__retry_rejected=True))
    assert len(server.calls) == 3 and (again.resumed, again.unanswered) == (2, 1)


def test_a_rejection_stands_until_there_is_another_answer(tmp_path: Path) -> None:
    data, down = some_tasks(tmp_path, 2), []
    behave = lambda call: Reply(status=500) if down else Reply("no") if call.task == "Write part 1." else None  # noqa: E731
    with FakeTeacher(behave=behave) as server:
        before = label(settings(data, server.url, label__reask=0)).rejected_path.read_bytes()
        down.append(True)
        chosen = {"label__reask": 0, "label__retry_rejected": True, "endpoint__retries": 0}
        result = label(settings(data, server.url, **chosen))
    assert len(server.calls) == 3 and result.rejected == 1 and result.rejected_path.read_bytes() == before


def test_of_votes_only_the_useless_are_asked_again(tmp_path: Path) -> None:
    data, bad = some_tasks(tmp_path, 1), [True]
    with FakeTeacher(behave=lambda call: Reply("no") if bad else None) as server:
        label(settings(data, server.url, label__reask=0, **VOTES))
        bad.clear()
        result = label(settings(data, server.url, label__reask=0, label__retry_rejected=True, **VOTES))
    assert result.labelled == 1 and sorted(call.body["seed"] for call in server.calls[3:]) == [3, 4, 5]


def test_what_a_killed_run_may_have_lost_is_named_once(tmp_path: Path) -> None:
    data, heard = some_tasks(tmp_path, 3), Heard()
    with FakeTeacher() as server:
        label(settings(data, server.url, label__limit=2))
        journal = tmp_path / "labels.jsonl.journal.jsonl"
        key = rows(journal)[-1]["provenance"]["key"]
        with journal.open("a") as file:
            file.write(json.dumps({"asks": key, "sample": 0, "id": "t1"}) + "\n")
        result = label(settings(data, server.url), heard)
        assert any("t1" in line and "may have been paid" in line for line in heard.said) and result.lost == 1
        heard.said.clear()
        assert label(settings(data, server.url), heard).lost == 0
    assert not any("may have been paid" in line for line in heard.said)


def test_a_slow_standard_input_does_not_hold_up_answers(tmp_path: Path) -> None:
    verb = (
        "import sys; from router_cli.label import label; from router_cli.settings import load\n"
        "options = {'label.data': '-', 'label.output': sys.argv[1], 'endpoint.base_url': sys.argv[2], "
        "'endpoint.timeout': 5, 'endpoint.retries': 0}\n"
        "result = label(load({key: ('test', value) for key, value in options.items()}, environ={}))\n"
        "print(result.labelled, result.unanswered)"
    )
    with FakeTeacher() as server:
        command = [sys.executable, "-c", verb, str(tmp_path / "labels.jsonl"), server.url]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write('{"task": "Write part 0."}\n')
        process.stdin.flush()
        journal = tmp_path / "labels.jsonl.journal.jsonl"
        # The row stands in the journal while the input is still open.
        for _ in range(1200):
            if process.poll() is not None or (journal.exists() and '"messages"' in journal.read_text()):
                break
            time.sleep(0.05)
        early = '"messages"' in journal.read_text()
        process.stdin.write('{"task": "Write part 1."}\n')
        process.stdin.close()
        said = process.stdout.read()
        process.stdout.close()
    assert process.wait() == 0 and said.split() == ["2", "0"] and early


def test_prices_go_in_pairs_and_a_cap_needs_them(tmp_path: Path) -> None:
    data = some_tasks(tmp_path, 1)
    with pytest.raises(SettingsError, match="--price-out"):
        label(settings(data, "http://localhost:1/v1", label__price_in=1))
