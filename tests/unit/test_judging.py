"""What `router eval` composes: two runs by their folders, the flip test, and what the options refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_cli.backends.local import LocalBackend
from router_cli.cli import main
from router_cli.errors import UsageError
from router_cli.flip import flip_test, typos
from router_cli.jsonl import write_json, write_rows
from router_cli.judging import judge, weigh
from router_cli.schema import Task
from router_cli.settings import load
from router_cli.train import train
from tests import training
from tests.unit.test_evaluate import labels, right

TEXTS = [
    "Write one function that sorts a list of numbers.",
    "First export the tables, then convert them, then verify the result.",
    "把会话从 Cookie 迁移到 Redis,同时保持各服务一致。",
]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    write_rows(tmp_path / "labels.jsonl", [*labels(40), *labels(12, "train", start=500)])
    for name, wrong in (("first", 2), ("second", 20)):
        write_rows(tmp_path / name / "predictions.jsonl", right(40, wrong))
    told = {"labels": [str(tmp_path / "labels.jsonl")], "split": "test", "loss": [{"step": 1, "loss": 1.5}]}
    write_json(tmp_path / "first" / "report.json", told)
    return tmp_path / "first", tmp_path / "second"


def test_two_run_folders_are_compared_by_the_first_ones_labels(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = runs
    words = ["eval", "--compare", str(first), str(second), "--output-dir", "both", "--resamples", "200", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in report["systems"]][:2] == ["first", "second"]
    assert report["summary"][0].startswith("first gives 38 of 40 tasks")
    assert (report["sides"][0]["name"], report["sides"][0]["versus"]["only_router"]) == ("second", 18)
    assert report["loss"] == [{"step": 1.0, "loss": 1.5, "eval_loss": None}]
    assert "Side by side" in (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    # With commas, and with labels of one's own, it is the same.
    again = ["eval", "--compare", f"{first},{second}", "--labels", str(tmp_path / "labels.jsonl"), *words[4:]]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["sides"] == report["sides"]


def test_what_does_not_go_together_is_one_line(runs, tmp_path, capsys):
    first, second = map(str, runs)
    for words, said in (
        (["--compare", first], "--compare needs two runs"),
        (["--compare", second, first], "second has no report.json that names its own"),
        ([first], "runs stand after --compare"),
        (["--predictions", "p", "--labels", "l", "--flip", "9"], "--flip needs --adapter"),
    ):
        assert main(["eval", *words, "--output-dir", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err


def test_typing_errors_keep_letters_ends_and_everything_else():
    text = "Write a function that sorts numbers; f(x) == 3 must hold for every positive integer argument given."
    found = typos(text, 7)
    assert found != text and sorted(found) == sorted(text) and found == typos(text, 7)
    changed = [(a, b) for a, b in zip(text.split(), found.split(), strict=True) if a != b]
    assert len(changed) == 1 and (changed[0][0][0], changed[0][0][-1]) == (changed[0][1][0], changed[0][1][-1])
    assert typos("f(x) == 3", 7) == "f(x) == 3"


def test_the_flip_test_counts_what_changes_and_leaves_the_router_as_it_was(tiny_folder):
    backend = LocalBackend(load({"infer.base": ("--base", str(tiny_folder())), "models.dtype": ("", "float32")}))
    tasks = [Task(id=f"t{i}", text=f"{TEXTS[i % 3]} Number {i}.") for i in range(24)]
    before = backend.decide([task.text for task in tasks])
    found = flip_test(backend, tasks, seed=1)
    assert [one.name for one in found.changed] == ["typos", "header", "roles"]
    assert (found.tasks, {one.topology.n for one in found.changed}) == (24, {24})
    # By hand, for the roles.
    turned = backend.over(type(backend.space)(backend.space.roles[::-1]))
    after = [backend.space.resolve(one.decision).decision for one in turned.decide([task.text for task in tasks])]
    by_hand = sum(one.decision != other for one, other in zip(before, after, strict=True)) / 24
    assert found.changed[2].decision.value == by_hand
    assert [one.decision for one in backend.decide([task.text for task in tasks])] == [one.decision for one in before]
    assert all(one.usage.prompt_tokens > one.usage.completion_tokens > 0 for one in before)


def test_an_adapter_is_asked_otherwise_and_the_report_says_what_changed(tiny_folder, tmp_path):
    data = training.write_rows(tmp_path / "train.jsonl", training.label_rows(8, 0))
    train(training.train_settings(data, tiny_folder(), tmp_path / "adapter", validation_share=0))
    gold = [
        {"id": f"t{i}", "task": f"{TEXTS[i % 3]} Number {i}.", "decision": one["decision"], "split": "test"}
        for i, one in enumerate(labels(12))
    ]
    write_rows(tmp_path / "tasks.jsonl", gold)
    given = {"adapter": str(tmp_path / "adapter"), "data": str(tmp_path / "tasks.jsonl"), "flip": 5, "resamples": 100}
    given |= {"output_dir": str(tmp_path / "out")}
    report = judge(load({f"eval.{key}": (f"--{key}", value) for key, value in given.items()}, environ={}))
    assert report.flip.tasks == 5 and len(report.flip.changed) == 3
    assert sum(note.startswith("Flip test") for note in report.notes) == 3
    assert "Flip test" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report.spending.prompt_tokens is not None, "infer counts the tokens"


def test_there_is_no_flip_test_beside_outcomes():
    settings = load({"eval.flip": ("--flip", 5), "eval.outcomes": ("--outcomes", "humaneval-mapcoder")}, environ={})
    with pytest.raises(UsageError, match="flip says nothing beside --outcomes"):
        weigh(settings)
