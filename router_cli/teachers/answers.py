"""Reading what a chat-completions endpoint answered: its text, why it cannot be used, what it used. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router_cli import prompts
from router_cli.schema import Usage
from router_cli.space import DecisionSpace, Resolved, Violation


@dataclass(frozen=True)
class Reply:
    """One answer, or (`failed`) why there is none; `usage.attempts` counts every request sent for it.

    `structured` is whether the text is a JSON object and nothing else.
    """

    text: str
    model: str
    usage: Usage
    violation: Violation | None = None
    failed: bool = False
    logprobs: Any = None
    structured: bool = True


def read(body: Mapping[str, Any], asked: str, attempts: int = 1) -> Reply:
    """The reply in a chat completion's body, asked of the model `asked`; its cost is not known yet (None)."""
    choice = body["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    text, answered = plain_text(message.get("content")), plain_text(body.get("model")) or asked
    prompt, completion = (_count(body.get("usage"), name) for name in ("prompt_tokens", "completion_tokens"))
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, attempts=attempts)

    def unusable(name: str, words: str, text: str = text, failed: bool = False) -> Reply:
        return Reply(text, answered, usage, Violation(name, words), failed)

    if reason == "content_filter":
        return unusable("content_filter", "the endpoint's content filter stopped the answer", failed=True)
    if message.get("refusal"):
        return unusable("refusal", "the model refused to answer", plain_text(message["refusal"]))
    if reason == "length":
        return unusable("truncated", "the answer was cut before its end")
    if not text.strip():
        return unusable("empty_answer", "the answer was empty")
    return Reply(text, answered, usage, logprobs=choice.get("logprobs"), structured=_is_object(text))


def judge(reply: Reply, space: DecisionSpace) -> Resolved:
    """The decision in a reply, or the violations that speak against it."""
    if reply.violation is not None:
        return Resolved(None, (reply.violation,))
    resolved = prompts.parse(reply.text, space)
    violations = tuple(Violation(found.name, clean(found.text)) for found in resolved.violations)
    return Resolved(resolved.decision, violations, resolved.normalised)


def again(reply: Reply, resolved: Resolved) -> list[dict[str, str]]:
    """The messages that hand an unusable reply back; none where it was cut: the same question needs more room."""
    if reply.violation is not None and reply.violation.name == "truncated":
        return []
    return [message.model_dump() for message in prompts.reask_messages(reply.text, resolved.violations)]


def plain_text(content: Any) -> str:
    """The text of a message's content, which some endpoints send in parts."""
    if isinstance(content, list):
        return "".join(plain_text(part.get("text")) for part in content if isinstance(part, dict))
    return clean(content) if isinstance(content, str) else ""


def clean(text: str) -> str:
    """`text` without half characters, which a model cut in the middle of an emoji leaves and no file takes."""
    return text.encode("utf-8", "replace").decode()


def _count(usage: Any, name: str) -> int:
    found = usage.get(name) if isinstance(usage, dict) else None
    return max(0, found) if isinstance(found, int) else 0


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
