"""A router behind a server: whose probabilities are read out of an answer that says more than the decision."""

from __future__ import annotations

import re

import pytest

from router_cli.backends import Choice
from router_cli.backends.remote import RemoteBackend
from router_cli.settings import load
from tests.fake_teacher import FakeTeacher
from tests.training import Recorder
from tests.unit.test_infer import SINGLE, logprobs, with_logprobs

CHAIN = '{"topology":"chain","roles":["planner","builder"],"manager_role":null,"entry_role":"planner","max_steps":2}'
SURE = {"single": [("single", 0.99), ("chain", 0.01)], "chain": [("chain", 0.9), ("single", 0.1)]}
"""How likely the server's tokens say each name is, where they write it."""


def decided(content: str, seen: str | None = None) -> Choice:
    """What comes of an answer, a token a word or sign; `seen` is the text that the log probabilities are about."""
    pieces = re.findall(r"\w+|\W", content if seen is None else seen)
    given = logprobs([(piece, SURE.get(piece, [])) for piece in pieces])
    with FakeTeacher(with_logprobs(content, given)) as server:
        chosen = {"infer.model": "m", "endpoint.base_url": server.url, "endpoint.api_key": "k"}
        backend = RemoteBackend(load({key: ("test", value) for key, value in chosen.items()}, environ={}), Recorder())
        try:
            [choice] = backend.decide(["Sort a list"])
        finally:
            backend.close()
    return choice


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (f"<think>\nPerhaps {CHAIN}? No, one is enough.\n</think>\n\n{SINGLE}", None),
        (f"First thought: {CHAIN}\nBetter: {SINGLE}", None),
        (SINGLE, f"Perhaps {CHAIN}? No, one is enough.\n</think>\n\n{SINGLE}"),  # a server that hides what was thought
        (f"{CHAIN} - no: {SINGLE.replace(':', ' : ')}", None),
    ],
    ids=["think block", "corrects itself", "hidden by the server", "spaced out"],
)
def test_the_probabilities_are_those_of_the_decision_not_of_what_was_thought_before(
    content: str, seen: str | None
) -> None:
    choice = decided(content, seen)
    assert choice.decision.topology == "single"
    assert choice.topologies == pytest.approx({"single": 0.99, "chain": 0.01, "decentralized": 0.0, "centralized": 0.0})
    assert choice.probability == pytest.approx(0.99)


def test_a_name_that_is_not_the_decisions_says_nothing_of_it() -> None:
    for content in (f'{SINGLE}\nRather "topology": "chain", had it two parts.', f"{SINGLE}<think>{CHAIN}"):
        choice = decided(content)
        assert choice.decision.topology == "single"
        assert choice.topologies is None and choice.probability is None
