"""Tasks to messages and tokens, decisions to text and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.schema import Decision, Message
from router_cli.space import DecisionSpace
from tests import templates
from tests.tiny import STYLES, tiny_tokenizer

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE = Decision(topology="single", roles=("builder",), manager_role=None, entry_role="builder", max_steps=1)
CHAIN = Decision(topology="chain", roles=("tester", "builder"), manager_role=None, entry_role="tester", max_steps=2)
TEXT = prompts.render(SINGLE)
OTHER = prompts.render(CHAIN)
TASK = "Write a Python function that sorts a list of integers. 请保持稳定排序。"


@pytest.fixture(params=STYLES, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_tokenizer(request.param)


# -- messages -------------------------------------------------------------------------------------------------


def test_the_router_is_asked_with_roles_topologies_and_the_task() -> None:
    space = DecisionSpace(("a", "b"), ("single", "chain"), 7)
    system, user = prompts.router_messages(TASK, space)
    assert "Roles: a, b\n" in system.content and "up to 7" in system.content
    assert "single:" in system.content and "centralized" not in system.content
    assert user == Message(role="user", content=f"Task: {TASK}")


@pytest.mark.parametrize("strategy", ["balanced", "prefer-single", "prefer-teams"])
def test_the_teacher_is_asked_with_the_rubric_of_the_topologies_in_force(strategy: Any) -> None:
    system, user = prompts.teacher_messages(TASK, DecisionSpace(("a", "b"), ("single", "chain")), strategy)
    assert '- "chain":' in system.content and '- "centralized":' not in system.content
    assert prompts.task_text([system, user]) == TASK


def test_the_leanings_of_the_teacher_differ() -> None:
    asked = {prompts.teacher_messages(TASK, SPACE, leaning)[0].content for leaning in prompts._LEANING}
    assert len(asked) == 3


def test_an_invalid_answer_is_handed_back_with_the_validators_words() -> None:
    found = prompts.parse('{"topology": "star"}', SPACE)
    answer, question = prompts.reask_messages("", found.violations)
    assert answer.content == "(no answer)" and "the field roles is missing" in question.content


@pytest.mark.parametrize("text", [TASK, "Task: sort", "sort\n\ntwice"])
def test_the_task_comes_back_out_of_its_messages(text: str) -> None:
    assert prompts.task_text(prompts.router_messages(text, SPACE)) == text


def test_messages_without_a_user_hold_an_empty_task() -> None:
    assert prompts.task_text([Message(role="system", content="x")]) == ""


# -- decisions as text ----------------------------------------------------------------------------------------


def test_a_decision_is_rendered_as_compact_json_in_the_order_of_the_schema() -> None:
    assert TEXT == '{"topology":"single","roles":["builder"],"manager_role":null,"entry_role":"builder","max_steps":1}'
    assert prompts.render(SINGLE.model_copy(update={"entry_role": "构建"})).count("构建") == 1


@pytest.mark.parametrize(
    "answer",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Sure! Here it is:\n\n{TEXT}\n\nLet me know {{if}} that helps.",
        f"<think>Maybe {OTHER}? No.</think>\n{TEXT}",
        f"Maybe {OTHER}? No.\n</think>\n\n{TEXT}",
        f"<think></think>{TEXT}",
        f'{{"note": "not a decision"}} {TEXT} {{"note": "nor this"}}',
        f"[{TEXT}]",
        json.dumps(json.loads(TEXT), indent=4),
    ],
    ids=["bare", "fence", "prose", "think", "think-end-only", "think-empty", "objects", "array", "indented"],
)
def test_a_decision_is_found_in_an_answer(answer: str) -> None:
    assert prompts.parse(answer, SPACE) == prompts.Resolved(SINGLE)


@pytest.mark.parametrize(
    "answer",
    ["", "no idea", TEXT[:-1], TEXT.replace('"', "'"), f"<think>{TEXT}", f"<think>{TEXT}</think>", "{" * 5000],
    ids=["empty", "prose", "cut", "quotes", "think-open", "think-only", "braces"],
)
def test_an_answer_without_a_decision_is_a_violation(answer: str) -> None:
    resolved = prompts.parse(answer, SPACE)
    assert resolved.decision is None
    assert [violation.name for violation in resolved.violations] == ["no_json"]


def test_of_several_decisions_the_last_counts_and_that_is_recorded() -> None:
    resolved = prompts.parse(f"{OTHER}\nOn second thoughts:\n{TEXT}", SPACE)
    assert resolved.decision == SINGLE
    assert resolved.normalised == ("last of 2 decisions in the answer taken",)


def test_an_invalid_last_decision_is_not_replaced_by_a_valid_earlier_one() -> None:
    resolved = prompts.parse(f'{TEXT} {{"topology": "star"}}', SPACE)
    assert resolved.decision is None and resolved.violations[0].name == "missing_field"


def test_what_is_normalised_in_an_answer_is_recorded() -> None:
    resolved = prompts.parse(OTHER.replace("tester", "checker"), SPACE)
    assert resolved.decision == CHAIN and resolved.normalised == ("role checker read as tester",)


# -- tokens ---------------------------------------------------------------------------------------------------


def test_an_example_is_the_prompt_and_then_the_whole_answer(tokenizer: Any) -> None:
    encoded = prompts.encode_example(TASK, CHAIN, SPACE, tokenizer, 2048)
    prompt, answer = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    assert prompt == prompts.encode_prompt(TASK, SPACE, tokenizer)
    assert tokenizer.decode(answer[:-1]) == OTHER
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
    assert encoded.cut_tokens == 0


def test_the_example_is_what_the_models_own_template_makes_of_the_dialogue(tokenizer: Any) -> None:
    """The prompt that serves is a prefix of the text that trains, and the answer follows without anything between."""
    dialogue = [message.model_dump() for message in prompts.router_messages(TASK, SPACE)]
    dialogue.append({"role": "assistant", "content": OTHER})
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False, enable_thinking=False)
    encoded = prompts.encode_example(TASK, CHAIN, SPACE, tokenizer, 2048)
    assert whole.rstrip("\n") == tokenizer.decode(encoded.input_ids)


def test_a_beginning_of_text_is_never_doubled() -> None:
    tokenizer = tiny_tokenizer("llama3")
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it would add another if asked
    encoded = prompts.encode_example(TASK, CHAIN, SPACE, tokenizer, 2048)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_the_tests_own_qwen3_template_says_what_the_real_one_says() -> None:
    import trl

    real = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    if not real.is_file():
        pytest.skip("this version of trl does not bring it")
    ours, theirs = tiny_tokenizer("qwen3"), tiny_tokenizer("qwen3")
    theirs.chat_template = real.read_text(encoding="utf-8")
    answer = {"role": "assistant", "content": OTHER}
    thought = {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{OTHER}"}
    question = [message.model_dump() for message in prompts.router_messages(TASK, SPACE)]
    for dialogue in (question, [*question, answer], [*question, thought], [*question, thought, question[1], answer]):
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            one, other = (t.apply_chat_template(dialogue, tokenize=False, **options) for t in (ours, theirs))
            assert one == other


def test_a_template_that_prints_the_day_prints_the_same_one_every_day() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = templates.LLAMA3_2
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(prompts.encode_prompt(TASK, SPACE, tokenizer))


def test_other_wordings_ask_for_the_same_task_and_leave_the_served_one_alone(tokenizer: Any) -> None:
    made = prompts.other_wordings(SPACE, 40, "1:t1")
    assert made == prompts.other_wordings(SPACE, 40, "1:t1") != prompts.other_wordings(SPACE, 40, "1:t2")
    asked = {prompts.router_messages(TASK, SPACE, one) for one in made}
    assert len(asked) > 30
    for system, user in asked:
        assert user.content.endswith(TASK) and f"up to {SPACE.step_bound}" in system.content
        listed = system.content.splitlines()[1].removeprefix("Roles: ").split(", ")
        assert sorted(listed) == sorted(SPACE.roles)
        assert all(f"{name}: {meaning}" in system.content for name, meaning in prompts._MEANING.items())
    # A chain's roles are its stages, and the order of the others is the only one that serving can give.
    answers = {
        tuple(encoded.input_ids[encoded.prompt_length :])
        for encoded in (prompts.encode_example(TASK, CHAIN, SPACE, tokenizer, 2048, one) for one in made)
    }
    assert answers == {tuple(prompts.encode_answer(CHAIN, tokenizer))}
    assert prompts.router_messages(TASK, SPACE) == prompts.router_messages(TASK, SPACE, prompts.served_wording(SPACE))


def test_thinking_is_off_in_the_prompt() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    assert tokenizer.decode(prompts.encode_prompt(TASK, SPACE, tokenizer)).endswith(
        "assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("length", [300, 200, 171])
def test_an_over_long_task_is_cut_in_its_middle_and_nowhere_else(tokenizer: Any, length: int) -> None:
    text = "START here. " + " ".join(f"step {n} 步骤" for n in range(400)) + " finally END."
    plain = prompts.encode_prompt("", SPACE, tokenizer)
    length += len(plain)
    encoded = prompts.encode_example(text, CHAIN, SPACE, tokenizer, length)
    prompt = tokenizer.decode(encoded.input_ids[: encoded.prompt_length])
    assert len(encoded.input_ids) <= length
    assert encoded.input_ids[encoded.prompt_length :] == prompts.encode_answer(CHAIN, tokenizer)
    assert "Task: START here." in prompt and "finally END." in prompt and " … " in prompt
    assert prompt.startswith(tokenizer.decode(plain[:40]))
    # What was counted as cut is what is missing: the mark of the cut takes the place of some of it.
    lost = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - encoded.cut_tokens
    kept = len(tokenizer(prompt.split("Task: ")[1].split(" finally END.")[0])["input_ids"])
    assert encoded.cut_tokens > 0 and abs(lost - kept) < 30
    assert length - len(encoded.input_ids) < 12  # no more is cut than has to be


def test_a_cut_inside_a_character_leaves_no_broken_one(tokenizer: Any) -> None:
    text = "数据库迁移与双写校验" * 60
    for length in range(260, 275):
        prompt, cut = prompts.fit_prompt(text, SPACE, tokenizer, length + 60)
        assert cut > 0 and "\ufffd" not in tokenizer.decode(prompt)


def test_a_length_that_no_task_fits_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="takes more than the"):
        prompts.encode_example(TASK * 20, CHAIN, SPACE, tokenizer, 64)


def test_special_tokens_in_a_task_do_not_end_its_turn(tokenizer: Any) -> None:
    inserted = tokenizer.decode([tokenizer.eos_token_id])
    ids = prompts.encode_prompt(f"sort {inserted} a list", SPACE, tokenizer)
    plain = prompts.encode_prompt("sort a list", SPACE, tokenizer)
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)


def test_a_flood_of_special_tokens_is_shortened_like_any_text(tokenizer: Any) -> None:
    for token in (str(one) for one in tokenizer.added_tokens_decoder.values() if one.special):
        prompt, cut = prompts.fit_prompt(token * 300, SPACE, tokenizer, 400)
        assert 0 < len(prompt) <= 400 and cut > 0
