"""The only code that turns a task into messages and a decision into text, and both back.

Training and serving call the same functions here, so that the prompt a router is trained on is, token for token, the
prompt it is asked with. Everything a prompt depends on is in a `DecisionSpace` and `PROMPT_VERSION`, which a run keeps.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from router_cli.schema import Decision, Example, Message
from router_cli.space import DecisionSpace, Resolved, Violation

PROMPT_VERSION = "1"
"""Raised whenever a rendered prompt changes: labels and adapters remember the version they were made with."""

Strategy = Literal["balanced", "prefer-single", "prefer-teams"]

# A few words a topology: a small model reads the prompt for every task, and a CPU pays for each token of it.
_MEANING = {
    "single": "one artefact",
    "chain": "fixed stages",
    "decentralized": "unconnected parts",
    "centralized": "dependent parts, a manager",
}

_RUBRIC = {
    "single": "one agent can hold all of it and deliver one artefact; nobody has to check or take over. "
    "Exactly one role, manager_role null, entry_role that role, max_steps 1.",
    "chain": "stages in an order known beforehand, each consuming the whole product of the one before. "
    "Two or more roles in the order of the stages, manager_role null, entry_role the first, max_steps the number of "
    "roles.",
    "decentralized": "pieces that do not need each other's results: separate units or deliverables, independent "
    "viewpoints, candidates or suspicions. Two or more roles, manager_role null, entry_role the one with the greatest "
    "share, max_steps the number of roles, or twice that where the peers must compare notes.",
    "centralized": "parts that depend on each other through something to be designed and kept in step, or an unknown "
    "division that somebody must direct. Two or more roles, manager_role one of them, entry_role the manager, "
    "max_steps the number of roles + 1, or + 3 for four or more parts or an unknown cause.",
}

TEMPLATE_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What chat templates are told. Llama 3.2's prints the day: what a router is asked must not change overnight, so it is
always the day that this template falls back to."""

_OPENINGS = (
    "You are a meta-router. Answer in JSON.",
    "You are a meta-router for coding agents. Reply with one JSON object.",
    "Choose a formation of agents for the task. Answer in JSON.",
    "Route the task: name the formation of agents that it needs, as JSON.",
)
_HEADERS = ("Task: ", "Task:\n", "The task: ", "Request: ", "")

_LEANING = {
    "balanced": "In doubt take the cheaper formation: single, chain, decentralized, centralized, in this order.",
    "prefer-single": "Lean towards single: take more than one role only where one agent would clearly fail.",
    "prefer-teams": "Lean towards teams: take single only where a second role would clearly have nothing to do.",
}


class Tokenizer(Protocol):
    """What the rendering needs of a transformers tokenizer."""

    eos_token_id: int | None

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Every added token by its id; `special` says that it steers the model."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Render messages with the model's own template."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenise text; the result has `input_ids`."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> Any:
        """Text of token ids."""


# -- messages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wording:
    """How a router is asked, beside what: the words around the task, and the order in which the choices are listed."""

    opening: str
    roles: tuple[str, ...]
    topologies: tuple[str, ...]
    header: str


def served_wording(space: DecisionSpace) -> Wording:
    """The one wording that routers are asked in."""
    return Wording(_OPENINGS[0], space.roles, space.topologies, _HEADERS[0])


def other_wordings(space: DecisionSpace, count: int, key: str) -> list[Wording]:
    """`count` other wordings, drawn by `key`, under which every decision stays as right as it was.

    The task's own words stay. Roles and topologies are listed in another order, but the decision's roles are not
    touched: a chain's are its stages, whatever the list, and all others' have the order of `space`, which is the only
    one that serving can give.
    """
    draw = random.Random(key)
    return [
        Wording(
            draw.choice(_OPENINGS),
            tuple(draw.sample(space.roles, len(space.roles))),
            tuple(draw.sample(space.topologies, len(space.topologies))),
            draw.choice(_HEADERS),
        )
        for _ in range(count)
    ]


def router_messages(text: str, space: DecisionSpace, wording: Wording | None = None) -> tuple[Message, Message]:
    """The system and user message that ask a router about one task; a `wording` other than the served one trains."""
    asked = wording or served_wording(space)
    meanings = "; ".join(f"{name}: {_MEANING[name]}" for name in asked.topologies)
    system = f"{asked.opening}\nRoles: {', '.join(asked.roles)}\n{meanings}\nmax_steps: up to {space.step_bound}"
    return Message(role="system", content=system), Message(role="user", content=f"{asked.header}{text}")


def teacher_messages(
    text: str, space: DecisionSpace, strategy: Strategy = "balanced", examples: Sequence[Example] = ()
) -> tuple[Message, ...]:
    """The messages that ask a teacher model, with the whole rubric (data/README.md in short): system, user.

    `examples` stand between the two, each as a turn of its own, question and answer. Turns and not prose, because they
    show the form of the answer along with its content: a server without structured output answers in the same form.
    They come before the task, so that what is the same for all tasks is a prefix that providers bill as cached.
    """
    rubric = "\n".join(f'- "{name}": {_RUBRIC[name]}' for name in space.topologies)
    system = (
        "You are a meta-router for software tasks. Decide which formation of LLM agents a task needs.\n"
        f"Available roles: {', '.join(space.roles)}. Take only roles that the task has work for, each at most once.\n"
        f"Topologies; the first that fits, asked in this order, is right:\n{rubric}\n"
        f"Length and difficulty of the task decide nothing. max_steps is never above {space.step_bound}. "
        f"{_LEANING[strategy]}\n"
        "Answer with one JSON object and nothing else: "
        '{"topology": "...", "roles": ["..."], "manager_role": null, "entry_role": "...", "max_steps": 1}'
    )
    turns = [
        message
        for example in examples
        for message in (
            Message(role="user", content=f"Task: {example.text}"),
            Message(role="assistant", content=render(example.decision)),
        )
    ]
    return Message(role="system", content=system), *turns, Message(role="user", content=f"Task: {text}")


def examples_id(examples: Sequence[Example]) -> str | None:
    """A short name of a few-shot set, the same for the same texts and decisions in the same order; None without any.

    Answers depend on the examples that were shown, so this is part of what a label row is resumed by.
    """
    if not examples:
        return None
    shown = json.dumps([[example.text, render(example.decision)] for example in examples])
    return hashlib.sha256(shown.encode()).hexdigest()[:12]


def reask_messages(answer: str, violations: Sequence[Violation]) -> tuple[Message, Message]:
    """The turn that hands an invalid answer back with the validator's words."""
    words = "; ".join(violation.text for violation in violations)
    return (
        # Some endpoints refuse an empty assistant message.
        Message(role="assistant", content=answer or "(no answer)"),
        Message(role="user", content=f"That decision is not valid: {words}. Answer again with the JSON object only."),
    )


def task_text(messages: Sequence[Message]) -> str:
    """The task's text of a training row's messages: the user message, without the leading `Task:`."""
    user = next((message.content for message in messages if message.role == "user"), "")
    return user.removeprefix("Task:").strip()


# -- decisions as text ----------------------------------------------------------------------------------------


def render(decision: Decision) -> str:
    """The canonical text of a decision: compact JSON, fields in the order of the schema (17 % fewer tokens)."""
    return json.dumps(decision.model_dump(), separators=(",", ":"), ensure_ascii=False)


def render_verdict(topology: str, solved: bool) -> str:
    """The text in which a router says whether a topology solves the task; begins as a decision does."""
    return json.dumps({"topology": topology, "solved": solved}, separators=(",", ":"))


def parse(answer: str, space: DecisionSpace) -> Resolved:
    """Read a decision out of a model's answer: think blocks, fences and prose around the JSON are passed over.

    Of several objects the last one that looks like a decision counts (models correct themselves); that more than one
    stood there is recorded. Nothing else is repaired: broken JSON is a violation.
    """
    decisions = decisions_in(answer)
    if not decisions:
        return Resolved(None, (Violation("no_json", "the answer holds no JSON object with a decision"),))
    resolved = space.resolve(decisions[-1])
    if len(decisions) > 1:
        note = f"last of {len(decisions)} decisions in the answer taken"
        resolved = Resolved(resolved.decision, resolved.violations, (*resolved.normalised, note))
    return resolved


def decisions_in(answer: str) -> list[dict[str, Any]]:
    """The JSON objects in an answer that look like a decision, unchecked, in the order in which they stand there."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL)
    # Where the template opens the think block, the answer holds only its end.
    return [value for value in _objects(text.rpartition("</think>")[2]) if "topology" in value]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict):
            yield value
        at = text.find("{", end)


# -- tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One training example as tokens: `input_ids`, and how many of the first are the prompt (no loss there).

    A `verdict` ends at the token that says whether a topology solves the task; all before it counts as the prompt.
    """

    input_ids: list[int]
    prompt_length: int
    cut_tokens: int = 0
    verdict: bool = False


@dataclass(frozen=True)
class Verdict:
    """How an answer about one topology goes on behind the prompt, up to where it says `solved` or `unsolved`."""

    start: list[int]
    solved: int
    unsolved: int


def encode_prompt(text: str, space: DecisionSpace, tokenizer: Tokenizer, wording: Wording | None = None) -> list[int]:
    """The prompt's token ids, up to where the answer begins; a thinking mode of the template is off.

    A special token that the task's text spells out is broken by a space: it would end the user's turn. Llama's
    templates print a date, the same one every day.
    """
    messages = [message.model_dump() for message in router_messages(_broken(text, tokenizer), space, wording)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS)
    # The template writes the special tokens itself: adding them again would double the BOS of Llama-like models.
    return _ids(rendered, tokenizer)


def _broken(text: str, tokenizer: Tokenizer) -> str:
    """`text` with a space in every special token that it spells out."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and str(token) in text:
            text = text.replace(str(token), f"{str(token)[:1]} {str(token)[1:]}")
    return text


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    # Not verbose: that a text is longer than the model's context is said, or mended, by who asks.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_answer(decision: Decision, tokenizer: Tokenizer) -> list[int]:
    """The canonical answer's token ids with the end token, as a router is trained to give it."""
    return [*tokenizer(render(decision), add_special_tokens=False)["input_ids"], end_token(tokenizer)]


def encode_verdict(topology: str, tokenizer: Tokenizer) -> Verdict:
    """The tokens of a router's word on whether a topology solves a task."""
    yes, no = (_ids(render_verdict(topology, solved), tokenizer) for solved in (True, False))
    at = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
    return Verdict(yes[:at], yes[at], no[at])


def end_token(tokenizer: Tokenizer) -> int:
    """The token that ends an answer. Raises ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token")
    return tokenizer.eos_token_id


def encode_example(
    text: str,
    decision: Decision,
    space: DecisionSpace,
    tokenizer: Tokenizer,
    max_length: int,
    wording: Wording | None = None,
) -> Encoded:
    """A task and its decision as tokens, at most `max_length` of them.

    An over-long task loses words from the middle of its text, where the least is said, never the answer's end.
    Raises ValueError where even an empty task does not fit.
    """
    answer = encode_answer(decision, tokenizer)
    prompt, cut = fit_prompt(text, space, tokenizer, max_length - len(answer), wording)
    return Encoded(prompt + answer, len(prompt), cut)


def fit_prompt(
    text: str, space: DecisionSpace, tokenizer: Tokenizer, budget: int, wording: Wording | None = None
) -> tuple[list[int], int]:
    """The prompt of a task within `budget` tokens, and how many tokens of the task were cut from its middle."""
    prompt = encode_prompt(text, space, tokenizer, wording)
    if len(prompt) <= budget:
        return prompt, 0
    # Broken as they will be asked: whole, special tokens would count as one word each.
    words = _ids(_broken(text, tokenizer), tokenizer)
    keep = len(words) - (len(prompt) - budget)
    while keep > 0:
        # Cutting between tokens can change how the rest is tokenised by a few, so the loop tightens until it fits.
        # A cut through the bytes of one character leaves U+FFFD on either side.
        head = str(tokenizer.decode(words[: (keep + 1) // 2])).rstrip("\ufffd").rstrip()
        tail = str(tokenizer.decode(words[len(words) - keep // 2 :])).lstrip("\ufffd").lstrip()
        shorter = f"{head} … {tail}"
        prompt = encode_prompt(shorter, space, tokenizer, wording)
        if len(prompt) <= budget:
            return prompt, len(words) - keep
        keep -= max(1, len(prompt) - budget)
    raise ValueError(f"the prompt without any task takes more than the {budget} tokens that max_length leaves for it")
