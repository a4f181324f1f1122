"""What goes over the wire: requests read, answers and errors written, in the shapes of OpenAI and of `router infer`.

A chat completion's answer is the decision as JSON. What a chat completion has no field for stands beside it under
`router`; clients that do not know it pass over it.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router_cli import prompts
from router_cli.jsonl import parse_row, whole
from router_cli.schema import Prediction, Task, Usage
from router_cli.space import DecisionSpace
from router_cli.tasks import stable_id, task_of

OPENING = "You are a meta-router"
"""What the system messages of this program begin with, a router's and a teacher's: their user messages say `Task: `."""

NEVER = -9999.0
"""OpenAI's log probability of what cannot happen."""


class Refusal(Exception):
    """A request that gets an error instead of a decision, in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Chat:
    """What a chat completion asks for, as far as a router can give it."""

    task: Task
    model: str
    stream: bool
    stream_usage: bool
    logprobs: bool


# -- requests -------------------------------------------------------------------------------------------------


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request."""
    try:
        return parse_row(body.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        words = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Refusal(400, "invalid_json", f"the body {words}") from None


def read_tasks(body: Mapping[str, Any]) -> tuple[list[Task], bool]:
    """The tasks of `POST /v1/route`, and whether they came as a list.

    `tasks` is a list of texts and of rows as `router infer --data` reads them; without it the body is such a row.
    """
    if "tasks" not in body:
        return [_task(body, "task")], False
    given = body["tasks"]
    if not isinstance(given, list) or not given:
        raise Refusal(400, "invalid_tasks", "tasks must be a list of at least one task", "tasks")
    return [_task(one, f"tasks[{place}]") for place, one in enumerate(given)], True


def _task(given: Any, param: str) -> Task:
    row = {"task": given} if isinstance(given, str) else given
    if not isinstance(row, dict):
        raise Refusal(400, "invalid_task", f"{param}: expected a text, or an object with one under task", param)
    try:
        return task_of(row)
    except ValueError as error:
        raise Refusal(400, "invalid_task", f"{param}: {error}", param) from None


def read_chat(body: Mapping[str, Any], space: DecisionSpace) -> Chat:
    """What `POST /v1/chat/completions` asks for; what a decision has no use for (temperature, tools) is ignored."""
    if body.get("n") not in (None, 1):
        raise Refusal(400, "unsupported_value", "n must be 1: a router gives the same decision every time", "n")
    model = body.get("model")
    if not isinstance(model, str):
        raise Refusal(400, "missing_model", "model must be a name: see /v1/models", "model")
    text = _text(body.get("messages"), space)
    options = body.get("stream_options")
    return Chat(
        Task(id=stable_id(text), text=text),
        model,
        stream=_flag(body, "stream"),
        stream_usage=isinstance(options, dict) and _flag(options, "include_usage"),
        logprobs=_flag(body, "logprobs"),
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, "invalid_type", f"{name} must be true or false", name)
    return bool(value)


def _text(messages: Any, space: DecisionSpace) -> str:
    """The task: the last user message, or what stands after `Task:` in a prompt that this program rendered.

    What is not read may be anything: pictures in an earlier message are nobody's concern.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise Refusal(400, "invalid_messages", "messages must be a list of objects with role and content", "messages")
    said = [(one.get("role"), _content(one.get("content"))) for one in messages]
    asked = [content for role, content in said if role == "user"]
    system = next((content for role, content in said if role in ("system", "developer")), None) or ""
    if system.startswith(OPENING):
        ours = prompts.router_messages("", space)[0].content
        if system.partition("\n")[0] == ours.partition("\n")[0] and system != ours:
            words = f"this router decides between {', '.join(space.topologies)} for the roles {', '.join(space.roles)}"
            raise Refusal(
                400, "other_space", f"{words} in up to {space.step_bound} steps; the prompt says otherwise", "messages"
            )
        # After an answer that a client finds invalid, the last user message is its complaint.
        asked = [one.removeprefix("Task:") for one in asked if one is not None and one.startswith("Task:")]
    if asked and asked[-1] is None:
        words = "the last user message must be whole text: a router reads no more"
        raise Refusal(400, "invalid_content", words, "messages")
    text = (asked[-1] or "").strip() if asked else ""
    if not text:
        raise Refusal(400, "no_task", "messages must hold a user message with the task", "messages")
    return text


def _content(content: Any) -> str | None:
    """A message's text; None where it is not text alone."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list):
        return None
    texts = [one.get("text") if isinstance(one, dict) and one.get("type") == "text" else None for one in parts]
    return "\n".join(map(str, texts)) if all(isinstance(text, str) and whole(text) for text in texts) else None


# -- answers --------------------------------------------------------------------------------------------------


def routed(
    tasks: Sequence[Task],
    rows: Sequence[Prediction | BaseException],
    many: bool,
    failure: Callable[[BaseException], dict[str, Any]],
) -> dict[str, Any]:
    """The answer of `POST /v1/route`: the row of `router infer`, or all of them under `predictions`.

    In the place of a task that nobody decided stands its id with what `failure` makes of its error.
    """
    found = [
        {"task_id": task.id, **failure(row)} if isinstance(row, BaseException) else row.model_dump(mode="json")
        for task, row in zip(tasks, rows, strict=True)
    ]
    return {"predictions": found} if many else found[0]


def completion(chat: Chat, row: Prediction) -> dict[str, Any]:
    """The answer of `POST /v1/chat/completions`. Where nobody decided, it is a refusal.

    `usage` is what the row says; rules read no tokens.
    """
    used = row.usage or Usage()
    asked, answered = used.prompt_tokens, used.completion_tokens
    content = None if row.decision is None else prompts.render(row.decision)
    refusal = "the router is not sure enough, and nobody decides in its place" if row.decision is None else None
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": refusal},
                "finish_reason": "stop",
                "logprobs": logprobs(row) if chat.logprobs else None,
            }
        ],
        "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
        "router": row.model_dump(mode="json", exclude={"task_id", "decision", "backend", "model", "usage"}),
    }


def logprobs(row: Prediction) -> dict[str, Any] | None:
    """The log probabilities of an answer up to its topology: what comes before is forced, and of what comes after no
    probability is known. None where a model did not decide."""
    if row.decision is None or row.topologies is None or row.fallback is not None:
        return None
    chosen = row.decision.topology
    head = prompts.render(row.decision).partition(chosen)[0]

    def entry(token: str, share: float) -> dict[str, Any]:
        logprob = math.log(share) if share > 0 else NEVER
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    likeliest = sorted(row.topologies.items(), key=lambda one: -one[1])
    certain = entry(head, 1.0)
    return {
        "content": [
            {**certain, "top_logprobs": [certain]},
            {**entry(chosen, row.topologies[chosen]), "top_logprobs": [entry(*one) for one in likeliest]},
        ]
    }


def streamed(chat: Chat, whole_answer: Mapping[str, Any]) -> bytes:
    """A completion as server-sent events. A decision is there all at once, so its text is one chunk."""
    [choice] = whole_answer["choices"]
    base = {**{name: whole_answer[name] for name in ("id", "created", "model")}, "object": "chat.completion.chunk"}

    def chunk(delta: Mapping[str, Any], reason: str | None = None, given: Any = None) -> dict[str, Any]:
        return {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": given}]}

    said = {name: value for name, value in choice["message"].items() if value is not None}
    events: list[Any] = [chunk(said, given=choice["logprobs"]), {**chunk({}, "stop"), "router": whole_answer["router"]}]
    if chat.stream_usage:
        events.append({**base, "choices": [], "usage": whole_answer["usage"]})
    return b"".join(b"data: " + dumped(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def models(name: str, since: int) -> dict[str, Any]:
    """The answer of `GET /v1/models`."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": since, "owned_by": "router"}]}


def dumped(document: Any) -> bytes:
    """JSON as it is sent: on one line, which server-sent events need too."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
