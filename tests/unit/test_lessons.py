"""Lessons: what is looked at before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router_cli import prompts
from router_cli.errors import ModelError, TrainingError
from router_cli.schema import Decision, Example
from router_cli.space import DecisionSpace
from router_cli.train import train
from router_cli.training.lessons import check_model, encode
from tests import templates
from tests.tiny import STYLES, Style, tiny_model, tiny_tokenizer
from tests.training import Recorder, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
EXAMPLES = [
    Example(
        task_id=row["id"],
        text=row["task"],
        decision=Decision.model_validate(row["decision"], strict=False),
        sample_type="teacher_distilled",
    )
    for row in label_rows(8, 0)
]


def lessons(tokenizer: Any, examples: list[Example] = EXAMPLES, **options: Any) -> list[prompts.Encoded]:
    return encode(examples, SPACE, tokenizer, 2048, Recorder(), **options)


@pytest.mark.parametrize("style", STYLES)
def test_sound_examples_pass(style: Style) -> None:
    tokenizer, said = tiny_tokenizer(style), Recorder()
    check_model(SimpleNamespace(), tokenizer, SPACE, "base", said)
    assert len(lessons(tokenizer)) == 8 and not said.warnings


def test_a_beginning_that_stands_there_twice_is_refused_and_the_example_named() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + templates.LLAMA3
    with pytest.raises(TrainingError, match=r"example t0: .*beginning-of-text token twice; mend .*chat template"):
        lessons(tokenizer)


def test_an_answer_that_the_tokenizer_does_not_keep_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer("smollm")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("centralized", "c")
    with pytest.raises(TrainingError, match=r'example t2: the tokenizer makes .*"dec".* take another base model'):
        lessons(tokenizer)


def test_a_role_that_is_a_special_token_is_refused() -> None:
    space = DecisionSpace(("<|im_end|>", "builder"))
    decision = Decision(
        topology="single", roles=("<|im_end|>",), manager_role=None, entry_role="<|im_end|>", max_steps=1
    )
    with pytest.raises(TrainingError, match=r"example t0: .*role name without special tokens"):
        encode([EXAMPLES[0].model_copy(update={"decision": decision})], space, tiny_tokenizer(), 2048, Recorder())


def test_a_decision_that_serving_can_never_give_is_refused() -> None:
    swapped = EXAMPLES[2].decision.model_copy(update={"roles": EXAMPLES[2].decision.roles[::-1]})
    with pytest.raises(TrainingError, match=r"example t2: the router could never answer .*label it again"):
        lessons(tiny_tokenizer(), [EXAMPLES[0], EXAMPLES[2].model_copy(update={"decision": swapped})])


def test_augmented_lessons_ask_otherwise_and_answer_alike() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    rows = lessons(tokenizer, augment=2, seed=1)
    assert rows[:8] == lessons(tokenizer) and len(rows) == 24
    for i, row in enumerate(rows[8:]):
        plain = rows[i // 2]
        assert row.input_ids[row.prompt_length :] == plain.input_ids[plain.prompt_length :]
        assert row.input_ids[: row.prompt_length] != plain.input_ids[: plain.prompt_length]
    assert lessons(tokenizer, augment=2, seed=1) == rows != lessons(tokenizer, augment=2, seed=2)


def asked_of(template: str, style: Style = "qwen3", **generation: Any) -> Recorder:
    tokenizer, said = tiny_tokenizer(style), Recorder()
    tokenizer.chat_template = template
    model = SimpleNamespace(generation_config=SimpleNamespace(**generation)) if generation else SimpleNamespace()
    check_model(model, tokenizer, SPACE, "base", said)
    return said


def test_a_think_block_that_stays_open_is_refused() -> None:
    with pytest.raises(ModelError, match="base: its chat template opens a think block"):
        asked_of(templates.ALWAYS_THINKING)


def test_a_template_without_a_system_role_is_refused() -> None:
    with pytest.raises(ModelError, match=r"base: its chat template refuses .*System role not supported"):
        asked_of(templates.NO_SYSTEM)


def test_a_template_that_drops_the_system_message_is_refused() -> None:
    with pytest.raises(ModelError, match="leaves a part of the router's prompt out"):
        asked_of("{% for message in messages[1:] %}{{ message['content'] }}{% endfor %}")


def test_an_end_that_other_servers_do_not_stop_at_is_warned_about() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    assert not asked_of(templates.QWEN3, eos_token_id=[1, tokenizer.eos_token_id]).warnings
    [said] = asked_of(templates.QWEN3, eos_token_id=tokenizer.pad_token_id).warnings
    assert said.startswith("base: answers are taught to end with <|im_end|>, but its generation_config.json")


def test_a_template_that_prints_the_day_without_being_told_is_warned_about() -> None:
    [said] = asked_of("{{ strftime_now('%Y') }}" + templates.QWEN3).warnings
    assert "the router will be asked otherwise tomorrow" in said
    assert not asked_of(templates.LLAMA3_2, "llama3").warnings


def test_the_checks_come_before_the_first_step(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "qwen3", 1, 16)
    (base / "chat_template.jinja").write_text(templates.ALWAYS_THINKING)
    data, said = write_rows(tmp_path / "data.jsonl", label_rows(8, 0)), Recorder()
    with pytest.raises(ModelError, match="think block"):
        train(train_settings(data, base, tmp_path / "a", validation_share=0), said)
    assert "train" not in said.bars
