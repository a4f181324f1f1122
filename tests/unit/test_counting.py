"""Counting tokens before anybody is asked, and learning from what answers took."""

from __future__ import annotations

import pytest

from router_cli.schema import Usage
from router_cli.teachers.counting import Meter, at_most


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("openai/gpt-4.1", "o200k_base"),
        ("o3", "o200k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("openai/gpt-oss-20b", "o200k_harmony"),
        ("Qwen/Qwen3-8B", "qwen3.5"),
        ("mistral-large", "o200k_base (another model's)"),
    ],
)
def test_each_family_is_counted_with_its_own_vocabulary(model: str, vocabulary: str) -> None:
    assert Meter(model).name == vocabulary


def test_a_chat_counts_as_openai_bills_it() -> None:
    # "hello world" is two tokens; four wrap the message, three open the answer.
    assert Meter("gpt-4o").count(["hello world"]) == 9
    assert Meter("gpt-4o").count(["half a character: \ud83d, and <|endoftext|> as plain text"]) > 7


def test_no_chat_has_more_tokens_than_the_bound() -> None:
    for text in ("", "plain", "\U0001f600" * 50, "数据库" * 30, "\x00\x01\x02" * 20):
        for model in ("gpt-4o", "gpt-4", "Qwen/Qwen3-8B"):
            assert Meter(model).count([text, text]) <= at_most([text, text])


def test_finished_asks_correct_what_is_expected() -> None:
    meter = Meter("some-model")
    assert meter.expected(700).prompt_tokens == 700 and meter.error is None
    for _ in range(20):
        meter.answered(700, 1000)
        meter.finished(700, Usage(prompt_tokens=1200, completion_tokens=90, attempts=2))
    expected = meter.expected(1400)
    assert (expected.prompt_tokens, expected.completion_tokens, expected.attempts) == (2400, 90, 2)
    assert meter.error == pytest.approx(-0.3)


def test_an_endpoint_that_reports_no_usage_teaches_nothing() -> None:
    meter = Meter("some-model")
    meter.answered(700, 0)
    meter.finished(700, Usage())
    assert meter.error is None and meter.expected(700).prompt_tokens == 700


def test_of_many_answers_a_part_is_counted_and_the_others_teach_nothing() -> None:
    meter = Meter("some-model")
    counts = [meter.sampled(["a question"]) for _ in range(1200)]
    assert all(counts[:200]) and sum(count > 0 for count in counts) == 300
    for count in counts:
        meter.answered(count, 2 * counts[0])
        meter.finished(count, Usage(prompt_tokens=4 * counts[0], completion_tokens=90))
    assert meter.error == pytest.approx(-0.5) and meter.expected(100).prompt_tokens == 400
