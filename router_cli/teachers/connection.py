"""One request to a chat-completions endpoint, and what became of it.

The client sends and nothing more: its typed interface checks every field of every request and costs more than all the
rest (1.8 ms of CPU a request against 0.75). Its transport is aiohttp's.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from router_cli.teachers.endpoint import Fault, fault, is_local

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# A proxy that gave up waiting does not know what the model behind it did.
_MAYBE_ANSWERED = (408, 504, 524)
LONGEST_CONNECT = 10.0
"""Seconds to reach an endpoint, at most; a third of a shorter time-out, so that there is time for a second try."""


def make_client(url: str, key: str, timeout: float, connections: int) -> AsyncOpenAI:
    """The openai client for an endpoint, its own retries off, with room for so many connections at once."""
    import httpx2
    from openai import AsyncOpenAI, DefaultAioHttpClient

    parts = urlsplit(url)
    headers = {}
    if parts.username is not None:
        # Basic authentication of a proxy in front of the endpoint; aiohttp takes none from the URL beside a key.
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    # The client would put a query of the base URL before the path of the request.
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "api-version" in query:
        headers["api-key"] = key  # Azure's paths with a deployment take the key from this header
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return AsyncOpenAI(
        api_key=key,
        base_url=url,
        default_headers=headers,
        default_query=query,
        max_retries=0,
        timeout=httpx2.Timeout(timeout, connect=min(LONGEST_CONNECT, timeout / 3)),
        # A proxy from the environment has no way to this machine's own servers.
        http_client=DefaultAioHttpClient(limits=limits, trust_env=not is_local(url)),
    )


async def post(
    client: AsyncOpenAI, body: dict[str, Any], timeout: float
) -> tuple[dict[str, Any] | Fault, Mapping[str, str]]:
    """Ask for a chat completion: the body of the response, or the fault, and the response's headers.

    A fault is `lost` where the endpoint may have answered, and charged, all the same.
    """
    import httpx2
    import openai

    try:
        # The client's own time-out starts anew with every byte that trickles in.
        async with asyncio.timeout(timeout):
            response = await client.post("/chat/completions", body=body, cast_to=httpx2.Response)
    except TimeoutError:
        return Fault(f"no answer within {timeout:g} seconds", lost=True), {}
    except openai.APIConnectionError as error:
        return broken(error, timeout), {}
    except openai.APIStatusError as error:
        found = fault(error.status_code, error.response.headers, error.response.text)
        return replace(found, lost=error.status_code in _MAYBE_ANSWERED), error.response.headers
    try:
        answer = json.loads(response.content)
        answer["choices"][0]["message"].get("content")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return replace(fault(response.status_code, response.headers, response.text), lost=True), response.headers
    return dict(answer), response.headers


def broken(error: Exception, timeout: float) -> Fault:
    """A connection that was not made, broke or stayed silent. aiohttp's exception is at the bottom of it."""
    import aiohttp

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    root = next((cause for cause in causes if isinstance(cause, aiohttp.ClientError)), causes[-1])
    if isinstance(root, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Fault(str(root), unreachable=True)
    if isinstance(root, TimeoutError):
        return Fault(f"no answer within {timeout:g} seconds", lost=True)
    return Fault(f"the connection broke: {root}", lost=True)
