"""The servers that docs/label.md names: its base URLs reach the chat endpoint, and its words about keys hold."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from router_cli.errors import CredentialsError
from router_cli.schema import Task
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.teachers import make_teacher
from tests.fake_teacher import FakeTeacher

PAGE = (Path(__file__).parents[2] / "docs" / "label.md").read_text(encoding="utf-8")
SERVERS = dict(
    re.findall(
        r"LLM_API_BASE=(\S+)(?: LLM_API_KEY=\S+)?\nrouter label .*--model (\S+)", PAGE.partition("## Servers")[2]
    )
)


def test_the_page_names_the_servers() -> None:
    assert len(SERVERS) == 5


@pytest.mark.parametrize("url", SERVERS)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_base_url_reaches_the_chat_endpoint_with_the_key(url: str, slash: str) -> None:
    path = urlsplit(url).path.rstrip("/")
    with FakeTeacher() as server:
        environ = {"LLM_API_BASE": server.url.removesuffix("/v1") + path + slash, "LLM_API_KEY": "sk-test"}
        teacher = make_teacher(load({"label.model": ("--model", SERVERS[url])}, environ=environ))

        async def ask() -> None:
            try:
                space = DecisionSpace(("planner", "builder"))
                assert (await teacher.ask(Task(id="a", text="Sum a list."), space, "balanced")).decision
            finally:
                await teacher.close()

        asyncio.run(ask())
    [call] = server.calls
    assert call.path == f"{path}/chat/completions" and call.body["model"] == SERVERS[url]
    assert call.headers["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize("url", [*SERVERS, "http://192.168.0.7:8000/v1"])
def test_only_servers_on_this_machine_need_no_key(url: str) -> None:
    settings = load(environ={"LLM_API_BASE": url})
    if urlsplit(url).hostname in ("localhost", "127.0.0.1"):
        asyncio.run(make_teacher(settings).close())
    else:
        with pytest.raises(CredentialsError, match="LLM_API_KEY"):
            make_teacher(settings)
        asyncio.run(make_teacher(load(environ={"LLM_API_BASE": url, "LLM_API_KEY": "none"})).close())
