"""`Router`: five lines, from threads and coroutines; and what docs/python.md shows, run as it stands there."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from router_cli.api import Router, _asked, _Queue, _work
from router_cli.errors import SettingsError, TeacherError, UsageError
from router_cli.fallback import Fallback, make_fallback
from router_cli.schema import Decision, Prediction
from router_cli.space import DecisionSpace
from router_cli.tasks import stable_id
from router_cli.train import train
from tests.fake_teacher import Call, FakeTeacher, Reply
from tests.serving import Gated, settings, until
from tests.training import Recorder, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
TEXTS = [f"Do {'very ' * (i % 4)}well {i}." for i in range(10)]


@pytest.fixture(scope="module")
def router(tiny_folder: Tiny) -> Iterator[Router]:
    with Router.load(base=str(tiny_folder("smollm")), batch_size=4, models__dtype="float32") as one:
        yield one


def test_a_row_is_what_infer_writes(router: Router) -> None:
    row = router.decide("Sort a list")
    assert isinstance(row, Prediction) and row.task_id == stable_id("Sort a list") and row.backend == "local"
    assert row.decision is not None and not SPACE.violations(row.decision) and router.space == SPACE
    assert row.topologies is not None and row.probability == row.topologies[row.decision.topology]
    assert Prediction.model_validate_json(row.model_dump_json()) == row


def test_many_come_in_order_and_are_decided_as_each_alone(router: Router) -> None:
    rows = router.decide_many(iter(TEXTS))
    assert [row.task_id for row in rows] == [stable_id(text) for text in TEXTS]
    assert [row.decision for row in rows] == [router.decide(text).decision for text in TEXTS]
    assert router.decide_many([]) == []


def batches(rows: list[Prediction]) -> int:
    """In how many batches rows were decided: the rows of one share its time."""
    return len({row.milliseconds for row in rows})


def test_coroutines_that_ask_at_once_share_a_batch(router: Router) -> None:
    async def ask() -> list[Prediction]:
        return list(await asyncio.gather(*map(router.adecide, TEXTS)))

    rows = asyncio.run(ask())
    assert [row.task_id for row in rows] == [stable_id(text) for text in TEXTS]
    assert batches(rows) == 3  # four, four and two
    assert [row.decision for row in rows] == [row.decision for row in router.decide_many(TEXTS)]


def test_what_threads_ask_while_it_works_is_decided_together(router: Router) -> None:
    with ThreadPoolExecutor(8) as pool:
        pool.submit(router.decide_many, TEXTS * 3)
        rows = list(pool.map(router.decide, TEXTS[:7]))
    assert [row.task_id for row in rows] == [stable_id(text) for text in TEXTS[:7]]
    assert batches(rows) < 7


def test_a_cancelled_question_hurts_nobody(router: Router) -> None:
    async def ask() -> Prediction:
        gone = asyncio.create_task(router.adecide(TEXTS[0]))
        kept = asyncio.create_task(router.adecide(TEXTS[1]))
        await asyncio.sleep(0)
        gone.cancel()
        return await kept

    assert asyncio.run(ask()).task_id == stable_id(TEXTS[1])


def test_empty_tasks_and_a_closed_router_are_refused(tiny_folder: Tiny) -> None:
    router = Router.load(backend="heuristic")
    for text in ("", " \n"):
        with pytest.raises(UsageError, match="the task is empty"):
            router.decide(text)
        with pytest.raises(UsageError, match="the task is empty"):
            asyncio.run(router.adecide(text))
    router.close()
    router.close()
    with pytest.raises(UsageError, match="the router is closed"):
        router.decide("Sort")
    with pytest.raises(UsageError, match="the router is closed"):
        asyncio.run(router.adecide("Sort"))


def test_closing_waits_for_what_was_asked(router: Router) -> None:
    with Router.load(backend="heuristic") as other, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(other.decide_many, TEXTS * 50)
        while not asked.running() and not asked.done():
            pass
    assert len(asked.result()) == 500


def test_a_forgotten_router_goes_with_its_thread() -> None:
    def threads() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "router"]

    before = set(threads())
    router = Router.load(backend="heuristic")
    [mine] = set(threads()) - before
    gone = weakref.ref(router)
    del router
    gc.collect()
    mine.join(10)
    assert gone() is None and not mine.is_alive()


def test_settings_go_by_their_names() -> None:
    with Router.load(backend="heuristic", decision__roles=["cook", "waiter"]) as router:
        assert router.space == DecisionSpace(("cook", "waiter"))
    with pytest.raises(SettingsError, match=r"Router.load\(bakend=\.\.\.\): there is no setting.*infer.backend"):
        Router.load(bakend="heuristic")
    with pytest.raises(SettingsError, match=r"infer.batch_size \(Router.load\(batch_size=\.\.\.\)\): must be >= 1"):
        Router.load(batch_size=0)
    for name, value in {"data": "x.jsonl", "limit": 3, "engine": "ray"}.items():
        with pytest.raises(UsageError, match="a Router decides single tasks"):
            Router.load(backend="heuristic", **{name: value})
    with pytest.raises(UsageError, match="pass --adapter FOLDER, or --base MODEL"):
        Router.load()


def test_who_is_not_sure_enough_hands_on(tiny_folder: Tiny) -> None:
    base = {"base": str(tiny_folder("smollm")), "models__dtype": "float32", "min_confidence": 1.0}
    with Router.load(fallback="abstain", **base) as router:
        assert [(row.decision, row.fallback) for row in router.decide_many(TEXTS[:2])] == [(None, "abstain")] * 2
    with pytest.raises(UsageError, match="--fallback needs --min-confidence"):
        Router.load(fallback="abstain", base=base["base"])


def test_a_teacher_is_asked_and_its_refusal_reaches_who_asked(tiny_folder: Tiny) -> None:
    chain = {"topology": "chain", "roles": ["planner", "builder"], "manager_role": None, "entry_role": "planner"}
    content = json.dumps({**chain, "max_steps": 2})
    base = {"base": str(tiny_folder("smollm")), "models__dtype": "float32", "min_confidence": 1.0}
    base |= {"fallback": "teacher", "endpoint__retries": 0}
    with FakeTeacher(Reply(content)) as server, Router.load(endpoint__base_url=server.url, **base) as router:
        row = router.decide("Sort")
        assert row.fallback == "teacher" and row.decision is not None and row.decision.topology == "chain"
    with (
        FakeTeacher(behave=lambda call: Reply(status=401)) as server,
        Router.load(endpoint__base_url=server.url, **base) as router,
        pytest.raises(TeacherError),
    ):
        router.decide("Sort")


def test_a_teacher_that_comes_back_is_asked_again(tiny_folder: Tiny) -> None:
    there = threading.Event()
    base = {"base": str(tiny_folder("smollm")), "models__dtype": "float32", "min_confidence": 1.0}
    base |= {"fallback": "teacher", "endpoint__retries": 0}
    with (
        FakeTeacher(behave=lambda call: None if there.is_set() else Reply(status=401)) as server,
        Router.load(endpoint__base_url=server.url, **base) as router,
    ):
        with pytest.raises(TeacherError):
            router.decide("Sort")
        there.set()
        assert router.decide("Sort").fallback == "teacher"


def together(texts: list[str], unsure: Fallback | None = None) -> list[Prediction | BaseException | None]:
    """What those get who ask at the same time, each for one task."""
    asked, queue = [_asked(text) for text in texts], _Queue()
    for one in asked:
        queue.put([one])
    queue.put(None)
    _work(queue, Gated(lambda text: 0.4 if "doubtful" in text else 0.9), unsure, len(texts), ExitStack())
    return [one.answer.exception(0) or one.answer.result() for one in asked]


def test_a_task_that_breaks_the_model_breaks_nobody_elses_answer() -> None:
    found = together(["good", "broken", "fine"])
    assert [isinstance(one, Prediction) for one in found] == [True, False, True]
    assert isinstance(found[1], RuntimeError)
    assert all(isinstance(one, TeacherError) for one in together(["good", "refused"]))  # a server refuses all


def test_a_refusing_teacher_is_an_error_for_the_unsure_alone() -> None:
    def behave(call: Call) -> Reply | None:
        until(lambda: len(server.calls) == 2)  # both are on their way before one is refused
        return Reply(status=401) if "bad" in call.task else None

    with FakeTeacher(behave=behave) as server:
        values = {"infer__min_confidence": 0.5, "infer__fallback": "teacher", "endpoint__base_url": server.url}
        unsure = make_fallback(settings(**values, endpoint__api_key="k"), [], None)
        found = together(["bad, doubtful", "broken", "sure", "doubtful"], unsure)
    assert isinstance(found[0], TeacherError) and isinstance(found[1], RuntimeError)
    assert [one.fallback for one in found[2:] if isinstance(one, Prediction)] == [None, "teacher"]


# -- docs/python.md ---------------------------------------------------------------------------------------------

BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FORMATIONS = {
    "single": ("builder", None, 1),
    "chain": ("planner builder tester", None, 3),
    "decentralized": ("planner builder tester", None, 4),
    "centralized": ("planner builder tester", "planner", 5),
}


def formed(topology: str) -> Decision:
    roles, manager, steps = FORMATIONS[topology]
    listed = tuple(roles.split())
    decision = Decision(
        topology=topology,  # type: ignore[arg-type]
        roles=listed,
        manager_role=manager,
        entry_role=listed[0],
        max_steps=steps,
    )
    assert not SPACE.violations(decision)
    return decision


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("api")
    data = write_rows(folder / "labels.jsonl", label_rows(8, 0))
    train(train_settings(data, tiny_folder("smollm"), folder / "adapter", validation_share=0), Recorder())
    return folder / "adapter"


def role_of(call: Call) -> str:
    return str(re.match(r"You are the (\w+)\.", call.messages[0]["content"])[1])  # type: ignore[index]


class Worker:
    """A model that speaks for every role: peers and the manager name who goes on, in this order, and then finish."""

    def __init__(self, *onward: str) -> None:
        self.onward, self.spoken = list(onward), list[str]()

    def __call__(self, call: Call) -> Reply:
        role = role_of(call)
        self.spoken.append(role)
        tools = {tool["function"]["name"]: tool for tool in call.body.get("tools", [])}
        following = self.onward.pop(0) if self.onward and (tools or "NEXT" in call.messages[0]["content"]) else None
        if following is None or not tools:
            said = f"{role}'s result" + (f"\nNEXT: {following}" if following else "")
            return Reply(said, usage=None)
        [name] = [name for name in tools if following in name]
        needed = tools[name]["function"]["parameters"].get("required", [])
        arguments = json.dumps(dict.fromkeys(needed, f"do it, {following}"))
        used = {"id": f"call-{call.number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [used]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        whole = {"id": f"c{call.number}", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return Reply(body=json.dumps(whole).encode(), usage=None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the page in. What a team is made of is the same whoever decides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("ROUTER_INFER__BACKEND", "heuristic")
    return tmp_path


def ran(block: str) -> dict[str, Any]:
    """The names of a block of the page, after it ran."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)  # this file's annotations are strings
    return names


def test_the_pages_first_lines_run(
    adapter: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, here / "outputs" / "quickstart" / "adapter")
    monkeypatch.setenv("ROUTER_INFER__BACKEND", "local")
    ran(BLOCKS[0])
    topology = capsys.readouterr().out.split()[0]
    assert topology in SPACE.topologies and len(BLOCKS[0].strip().splitlines()) == 5
    ran(BLOCKS[1])
    assert len(json.loads(capsys.readouterr().out.replace("'", '"'))) == 2


def framework(block: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a block, after it ran with a worker that finishes at once."""
    with FakeTeacher(behave=Worker()) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        names = ran(block)
        assert server.calls
    return names


SPOKEN = {
    "single": ((), ["builder"]),
    "chain": ((), ["planner", "builder", "tester"]),
    "decentralized": (("tester", "builder"), ["planner", "tester", "builder"]),
    "centralized": (("builder", "tester"), ["planner", "builder", "planner", "tester", "planner"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("topology", FORMATIONS)
def test_a_decision_becomes_a_langgraph_team(
    topology: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("langgraph", reason="an example of docs/python.md is for LangGraph")
    names = framework(BLOCKS[2], monkeypatch)
    assert capsys.readouterr().out.endswith("'s result\n")
    onward, spoken = SPOKEN[topology]
    worker = Worker(*onward)
    with FakeTeacher(behave=worker) as server:
        names["client"].base_url = server.url
        turns = names["work"](formed(topology), "Write it")
    names["client"].close()
    assert worker.spoken == [role for role, _ in turns] == spoken and turns[-1][1] == f"{spoken[-1]}'s result"
    assert "Task: Write it" in server.calls[0].messages[1]["content"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("topology", FORMATIONS)
def test_a_decision_becomes_an_agents_team(
    topology: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("agents", reason="an example of docs/python.md is for OpenAI Agents")
    names = framework(BLOCKS[3], monkeypatch)
    assert capsys.readouterr().out.endswith("'s result\n")
    onward, spoken = SPOKEN[topology]
    worker = Worker(*onward)
    with FakeTeacher(behave=worker) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        result = asyncio.run(names["work"](formed(topology), "Write it"))
    assert worker.spoken == spoken and result == f"{spoken[-1]}'s result"
