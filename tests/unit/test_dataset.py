"""Labels to examples: the shapes of rows, roles of the data, duplicates, splits, leakage, subsets."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.dataset import Dataset, build, leakage, read_labels, roles_of
from router_cli.errors import InputError, TrainingError
from router_cli.schema import Decision, Example, Label, Message, Provenance
from router_cli.settings import load
from router_cli.space import TOPOLOGIES, DecisionSpace
from router_cli.tasks import near_duplicates

ROLES = ("planner", "builder", "tester", "refractor")
SPACE = DecisionSpace(ROLES)
DECISIONS = {
    "single": Decision(topology="single", roles=("builder",), manager_role=None, entry_role="builder", max_steps=1),
    "chain": Decision(
        topology="chain", roles=("planner", "builder"), manager_role=None, entry_role="planner", max_steps=2
    ),
    "decentralized": Decision(
        topology="decentralized", roles=("builder", "tester"), manager_role=None, entry_role="builder", max_steps=2
    ),
    "centralized": Decision(
        topology="centralized", roles=("planner", "builder"), manager_role="planner", entry_role="planner", max_steps=3
    ),
}
OLD_SYSTEM = (
    'You are a meta-router for code development. Decide the best topology.\nReturn JSON: {"topology": "..."}\n\n'
    'Roles: builder, planner, checker, researcher\n\n\n**Roles:** single=["builder"], decentralized=2-3 no mgr\n'
)
HUMANEVAL = {"task_id": "HumanEval/7", "prompt": "def add(a, b):\n    '''Add.'''", "entry_point": "add", "test": "..."}


def task(n: int) -> str:
    """A text that is like no other: near-duplicates are the tests' own."""
    chance = random.Random(n)
    return " ".join("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(12))


def row(n: int, topology: str = "single", **more: Any) -> dict[str, Any]:
    return {"id": f"t{n}", "task": task(n), "decision": DECISIONS[topology].model_dump(mode="json")} | more


def old_row(decision: Any, text: str = "sort", system: str = OLD_SYSTEM) -> dict[str, Any]:
    """A row of the old generator, which wrote nothing else."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Task: {text}\nEntry point: f"},
        {"role": "assistant", "content": decision if isinstance(decision, str) else json.dumps(decision)},
    ]
    return {"messages": messages, "sample_type": "mbpp_teacher_distilled", "origin_task_id": 7}


def label(n: int, topology: str = "single", roles: tuple[str, ...] = ROLES, **more: Any) -> dict[str, Any]:
    """A row as `router label` writes it."""
    question = prompts.router_messages(task(n), DecisionSpace(roles))
    answer = Message(role="assistant", content=prompts.render(DECISIONS[topology]))
    provenance = Provenance(
        teacher="openai", model="m", prompt_version="1", roles=roles, strategy="balanced", key=str(n)
    )
    made = Label(
        messages=(*question, answer),
        sample_type="teacher_distilled",
        origin_task_id=f"t{n}",
        decision=DECISIONS[topology],
        provenance=provenance,
    )
    return made.model_dump(mode="json") | more


def write(folder: Path, *rows: Any, name: str = "labels.jsonl") -> str:
    path = folder / name
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, **options: Any) -> list[Example]:
    return list(read_labels([write(folder, *rows)], SPACE, **options))


def built(path: str, space: DecisionSpace = SPACE, **options: Any) -> Dataset:
    given = {"train.data": ("--data", path), **{f"train.{key}": (f"--{key}", value) for key, value in options.items()}}
    return build(load(given, environ={}), space)


def ids(examples: list[Example]) -> list[str]:
    return [example.task_id for example in examples]


# -- rows -----------------------------------------------------------------------------------------------------


def test_rows_of_router_label(tmp_path: Path) -> None:
    assert read(tmp_path, label(1, "chain", split="validation")) == [
        Example(
            task_id="t1",
            text=task(1),
            decision=DECISIONS["chain"],
            split="validation",
            sample_type="teacher_distilled",
        )
    ]


def test_rows_of_the_old_generator(tmp_path: Path) -> None:
    decision = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder"}
    [example] = read(tmp_path, old_row(f"```json\n{json.dumps(decision | {'max_steps': 1})}\n```"))
    assert example == Example(
        task_id="7", text="sort\nEntry point: f", decision=DECISIONS["single"], sample_type="mbpp_teacher_distilled"
    )


def test_rows_of_tasks_with_a_decision(tmp_path: Path) -> None:
    [example] = read(tmp_path, row(1, "centralized", split="test", lang="en", kind="bug"))
    assert (example.decision, example.split) == (DECISIONS["centralized"], "test")
    assert (example.sample_type, example.text) == ("teacher_distilled", task(1))


def test_raw_humaneval_rows_are_labelled_offline_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.jsonl:1: is a raw HumanEval row .*--convert-humaneval"):
        read(tmp_path, HUMANEVAL)
    [example] = read(tmp_path, HUMANEVAL, convert_humaneval=True)
    assert (example.task_id, example.sample_type) == ("HumanEval/7", "humaneval_heuristic")
    assert SPACE.violations(example.decision) == ()


def test_converting_humaneval_labels_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no decision"):
        read(tmp_path, {"task": "sort"}, convert_humaneval=True)


def test_aliases_are_resolved_and_recorded(tmp_path: Path) -> None:
    decision = {"topology": "single", "roles": ["checker"], "manager_role": None, "entry_role": "checker"}
    [example] = read(tmp_path, old_row(decision | {"max_steps": 1}))
    assert example.decision.roles == ("tester",) and example.normalised == ("role checker read as tester",)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(2, decision=None), "has no decision"),
        (row(2, decision="single"), "decision must be an object"),
        (row(2, decision={"topology": "single"}), "missing_field"),
        (row(2, decision=DECISIONS["single"].model_dump() | {"max_steps": 2}), "steps_out_of_range"),
        (old_row("I cannot say."), "no_json"),
        (old_row({"topology": "star", "roles": [], "manager_role": None, "entry_role": "", "max_steps": 1}), "star"),
        ({"messages": old_row("")["messages"][:2]}, "no message of the assistant"),
        ({"messages": []}, "no user message"),
        (row(2, task=" "), "text is empty"),
        (row(2, split="dev"), "split must be one of"),
    ],
)
def test_a_row_without_a_usable_decision_is_refused_or_handed_over(tmp_path: Path, bad: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, row(1), "", bad)
    assert "labels.jsonl:3: " in str(caught.value) and words in str(caught.value)
    assert "--drop-no-output" in str(caught.value) and "\n" not in str(caught.value)
    dropped: list[tuple[int, str, str]] = []
    assert ids(read(tmp_path, row(1), "", bad, row(3), on_unusable=lambda *line: dropped.append(line))) == ["t1", "t3"]
    assert [number for number, _, _ in dropped] == [3] and words in dropped[0][2]
    assert json.loads(dropped[0][1]) == json.loads(json.dumps(bad))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_line_that_is_no_row_is_never_dropped(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"labels\.jsonl:2"):
        read(tmp_path, row(1), content, on_unusable=lambda *line: None)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no row"):
        read(tmp_path)


# -- roles ----------------------------------------------------------------------------------------------------


def test_roles_come_from_the_provenance_first(tmp_path: Path) -> None:
    assert roles_of([write(tmp_path, label(1, roles=("builder", "boss")))]) == ("builder", "boss")


@pytest.mark.parametrize(
    "system",
    [
        OLD_SYSTEM,
        prompts.teacher_messages("x", DecisionSpace(("builder", "planner", "checker", "researcher")))[0].content,
        prompts.router_messages("x", DecisionSpace(("builder", "planner", "checker", "researcher")))[0].content,
    ],
)
def test_roles_come_from_the_system_message_next(tmp_path: Path, system: str) -> None:
    path = write(tmp_path, old_row("{}", system=system))
    assert roles_of([path]) == ("builder", "planner", "checker", "researcher")


def test_roles_come_from_the_decisions_last_in_the_default_order(tmp_path: Path) -> None:
    plain = "You are a meta-router."
    other = {"topology": "single", "roles": ["wizard", "builder"]}
    path = write(tmp_path, old_row(other, system=plain), row(1, "centralized"))
    assert roles_of([path]) == ("planner", "builder", "wizard")
    assert roles_of([write(tmp_path, HUMANEVAL)]) == ()


def test_different_role_lists_are_refused(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, label(1), name="a.jsonl"),
        write(tmp_path, label(2), old_row("{}"), name="b.jsonl"),
    ]
    with pytest.raises(InputError) as caught:
        roles_of(paths)
    assert "b.jsonl:2: made for the roles builder, planner" in str(caught.value)
    assert "a.jsonl:1 for planner, builder" in str(caught.value) and "--roles" in str(caught.value)


def test_the_same_roles_in_another_order_are_no_conflict(tmp_path: Path) -> None:
    assert roles_of([write(tmp_path, label(1), label(2, roles=ROLES[::-1]), row(3))]) == ROLES


# -- building -------------------------------------------------------------------------------------------------


def many(counts: dict[str, int], **more: Any) -> list[dict[str, Any]]:
    names = [topology for topology, count in counts.items() for _ in range(count)]
    return [row(n, topology, **more) for n, topology in enumerate(names)]


def test_the_splits_that_rows_bring_are_kept_and_test_rows_never_trained_on(tmp_path: Path) -> None:
    rows = [row(n, split=("train", "validation", "test")[n % 3]) for n in range(9)]
    data = built(write(tmp_path, *rows))
    assert (ids(data.train), ids(data.validation)) == (["t0", "t3", "t6"], ["t1", "t4", "t7"])
    assert (data.rows, data.test_rows, data.leaked) == (9, 3, 0)


def test_rows_without_a_split_are_split_by_share_and_stratified(tmp_path: Path) -> None:
    data = built(write(tmp_path, *many({"single": 60, "chain": 20, "decentralized": 8, "centralized": 12})))
    assert data.classes["validation"] == {"single": 9, "chain": 3, "decentralized": 1, "centralized": 2}
    assert data.classes["train"] == {"single": 51, "chain": 17, "decentralized": 7, "centralized": 10}
    assert {example.split for example in data.train} == {"train"}
    assert {example.split for example in data.validation} == {"validation"}


def test_small_classes_do_not_all_round_to_nothing_and_keep_a_training_row(tmp_path: Path) -> None:
    assert len(built(write(tmp_path, *many(dict.fromkeys(TOPOLOGIES, 3)))).validation) == 2
    data = built(write(tmp_path, *many({"single": 1, "chain": 1, "centralized": 2})), validation_share=0.9)
    assert data.classes["train"] == {"single": 1, "chain": 1, "decentralized": 0, "centralized": 1}


def test_the_split_depends_on_seed_and_texts_not_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = many({"single": 30, "chain": 30})
    first = built(write(tmp_path, *rows))
    random.Random(1).shuffle(rows)
    shuffled = built(write(tmp_path, *rows))
    assert set(ids(first.validation)) == set(ids(shuffled.validation))
    assert set(ids(first.validation)) != set(ids(built(write(tmp_path, *rows), seed=1).validation))


def test_nothing_is_held_out_with_a_share_of_zero(tmp_path: Path) -> None:
    data = built(write(tmp_path, *many({"single": 5, "chain": 5})), validation_share=0)
    assert len(data.train) == 10 and "nothing is held out: overfitting will not show" in data.warnings


def test_near_duplicates_and_rows_of_one_task_never_straddle_the_split(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(30):
        rows += [row(n), row(n, id=f"again{n}", task=task(n) + " please"), row(n, task=task(n + 1000))]
    data = built(write(tmp_path, *rows), validation_share=0.3)
    assert len(data.validation) == 27
    assert leakage(data.train, data.validation) == []
    assert not {example.task_id for example in data.train} & {example.task_id for example in data.validation}


def test_a_row_without_a_split_follows_its_near_duplicate(tmp_path: Path) -> None:
    rows = [row(n, split=split) for n, split in enumerate(("train", "validation", "test"))]
    rows += [row(n, id=f"near{n}", task=task(n) + " please") for n in range(3)]
    data = built(write(tmp_path, *rows), validation_share=0.5)
    assert (ids(data.train), ids(data.validation)) == (["t0", "near0"], ["t1", "near1"])
    assert data.leaked == 1 and any("text of the test split" in warning for warning in data.warnings)


def test_a_row_near_to_training_and_test_rows_is_left_out(tmp_path: Path) -> None:
    rows = [row(1, split="train"), row(2, split="test", task=task(1) + " please"), row(3, task=task(1) + " now")]
    assert ids(built(write(tmp_path, *rows)).train) == ["t1"]


def test_a_text_of_the_test_split_is_not_trained_on_whatever_its_other_row_says(tmp_path: Path) -> None:
    data = built(write(tmp_path, row(1, split="train"), row(2, split="train"), row(1, id="again", split="test")))
    assert ids(data.train) == ["t2"] and (data.leaked, data.test_rows) == (1, 1)


def test_splits_that_rows_bring_are_warned_about_where_near_duplicates_straddle_them(tmp_path: Path) -> None:
    rows = [row(1, split="train"), row(2, split="validation", task=task(1) + " please")]
    data = built(write(tmp_path, *rows))
    assert (ids(data.train), ids(data.validation)) == (["t1"], ["t2"])
    assert any("straddle the splits that the rows bring, such as t1 and t2" in warning for warning in data.warnings)


def test_exact_duplicates_are_removed_and_conflicts_counted(tmp_path: Path) -> None:
    rows = [row(1), row(1, task=f"  {task(1).upper()} "), row(1, "chain", id="other"), row(2)]
    data = built(write(tmp_path, *rows), validation_share=0)
    assert [(example.task_id, example.decision.topology) for example in data.train] == [
        ("t1", "single"),
        ("t2", "single"),
    ]
    assert (data.duplicates, data.conflicts) == (2, 1)
    assert "1 rows repeat a task with another decision: its first decision is kept" in data.warnings


def test_sample_types_filter_before_anything_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, row(1), old_row("no decision"), row(2, sample_type="custom_type"))
    data = built(path, sample_types="teacher_distilled,custom_type", validation_share=0)
    assert ids(data.train) == ["t1", "t2"] and (data.rows, data.filtered) == (3, 1)
    with pytest.raises(InputError, match="no_json"):
        built(path)


def test_unusable_rows_are_dropped_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, row(1), row(2, decision=None), row(3, decision={}))
    with pytest.raises(InputError, match=r"labels\.jsonl:2"):
        built(path)
    data = built(path, drop_no_output=True, validation_share=0)
    assert ids(data.train) == ["t1"] and data.dropped == 2
    assert "2 rows without a usable decision are left out" in data.warnings


def test_a_subset_is_stratified_keeps_the_order_and_does_not_depend_on_it(tmp_path: Path) -> None:
    rows = many({"single": 50, "chain": 30, "centralized": 20})
    data = built(write(tmp_path, *rows), max_samples=10, validation_share=0)
    assert Counter(example.decision.topology for example in data.train) == {"single": 5, "chain": 3, "centralized": 2}
    assert ids(data.train) == sorted(ids(data.train), key=lambda name: int(name[1:]))
    shuffled = built(write(tmp_path, *random.Random(1).sample(rows, 100)), max_samples=10, validation_share=0)
    assert set(ids(shuffled.train)) == set(ids(data.train))
    other = built(write(tmp_path, *rows), max_samples=10, validation_share=0, seed=1)
    assert set(ids(other.train)) != set(ids(data.train))
    assert len(built(write(tmp_path, *rows), max_samples=1000, validation_share=0).train) == 100


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 41])
def test_a_subset_has_the_size_asked_for(tmp_path: Path, limit: int) -> None:
    rows = many({"single": 31, "chain": 7, "decentralized": 3, "centralized": 1})
    assert len(built(write(tmp_path, *rows), max_samples=limit, validation_share=0).train) == limit


def test_the_subset_leaves_the_validation_rows_alone(tmp_path: Path) -> None:
    rows = many({"single": 20, "chain": 20})
    path = write(tmp_path, *rows)
    assert ids(built(path, max_samples=4).validation) == ids(built(path).validation)


def test_imbalance_and_absent_topologies_are_said(tmp_path: Path) -> None:
    warnings = built(write(tmp_path, *many({"single": 9, "chain": 1})), validation_share=0).warnings
    assert "9 of 10 training rows are single: the router may learn to say only that" in warnings
    assert any("no training row is decentralized or centralized" in warning for warning in warnings)
    even = built(write(tmp_path, *many(dict.fromkeys(TOPOLOGIES, 10))))
    assert even.warnings == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_types": "other"}, "of 4 read, 4 of other sample types than other (there: teacher_distilled)"),
        ({"drop_no_output": True}, "of 4 read, 1 without a usable decision, 2 of the test split, 1 of the validation"),
    ],
)
def test_nothing_to_train_on_says_what_left_it_out(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    rows = [row(1, split="test"), row(2, split="test"), row(3, split="validation"), row(4, decision=None)]
    with pytest.raises(TrainingError) as caught:
        built(write(tmp_path, *rows), **options)
    assert words in str(caught.value) and "labels.jsonl: no row is left to train on" in str(caught.value)


def test_leakage_names_the_pairs(tmp_path: Path) -> None:
    one, two, three = read(tmp_path, row(1), row(2), row(3, task=task(1) + "!"))
    assert leakage([one, two], [three]) == [(one, three)]
    assert leakage([one, two, three], []) == []


# -- the project's own tasks ----------------------------------------------------------------------------------

OWN = Path(__file__).parents[2] / "data" / "tasks.jsonl"


def test_the_projects_own_tasks_train_without_a_warning() -> None:
    data = built(str(OWN))
    assert data.warnings == [] and (data.duplicates, data.dropped, data.leaked) == (0, 0, 0)
    assert len(data.train) >= 240 and len(data.validation) >= 60 and data.test_rows >= 180
    assert roles_of([str(OWN)]) == ROLES


def test_the_projects_own_tasks_are_free_of_leakage_and_cover_every_topology() -> None:
    examples = list(read_labels([str(OWN)], SPACE))
    assert near_duplicates(example.text for example in examples) == []
    assert len(set(ids(examples))) == len(examples) >= 480
    for split in ("train", "validation", "test"):
        classes = Counter(example.decision.topology for example in examples if example.split == split)
        assert all(classes[topology] >= 0.15 * classes.total() for topology in TOPOLOGIES), (split, classes)
    assert all(example.normalised == () for example in examples)
