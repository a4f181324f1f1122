"""Few-shot examples: which ones, checked how, and how they reach the teacher."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router_cli import examples, prompts
from router_cli.errors import InputError, RouterError, SettingsError
from router_cli.examples import Examples, choose
from router_cli.label import label
from router_cli.schema import Decision, Example
from router_cli.sections import MOST_EXAMPLES
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.tasks import read_tasks
from tests.fake_teacher import FakeTeacher

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}
CHAIN = SINGLE | {"topology": "chain", "roles": ["builder", "tester"], "max_steps": 2}


def settings(**values: Any) -> Settings:
    chosen = {key.replace("__", "."): value for key, value in values.items()}
    return load({key: (f"--{key.partition('.')[2]}", value) for key, value in chosen.items()}, environ={})


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def example(text: str, decision: dict[str, Any]) -> Example:
    return Example(
        task_id=text, text=text, decision=Decision.model_validate_json(json.dumps(decision)), sample_type="test"
    )


# -- in the prompt ----------------------------------------------------------------------------------------------


def test_examples_stand_as_answered_turns_between_the_rubric_and_the_task() -> None:
    shown = [example("Sum a list.", SINGLE), example("Write it, then test it.", CHAIN)]
    system, *turns, last = prompts.teacher_messages("Sort a list.", SPACE, "balanced", shown)
    assert system == prompts.teacher_messages("Sort a list.", SPACE)[0]
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[0].content == "Task: Sum a list." and last.content == "Task: Sort a list."
    # The answers are what a router learns to say, and pass the check that every teacher's answer has to pass.
    assert [prompts.parse(turn.content, SPACE).decision for turn in turns[1::2]] == [one.decision for one in shown]


def test_a_task_is_never_its_own_example_and_its_topology_stays_in_the_prompt() -> None:
    sum_, test = example("Sum a list.", SINGLE), example("Write it, then test it.", CHAIN)
    spare = example("Sort a list.", SINGLE)
    few = Examples((sum_, test), (spare, example("Plan, then build.", CHAIN)))
    assert few.beside("Reverse a list.") == (sum_, test)
    assert few.beside("sum  a LIST.\n") == (spare, test)
    assert Examples((sum_, test)).beside("Sum a list.") == (test,)
    assert examples.NO_EXAMPLES.beside("Sum a list.") == ()


def test_the_teacher_is_sent_the_examples_and_a_task_not_itself(tmp_path: Path) -> None:
    few = choose(settings(label__shots=4))
    data = write(tmp_path / "tasks.jsonl", {"task": "Sort a list."}, {"task": few.shown[1].text})
    with FakeTeacher() as server:
        label(
            settings(label__shots=4, label__data=data, label__output=str(tmp_path / "o"), endpoint__base_url=server.url)
        )
    sent = {call.messages[-1]["content"].removeprefix("Task: "): call.messages for call in server.calls}
    for text, instead in ("Sort a list.", few.shown[1]), (few.shown[1].text, few.spare[1]):
        asked = [few.shown[0], instead, *few.shown[2:]]
        expected = prompts.teacher_messages(text, SPACE, "balanced", asked)
        assert sent[text] == [message.model_dump() for message in expected]


def test_other_examples_make_other_rows_and_going_back_costs_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "tasks.jsonl", {"task": "Sort a list."})
    with FakeTeacher() as server:
        paid = []
        for shots in ({}, {"label__shots": 4}, {"label__shots": 5}, {"label__shots": 4}, {}):
            given = {"label__data": data, "label__output": str(tmp_path / "o"), "endpoint__base_url": server.url}
            label(settings(**given, **shots))
            paid.append(len(server.calls))
    assert paid == [1, 2, 3, 3, 3]


def test_the_name_of_a_set_follows_texts_decisions_and_order() -> None:
    first, second = example("a", SINGLE), example("b", SINGLE)
    sets = [
        Examples((first, second)),
        Examples((second, first)),
        Examples((first,)),
        Examples((first, example("b", CHAIN))),
        Examples((first,), (second, example("c", SINGLE))),
    ]
    names = [one.id for one in sets]
    assert len(set(names)) == len(names) and None not in names
    assert Examples((first, second)).id == names[0] and examples.NO_EXAMPLES.id is None


# -- from the project's own tasks -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 6, 12, MOST_EXAMPLES])
def test_shots_show_all_topologies_alike_and_no_task_twice(count: int) -> None:
    few = choose(settings(label__shots=count))
    each = Counter(one.decision.topology for one in few.shown)
    assert len(few.shown) == count and set(each) == set(SPACE.topologies)
    assert max(each.values()) - min(each.values()) <= 1
    assert [one.decision.topology for one in few.spare] == list(SPACE.topologies)
    assert len({one.text for one in (*few.shown, *few.spare)}) == count + len(SPACE.topologies)


def test_shots_come_from_the_training_split_alone_and_are_the_same_every_time() -> None:
    few = choose(settings(label__shots=32))
    train = {task.text for task in read_tasks(["rubric"]) if task.split == "train"}
    assert {one.text for one in (*few.shown, *few.spare)} <= train
    assert choose(settings(label__shots=32)) == few


def test_eight_shots_are_of_several_kinds_and_parts() -> None:
    tasks = {task.text: task for task in read_tasks(["rubric"])}
    found = [tasks[one.text] for one in choose(settings(label__shots=8)).shown]
    assert len({task.kind for task in found}) >= 4 and len({task.id.split("-")[0] for task in found}) == 6
    assert {task.lang for task in found} == {"en", "zh"}


def test_shots_keep_to_the_decision_space() -> None:
    few = choose(settings(label__shots=4, decision__roles="checker,builder", decision__topologies="single,chain"))
    assert {one.decision.topology for one in few.shown} == {"single", "chain"}
    assert {role for one in few.shown for role in one.decision.roles} <= {"checker", "builder"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label__shots": 3}, r"label\.shots \(--shots\): must be at least 4, one example of each topology, got 3"),
        ({"label__shots": 4, "decision__roles": "cook,waiter"}, r"too few examples of single for the roles cook, wai"),
        ({"label__shots": 4, "label__examples": "x"}, r"label\.examples \(--examples\) and label\.shots .* exclude"),
        ({"label__shots": 4, "label__teacher": "heuristic"}, "the teacher heuristic takes no examples"),
        ({"label__examples": "x", "label__teacher": "recorded"}, "the teacher recorded takes no examples"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        choose(settings(**values))


# -- from a file ------------------------------------------------------------------------------------------------


def test_a_file_may_hold_task_rows_and_label_rows(tmp_path: Path) -> None:
    question = [{"role": one.role, "content": one.content} for one in prompts.router_messages("Sum a list.", SPACE)]
    answer = {"role": "assistant", "content": json.dumps(SINGLE)}
    file = write(
        tmp_path / "few.jsonl",
        {"task": "Write it, then test it.", "decision": CHAIN | {"roles": ["builder", "checker"]}},
        {"messages": [*question, answer], "sample_type": "teacher_distilled", "origin_task_id": "t1"},
    )
    few = choose(settings(label__examples=file, decision__roles="planner,builder,tester"))
    assert [one.text for one in few.shown] == ["Write it, then test it.", "Sum a list."]
    assert few.shown[0].decision.roles == ("builder", "tester") and few.spare == ()


BAD = [
    ([{"task": "a", "decision": SINGLE}, {"task": "b", "decision": SINGLE | {"max_steps": 4}}], r":2: steps_out_of_ra"),
    ([{"task": "a", "decision": SINGLE | {"roles": ["cook"], "entry_role": "cook"}}], r":1: unknown_role"),
    ([{"task": "a"}], r":1: has no decision"),
    ([{"task": "a", "decision": SINGLE, "split": "test"}], "of the test split"),
    (
        [{"id": "x", "task": "a b", "decision": SINGLE}, {"id": "x", "task": "A  b", "decision": CHAIN}],
        "same task as x",
    ),
    ([{"task": f"part {i}", "decision": SINGLE} for i in range(MOST_EXAMPLES + 1)], "more than 64 examples"),
    ([], "holds no row"),
]


@pytest.mark.parametrize(("rows", "said"), BAD, ids=[said for _, said in BAD])
def test_a_file_that_cannot_be_shown_is_refused_with_its_line(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "few.jsonl", *rows)
    with pytest.raises(InputError, match=said) as error:
        choose(settings(label__examples=file))
    assert str(error.value).startswith(file) and "drop-no-output" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="no such file"):
        choose(settings(label__examples=str(tmp_path / "few.jsonl")))
