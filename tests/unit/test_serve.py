"""`router serve`: both endpoints, who is turned away and how, batches, clients that go, and what Prometheus is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from router_cli import prompts
from router_cli.backends.heuristic import HeuristicBackend
from router_cli.backends.local import LocalBackend
from router_cli.backends.remote import RemoteBackend
from router_cli.cli import main
from router_cli.errors import ModelError, SettingsError, UsageError
from router_cli.fallback import make_fallback
from router_cli.infer import infer, predict
from router_cli.schema import Prediction, Task
from router_cli.serve import ServeResult, _tidied, serve
from router_cli.serving.batching import Batcher, QueueFull
from router_cli.serving.shapes import OPENING
from router_cli.space import DecisionSpace
from router_cli.summaries.serve import served as summary
from router_cli.tasks import stable_id
from router_cli.train import train
from tests.fake_teacher import Call, FakeTeacher, Reply
from tests.serving import SPACE, Gated, Served, ask, serving, settings, until
from tests.training import Recorder, label_rows, train_settings, write_rows

TASKS = ["Sort a list of integers", "Plan the module, build it, then test it.", "测试这个模块 🙂", "x " * 500 + "end"]
TOKEN = "a-token-of-20-letters"


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "router", "messages": [{"role": "user", "content": text}], **more}


def client(served: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", **{"api_key": "none", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def rules() -> Iterator[Served]:
    """A server of the offline rules, which nothing keeps busy."""
    with serving(HeuristicBackend(settings()), max_body=20_000) as served:
        yield served


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    data = write_rows(folder / "labels.jsonl", label_rows(8, 0))
    train(train_settings(data, tiny_folder("smollm"), folder / "adapter", validation_share=0))
    return folder / "adapter"


@pytest.fixture(scope="module")
def trained(adapter: Path) -> Iterator[Served]:
    """A server of a trained adapter."""
    values = {"infer__adapter": str(adapter), "models__dtype": "float32", "infer__alternatives": 3}
    with serving(LocalBackend(settings(**values)), **values) as served:
        yield served


def same(row: dict[str, Any], other: Prediction) -> None:
    assert row["decision"] == json.loads(other.model_dump_json())["decision"]
    assert row["topologies"] == pytest.approx(other.topologies, abs=1e-4)
    assert row["probability"] == pytest.approx(other.probability, abs=1e-4)


# -- what is answered -------------------------------------------------------------------------------------------


def test_one_task_gets_the_row_of_infer_and_many_get_all_of_them(rules: Served) -> None:
    own = predict(HeuristicBackend(settings()), [Task(id=stable_id(text), text=text) for text in TASKS])
    expected = [{**row.model_dump(mode="json"), "milliseconds": 0} for row in own]
    one = rules.post("/v1/route", {"task": TASKS[0]})
    assert one.status == 200 and {**one.json, "milliseconds": 0} == expected[0]
    many = rules.post("/v1/route", {"tasks": [TASKS[0], {"id": "mine", "prompt": TASKS[1]}, *TASKS[2:]]}).json
    assert [{**row, "milliseconds": 0} for row in many["predictions"]] == [
        {**row, "task_id": "mine" if place == 1 else row["task_id"]} for place, row in enumerate(expected)
    ]


def test_an_adapter_decides_as_infer_does(trained: Served, adapter: Path) -> None:
    own = [infer(settings(infer__adapter=str(adapter), models__dtype="float32"), text).predictions[0] for text in TASKS]
    rows = trained.post("/v1/route", {"tasks": TASKS}).json["predictions"]
    for row, other, text in zip(rows, own, TASKS, strict=True):
        same(row, other)
        answer = trained.post("/v1/chat/completions", chat(text)).json
        assert json.loads(answer["choices"][0]["message"]["content"]) == row["decision"]
        assert answer["router"]["topologies"] == pytest.approx(row["topologies"], abs=1e-4)
        assert len(row["alternatives"]) == len(answer["router"]["alternatives"]) == 3


def test_infer_asks_it_as_a_remote_router_and_gets_decisions_and_probabilities(trained: Served, adapter: Path) -> None:
    own = infer(settings(infer__adapter=str(adapter), models__dtype="float32"), TASKS[1]).predictions[0]
    values = {"infer__backend": "remote", "infer__model": "router", "endpoint__base_url": f"{trained.url}/v1"}
    [row] = infer(settings(**values), TASKS[1]).predictions
    same(row.model_dump(mode="json"), own)
    assert (row.backend, row.fallback) == ("remote", None)


def test_openais_client_reads_a_completion_and_its_usage(trained: Served) -> None:
    with client(trained) as asking:
        answer = asking.chat.completions.create(
            model="router",
            messages=[{"role": "user", "content": "Sort."}],
            temperature=0,
            logprobs=True,
            top_logprobs=5,
        )
        assert [one.id for one in asking.models.list()] == ["router"] and asking.models.retrieve(
            "router"
        ).id == "router"
        with pytest.raises(openai.NotFoundError, match="called 'router'"):
            asking.models.retrieve("other")
    [choice] = answer.choices
    decision = json.loads(choice.message.content or "")
    assert not SPACE.violations(decision) and choice.finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens > 50 and answer.usage.completion_tokens > 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    extra = answer.model_extra["router"] if answer.model_extra else {}
    assert choice.logprobs and choice.logprobs.content
    head, topology = choice.logprobs.content
    assert f"{head.token}{topology.token}" == choice.message.content[: len(head.token) + len(topology.token)]  # type: ignore[index]
    assert [one.token for one in topology.top_logprobs] == sorted(
        extra["topologies"], key=lambda one: -extra["topologies"][one]
    )
    assert topology.logprob == topology.top_logprobs[0].logprob < 0 == head.logprob


def test_openais_client_reads_a_stream(trained: Served) -> None:
    asked: dict[str, Any] = chat("Sort.", stream=True, stream_options={"include_usage": True})
    with client(trained) as asking:
        chunks = list(asking.chat.completions.create(**asked))
        whole = asking.chat.completions.create(**chat("Sort."))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_the_last_user_message_is_the_task(rules: Served) -> None:
    parts = [{"type": "text", "text": "Plan it, build it,"}, {"type": "text", "text": "then test it."}]
    messages = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": parts},
    ]
    answer = rules.post("/v1/chat/completions", {"model": "router", "messages": messages}).json
    alone = rules.post("/v1/route", {"task": "Plan it, build it,\nthen test it."}).json
    assert json.loads(answer["choices"][0]["message"]["content"]) == alone["decision"]


def test_what_is_no_text_is_refused_in_the_message_that_is_read_alone(rules: Served) -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
    asked = {"role": "user", "content": "Sort a list"}

    def post(*messages: Any) -> Any:
        return rules.post("/v1/chat/completions", {"model": "router", "messages": list(messages)})

    answer = post(picture, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, asked)
    alone = rules.post("/v1/route", {"task": "Sort a list"}).json
    assert json.loads(answer.json["choices"][0]["message"]["content"]) == alone["decision"]
    assert post({**picture, "role": "system"}, asked).status == 200
    assert (post(asked, picture).status, post(asked, picture).code) == (400, "invalid_content")
    ours = [message.model_dump() for message in prompts.router_messages("Sort a list", SPACE)]
    assert post(ours[0], picture, *ours[1:]).status == 200


def test_the_task_of_a_rendered_prompt_is_what_stands_in_it() -> None:
    backend = Gated()
    rendered = [message.model_dump() for message in prompts.router_messages("Sort.", SPACE)]
    complaint = [{"role": "assistant", "content": "{}"}, {"role": "user", "content": "That decision is not valid"}]
    teachers = [message.model_dump() for message in prompts.teacher_messages("Sort.", SPACE)]
    assert rendered[0]["content"].startswith(OPENING) and teachers[0]["content"].startswith(OPENING)
    other = [message.model_dump() for message in prompts.router_messages("Sort.", DecisionSpace(("cook", "waiter")))]
    with serving(backend) as served:
        for messages in (rendered, rendered + complaint, teachers):
            assert served.post("/v1/chat/completions", {"model": "router", "messages": messages}).status == 200
        # A task that begins like a prompt is a task.
        served.post("/v1/chat/completions", chat("Task: Sort."))
        refused = served.post("/v1/chat/completions", {"model": "router", "messages": other})
    assert backend.batches == [["Sort."]] * 3 + [["Task: Sort."]]
    assert (refused.status, refused.code) == (400, "other_space") and "planner, builder" in refused.text


# -- what is turned away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("route", b"{", "invalid_json"),
        ("route", b"[" * 100_00, "invalid_json"),
        ("route", b'{"task": "\xff"}', "invalid_json"),
        ("route", ["Sort"], "invalid_json"),
        ("route", {}, "invalid_task"),
        ("route", {"task": " \n"}, "invalid_task"),
        ("route", {"task": 3}, "invalid_task"),
        ("route", b'{"task": "\\ud83d"}', "invalid_task"),
        ("route", {"tasks": []}, "invalid_tasks"),
        ("route", {"tasks": "Sort"}, "invalid_tasks"),
        ("route", {"tasks": ["Sort", None]}, "invalid_task"),
        ("chat/completions", b"", "invalid_json"),
        ("chat/completions", {"model": "router"}, "invalid_messages"),
        ("chat/completions", {"model": "router", "messages": []}, "no_task"),
        ("chat/completions", {"model": "router", "messages": [{"role": "system", "content": "x"}]}, "no_task"),
        ("chat/completions", {"model": "router", "messages": ["x"]}, "invalid_messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "missing_model"),
        ("chat/completions", chat("x", n=2), "unsupported_value"),
        ("chat/completions", chat("x", stream="yes"), "invalid_type"),
        ("chat/completions", b'{"model":"router","messages":[{"role":"user","content":"\\ud83d"}]}', "invalid_content"),
        (
            "chat/completions",
            {"model": "router", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "invalid_content",
        ),
    ],
)
def test_bad_requests_get_400_in_openais_shape(rules: Served, path: str, body: Any, code: str) -> None:
    answer = rules.post(f"/v1/{path}", body)
    assert (answer.status, answer.code) == (400, code)
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"]


def test_unknown_paths_methods_models_and_types_are_refused(rules: Served) -> None:
    assert (rules.get("/v1/nothing").status, rules.get("/v1/nothing").code) == (404, "unknown_url")
    assert rules.get("/v1/route").status == 405 and rules.get("/v1/route").headers["allow"] == "POST"
    wrong = rules.post("/v1/chat/completions", {**chat("x"), "model": "gpt-4o"})
    assert (wrong.status, wrong.code) == (404, "model_not_found")
    plain = rules.post("/v1/route", {"task": "x"}, Content_Type="text/plain")
    assert (plain.status, plain.code) == (415, "not_json")


def test_a_body_too_large_is_refused_however_it_is_sent(rules: Served) -> None:
    body = json.dumps({"task": "x" * 30_000}).encode()
    told = rules.post("/v1/route", body)
    assert (told.status, told.code) == (413, "too_large") and "20,000" in told.text
    connection = http.client.HTTPConnection("127.0.0.1", rules.port, timeout=30)
    connection.request("POST", "/v1/route", iter([body]), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert rules.post("/v1/route", {"task": "x" * 19_000}).status == 200


def test_more_tasks_than_the_queue_holds_are_refused() -> None:
    with serving(Gated(), queue=3) as served:
        answer = served.post("/v1/route", {"tasks": ["x"] * 4})
        assert (answer.status, answer.code) == (413, "too_many_tasks")
        assert served.post("/v1/route", {"tasks": ["x"] * 3}).status == 200


def test_a_token_is_asked_for_everywhere_but_by_the_probes() -> None:
    with serving(Gated(), token=TOKEN) as served:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for answer in (served.post("/v1/route", {"task": "x"}, **given), served.get("/metrics", **given)):
                assert (answer.status, answer.code) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer" and TOKEN not in answer.text
        assert served.post("/v1/route", {"task": "x"}, Authorization=f"Bearer {TOKEN}").status == 200
        assert served.get("/healthz").status == served.get("/readyz").status == 200
        with client(served, api_key=TOKEN) as asking:
            assert asking.chat.completions.create(**chat("x")).choices
        with client(served) as asking, pytest.raises(openai.AuthenticationError):
            asking.chat.completions.create(**chat("x"))
        assert not served.said.warnings


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8808", "127.0.0.1.evil.example", "10.0.0.1", "[::1"])
def test_a_page_that_points_its_name_here_is_not_answered(host: str) -> None:
    with serving(Gated()) as served:
        for answer in (served.post("/v1/route", {"task": "x"}, Host=host), served.get("/metrics", Host=host)):
            assert (answer.status, answer.code) == (421, "wrong_host")
        assert served.get("/healthz", Host=host).status == served.get("/readyz", Host=host).status == 200
    with serving(Gated(), token=TOKEN) as served:  # a page does not know it
        assert served.post("/v1/route", {"task": "x"}, Host=host, Authorization=f"Bearer {TOKEN}").status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8808", "127.8.9.1", "[::1]:8808", "here.lan"])
def test_this_machines_own_names_are_answered(host: str) -> None:
    with serving(Gated(), host="Here.lan") as served:
        assert served.post("/v1/route", {"task": "x"}, Host=host).status == 200


@pytest.mark.parametrize("token", ["short", "white space in the middle", "umlaut-ä-is-not-ascii"])
def test_a_weak_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(SettingsError, match=r"serve\.token .*16 or more") as error:
        settings(token=token)
    assert token not in str(error.value)


def test_others_cannot_reach_it_without_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UsageError, match="ROUTER_SERVE__TOKEN"):
            serve(settings(host=host, port=0, infer__backend="heuristic"))
    with pytest.raises(UsageError, match="no address of this machine"):
        serve(settings(host="no.such.host.invalid", infer__backend="heuristic"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--backend", "heuristic", "--port", port]) == 2
    assert f"127.0.0.1:{port} cannot be listened at" in capsys.readouterr().err


def test_options_that_do_not_go_together_are_said_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="gives no probability"):
        serve(settings(infer__backend="heuristic", infer__fallback="abstain", infer__min_confidence=0.5))
    with pytest.raises(UsageError, match="--adapter FOLDER"):
        serve(settings(port=0))


# -- the queue --------------------------------------------------------------------------------------------------


def test_what_comes_while_the_model_works_shares_the_next_batch() -> None:
    backend = Gated()
    backend.open.clear()
    with serving(backend, infer__batch_size=4) as served:
        first = served.later("/v1/route", {"task": "first"})
        until(lambda: len(backend.batches) == 1)
        rest = [served.later("/v1/route", {"task": f"task {i}"}) for i in range(6)]
        until(lambda: served.waiting == 6)
        backend.open.set()
        assert [one.get().status for one in (first, *rest)] == [200] * 7
    assert [len(batch) for batch in backend.batches] == [1, 4, 2]


def test_an_idle_model_waits_a_moment_for_company() -> None:
    backend = Gated()
    with serving(backend, batch_wait_ms=500, infer__batch_size=2) as served:
        both = [served.later("/v1/route", {"task": "x"}) for _ in range(2)]
        assert [one.get().status for one in both] == [200, 200]
    assert [len(batch) for batch in backend.batches] == [2]


def test_a_long_text_makes_nobody_pad() -> None:
    backend = Gated()
    with serving(backend) as served:
        served.post("/v1/route", {"tasks": ["a", "b", "x" * 50_000, "y" * 50_000, "c"]})
    assert [[text[0] for text in batch] for batch in backend.batches] == [["a", "b"], ["x"], ["y"], ["c"]]


def test_a_full_queue_says_when_to_come_back_and_loses_nobody() -> None:
    backend = Gated()
    backend.open.clear()
    with serving(backend, queue=2) as served:
        inside = [served.later("/v1/route", {"task": "x"})]
        until(lambda: len(backend.batches) == 1)
        inside += [served.later("/v1/route", {"task": "x"}) for _ in range(2)]
        until(lambda: served.waiting == 2)
        turned_away = served.post("/v1/route", {"task": "x"})
        assert (turned_away.status, turned_away.code) == (429, "queue_full")
        assert turned_away.json["error"]["type"] == "rate_limit_error" and int(turned_away.headers["retry-after"]) >= 1
        with client(served) as asking, pytest.raises(openai.RateLimitError):
            asking.chat.completions.create(**chat("x"))
        backend.open.set()
        assert [one.get().status for one in inside] == [200] * 3
        assert served.post("/v1/route", {"task": "x"}).status == 200
    assert served.metric("router_errors_total", code="queue_full") == 2


def test_the_time_to_stay_away_counts_all_that_work_at_once() -> None:
    async def told(at_once: int) -> int:
        batcher = Batcher[str, str](lambda items: items, 1, 10, at_once=at_once)  # nobody works yet
        batcher._pace = 4.0
        waiting = asyncio.ensure_future(batcher.put(["x"] * 10))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await batcher.put(["x"])
        waiting.cancel()
        return full.value.seconds

    assert [asyncio.run(told(at_once)) for at_once in (1, 4)] == [40, 10]


def test_a_client_that_goes_away_frees_its_place_and_is_never_decided_for() -> None:
    backend = Gated()
    backend.open.clear()
    with serving(backend, queue=3) as served:
        first = served.later("/v1/route", {"task": "first"})
        until(lambda: len(backend.batches) == 1)
        body = json.dumps({"tasks": ["gone"] * 3}).encode()
        head = "POST /v1/route HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
            until(lambda: served.waiting == 3)
        until(lambda: served.waiting == 0)
        until(lambda: served.metric("router_requests_in_progress") == 1)
        # Half a body is no request either.
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body[:5])
            until(lambda: served.metric("router_requests_in_progress") == 2)
        until(lambda: served.metric("router_requests_in_progress") == 1)
        backend.open.set()
        assert first.get().status == 200
    assert backend.batches == [["first"]]
    assert served.metric("router_errors_total", code="gone") == 2 and not served.said.warnings


def test_the_time_limit_ends_waiting_and_shows_a_stuck_model() -> None:
    backend = Gated()
    backend.open.clear()
    with serving(backend, time_limit=0.2) as served:
        first = served.later("/v1/route", {"task": "first"})
        until(lambda: len(backend.batches) == 1)
        late = served.post("/v1/route", {"task": "late"})
        assert (late.status, late.code) == (504, "time_limit")
        assert first.get().status == 504 and served.waiting == 0
        assert (served.get("/readyz").status, served.get("/healthz").status) == (503, 200)
        backend.open.set()
        until(lambda: served.get("/readyz").status == 200)
    assert backend.batches == [["first"]]


# -- failures ---------------------------------------------------------------------------------------------------


def test_a_task_that_breaks_the_model_breaks_nobody_elses_answer() -> None:
    backend = Gated()
    backend.open.clear()
    with serving(backend) as served:
        first = served.later("/v1/route", {"task": "first"})
        until(lambda: len(backend.batches) == 1)
        texts = ("good", "broken", "fine")
        asked = [served.later("/v1/route", {"task": text}) for text in texts]
        until(lambda: served.waiting == 3)
        backend.open.set()
        answers = {text: one.get() for text, one in zip(texts, asked, strict=True)}
        assert first.get().status == 200
    assert {text: one.status for text, one in answers.items()} == {"good": 200, "broken": 500, "fine": 200}
    assert answers["broken"].json["error"]["type"] == "server_error" and "memory" not in answers["broken"].text
    assert any("RuntimeError: out of memory" in line for line in served.said.warnings)


def test_of_many_tasks_those_that_fail_stand_among_the_decided() -> None:
    with serving(Gated()) as served:
        answer = served.post("/v1/route", {"tasks": ["good", {"id": "mine", "task": "broken"}, "fine"]})
        rows = answer.json["predictions"]
        assert answer.status == 200 and [row["task_id"] for row in rows] == [
            stable_id("good"),
            "mine",
            stable_id("fine"),
        ]
        assert rows[0]["decision"] and rows[2]["decision"]
        assert set(rows[1]) == {"task_id", "error"} and rows[1]["error"]["code"] == "internal"
        assert served.metric("router_errors_total", code="internal") == 1
        assert served.metric("router_decisions_total") == 2
        assert served.metric("router_requests_total", status="200") == 1
        for body in ({"tasks": ["broken", "broken too"]}, {"task": "broken"}, {"tasks": ["broken"]}):
            none = served.post("/v1/route", body)
            assert (none.status, none.code) == (500, "internal")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ModelError("the model gives no finite logits")])
def test_a_model_that_decides_nothing_any_more_is_not_ready(error: Exception) -> None:
    backend = Gated()
    with serving(backend) as served:
        for failed in range(5):
            backend.error = None if failed == 2 else error  # two are no row
            answer = served.post("/v1/route", {"tasks": ["x", "y"]})
            assert failed == 2 or (answer.status, answer.code) == (500, "internal")
            assert served.get("/readyz").status == 200
        backend.error = error
        served.post("/v1/route", {"tasks": ["x", "y"]})
        assert (served.get("/readyz").status, served.get("/readyz").code) == (503, "broken")
        assert served.get("/healthz").status == 200
        backend.error = None
        assert served.get("/readyz").status == served.get("/readyz").status == 200


def test_tasks_that_break_the_model_or_that_a_server_refuses_are_no_broken_model() -> None:
    backend = Gated()
    with serving(backend) as served:
        for _ in range(5):
            served.post("/v1/route", {"task": "broken"})
        assert served.get("/readyz").status == 200 and served.post("/v1/route", {"task": "x"}).status == 200
        before = len(backend.batches)
        for _ in range(5):
            served.post("/v1/route", {"task": "refused"})
        assert served.get("/readyz").status == 200 and len(backend.batches) == before + 5  # it is not even asked


# -- a server behind --------------------------------------------------------------------------------------------


def behind(teacher: FakeTeacher, **more: Any) -> dict[str, Any]:
    values = {"infer__backend": "remote", "infer__model": "m", "endpoint__base_url": teacher.url}
    return {**values, "endpoint__api_key": "k", "endpoint__retries": 0, **more}


def test_a_slow_answer_of_the_server_behind_delays_nobody() -> None:
    answering = threading.Event()

    def behave(call: Call) -> Reply | None:
        assert "slow" not in call.task or answering.wait(30)
        return None

    with FakeTeacher(behave=behave) as teacher:
        values = behind(teacher, label__concurrency=4, time_limit=20, batch_wait_ms=1000)
        with serving(RemoteBackend(settings(**values)), **values) as served:
            slow = served.later("/v1/route", {"tasks": ["slow", "slow too"]})
            beside = served.later("/v1/route", {"task": "quick"})  # in time to share a batch, if there were any
            assert beside.get().status == 200
            until(lambda: len(teacher.calls) == 3)
            assert served.post("/v1/route", {"tasks": [f"quick {i}" for i in range(9)]}).status == 200
            answering.set()
            assert slow.get().status == 200


def test_it_is_stuck_when_all_that_wait_for_the_server_behind_hang() -> None:
    answering = threading.Event()

    def behave(call: Call) -> Reply | None:
        assert "slow" not in call.task or answering.wait(30)
        return None

    with FakeTeacher(behave=behave) as teacher:
        values = behind(teacher, label__concurrency=2, time_limit=1.0)
        with serving(RemoteBackend(settings(**values)), **values) as served:
            assert served.post("/v1/route", {"task": "slow"}).status == 504
            assert served.get("/readyz").status == 200 and served.post("/v1/route", {"task": "quick"}).status == 200
            assert served.post("/v1/route", {"task": "slow"}).status == 504
            until(lambda: served.get("/readyz").status == 503)
            assert served.get("/readyz").code == "stuck"
            answering.set()
            until(lambda: served.get("/readyz").status == 200)


def test_a_refusal_of_the_server_behind_ends_no_other_request() -> None:
    answering = threading.Event()

    def behave(call: Call) -> Reply | None:
        if "refused" in call.task:
            return Reply(status=401)
        assert "slow" not in call.task or answering.wait(30)
        return None

    with FakeTeacher(behave=behave) as teacher:
        values = behind(teacher)
        with serving(RemoteBackend(settings(**values)), **values) as served:
            slow = served.later("/v1/route", {"task": "slow"})
            until(lambda: len(teacher.calls) == 1)
            assert served.post("/v1/route", {"task": "refused"}).status == 502
            answering.set()
            assert slow.get().status == 200
            assert served.post("/v1/route", {"task": "quick"}).status == 200


def test_what_the_server_behind_says_is_handed_on() -> None:
    with serving(Gated()) as served:
        answer = served.post("/v1/route", {"task": "refused"})
    assert (answer.status, answer.code) == (502, "upstream") and "no such model" in answer.text


# -- not sure enough --------------------------------------------------------------------------------------------


def unsure_settings(**values: Any) -> dict[str, Any]:
    return {
        "infer__min_confidence": 0.5,
        **{f"infer__{key}" if "__" not in key else key: value for key, value in values.items()},
    }


def doubtful(text: str) -> float:
    return 0.4 if "doubtful" in text else 0.9


def test_abstaining_is_a_row_without_a_decision_and_a_refusal() -> None:
    values = unsure_settings(fallback="abstain")
    with make_fallback(settings(**values), [], None) as unsure, serving(Gated(doubtful), unsure, **values) as served:
        rows = served.post("/v1/route", {"tasks": ["sure", "doubtful"]}).json["predictions"]
        assert [row["fallback"] for row in rows] == [None, "abstain"] and rows[1]["decision"] is None
        with client(served) as asking:
            message = asking.chat.completions.create(**chat("doubtful")).choices[0].message
            assert message.content is None and "not sure enough" in (message.refusal or "")
            last = list(asking.chat.completions.create(**chat("doubtful", stream=True)))
            assert last[0].choices[0].delta.content is None and last[0].choices[0].delta.refusal  # type: ignore[union-attr]
    assert served.metric("router_decisions_total", topology="none") == 3
    assert served.metric("router_fallbacks_total", by="abstain") == 3


@contextmanager
def slow_teacher() -> Iterator[tuple[FakeTeacher, threading.Event]]:
    """A teacher that answers nobody before the event is set."""
    answering = threading.Event()

    def behave(call: Call) -> Reply | None:
        assert answering.wait(30)
        return None

    with FakeTeacher(behave=behave) as teacher:
        yield teacher, answering


def test_a_teacher_is_asked_for_the_unsure_and_nobody_waits_for_it_but_they() -> None:
    with slow_teacher() as (teacher, answering):
        values = unsure_settings(fallback="teacher", endpoint__base_url=teacher.url, endpoint__api_key="k")
        values |= {"label__price_in": 2.5, "label__price_out": 10.0}
        unsure = make_fallback(settings(**values), [], None)
        with serving(Gated(doubtful), unsure, **values) as served:
            waiting = served.later("/v1/route", {"task": "doubtful"})
            until(lambda: len(teacher.calls) == 1)
            assert served.post("/v1/route", {"task": "sure"}).json["fallback"] is None
            answering.set()
            row = waiting.get().json
    assert row["fallback"] == "teacher" and not SPACE.violations(row["decision"])
    assert row["probability"] == pytest.approx(row["topologies"][row["decision"]["topology"]])
    assert served.metric("router_fallback_dollars_total") == pytest.approx(teacher.cost)
    assert dict(unsure.counts) == {"teacher": 1}


def test_a_teacher_that_refuses_is_an_error_for_the_unsure_alone() -> None:
    with FakeTeacher(behave=lambda call: Reply(status=401)) as teacher:
        values = unsure_settings(fallback="teacher", endpoint__base_url=teacher.url, endpoint__api_key="k")
        unsure = make_fallback(settings(**values), [], None)
        with serving(Gated(doubtful), unsure, **values) as served:
            for body in ({"task": "doubtful"}, {"tasks": ["doubtful", "doubtful too"]}):
                answer = served.post("/v1/route", body)
                assert (answer.status, answer.code) == (502, "upstream")
            assert served.post("/v1/route", {"task": "sure"}).status == 200
            answer = served.post("/v1/route", {"tasks": ["sure", "doubtful"]})
            sure, none = answer.json["predictions"]
            assert answer.status == 200 and sure["decision"] and none["error"]["code"] == "upstream"
            assert none["task_id"] == stable_id("doubtful") and "401" in none["error"]["message"]


def test_what_the_teacher_answered_stands_beside_what_it_refused() -> None:
    def behave(call: Call) -> Reply | None:
        until(lambda: len(teacher.calls) == 4)  # all are on their way before one is refused
        return Reply(status=401) if "doubtful 1" in call.task else None

    with FakeTeacher(behave=behave) as teacher:
        values = unsure_settings(fallback="teacher", endpoint__base_url=teacher.url, endpoint__api_key="k")
        values |= {"label__price_in": 2.5, "label__price_out": 10.0}
        unsure = make_fallback(settings(**values), [], None)
        with serving(Gated(doubtful), unsure, **values) as served:
            rows = served.post("/v1/route", {"tasks": [f"doubtful {i}" for i in range(4)]}).json["predictions"]
            assert ["error" in row for row in rows] == [False, True, False, False]
            assert [row.get("fallback") for row in rows] == ["teacher", None, "teacher", "teacher"]
            assert served.metric("router_fallback_dollars_total") == pytest.approx(teacher.cost) and teacher.cost > 0
    assert unsure.usage.attempts == 3 and served.service.metrics.fallbacks == 3


def test_a_teacher_that_comes_back_is_asked_again() -> None:
    there = threading.Event()
    with FakeTeacher(behave=lambda call: None if there.is_set() else Reply(status=401)) as teacher:
        values = unsure_settings(fallback="teacher", endpoint__base_url=teacher.url, endpoint__api_key="k")
        with serving(Gated(doubtful), make_fallback(settings(**values), [], None), **values) as served:
            assert [served.post("/v1/route", {"task": "doubtful"}).status for _ in range(2)] == [502, 502]
            there.set()
            assert served.post("/v1/route", {"task": "doubtful"}).json["fallback"] == "teacher"


def test_where_the_teachers_queue_is_full_the_sure_are_answered() -> None:
    with slow_teacher() as (teacher, answering):
        values = unsure_settings(fallback="teacher", endpoint__base_url=teacher.url, endpoint__api_key="k")
        values |= {"label__concurrency": 1, "queue": 2}
        with serving(Gated(doubtful), make_fallback(settings(**values), [], None), **values) as served:
            waiting = [served.later("/v1/route", {"task": "doubtful"})]
            until(lambda: len(teacher.calls) == 1)
            waiting.append(served.later("/v1/route", {"tasks": ["doubtful", "doubtful"]}))
            # All three are decided, and the last two wait for the teacher.
            until(lambda: served.metric("router_batch_size_sum") == 3 and served.waiting == 2)
            sure, none = served.post("/v1/route", {"tasks": ["sure", "doubtful"]}).json["predictions"]
            assert sure["decision"] and none["error"]["code"] == "queue_full"
            refused = served.post("/v1/route", {"task": "doubtful"})
            assert (refused.status, refused.code) == (429, "queue_full") and "retry-after" in refused.headers
            answering.set()
            assert [one.get().status for one in waiting] == [200, 200]


def test_the_end_tells_the_fallbacks_and_their_price() -> None:
    said, results = Recorder(), list[ServeResult]()

    def behave(call: Call) -> Reply | None:  # as the router it has no valid answer, as the teacher it has
        return Reply("no idea", usage=None) if call.body["model"] == "m" else None

    def ask_and_end() -> None:
        until(lambda: bool(said.notices))
        url = said.notices[-1].split(" at ")[1].split(",")[0]
        try:
            ask(f"{url}/route", {"tasks": ["Sort a list", "Sort another list"]})
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with FakeTeacher(behave=behave) as teacher:
        values = behind(teacher, **unsure_settings(fallback="teacher"), label__reask=0, port=0)
        values |= {"label__price_in": 2.5, "label__price_out": 10.0}
        asking = threading.Thread(target=ask_and_end)
        asking.start()
        results.append(serve(settings(**values), said))
        asking.join()
    [result] = results
    assert (result.decisions, result.fallbacks) == (2, 2)
    assert result.fallback_dollars == pytest.approx(teacher.cost) and teacher.cost > 0
    assert f"2 decisions, 0 refused, 2 fallbacks (${teacher.cost:.4f})" in str(summary(result)[0])
    assert summary(result)[1]["fallbacks"] == 2
    assert "fallback" not in str(summary(ServeResult(1, 0, 0, 0, 1, 0, 0.0, 1.0))[0])


# -- metrics ----------------------------------------------------------------------------------------------------


def test_prometheus_reads_the_metrics() -> None:
    with serving(Gated()) as served:
        served.post("/v1/route", {"tasks": ["Sort a list", "Sort another list"]})
        served.post("/v1/chat/completions", chat("Sort a list"))
        served.post("/v1/route", b"{")
        page = served.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=")
        served.get("/healthz")
        counted = served.metric
        assert counted("router_requests_total", endpoint="/v1/route", status="200") == 1
        assert counted("router_requests_total", endpoint="/v1/route", status="400") == 1
        assert counted("router_requests_total") == 3
        assert counted("router_request_seconds_count", endpoint="/v1/chat/completions") == 1
        assert counted("router_errors_total", code="invalid_json") == counted("router_errors_total") == 1
        assert (counted("router_batch_size_sum"), counted("router_batch_seconds_count")) == (3, 2)
        assert counted("router_decisions_total", topology="single") == counted("router_decisions_total") == 3
        assert counted("router_queue_depth") == counted("router_requests_in_progress") == 0
        if hasattr(socket, "AF_UNIX"):
            assert counted("process_resident_memory_bytes") > 1e7 or not Path("/proc/self/stat").exists()
        assert ask(f"{served.url}/metrics").text.endswith("\n")


# -- the page ---------------------------------------------------------------------------------------------------


def test_the_page_names_every_path_and_every_error() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "serve.md").read_text(encoding="utf-8")
    source = "".join(file.read_text(encoding="utf-8") for file in (root / "router_cli" / "serving").glob("*.py"))
    paths = set(re.findall(r'asked\("([^"{]+)', source))
    assert {path.rstrip("/") for path in paths} == set(re.findall(r"^\| `(?:GET|POST) ([^` ]+)`", page, re.MULTILINE))
    raised = set(re.findall(r'Refusal\(\s*\d+,\s*"(\w+)"', source)) | {"unknown_url", "method_not_allowed"}
    table = "".join(re.findall(r"^\| \d{3} \|([^|]*)\|", page, re.MULTILINE))
    assert raised == set(re.findall(r"`(\w+)`", table))
    assert set(re.findall(r'"(router_\w+)"', source)) == {
        name.removesuffix("_total") for name in re.findall(r"`(router_(?!cli)\w+)", page)
    }


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_goes_back_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def decide(tasks: Sequence[Task]) -> list[Prediction | BaseException]:
        # Many small pieces, of which the last stays: glibc keeps all that lies below it.
        pieces = [bytearray(60_000) for _ in range(2_000)]
        kept.append(pieces[-1])
        return []

    kept: list[bytearray] = []
    monkeypatch.setattr("router_cli.serve.HAND_BACK_SECONDS", 3600.0)
    _tidied(decide)([])
    grown = resident()
    monkeypatch.setattr("router_cli.serve.HAND_BACK_SECONDS", 0.0)
    _tidied(decide)([])
    assert resident() < grown - 50_000_000


def test_a_server_keeps_few_compiled_products_unless_it_is_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from router_cli.backends.device import keep_few_kernels

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
