"""Outcome rows: what is read, what is refused and where, and the tables that are made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_cli.errors import InputError
from router_cli.scoring.oracles import DIFFERING, differing
from router_cli.scoring.outcomes import Table, locate_outcomes, read_outcomes, tables
from router_cli.sections import OUTCOME_TABLES

DATA = Path(__file__).parents[2] / "data" / "outcomes"


def run(task: str, topology: str | None, solved: bool, **more: Any) -> dict[str, Any]:
    return {"task_id": task, "topology": topology, "solved": solved, **more}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(path: Path, *rows: dict[str, Any]) -> Table:
    (found,) = tables(read_outcomes(write(path / "o.jsonl", *rows)))
    return found


def test_a_cell_is_the_mean_of_its_runs_and_what_did_not_run_is_unknown(tmp_path):
    found = table(
        tmp_path,
        run("a", "single", True, repeat=0, cost=0.1),
        run("a", "single", False, repeat=1, cost=0.3),
        run("a", "chain", True, cost=1.0),
        run("b", "single", True, cost=0.1),
    )
    assert found.tasks == ("a", "b")
    assert found.topologies == ("single", "chain")
    assert found.solved[0].tolist() == [0.5, 1.0]
    assert found.solved[1, 0] == 1.0 and np.isnan(found.solved[1, 1])
    assert found.repeats.tolist() == [[2, 1], [1, 0]]
    assert found.dollars[0].tolist() == pytest.approx([0.2, 1.0])
    assert found.unit == "USD"


def test_topologies_stand_from_the_cheapest_on(tmp_path):
    rows = [run("a", name, True, prompt_tokens=tokens, completion_tokens=0) for name, tokens in
            (("single", 50), ("chain", 400), ("centralized", 20))]  # fmt: skip
    found = table(tmp_path, *rows)
    assert (found.topologies, found.unit) == (("centralized", "single", "chain"), "tokens")


def test_without_tokens_on_every_run_the_order_of_formations_counts(tmp_path):
    found = table(tmp_path, run("a", "chain", True, cost=0.1), run("a", "single", True))
    assert (found.topologies, found.unit) == (("single", "chain"), "rank")


def test_a_known_workers_tokens_have_its_list_price(tmp_path):
    tokens = {"prompt_tokens": 1000, "completion_tokens": 1000}
    found = table(tmp_path, *(run("a", name, True, worker="gpt-4-turbo", **tokens) for name in ("single", "chain")))
    assert found.unit == "USD"
    assert found.dollars[0, 0] == pytest.approx(0.04)


def test_workers_and_benchmarks_are_apart_and_share_a_tasks_text(tmp_path):
    rows = [run("a", "single", True, worker=worker, benchmark="B") for worker in ("x", "y")]
    recorded = read_outcomes(write(tmp_path / "o.jsonl", {**rows[0], "text": "Sort.", "split": "train"}, rows[1]))
    assert [found.name for found in tables(recorded)] == ["B, x", "B, y"]
    alone = read_outcomes(str(tmp_path / "o.jsonl"), worker="y")
    assert [(found.texts, found.splits) for found in tables(alone)] == [(("Sort.",), ("train",))]


def test_a_folder_is_the_runs_in_it(tmp_path):
    one = write(tmp_path / "one.jsonl", run("a", "single", True, repeat=0), run("a", "chain", False, repeat=0))
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "outcomes.jsonl").write_bytes(Path(one).read_bytes())
    assert len(read_outcomes(str(tmp_path / "runs" / "first")).rows) == 2
    (both,) = tables(read_outcomes(str(tmp_path / "runs")))
    assert both.repeats.tolist() == [[2, 2]]  # each folder's runs are others
    (tmp_path / "runs" / "second" / "outcomes.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"second/outcomes\.jsonl:1: expected an outcome"):
        read_outcomes(str(tmp_path / "runs"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no outcomes\.jsonl"):
        read_outcomes(str(tmp_path / "empty"))


def test_runs_without_a_topology_are_counted_apart(tmp_path):
    path = write(tmp_path / "o.jsonl", run("a", None, True), run("a", "single", True))
    assert (read_outcomes(path).formless, len(read_outcomes(path).rows)) == (1, 1)


def test_gzip_byte_order_marks_and_blank_lines_are_read(tmp_path):
    text = "\ufeff" + json.dumps(run("a", "single", True)) + "\r\n\r\n" + json.dumps(run("b", "single", False)) + "\r\n"
    (tmp_path / "o.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert [row.task_id for row in read_outcomes(str(tmp_path / "o.jsonl.gz")).rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"topology": "single", "solved": True}, "expected an outcome with a task_id"),
        ({"task_id": "b", "solved": True}, "topology must be one of single, chain"),
        (run("b", "team", True), "got 'team'"),
        ({"task_id": "b", "topology": "single"}, "expected an outcome with solved"),
        (run("b", "single", "yes"), "solved must be true or false, got 'yes'"),  # type: ignore[arg-type]
        (run("b", "single", True, cost=-1), "cost must be a number from 0 on, got -1"),
        (run("b", "single", True, prompt_tokens=1.5), "prompt_tokens must be a whole number"),
        (run("b", "single", True, seconds="3"), "seconds must be a number"),
        (run("b", "single", True, split="dev"), "split must be one of train"),
        (run("b", "single", True, evidence=2), "evidence must be true or false"),
        (run("a", "single", True, repeat=0), "is the same run as line 1"),
    ],
)
def test_a_bad_row_is_one_line_with_file_and_line(tmp_path, row, said):
    path = write(tmp_path / "o.jsonl", run("a", "single", True, repeat=0), row)
    with pytest.raises(InputError) as error:
        read_outcomes(path)
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)


def test_an_unknown_worker_or_table_names_those_there_are(tmp_path):
    path = write(tmp_path / "o.jsonl", run("a", "single", True, worker="x"))
    with pytest.raises(InputError, match=r"no run of the worker 'z' \(there: x\)"):
        read_outcomes(path, worker="z")
    with pytest.raises(InputError, match="did you mean 'humaneval-mapcoder'"):
        locate_outcomes("humaneval-mapcode")
    with pytest.raises(InputError, match="holds no outcome of a topology"):
        read_outcomes(write(tmp_path / "n.jsonl", run("a", None, True)))


# -- the carried tables -----------------------------------------------------------------------------------------

# Tasks, and what single and chain solve, counted in the source.
CARRIED = {
    "humaneval-mapcoder": (164, {"gemini-pro": (109, 114), "gpt-3.5-turbo": (113, 132), "gpt-4-turbo": (146, 154)}),
    "mbpp-mapcoder": (397, {"gpt-3.5-turbo": (280, 311), "gpt-4-turbo": (327, 330)}),
    "mbpp-et-mapcoder": (397, {"gpt-3.5-turbo": (183, 216), "gpt-4-turbo": (223, 229)}),
    "xcodeeval-mapcoder": (106, {"gpt-3.5-turbo": (25, 29), "gpt-4-turbo": (39, 48)}),
}


@pytest.mark.parametrize("name", OUTCOME_TABLES)
def test_carried_tables_hold_what_they_say(name):
    tasks, solved = CARRIED[name]
    found = {one.worker: one for one in tables(read_outcomes(name))}
    assert {worker: len(one.tasks) for worker, one in found.items()} == dict.fromkeys(solved, tasks)
    for worker, one in found.items():
        assert one.topologies == ("single", "chain")
        assert tuple(one.solved.sum(axis=0).astype(int)) == solved[worker]
        assert (None in one.texts) == (name == "xcodeeval-mapcoder")


def test_every_carried_file_has_a_name_and_an_attribution():
    files = {path.name.removesuffix(".jsonl.gz") for path in DATA.glob("*.jsonl.gz")}
    assert files == {*OUTCOME_TABLES, "mbpp-reflexion"}
    page = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(name in page for name in files)
    assert all(word in page for word in ("MIT", "CC-BY-4.0", "Md-Ashraful-Pramanik/MapCoder", "noahshinn/reflexion"))


def test_extended_tests_bring_the_base_tests_as_evidence():
    found = {one.worker: one for one in tables(read_outcomes("mbpp-et-mapcoder"))}["gpt-4-turbo"]
    base = {one.worker: one for one in tables(read_outcomes("mbpp-mapcoder"))}["gpt-4-turbo"]
    assert [runs[0][0].evidence for runs in found.runs] == [bool(rate) for rate in base.solved[:, 0]]


def test_reruns_of_the_same_agent_differ_as_often_as_is_said():
    found = tables(read_outcomes(str(DATA / "mbpp-reflexion.jsonl.gz")))[0]
    assert differing(found) == (pytest.approx(6 / 397), 397)
    twice: dict[str, list[bool]] = {}
    with gzip.open(DATA / "mbpp-reflexion.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["topology"] is None:
                twice.setdefault(row["task_id"], []).append(row["solved"])
    pairs = [runs for runs in twice.values() if len(runs) == 2]
    assert pytest.approx(sum(a != b for a, b in pairs) / len(pairs)) == DIFFERING
