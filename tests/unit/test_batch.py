"""`label --batch`: half the price, nothing lost, nothing asked twice, through a server that keeps OpenAI's rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from router_cli.errors import BudgetReached, CredentialsError, OutputError, TeacherError, UsageError
from router_cli.label import LabelResult, estimate, label
from router_cli.labelling import batching
from router_cli.labelling.worklist import Question, Worklist
from router_cli.progress import SILENT
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.tasks import read_tasks
from router_cli.teachers import Answer, make_teacher
from tests.fake_batch import EXPIRED, FakeBatches
from tests.fake_teacher import Call, FakeTeacher, Reply


def settings(folder: Path, url: str, count: int = 6, **values: Any) -> Settings:
    data = folder / "tasks.jsonl"
    data.write_text("".join(json.dumps({"id": f"t{i}", "task": f"Write part {i}."}) + "\n" for i in range(count)))
    chosen = {"label.data": str(data), "label.output": str(folder / "labels.jsonl"), "endpoint.base_url": url}
    chosen |= {"label.batch": True, "label.batch_poll": 0.01, "endpoint.retries": 3}
    chosen |= {key.replace("__", "."): value for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def ids(result: LabelResult) -> list[str]:
    return [row["origin_task_id"] for row in rows(result.output)]


def once(server: FakeBatches) -> bool:
    """Whether no task was paid for twice."""
    return set(server.paid.values()) <= {1}


class Said:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def bar(self, title: str, total: int | None, done: int = 0) -> Any:
        return SILENT.bar(title, total, done)

    def notice(self, text: str) -> None:
        self.lines.append(text)

    warn = notice

    def __contains__(self, words: str) -> bool:
        return any(words in line for line in self.lines)


# -- what comes out -------------------------------------------------------------------------------------------


def test_a_batch_makes_the_rows_of_an_online_run_for_half_the_money(tmp_path: Path) -> None:
    for name in ("batch", "online"):
        (tmp_path / name).mkdir()
    with FakeBatches() as server:
        result = label(settings(tmp_path / "batch", server.url))
    with FakeTeacher() as teacher:
        online = label(settings(tmp_path / "online", teacher.url, label__batch=False))
    mine, theirs = rows(result.output), rows(online.output)
    assert [row["provenance"].pop("usage")["cost_usd"] for row in mine] == [pytest.approx(0.0007)] * 6
    assert [row["provenance"].pop("usage")["cost_usd"] for row in theirs] == [pytest.approx(0.0014)] * 6
    assert mine == theirs and result.complete and once(server)
    assert result.usage.cost_usd == pytest.approx(server.cost) and result.requests == 6
    assert not list((tmp_path / "batch").glob(".*part"))


def test_a_finished_file_asks_for_nothing_by_either_way(tmp_path: Path) -> None:
    with FakeBatches() as server:
        label(settings(tmp_path, server.url))
        steps = len(server.steps)
        again = label(settings(tmp_path, server.url))
        assert len(server.steps) == steps
    with FakeTeacher() as teacher:
        online = label(settings(tmp_path, teacher.url, label__batch=False))
        assert teacher.calls == []
    assert again.resumed == online.resumed == 6


def test_uploads_stay_below_the_limits_of_requests_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeBatches(most_requests=4) as server:
        assert label(settings(tmp_path, server.url, 10, label__batch_size=4)).complete
        assert [len(batch.lines) for batch in server.batches.values()] == [4, 4, 2]
    size = len(next(iter(server.files.values()))) // 4
    (tmp_path / "bytes").mkdir()
    monkeypatch.setattr("router_cli.labelling.batching.MOST_BYTES", 3 * size + 50)  # the real one takes 200 MB to reach
    with FakeBatches(most_bytes=3 * size + 50) as server:
        assert label(settings(tmp_path / "bytes", server.url, 10)).complete
        assert len(server.batches) == 4


def test_the_estimate_is_at_the_batch_rate(tmp_path: Path) -> None:
    batch = estimate(settings(tmp_path, "http://127.0.0.1:1/v1"))
    online = estimate(settings(tmp_path, "http://127.0.0.1:1/v1", label__batch=False))
    own = estimate(settings(tmp_path, "http://127.0.0.1:1/v1", label__price_in=2.5, label__price_out=10))
    assert batch.cost_usd is not None and online.cost_usd == pytest.approx(2 * batch.cost_usd)
    assert own.cost_usd == pytest.approx(batch.cost_usd)


def test_a_pilot_that_was_asked_online_does_not_double_the_estimate(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 800, "completion_tokens": 80}
    with FakeTeacher(behave=lambda call: Reply(usage=usage)) as teacher:
        label(settings(tmp_path, teacher.url, 20, label__batch=False, label__limit=10))
        found = estimate(settings(tmp_path, teacher.url, 20))
    assert (found.questions, found.pilot) == (10, 10) and "within a day" in str(found)
    assert found.cost_usd == pytest.approx(10 * 0.0014)


def test_invalid_answers_are_asked_again_in_the_next_batch_and_then_rejected(tmp_path: Path) -> None:
    def behave(call: Call) -> Reply | None:
        if call.task == "Write part 2.":
            return Reply('{"topology": "ring"}')
        return Reply("no", finish_reason="length") if call.task == "Write part 3." and len(sizes) < 1 else None

    sizes: list[int] = []
    with FakeBatches(behave=behave, watch=lambda step: sizes.append(1) if step == "download" else None) as server:
        result = label(settings(tmp_path, server.url))
    assert [len(batch.lines) for batch in server.batches.values()] == [6, 2, 1]
    *_, last = server.batches.values()
    said = [message["content"] for message in last.lines[0]["body"]["messages"]]
    assert '{"topology": "ring"}' in said and "not valid" in said[-1]
    [row] = rows(result.rejected_path)
    assert row["origin_task_id"] == "t2" and row["provenance"]["usage"]["attempts"] == 3
    assert len(rows(result.output)) == 5
    assert result.usage_all.cost_usd == pytest.approx(server.cost) == pytest.approx(9 * 0.0007)


def test_votes_are_asked_for_in_one_batch(tmp_path: Path) -> None:
    with FakeBatches() as server:
        result = label(settings(tmp_path, server.url, label__votes=3))
    assert set(server.paid.values()) == {3} and len(server.batches) == 1
    assert rows(result.output)[0]["provenance"]["agreement"] == 1.0


def test_rejected_tasks_are_asked_again_when_wanted(tmp_path: Path) -> None:
    with FakeBatches(behave=lambda call: Reply("no") if call.task == "Write part 1." else None) as server:
        assert label(settings(tmp_path, server.url, label__reask=0)).rejected == 1
    with FakeBatches() as server:
        result = label(settings(tmp_path, server.url, label__reask=0, label__retry_rejected=True))
    assert result.complete and server.paid == {"Write part 1.": 1}


def test_the_same_task_twice_is_one_request(tmp_path: Path) -> None:
    with FakeBatches() as server:
        wanted = settings(tmp_path, server.url)
        data = tmp_path / "tasks.jsonl"
        data.write_text(data.read_text() * 2)
        label(wanted)
    assert once(server)


# -- what goes wrong ------------------------------------------------------------------------------------------


def test_expired_requests_are_handed_over_again_and_cost_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    def behave(call: Call) -> Reply | None:
        asked.append(call.task)
        return EXPIRED if call.task.endswith(("4.", "5.")) and asked.count(call.task) == 1 else None

    with FakeBatches(behave=behave) as server:
        result = label(settings(tmp_path, server.url))
    assert [len(batch.lines) for batch in server.batches.values()] == [6, 2]
    assert next(iter(server.batches.values())).shown["status"] == "expired"
    assert ids(result) == [f"t{i}" for i in range(6)] and once(server)


def test_a_request_without_an_answer_again_and_again_is_left_for_the_next_run(tmp_path: Path) -> None:
    broken = True

    def behave(call: Call) -> Reply | None:
        return Reply(status=500) if broken and call.task == "Write part 1." else None

    with FakeBatches(behave=behave) as server:
        first = label(settings(tmp_path, server.url, endpoint__retries=1))
        assert (first.labelled, first.unanswered, len(server.batches)) == (5, 1, 2)
        broken = False
        second = label(settings(tmp_path, server.url, endpoint__retries=1))
    assert second.complete and once(server)


def test_what_the_model_does_not_take_is_left_off_in_the_next_batch(tmp_path: Path) -> None:
    def behave(call: Call) -> Reply | None:
        for name in ("temperature", "max_tokens"):
            if name in call.body:
                return Reply(status=400, error={"message": f"Unsupported parameter: {name}", "param": name})
        return None

    with FakeBatches(behave=behave) as server:
        result = label(settings(tmp_path, server.url))
    assert result.complete and once(server)
    *_, last = server.batches.values()
    assert "max_completion_tokens" in last.lines[0]["body"] and "temperature" not in last.lines[0]["body"]


def test_a_task_that_the_endpoint_will_not_take_is_rejected_at_once(tmp_path: Path) -> None:
    error = {"message": "This model's maximum context length is 10 tokens", "code": "context_length_exceeded"}
    with FakeBatches(
        behave=lambda call: Reply(status=400, error=error) if call.task == "Write part 1." else None
    ) as server:
        result = label(settings(tmp_path, server.url))
    [row] = rows(result.rejected_path)
    assert row["violations"][0].startswith("request_refused") and len(server.batches) == 1


def test_a_batch_of_refusals_ends_the_run_with_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    error = {"message": "The model `gpt-4o` does not exist", "code": "model_not_found"}
    with FakeBatches(behave=lambda call: Reply(status=404, error=error)) as server:
        with pytest.raises(TeacherError, match="does not know the model gpt-4o"):
            label(settings(tmp_path, server.url))
        assert len(server.batches) == 1
    with FakeBatches() as server:
        assert label(settings(tmp_path, server.url)).complete


def test_a_batch_that_fails_validation_is_shown_in_the_providers_words(tmp_path: Path) -> None:
    with FakeBatches(most_requests=3) as server, pytest.raises(TeacherError, match="more than 3 requests") as caught:
        label(settings(tmp_path, server.url))
    assert "\n" not in str(caught.value)
    with FakeBatches(most_requests=3) as server:
        assert label(settings(tmp_path, server.url, label__batch_size=3)).complete


def test_a_full_queue_makes_batches_smaller_and_waits_for_those_under_way(tmp_path: Path) -> None:
    said = Said()
    with FakeBatches(enqueued=4) as server:
        result = label(settings(tmp_path, server.url, 12), said)
    assert result.complete and once(server) and "at most 6 requests" in said and "at most 3 requests" in said


def test_a_queue_too_full_for_one_request_is_said_in_the_providers_words(tmp_path: Path) -> None:
    with FakeBatches(enqueued=0) as server, pytest.raises(TeacherError, match="Enqueued token limit"):
        label(settings(tmp_path, server.url))


def test_an_endpoint_without_batches_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    words = r"has no Batch API .*: label without --batch"
    with FakeBatches(watch=lambda step: Reply(status=404)) as server, pytest.raises(TeacherError, match=words):
        label(settings(tmp_path, server.url))
    with FakeTeacher() as teacher:
        assert label(settings(tmp_path, teacher.url, label__batch=False)).complete


def test_a_refused_key_ends_at_once_and_stands_in_no_file(tmp_path: Path) -> None:
    key = "sk-secret-0123456789abcdef"
    error = {"message": f"Incorrect API key provided: {key}"}
    with FakeBatches(watch=lambda step: Reply(status=401, error=error)) as server:
        with pytest.raises(CredentialsError) as caught:
            label(settings(tmp_path, server.url, endpoint__api_key=key))
        assert server.steps == ["upload"]
    with FakeBatches() as server:
        label(settings(tmp_path, server.url, endpoint__api_key=key))
        assert server.headers[0]["authorization"] == f"Bearer {key}"
    assert key not in str(caught.value)
    assert [path for path in tmp_path.iterdir() if key.encode() in path.read_bytes()] == []


def test_failures_that_pass_are_tried_again_and_no_batch_is_made_twice(tmp_path: Path) -> None:
    failed: set[str] = set()

    def watch(step: str) -> Reply | None:
        if step in failed:
            return None
        failed.add(step)  # each step fails once; "created" and "uploaded" lose the answer to what was done
        return Reply(status=503) if len(failed) % 2 else Reply(drop=True)

    with FakeBatches(watch=watch) as server:
        assert label(settings(tmp_path, server.url)).complete
    assert failed == {"upload", "uploaded", "create", "created", "list", "poll", "download"}
    assert once(server) and len(server.batches) == 1


def test_a_provider_that_keeps_failing_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    down = {"created", "list"}
    with FakeBatches(watch=lambda step: Reply(status=503) if step in down else None) as server:
        with pytest.raises(TeacherError, match="keeps failing"):
            label(settings(tmp_path, server.url, endpoint__retries=1))
        down.clear()
        assert label(settings(tmp_path, server.url)).complete
        assert once(server) and len(server.batches) == 1


def test_a_cancelled_batch_hands_nothing_more_over_in_this_run(tmp_path: Path) -> None:
    said = Said()

    def watch(step: str) -> Reply | None:
        if step == "poll" and server.steps.count("poll") == 2:
            server.cancel(next(iter(server.batches)))
        return None

    with FakeBatches(watch=watch) as server:
        first = label(settings(tmp_path, server.url), said)
        assert (first.labelled, first.unanswered, len(server.batches)) == (3, 3, 1) and "was cancelled" in said
        second = label(settings(tmp_path, server.url))
    assert (second.labelled, second.resumed) == (3, 3) and once(server)


def test_a_damaged_line_of_answers_is_asked_for_again(tmp_path: Path) -> None:
    def watch(step: str) -> Reply | None:
        if step == "download" and len(server.batches) == 1:
            name = next(iter(server.batches.values())).shown["output_file_id"]
            server.files[name] = server.files[name].replace(b'"custom_id"', b'"custom_di"', 1)
        return None

    with FakeBatches(watch=watch) as server:
        result = label(settings(tmp_path, server.url))
    assert result.complete and len(server.batches) == 2
    with contextlib.closing(sqlite3.connect(tmp_path / "labels.jsonl.batches.sqlite")) as record:
        [[booked]] = record.execute("SELECT total(cost) FROM batches").fetchall()
    assert booked >= server.cost, "the provider charged for the damaged line, and a cap has to know"


def test_answers_that_the_provider_no_longer_has_are_said_so(tmp_path: Path) -> None:
    gone = FakeBatches(watch=lambda step: server.files.clear() if step == "download" else None)
    with gone as server, pytest.raises(TeacherError, match="does not know the file"):
        label(settings(tmp_path, server.url))


def test_a_damaged_record_of_batches_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl.batches.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match=r"labels\.jsonl\.batches\.sqlite: .*not a database"):
        label(settings(tmp_path, "http://127.0.0.1:1/v1"))


# -- what goes on ---------------------------------------------------------------------------------------------


def test_without_waiting_the_same_command_collects(tmp_path: Path) -> None:
    said = Said()
    with FakeBatches(still=True) as server:
        first = label(settings(tmp_path, server.url, label__wait=False), said)
        assert (first.labelled, first.unanswered) == (0, 6) and "6 requests wait in 1 batch" in said
        again = label(settings(tmp_path, server.url, label__wait=False))
        assert again.unanswered == 6 and len(server.batches) == 1
        assert again.estimate is not None and again.estimate.questions == 0
        server.still = False
        assert label(settings(tmp_path, server.url)).complete
    assert once(server)


def test_batches_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    said = Said()
    with FakeBatches(still=True) as server:
        label(settings(tmp_path, server.url, label__wait=False))
        server.still = False
        other = label(settings(tmp_path, server.url, label__strategy="prefer-single"), said)
        assert other.complete and len(server.batches) == 2 and "batches of other settings are left alone (1)" in said
        polled = server.steps.count("poll")
        first = label(settings(tmp_path, server.url))
        assert first.complete and server.steps.count("poll") > polled
    assert len(server.batches) == 2 and {row["provenance"]["strategy"] for row in rows(first.output)} == {"balanced"}


def test_an_online_run_does_not_pay_for_what_a_batch_is_answering(tmp_path: Path) -> None:
    with FakeBatches(still=True) as server:
        label(settings(tmp_path, server.url, label__wait=False))
        with (
            FakeTeacher() as teacher,
            pytest.raises(UsageError, match=r"batches of these settings are under way \(1\)"),
        ):
            label(settings(tmp_path, teacher.url, label__batch=False))
        assert teacher.calls == []


def test_a_task_added_while_a_batch_is_under_way_goes_into_the_next(tmp_path: Path) -> None:
    with FakeBatches(still=True) as server:
        label(settings(tmp_path, server.url, label__wait=False))
        label(settings(tmp_path, server.url, 8, label__wait=False))
        assert [json.loads(line)["custom_id"] for line in server.files["file-3"].splitlines()].__len__() == 2
        server.still = False
        assert label(settings(tmp_path, server.url, 8)).complete
    assert once(server)


def test_batches_need_a_paid_teacher_and_files(tmp_path: Path) -> None:
    for values in ({"label__teacher": "heuristic"}, {"label__data": "-"}):
        with pytest.raises(UsageError, match="--batch needs"):
            label(settings(tmp_path, "http://127.0.0.1:1/v1", **values))


# -- money ----------------------------------------------------------------------------------------------------


def test_the_cap_is_never_passed_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    def behave(call: Call) -> Reply:
        # Nearly the worst case: little comes back from what was reserved.
        usage = {"prompt_tokens": 1500, "completion_tokens": 1000}
        return Reply("no" if call.task == "Write part 3." else None, usage=usage)

    moments = random.Random(7)
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        cap = moments.uniform(0, 0.08)
        with FakeBatches(behave=behave) as server:
            try:
                result = label(settings(folder, server.url, label__max_cost=cap))
            except BudgetReached as error:
                assert "larger --max-cost" in str(error)
            else:
                assert result.stopped is None or "larger --max-cost" in result.stopped
            assert server.cost <= cap
            before = server.cost
            again = label(settings(folder, server.url, label__max_cost=1.0))
            assert again.unanswered == 0 and server.cost >= before
            assert again.usage_all.cost_usd == pytest.approx(server.cost)


def test_only_as_many_are_handed_over_as_fit_into_the_cap(tmp_path: Path) -> None:
    with FakeBatches(still=True) as server:
        label(settings(tmp_path, server.url, label__max_cost=0.025, label__wait=False))
        [content] = server.files.values()
    assert 0 < len(content.splitlines()) < 6


def test_a_cap_without_a_known_price_is_refused(tmp_path: Path) -> None:
    with FakeBatches() as server, pytest.raises(UsageError, match="--price-in"):
        label(settings(tmp_path, server.url, label__max_cost=1.0, label__model="nobodys-model"))
    assert server.steps == []


# -- what a power cut may take --------------------------------------------------------------------------------


def test_an_answer_is_forgotten_only_once_the_journal_has_it_on_the_disk(tmp_path: Path) -> None:
    events: list[str] = []
    with FakeBatches() as server:
        wanted = settings(tmp_path, server.url)
        teacher = make_teacher(wanted)
        worklist = Worklist(wanted, teacher, DecisionSpace(tuple(wanted.decision.roles)), None)

        async def keep(question: Question, answer: Answer) -> None:
            worklist.take(question)
            events.append("kept")

        async def sync() -> None:
            with contextlib.closing(sqlite3.connect(tmp_path / "labels.jsonl.batches.sqlite")) as record:
                [[answers]] = record.execute("SELECT count(answer) FROM requests").fetchall()
            events.append(f"synced with {answers} answers")

        async def run() -> None:
            missing = lambda: (one for task in read_tasks(wanted.label.data) for one in worklist.missing(task))  # noqa: E731
            with SILENT.bar("", None) as bar:
                await batching.run(wanted, teacher, worklist, SILENT, bar, missing=missing, keep=keep, sync=sync)
            await teacher.close()

        asyncio.run(run())
    assert events == ["synced with 0 answers", *["kept"] * 6, "synced with 6 answers"]
