"""The teachers: what an endpoint may do, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from router_cli.errors import CredentialsError, SettingsError, TeacherError
from router_cli.schema import Task, Usage
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.teachers import Answer, make_teacher, total
from router_cli.teachers.endpoint import fault, is_local, retry_after, shown
from router_cli.teachers.openai import OpenAITeacher
from tests.fake_teacher import Call, FakeTeacher, Reply, Storm

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE = '{"topology":"single","roles":["builder"],"manager_role":null,"entry_role":"builder","max_steps":1}'
KEY = "sk-test-0123456789abcdef"


class Notices:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    warn = notice

    def bar(self, title: str, total: int | None, done: int = 0) -> Any:
        raise AssertionError("a teacher draws no bar")


def settings(url: str | None = None, environ: dict[str, str] | None = None, **values: Any) -> Settings:
    options = {key.replace("__", "."): ("test", value) for key, value in values.items()}
    if url is not None:
        options["endpoint.base_url"] = ("test", url)
    return load(options, environ=environ if environ is not None else {"LLM_API_KEY": KEY})


def ask(server: FakeTeacher, tasks: int = 1, said: Notices | None = None, **values: Any) -> list[Answer]:
    """Ask for `tasks` tasks one after the other."""

    async def run() -> list[Answer]:
        teacher = OpenAITeacher(settings(server.url, **values), said or Notices(), backoff=0.002)
        try:
            return [await teacher.ask(Task(id=f"t{i}", text=f"task {i}"), SPACE, "balanced") for i in range(tasks)]
        finally:
            await teacher.close()

    return asyncio.run(run())


def refusing(*names: str, status: int = 400, param: bool = True) -> Any:
    """An endpoint that takes none of these parameters; a `response_format` may be narrowed to one type."""

    def behave(call: Call) -> Reply | None:
        for name in names:
            field, _, kind = name.partition("=")
            if field in call.body and (not kind or call.body[field]["type"] == kind):
                words = f"Unsupported parameter: '{field}' is not supported with this model."
                return Reply(status=status, error={"message": words, "param": field if param else None})
        return None

    return behave


def test_a_valid_answer_brings_decision_model_usage_and_cost() -> None:
    with FakeTeacher(Reply(SINGLE, model="gpt-4o-2024-08-06")) as server:
        [answer] = ask(server)
    assert answer.decision is not None and answer.decision.topology == "single"
    assert (answer.model, answer.raw, answer.final) == ("gpt-4o-2024-08-06", SINGLE, True)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.attempts) == (400, 40, 1)
    assert answer.usage.cost_usd == pytest.approx(400 * 2.5e-6 + 40 * 1e-5)
    call = server.calls[0]
    assert call.path == "/v1/chat/completions" and call.headers["authorization"] == f"Bearer {KEY}"
    assert call.body["model"] == "gpt-4o" and call.body["temperature"] == 0.1
    assert call.body["response_format"]["json_schema"]["schema"] == SPACE.json_schema()


@pytest.mark.parametrize(
    "content",
    [f"```json\n{SINGLE}\n```", f"<think>maybe {{}}</think>\n{SINGLE}", f"Here it is: {SINGLE} I hope it helps."],
)
def test_fences_think_blocks_and_prose_around_the_decision_are_read(content: str) -> None:
    with FakeTeacher(Reply(content)) as server:
        [answer] = ask(server)
    assert answer.decision is not None and answer.raw == content and len(server.calls) == 1


def test_content_in_parts_is_read() -> None:
    with FakeTeacher(Reply([{"type": "text", "text": SINGLE}])) as server:
        assert ask(server)[0].decision is not None


def test_what_was_normalised_is_recorded() -> None:
    with FakeTeacher(Reply(SINGLE.replace("builder", "code-generation"))) as server:
        [answer] = ask(server)
    assert answer.decision is not None and answer.normalised == ("role code-generation read as builder",)


def test_an_invalid_answer_goes_back_with_the_validators_words_and_both_are_paid() -> None:
    bad = SINGLE.replace('"max_steps":1', '"max_steps":7')
    with FakeTeacher(Reply(bad), Reply(SINGLE)) as server:
        [answer] = ask(server)
    assert answer.decision is not None
    assert answer.usage.prompt_tokens == 800 and answer.usage.attempts == 2
    again = server.calls[1].messages
    assert again[-2] == {"role": "assistant", "content": bad} and "max_steps must be 1" in again[-1]["content"]


@pytest.mark.parametrize("reask", [0, 2])
def test_reasking_ends_after_the_set_number(reask: int) -> None:
    with FakeTeacher(behave=lambda call: Reply('{"topology": "ring"}')) as server:
        [answer] = ask(server, label__reask=reask)
    assert answer.decision is None and answer.final and len(server.calls) == reask + 1
    assert answer.raw == '{"topology": "ring"}' and answer.violations[0].name == "missing_field"


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        (Reply(refusal="I cannot help with that."), "refusal"),
        (Reply(SINGLE, finish_reason="length"), "truncated"),
        (Reply(""), "empty_answer"),
        (Reply(None, refusal="", usage={"prompt_tokens": 5, "completion_tokens": 0}), "empty_answer"),
        (Reply(SINGLE, finish_reason="content_filter"), "content_filter"),
        (Reply("I would take one builder."), "no_json"),
    ],
)
def test_unusable_answers_are_violations_by_name(reply: Reply, name: str) -> None:
    with FakeTeacher(behave=lambda call: reply) as server:
        [answer] = ask(server, label__reask=0)
    assert answer.decision is None and answer.final and [found.name for found in answer.violations] == [name]


def test_a_cut_answer_is_asked_for_again_with_more_room() -> None:
    said = Notices()
    with FakeTeacher(Reply("<think>hm", finish_reason="length")) as server:
        [answer] = ask(server, said=said)
    assert answer.decision is not None
    assert [call.body["max_tokens"] for call in server.calls] == [1024, 4096]
    assert server.calls[1].messages == server.calls[0].messages and len(said.said) == 1


def test_half_characters_of_a_model_reach_no_file() -> None:
    body = json.dumps(
        {"model": "m\ud83d", "choices": [{"message": {"content": 'x\ud83d {"topology": 1, "\\ud83d": 2}'}}]}
    )
    with FakeTeacher(behave=lambda call: Reply(body=body.encode())) as server:
        [answer] = ask(server)
    assert answer.decision is None and len(server.calls) == 3
    "".join([answer.raw, answer.model, *map(str, answer.violations)]).encode()


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("param", [True, False])
def test_structured_output_steps_down_where_it_is_refused_and_remembers(status: int, param: bool) -> None:
    said = Notices()
    with FakeTeacher(behave=refusing("response_format", status=status, param=param)) as server:
        answers = ask(server, tasks=2, said=said)
    assert all(answer.decision for answer in answers)
    kinds = [call.body.get("response_format", {}).get("type") for call in server.calls]
    assert kinds == ["json_schema", "json_object", None, None]
    assert len(said.said) == 2 and "json_object" in said.said[0]


def test_structured_output_stops_stepping_where_it_is_taken() -> None:
    with FakeTeacher(behave=refusing("response_format=json_schema")) as server:
        ask(server, tasks=2)
    assert [call.body["response_format"]["type"] for call in server.calls[1:]] == ["json_object", "json_object"]


def test_structured_output_steps_down_where_it_is_ignored() -> None:
    said = Notices()
    with FakeTeacher(behave=lambda call: Reply(f"Sure! {SINGLE}")) as server:
        answers = ask(server, tasks=3, said=said)
    assert all(answer.decision for answer in answers) and len(server.calls) == 3
    assert [call.body.get("response_format", {}).get("type") for call in server.calls] == [
        "json_schema",
        "json_object",
        None,
    ]
    assert all("ignores" in text for text in said.said) and len(said.said) == 2


def test_one_bad_answer_among_good_ones_steps_nothing_down() -> None:
    said = Notices()
    with FakeTeacher(Reply(), Reply('{"topology": "single", "roles": [')) as server:
        ask(server, tasks=3, said=said)
    assert {call.body["response_format"]["type"] for call in server.calls} == {"json_schema"} and not said.said


@pytest.mark.parametrize("param", [True, False])
def test_refused_temperature_and_max_tokens_are_adapted_once(param: bool) -> None:
    said = Notices()
    with FakeTeacher(behave=refusing("max_tokens", "temperature", param=param)) as server:
        answers = ask(server, tasks=2, said=said)
    assert all(answer.decision for answer in answers) and len(server.calls) == 4
    last = server.calls[-1].body
    assert "temperature" not in last and "max_tokens" not in last and last["max_completion_tokens"] == 1024
    assert len(said.said) == 2


def test_votes_after_the_first_bring_a_seed_of_their_own_where_the_endpoint_takes_one() -> None:
    async def run(url: str) -> None:
        teacher = OpenAITeacher(settings(url), backoff=0.002)
        try:
            for sample in range(3):
                await teacher.ask(Task(id="a", text="a"), SPACE, "balanced", sample)
        finally:
            await teacher.close()

    with FakeTeacher() as server:
        asyncio.run(run(server.url))
    assert [call.body.get("seed") for call in server.calls] == [None, 1, 2]
    with FakeTeacher(behave=refusing("seed")) as server:
        asyncio.run(run(server.url))
    assert [call.body.get("seed") for call in server.calls] == [None, 1, None, None]


def test_who_waits_for_the_turn_sends_what_others_learnt_meanwhile() -> None:
    """At 600 requests a minute tasks queue up; only those that left before the refusal came are refused."""

    async def run(url: str) -> list[Answer]:
        teacher = OpenAITeacher(settings(url, label__rpm=600), backoff=0.002)
        tasks = [Task(id=str(i), text=f"task {i}") for i in range(16)]
        try:
            await teacher.ask(Task(id="first", text="first"), SPACE, "balanced")
            return await asyncio.gather(*[teacher.ask(task, SPACE, "balanced") for task in tasks])
        finally:
            await teacher.close()

    refuse = refusing("max_tokens")
    with FakeTeacher(behave=lambda call: refuse(call) if call.number else None) as server:
        answers = asyncio.run(run(server.url))
    assert all(answer.decision for answer in answers)
    assert sum("max_tokens" in call.body for call in server.calls[1:]) <= 12


def test_parameters_are_adapted_once_for_all_that_are_in_flight() -> None:
    said = Notices()

    async def run(url: str) -> list[Answer]:
        teacher = OpenAITeacher(settings(url), said, backoff=0.002)
        tasks = [Task(id=str(i), text=f"task {i}") for i in range(8)]
        try:
            return await asyncio.gather(*[teacher.ask(task, SPACE, "balanced") for task in tasks])
        finally:
            await teacher.close()

    with FakeTeacher(behave=refusing("response_format=json_schema"), delay=0.05) as server:
        answers = asyncio.run(run(server.url))
    assert all(answer.decision for answer in answers) and len(said.said) == 1
    kinds = Counter((call.task, call.body["response_format"]["type"]) for call in server.calls)
    assert kinds.total() <= 16 and set(kinds.values()) == {1}


def test_missing_usage_leaves_the_cost_unknown_and_is_said_once() -> None:
    said = Notices()
    with FakeTeacher(behave=lambda call: Reply(usage=None)) as server:
        answers = ask(server, tasks=2, said=said)
    assert [answer.usage.cost_usd for answer in answers] == [None, None] and len(said.said) == 1


def test_an_unknown_price_makes_the_sum_unknown() -> None:
    known = Usage(prompt_tokens=1, cost_usd=0.5)
    assert total(known, known).cost_usd == 1.0
    assert total(known, Usage(prompt_tokens=2)).cost_usd is None


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500),
        Reply(status=503, body=b"<html>busy</html>"),
        Reply(status=408),
        Reply(status=429),
        Reply(drop=True),
        Reply(error={"message": "upstream failed", "code": 502}),
        Reply(delay=0.6),
    ],
)
def test_passing_faults_are_retried(reply: Reply) -> None:
    with FakeTeacher(reply) as server:
        [answer] = ask(server, endpoint__timeout=0.4)
    assert answer.decision is not None and answer.usage.attempts == len(server.calls) == 2


def test_a_trickling_answer_is_given_up_after_the_timeout() -> None:
    """The client's own time-out would wait for ever: it starts anew with every byte."""

    async def run() -> Answer:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not hung_up.is_set():
                writer.write(b" ")
                await asyncio.sleep(0.05)
            writer.close()

        hung_up = asyncio.Event()
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        teacher = OpenAITeacher(settings(url, endpoint__timeout=0.3, endpoint__retries=0))
        try:
            return await asyncio.wait_for(teacher.ask(Task(id="a", text="a"), SPACE, "balanced"), 5)
        finally:
            await teacher.close()
            hung_up.set()
            await asyncio.sleep(0.1)
            server.close()

    answer = asyncio.run(run())
    assert not answer.final and "no answer within 0.3 seconds" in answer.violations[0].text


def test_a_task_that_keeps_failing_is_given_up_but_the_run_goes_on() -> None:
    with FakeTeacher(behave=lambda call: Reply(status=500) if call.task == "task 0" else None) as server:
        answers = ask(server, tasks=2, endpoint__retries=2)
    assert [answer.final for answer in answers] == [False, True]
    assert answers[0].violations[0].name == "no_answer" and len(server.calls) == 4


@pytest.mark.parametrize("status", [500, 429])
def test_an_endpoint_that_keeps_failing_stops_the_run(status: int) -> None:
    with (
        FakeTeacher(behave=lambda call: Reply(status=status)) as server,
        pytest.raises(TeacherError, match=str(status)),
    ):
        ask(server, tasks=9, endpoint__retries=1)
    assert len(server.calls) == 6


def test_a_streak_of_random_failures_that_ends_in_a_429_ends_no_run() -> None:
    """At one request at a time nobody else gets through meanwhile: seven in a row are luck, not a limit."""
    mixed = [Reply(status=500 if number % 2 else 429, headers={"retry-after-ms": "1"}) for number in range(12)]
    limits = [Reply(status=429, headers={"retry-after-ms": "1"})] * 7
    with FakeTeacher(Reply(), *mixed, Reply(), *limits) as server:
        answers = ask(server, tasks=4)
    # The retries are counted by kind.
    assert [answer.final for answer in answers] == [True, True, False, True] and len(server.calls) == 22


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_retry_after_pauses_every_worker(form: str) -> None:
    later = datetime.now(UTC) + timedelta(seconds=2)
    header = {
        "seconds": {"Retry-After": "1"},
        "milliseconds": {"retry-after-ms": "800", "Retry-After": "60"},
        "date": {"Retry-After": format_datetime(later, usegmt=True)},
    }[form]

    async def run(url: str) -> None:
        teacher = OpenAITeacher(settings(url), backoff=0.002)
        try:
            await teacher.ask(Task(id="x", text="x"), SPACE, "balanced")  # connects, so that the next comes at once
            first = asyncio.create_task(teacher.ask(Task(id="a", text="a"), SPACE, "balanced"))
            await asyncio.sleep(0.2)
            await asyncio.gather(first, teacher.ask(Task(id="b", text="b"), SPACE, "balanced"))
        finally:
            await teacher.close()

    with FakeTeacher(Reply(), Reply(status=429, headers=header)) as server:
        asyncio.run(run(server.url))
    limited, *after = server.calls[1:]
    assert sorted(call.task for call in after) == ["a", "b"]
    assert all(call.at - limited.at > 0.75 for call in after)


def test_a_rate_limit_that_lets_others_through_is_waited_for() -> None:
    """Waiting one's turn is no failure: a request may meet more 429s than `endpoint.retries`."""
    answered: list[int] = []

    def behave(call: Call) -> Reply | None:
        if call.number % 4:
            return Reply(status=429, headers={"retry-after-ms": "5"})
        answered.append(call.number)
        return None

    async def run(url: str) -> list[Answer]:
        teacher = OpenAITeacher(settings(url, endpoint__retries=4), backoff=0.002)
        tasks = [Task(id=str(i), text=f"task {i}") for i in range(12)]
        try:
            return await asyncio.gather(*[teacher.ask(task, SPACE, "balanced") for task in tasks])
        finally:
            await teacher.close()

    with FakeTeacher(behave=behave) as server:
        answers = asyncio.run(run(server.url))
    assert all(answer.decision for answer in answers) and max(answer.usage.attempts for answer in answers) > 5


def test_a_wait_of_many_hours_stops_the_run() -> None:
    with FakeTeacher(Reply(status=429, headers={"Retry-After": "90000"})) as server, pytest.raises(TeacherError):
        ask(server)


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(status=401, error={"message": f"Incorrect API key provided: {KEY}"}), CredentialsError, "LLM_API_KEY"),
        (Reply(status=403), CredentialsError, "gpt-4o"),
        (Reply(status=404, error={"message": "no such model", "code": "model_not_found"}), TeacherError, "gpt-4o"),
        (Reply(status=429, error={"message": f"Quota of {KEY}", "code": "insufficient_quota"}), TeacherError, "quota"),
        (Reply(status=429, error={"message": "Pay", "type": "insufficient_quota"}), TeacherError, "quota"),
        (Reply(status=402), TeacherError, "quota"),
        (Reply(status=400, error={"message": "bad request of sk-0123456789***mine"}), TeacherError, "400"),
        (Reply(body=b"<html>Welcome</html>"), TeacherError, "no chat completion"),
        (Reply(status=405), TeacherError, "405"),
    ],
)
def test_final_refusals_stop_at_once_with_one_line_without_the_key(reply: Reply, error: type, words: str) -> None:
    with FakeTeacher(behave=lambda call: reply) as server, pytest.raises(error, match=words) as caught:
        ask(server)
    assert len(server.calls) == 1 and "\n" not in str(caught.value) and "0123456789" not in str(caught.value)


def test_a_broken_connection_is_no_time_out_and_may_have_been_charged() -> None:
    async def run(url: str) -> tuple[Answer, OpenAITeacher]:
        teacher = OpenAITeacher(settings(url, endpoint__retries=0), backoff=0.002)
        try:
            return await teacher.ask(Task(id="a", text="a"), SPACE, "balanced"), teacher
        finally:
            await teacher.close()

    with FakeTeacher(Reply(drop=True)) as server:
        answer, teacher = asyncio.run(run(server.url))
    assert not answer.final and "the connection broke" in answer.violations[0].text
    assert answer.usage.cost_usd == 0.0 and teacher.budget.uncertain == teacher.budget.spent > 1024 * 1e-5


def test_user_and_password_of_the_url_are_sent_as_such() -> None:
    with FakeTeacher() as server:
        settled = settings(server.url.replace("://", "://me:s%40cret@"))

        async def run() -> None:
            teacher = OpenAITeacher(settled)
            try:
                await teacher.ask(Task(id="a", text="a"), SPACE, "balanced")
            finally:
                await teacher.close()

        asyncio.run(run())
    assert server.calls[0].headers["authorization"] == "Basic bWU6c0BjcmV0"


@pytest.mark.parametrize(
    ("tail", "path", "key"),
    [
        ("/", "/v1/chat/completions", None),
        ("/../openai/v1/", "/openai/v1/chat/completions", None),
        (
            "/../openai/deployments/gpt-4o?api-version=2024-10-21",
            "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
            KEY,
        ),
    ],
)
def test_base_urls_with_a_slash_or_a_query_are_asked_as_they_mean(tail: str, path: str, key: str | None) -> None:
    """Azure has both forms: `/openai/v1/`, and a deployment's path with a query and a header of its own."""
    with FakeTeacher() as server:

        async def run() -> Answer:
            teacher = OpenAITeacher(settings(server.url + tail))
            try:
                return await teacher.ask(Task(id="a", text="a"), SPACE, "balanced")
            finally:
                await teacher.close()

        assert asyncio.run(run()).decision is not None
    [call] = server.calls
    assert call.path == path and call.headers["authorization"] == f"Bearer {KEY}" and call.headers.get("api-key") == key


def test_through_a_storm_every_task_ends_and_the_bill_is_the_servers() -> None:
    async def run(url: str) -> tuple[list[Answer], OpenAITeacher]:
        teacher = OpenAITeacher(settings(url, endpoint__timeout=5.0, endpoint__retries=20), backoff=0.002)
        tasks = [Task(id=str(i), text=f"task {i}") for i in range(60)]
        try:
            return await asyncio.gather(*[teacher.ask(task, SPACE, "balanced") for task in tasks]), teacher
        finally:
            await teacher.close()

    with FakeTeacher(behave=Storm(seed=5, hang=0.05)) as server:
        answers, teacher = asyncio.run(run(server.url))
    assert all(answer.final and (answer.decision or answer.violations) for answer in answers)
    assert sum(answer.usage.cost_usd or 0.0 for answer in answers) == pytest.approx(server.cost, abs=1e-9)
    assert teacher.budget.spent - teacher.budget.uncertain == pytest.approx(server.cost, abs=1e-9)
    assert teacher.requests == len(server.calls) and teacher.wasted == sum(call.status == 429 for call in server.calls)


def test_connection_refused_is_final_after_the_retries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}/v1"

    async def run() -> None:
        teacher = OpenAITeacher(settings(url, endpoint__retries=2), backoff=0.002)
        try:
            await teacher.ask(Task(id="a", text="a"), SPACE, "balanced")
        finally:
            await teacher.close()

    with pytest.raises(TeacherError, match="cannot be reached") as caught:
        asyncio.run(run())
    assert "secret" not in str(caught.value)


def test_a_final_refusal_wakes_those_who_wait() -> None:
    """With one worker told that the key is bad, none sits out its back-off."""

    async def run(url: str) -> list[Any]:
        teacher = OpenAITeacher(settings(url, endpoint__retries=3), backoff=30.0)
        tasks = [Task(id=str(i), text=f"task {i}") for i in range(2)]
        try:
            asks = [teacher.ask(task, SPACE, "balanced") for task in tasks]
            return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 10)
        finally:
            await teacher.close()

    with FakeTeacher(
        behave=lambda call: Reply(status=401, delay=0.2) if call.task == "task 1" else Reply(status=500)
    ) as s:
        assert [type(error) for error in asyncio.run(run(s.url))] == [CredentialsError, CredentialsError]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(
            status=400, error={"message": "maximum context length is 8192 tokens", "code": "context_length_exceeded"}
        ),
        Reply(status=400, error={"message": "max_tokens: the model's context length is 2048"}),
        Reply(status=400, error={"message": "filtered", "code": "content_filter"}),
        Reply(status=413),
        Reply(status=400, error={"message": "something about this very task"}),
    ],
)
def test_a_task_that_the_endpoint_will_not_take_is_data(reply: Reply) -> None:
    with FakeTeacher(behave=lambda call: reply if call.task == "task 1" else None) as server:
        answers = ask(server, tasks=3)
    assert [bool(answer.decision) for answer in answers] == [True, False, True] and len(server.calls) == 3
    assert answers[1].final and answers[1].violations[0].name == "request_refused"
    assert server.calls[-1].body["max_tokens"] == 1024


def test_a_missing_key_is_one_line_with_the_fix_for_both_shells() -> None:
    with pytest.raises(CredentialsError) as caught:
        make_teacher(settings(environ={}))
    text = str(caught.value)
    assert text.startswith("LLM_API_KEY/OPENAI_API_KEY is not set: ") and "\n" not in text
    assert "export LLM_API_KEY=" in text and "$env:LLM_API_KEY" in text


def test_a_server_on_this_machine_needs_no_key() -> None:
    with FakeTeacher() as server:
        assert ask(server, environ={})[0].decision is not None
    assert is_local("http://localhost:8000/v1") and is_local("http://[::1]/v1")
    assert not is_local("https://api.openai.com/v1") and not is_local("http://localhost.example.com")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://h:port/v1", "http://[x/v1", "me:pw@h"]
)
def test_a_url_that_is_none_is_a_settings_error(url: str) -> None:
    with pytest.raises(SettingsError, match=r"endpoint\.base_url") as caught:
        make_teacher(settings(url))
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("key", ["two words", "sk-\u2026abc", "sk-a\nb"])
def test_a_key_that_cannot_be_one_is_said_before_anything_is_sent(key: str) -> None:
    with pytest.raises(CredentialsError, match="LLM_API_KEY") as caught:
        make_teacher(settings(environ={"LLM_API_KEY": key}))
    assert key not in str(caught.value)


def test_retry_after_in_all_its_forms() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after({"retry-after": "7"}, now) == 7.0
    assert retry_after({"retry-after": "Thu, 01 Jan 2026 00:00:09 GMT"}, now) == 9.0
    assert retry_after({"retry-after": "Wed, 31 Dec 2025 00:00:00 GMT"}, now) == 0.0
    assert retry_after({"retry-after": "-3"}, now) == 0.0
    assert [retry_after({"retry-after": odd}, now) for odd in ("soon", "nan", "inf", "")] == [None] * 4
    assert retry_after({}, now) is None


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '"no"', '{"error": "no"}', '{"detail": [{"loc": ["body"]}]}', "<p>"]
)
def test_any_error_body_is_read(text: str) -> None:
    assert fault(400, {}, text).meaning == "refused" and fault(400, {}, text).words


def test_a_url_is_shown_without_user_and_query() -> None:
    assert shown("https://me:secret@host:8/v1/?key=x") == "https://host:8/v1"


def test_recorded_hands_on_the_rows_own_decision() -> None:
    teacher = make_teacher(settings(label__teacher="recorded", environ={}))

    def ask_recorded(decision: Any) -> Answer:
        return asyncio.run(teacher.ask(Task(id="a", text="a", decision=decision), SPACE, "balanced"))

    alias = ask_recorded(json.loads(SINGLE.replace("builder", "code-generation")))
    assert alias.decision is not None and alias.decision.roles == ("builder",) and alias.normalised
    assert alias.usage.cost_usd == 0.0
    assert ask_recorded({"topology": "ring"}).violations[0].name == "missing_field"
    assert ask_recorded(None).violations[0].name == "no_recorded_decision"


def test_heuristic_gives_a_valid_decision_and_its_reason() -> None:
    teacher = make_teacher(settings(label__teacher="heuristic", environ={}))
    answer = asyncio.run(teacher.ask(Task(id="a", text="Write a function."), SPACE, "balanced"))
    assert answer.decision is not None and not SPACE.violations(answer.decision) and answer.reason
    assert (teacher.name, answer.usage.cost_usd) == ("heuristic", 0.0)
