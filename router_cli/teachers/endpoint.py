"""An endpoint: its address and key, and what its refusals mean. Pure functions.

Endpoints that call themselves OpenAI-compatible agree on little here: error bodies come nested or flat, with or
without `param` and `code`, as FastAPI's `detail`, as HTML of a proxy, or under status 200.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from router_cli.errors import CredentialsError, SettingsError, TeacherError
from router_cli.settings import Settings

# No retry brings these back: somebody has to pay, or to wait for the next month.
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
# The task is what is refused, not the request's form: other tasks may pass.
_TASK = {"context_length_exceeded", "string_above_max_length", "content_filter", "content_policy_violation"}
_TASK_WORDS = ("context length", "context window", "content management policy")

Meaning = Literal["key", "forbidden", "quota", "model", "busy", "transient", "task", "refused"]


@dataclass(frozen=True)
class Fault:
    """One failed request: the endpoint's words, and what it said in machine terms. `status` None is no response.

    `lost` is whether an answer may have been made, and charged, that never came here.
    """

    words: str
    status: int | None = None
    code: str = ""
    param: str = ""
    wait: float | None = None
    unreachable: bool = False
    lost: bool = False

    @property
    def meaning(self) -> Meaning:
        """What to do about it, whichever request it was."""
        if self.status == 402 or self.code in _QUOTA:
            return "quota"
        if self.status is None or self.status in (408, 409, 425) or self.status >= 500:
            return "transient"
        known: dict[int, Meaning] = {401: "key", 403: "forbidden", 404: "model", 413: "task", 429: "busy"}
        if self.status in known and self.code not in _TASK:
            return known[self.status]
        words = self.words.lower()
        if self.code in _TASK or (self.status in (400, 422) and any(part in words for part in _TASK_WORDS)):
            return "task"
        return "refused"

    def blames(self, sent: Collection[str]) -> str | None:
        """Which of the `sent` parameters a 400 or 422 refuses, None if none of them.

        `param` decides where it is given. Else the first name that the words mention: later ones may be the
        request's own text, which some validators quote.
        """
        if self.status not in (400, 422) or self.meaning == "task":
            return None
        aliases = {
            "response_format": (
                "response_format",
                "json_schema",
                "json_object",
                "structured output",
                "guided",
                "grammar",
            ),
            "max_tokens": ("max_tokens",),
            "max_completion_tokens": ("max_completion_tokens", "max_tokens"),
            **{
                name: (name,) for name in sent if name not in ("response_format", "max_tokens", "max_completion_tokens")
            },
        }
        text = self.param or self.words.lower()
        places = {name: [at for word in words if (at := text.find(word)) >= 0] for name, words in aliases.items()}
        named = {name: min(found) for name, found in places.items() if found and name in sent}
        return min(named, key=named.__getitem__) if named else None


def fault(status: int | None, headers: Mapping[str, str], text: str) -> Fault:
    """Read a refusal from a response's status, headers and body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    inner: Any = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        inner = {"message": inner} if isinstance(inner, str) else {"message": text}
    said = inner.get("message") or inner.get("detail") or text
    words = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    code = inner.get("code")
    if status == 200 and isinstance(code, int):
        status = code  # routers of models pass an upstream failure on like this
    kinds = [value for value in (code, inner.get("type")) if isinstance(value, str)]
    return Fault(
        words=" ".join(re.sub(r"<[^>]*>", " ", words).split()) or "no explanation",
        status=status,
        code=next((kind for kind in kinds if kind in _QUOTA | _TASK), kinds[0] if kinds else ""),
        param=inner["param"] if isinstance(inner.get("param"), str) else "",
        wait=retry_after(headers),
    )


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a response asks to wait: `retry-after-ms`, or `Retry-After` as seconds or as an HTTP date."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if seconds < float("inf"):  # neither inf nor nan
            return max(0.0, seconds)
    try:
        until = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    if until.tzinfo is None:  # the zone -0000, which HTTP dates do not know
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def final_error(found: Fault, model: str, url: str, secret: str) -> TeacherError:
    """The one line for a refusal that no retry changes. The key never stands in it."""
    words = shorten(found.words, secret)
    said = f"({found.status}: {words})" if found.status else f"({words})"
    if found.meaning == "key":
        # The endpoint's words often quote the key, masked or not.
        return CredentialsError(f"{url} refuses the API key (401): set LLM_API_KEY to a key that is valid there")
    if found.meaning == "forbidden":
        return CredentialsError(f"{url} does not let this API key use the model {model} {said}")
    if found.meaning == "quota":
        return TeacherError(f"{url} reports no quota left {said}: top up the account, then run the same command again")
    if found.meaning == "model":
        return TeacherError(
            f"{url} does not know the model {model}, or is no chat endpoint {said}: check model and URL"
        )
    if found.unreachable:
        return TeacherError(f"{url} cannot be reached {said}: check the base URL (LLM_API_BASE) and the network")
    if found.meaning == "busy":
        return TeacherError(f"{url} is over its rate limit {said}: run the same command again later")
    if found.meaning == "transient":
        return TeacherError(f"{url} keeps failing {said}: run the same command again later")
    return TeacherError(f"{url} refuses the request {said}")


def api_key(settings: Settings, url: str) -> str:
    """The API key for `url`, checked; a placeholder for a server on this machine, which needs none.

    Raises SettingsError for a URL that is none, CredentialsError where a key is missing or cannot be one.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        origin, seen = settings.origin("endpoint.base_url"), url.rpartition("@")[2]
        raise SettingsError(f"endpoint.base_url ({origin}): must look like https://host/v1, got {seen!r}")
    secret = settings.endpoint.api_key
    key = secret.get_secret_value().strip() if secret is not None else ""
    if not key and is_local(url):
        return "none-needed"
    if not key:
        raise CredentialsError(
            "LLM_API_KEY/OPENAI_API_KEY is not set: in bash `export LLM_API_KEY=your-key`, in PowerShell "
            '`$env:LLM_API_KEY = "your-key"`; or label offline with --teacher heuristic'
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        origin = settings.origin("endpoint.api_key")
        raise CredentialsError(f"the API key from {origin} holds characters that no key has: copy it again")
    return key


def shorten(words: str, secret: str, limit: int = 200) -> str:
    """An endpoint's words for one line, without the key or anything shaped like one."""
    if secret:
        words = words.replace(secret, "***")
    words = re.sub(r"\b(sk|pk|key|Bearer)[-_ ][\w*.-]{8,}", "***", words)
    return words if len(words) <= limit else words[:limit].rstrip() + " …"


def shown(url: str) -> str:
    """A base URL for messages: without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def is_local(url: str) -> bool:
    """Whether a URL names this very machine, whose servers need no key."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
