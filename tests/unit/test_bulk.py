"""A folder of shards: a file a shard, whole or not at all, continued by shard and never mixed."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from router_cli.bulk import BulkResult, infer_shards
from router_cli.cli import main
from router_cli.errors import InputError, OutputError, PartialError, UsageError
from router_cli.infer import infer
from router_cli.ray_engine import TRIES, RayWorker, without_secrets
from router_cli.schema import Prediction
from router_cli.settings import load
from tests.training import Recorder


def shards(folder: Path, count: int = 4, rows: int = 5) -> Path:
    """A folder of `count` shards of `rows` tasks: plain, compressed, below a folder; and what other programs leave."""
    (folder / "day").mkdir(parents=True)
    for i in range(count):
        text = "".join(json.dumps({"id": f"s{i}-{j}", "task": f"Do part {j} of {i}."}) + "\n" for j in range(rows))
        if i % 2:
            (folder / f"part-{i}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / ("day" if i == 2 else ".") / f"part-{i}.jsonl").write_text(text)
    (folder / "_SUCCESS").touch()
    return folder


def bulk(data: Path, output: Path | None, progress: Recorder | None = None, **values: Any) -> BulkResult:
    chosen = {"infer.data": str(data), "infer.backend": "heuristic"}
    chosen |= {} if output is None else {"infer.output": str(output)}
    chosen |= {key.replace("__", ".") if "__" in key else f"infer.{key}": value for key, value in values.items()}
    settings = load({key: ("test", value) for key, value in chosen.items()}, environ={})
    return infer_shards(settings, None, progress or Recorder())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rows(file: Path) -> list[Prediction]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [Prediction.model_validate_json(line) for line in text.splitlines()]


PARTS = ["day/part-2.jsonl", "part-0.jsonl", "part-1.jsonl.gz", "part-3.jsonl.gz"]


def test_each_shard_becomes_a_file_of_its_name_with_the_rows_of_a_plain_call(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "deep" / "out"
    result = bulk(data, output)
    assert (result.shards, result.resumed, result.decided, result.fallbacks) == (4, 0, 20, 0)
    assert names(output) == [".infer.json", ".infer.lock", *PARTS]
    for name in PARTS:
        alone = load({"infer.data": ("test", str(data / name)), "infer.backend": ("test", "heuristic")}, environ={})
        still = [row.model_copy(update={"milliseconds": 0.0}) for row in rows(output / name)]
        assert still == [row.model_copy(update={"milliseconds": 0.0}) for row in infer(alone).predictions]


def test_what_stands_is_not_decided_again(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    bulk(data, output)
    before = {name: (output / name).read_bytes() for name in PARTS}
    (output / PARTS[0]).unlink()
    # What a kill leaves is cleared away.
    (output / "day" / ".part-2.jsonl.123.part").write_text('{"task')
    result = bulk(data, output)
    assert (result.resumed, result.decided) == (3, 5)
    assert {name: (output / name).read_bytes() for name in PARTS[1:]} == {name: before[name] for name in PARTS[1:]}
    assert len(rows(output / PARTS[0])) == 5 and ".part" not in str(names(output)).replace("part-", "")


def test_a_shard_that_changed_meanwhile_and_other_settings_are_not_mixed(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    bulk(data, output)
    with pytest.raises(OutputError, match=r"made with other settings \(decision\)"):
        bulk(data, output, decision__roles="cook,waiter")
    with (data / PARTS[1]).open("a") as file:
        file.write('{"id": "new", "task": "One more."}\n')
    with pytest.raises(OutputError, match=r"part-0\.jsonl:6: is about the task None, but the shard has the task new"):
        bulk(data, output)
    (output / PARTS[1]).unlink()
    assert bulk(data, output).decided == 6


def test_a_broken_shard_keeps_none_of_the_others(tmp_path: Path) -> None:
    data, output, said = shards(tmp_path / "in"), tmp_path / "out", Recorder()
    (data / PARTS[1]).write_text('{"id": "a", "task": "Sort."}\n{"id": \n')
    with pytest.raises(PartialError, match="1 of 4 shards could not be decided, the others stand"):
        bulk(data, output, said)
    assert [line for line in said.warnings if "part-0.jsonl:2: is not JSON" in line]
    assert names(output)[2:] == [name for name in PARTS if name != PARTS[1]]
    result = bulk(data, tmp_path / "other", skip_bad_lines=True)
    assert (result.skipped, result.decided) == (1, 16)


def test_lines_that_are_passed_over_are_recorded_beside_their_shard(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    (data / PARTS[0]).write_bytes(b'"\xe9t\xe9"\n{"id": "a", "task": "Sort."}\n')  # not even the first one is UTF-8
    broken = '{"id": "b", "task": "Merge."}\n{"id": \n[1]\n'
    (data / PARTS[2]).write_bytes(gzip.compress(broken.encode()))
    records = [f"{PARTS[0]}.bad-lines.jsonl", f"{PARTS[2]}.bad-lines.jsonl"]

    def recorded() -> list[tuple[str, int, str]]:
        found = [json.loads(line) for name in records for line in (output / name).read_text().splitlines()]
        assert all(set(row) == {"file", "line", "text", "reason"} for row in found)
        return [(row["file"], row["line"], row["reason"].split(" (")[0]) for row in found]

    expected = [
        (str(data / PARTS[0]), 1, "is not UTF-8 or UTF-16 text"),
        (str(data / PARTS[2]), 2, "is not JSON"),
        (str(data / PARTS[2]), 3, "expected a JSON object"),
    ]
    result = bulk(data, output, skip_bad_lines=True)
    assert (result.shards, result.skipped, result.decided, recorded()) == (4, 3, 12, expected)
    assert names(output)[2:] == sorted([*PARTS, *records])
    # What stands is gone over all the same, and a record that a kill prevented is made up for.
    (output / records[1]).unlink()
    result = bulk(data, output, skip_bad_lines=True)
    assert (result.resumed, result.skipped, result.decided, recorded()) == (4, 3, 0, expected)
    # What a record says and is mended goes.
    (data / PARTS[2]).write_bytes(gzip.compress(broken.splitlines()[0].encode()))
    assert bulk(data, output, skip_bad_lines=True).skipped == 1
    assert names(output)[2:] == sorted([*PARTS, records[0]])


def test_empty_shards_and_those_without_a_task_of_the_split_are_empty_files(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    (data / "part-0.jsonl").write_text("")
    (data / "part-1.jsonl.gz").write_bytes(gzip.compress(b'{"id": "t", "task": "Sort.", "split": "test"}\n'))
    result = bulk(data, output, split="test")
    assert result.decided == 1 and [len(rows(output / name)) for name in PARTS] == [0, 0, 1, 0]
    assert bulk(data, output, split="test").resumed == 4


def test_fallbacks_are_counted_over_all_shards(tmp_path: Path, tiny_folder: Any) -> None:
    values = {"backend": "local", "base": str(tiny_folder("smollm")), "models__dtype": "float32"}
    data, said = shards(tmp_path / "in"), Recorder()
    result = bulk(data, tmp_path / "out", said, min_confidence=1.0, fallback="abstain", **values)
    assert (result.fallbacks, result.unsure, result.threshold) == (20, {"none": 20}, 1.0)
    assert sum("not calibrated" in line for line in said.warnings) == 1


def test_what_makes_no_sense_for_a_folder_is_refused(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    for values, words in (
        ({"limit": 3}, "--limit counts tasks in order"),
        ({"fallback": "teacher", "min_confidence": 0.5}, "--fallback teacher keeps one budget"),
        ({"workers": 2}, "--workers needs --engine ray"),
        ({"engine": "ray", "backend": "remote", "model": "m"}, "--engine ray needs a router in each worker"),
    ):
        with pytest.raises(UsageError, match=words):
            bulk(data, output, **values)
    with pytest.raises(UsageError, match="--data FOLDER needs --output FOLDER"):
        bulk(data, None)
    with pytest.raises(UsageError, match="lies in --data"):
        bulk(data, data / "out")
    with pytest.raises(UsageError, match="--engine ray needs --data FOLDER"):
        bulk(data / PARTS[1], output, engine="ray")
    assert not output.exists()
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds no shard: expected files named \*\.jsonl"):
        bulk(tmp_path / "none", output)
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that `router infer` did not write"):
        bulk(data, output)


def test_two_calls_do_not_write_one_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    data, output = shards(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".infer.lock"), pytest.raises(OutputError, match="another `router infer` is writing it"):
        bulk(data, output)


def test_the_command_goes_over_a_folder_and_says_what_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (shards(tmp_path / "in") / "README.md").write_text("about")
    argv = ["infer", "--backend", "heuristic", "--data", "in", "--output", "out"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "4 shards stand in out (0 from before)\n20 decisions added" in said.out
    assert "1 other files are no shards" in said.err
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": "out",
        "shards": 4,
        "resumed": 4,
        "decided": 0,
        "skipped": 0,
        "fallbacks": 0,
        "threshold": None,
        "unsure": {},
    }
    assert main(["infer", "--backend", "heuristic", "--workers", "2", "Sort a list"]) == 2
    assert main(["infer", "--backend", "heuristic", "--engine", "ray", "Sort a list"]) == 2


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs Ray .*: pip install 'router-cli\[ray\]'"):
        bulk(shards(tmp_path / "in"), tmp_path / "out", engine="ray")


def test_a_shard_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    data, output = shards(tmp_path / "in"), tmp_path / "out"
    values = {"infer.data": str(data), "infer.output": str(output), "infer.backend": "heuristic"}
    worker = RayWorker(load({key: ("test", value) for key, value in values.items()}, environ={}), str(Path.cwd()))

    def called() -> dict[str, Any]:
        [done] = worker({"shard": [PARTS[1]]})["done"]
        return dict(json.loads(done))

    output.mkdir()
    # What workers leave that are killed while they are at it.
    (output / ".part-0.jsonl.tries.part").write_text("." * TRIES)
    given_up = called()
    assert given_up["error"].startswith("part-0.jsonl: every worker that took it died") and names(output) == []
    (output / ".part-0.jsonl.tries.part").write_text("." * (TRIES - 1))
    assert called()["decided"] == 5 and names(output) == ["part-0.jsonl"]


def test_secrets_stay_with_the_command() -> None:
    given = {"endpoint.api_key": "sk-hidden-1", "models.hf_token": "hf-hidden-2", "serve.token": "hidden-3-hidden-3"}
    settings = load({key: ("test", value) for key, value in given.items()}, environ={})
    assert b"hidden" in pickle.dumps(settings)
    assert b"hidden" not in pickle.dumps(without_secrets(settings))
    assert without_secrets(settings).infer == settings.infer


def test_records_of_passed_over_lines_are_no_shards(tmp_path: Path) -> None:
    data = shards(tmp_path / "in")
    (data / f"{PARTS[0]}.bad-lines.jsonl").write_text(
        '{"file": "x", "line": 1, "text": "{", "reason": "is not JSON"}\n'
    )
    assert bulk(data, tmp_path / "out").shards == 4
