"""`infer`: one prediction a task, in order, from any backend; files are continued and never mixed."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.backends.local import META
from router_cli.errors import InputError, ModelError, OutputError, TeacherError, UsageError
from router_cli.infer import InferResult, infer
from router_cli.schema import Prediction
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.train import train
from tests.fake_teacher import Call, FakeTeacher, Reply
from tests.training import Recorder, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE = '{"topology":"single","roles":["builder"],"manager_role":null,"entry_role":"builder","max_steps":1}'


def settings(**values: Any) -> Settings:
    """Settings of `infer.*`, or of another section as `endpoint__base_url`."""
    chosen = {key.replace("__", ".") if "__" in key else f"infer.{key}": str(value) for key, value in values.items()}
    chosen.setdefault("models.dtype", "float32")
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def tasks_file(path: Path, count: int = 10) -> Path:
    return write_rows(
        path / "tasks.jsonl", [{"id": f"t{i}", "task": f"Do {'very ' * (i % 4)}well {i}."} for i in range(count)]
    )


def predictions(path: Path) -> list[Prediction]:
    return [Prediction.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("infer")
    data = write_rows(folder / "labels.jsonl", label_rows(8, 0))
    train(train_settings(data, tiny_folder("smollm"), folder / "adapter", validation_share=0))
    return folder / "adapter"


# -- the local backend ------------------------------------------------------------------------------------------


def test_one_task_as_text(adapter: Path) -> None:
    result = infer(settings(adapter=adapter), "Sort a list of integers")
    [row] = result.predictions
    assert (result.decided, result.resumed, result.output) == (1, 0, None)
    assert row.decision is not None and not SPACE.violations(row.decision)
    assert row.topologies is not None and list(row.topologies) == list(SPACE.topologies)
    assert sum(row.topologies.values()) == pytest.approx(1.0)
    assert row.probability == row.topologies[row.decision.topology]
    assert (row.backend, row.model, row.fallback) == ("local", str(adapter), None) and row.milliseconds > 0


def test_a_file_goes_to_a_file_in_its_order(adapter: Path, tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "deep" / "predictions.jsonl"
    result = infer(settings(adapter=adapter, data=data, output=output, batch_size=3))
    assert (result.decided, result.predictions) == (10, [])
    rows = predictions(output)
    assert [row.task_id for row in rows] == [f"t{i}" for i in range(10)]
    alone = infer(settings(adapter=adapter, data=data, batch_size=1)).predictions
    for row, other in zip(rows, alone, strict=True):
        assert row.decision == other.decision and row.topologies == pytest.approx(other.topologies, abs=1e-4)


def test_standard_input(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = '{"id": "a", "task": "Sort."}\n{"id": "b", "task": "Merge."}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(given.encode()))))
    assert [row.task_id for row in infer(settings(adapter=adapter, data="-")).predictions] == ["a", "b"]


def test_limit_and_split_choose_the_tasks(adapter: Path, tmp_path: Path) -> None:
    rows = [{"id": f"t{i}", "task": f"Do {i}.", "split": "test" if i % 2 else "train"} for i in range(6)]
    data = write_rows(tmp_path / "tasks.jsonl", rows)
    found = infer(settings(adapter=adapter, data=data, split="test", limit=2)).predictions
    assert [row.task_id for row in found] == ["t1", "t3"]
    with pytest.raises(InputError, match="holds no task of the validation split"):
        infer(settings(adapter=adapter, data=data, split="validation"))


def test_bad_lines_stop_or_are_recorded(adapter: Path, tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    data.write_text('{"id": "a", "task": "Sort."}\n{"id": \n{"id": "c", "task": "Merge."}\n')
    with pytest.raises(InputError, match=r"tasks\.jsonl:2: is not JSON"):
        infer(settings(adapter=adapter, data=data))
    said, output = Recorder(), tmp_path / "predictions.jsonl"
    result = infer(settings(adapter=adapter, data=data, skip_bad_lines=True), progress=said)
    assert [row.task_id for row in result.predictions] == ["a", "c"] and result.skipped == 1
    [warning] = said.warnings
    assert warning.startswith(f"{data}:2: skipped: is not JSON")
    assert infer(settings(adapter=adapter, data=data, output=output, skip_bad_lines=True)).skipped == 1
    [row] = map(json.loads, (tmp_path / "predictions.jsonl.bad-lines.jsonl").read_text().splitlines())
    assert (row["file"], row["line"], row["text"]) == (str(data), 2, '{"id": ')
    infer(settings(adapter=adapter, data=data, output=output, skip_bad_lines=True, limit=1))
    assert (tmp_path / "predictions.jsonl.bad-lines.jsonl").exists(), "a look at the first row is no news of the others"
    data.write_text('{"id": "a", "task": "Sort."}\n{"id": "c", "task": "Merge."}\n')
    assert infer(settings(adapter=adapter, data=data, output=output, skip_bad_lines=True)).resumed == 2
    assert not (tmp_path / "predictions.jsonl.bad-lines.jsonl").exists(), "what it says is mended"


def test_two_commands_do_not_write_one_file(adapter: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    output = tmp_path / "out" / "predictions.jsonl"
    output.parent.mkdir()
    with (
        FileLock(output.with_name(".predictions.jsonl.lock")),
        pytest.raises(OutputError, match=r"predictions\.jsonl: another `router infer` is writing it"),
    ):
        infer(settings(adapter=adapter, output=output), "Sort.")
    assert infer(settings(adapter=adapter, output=output), "Sort.").decided == 1


def test_a_base_without_adapter_decides_for_the_roles_of_the_settings(tiny_folder: Tiny) -> None:
    base = tiny_folder("qwen3")
    [row] = infer(settings(base=base, decision__roles="cook,waiter"), "Lay the table").predictions
    assert row.model == str(base) and row.decision is not None
    assert not DecisionSpace(("cook", "waiter")).violations(row.decision)


def test_another_base_can_be_put_below_an_adapter(adapter: Path, tiny_folder: Tiny, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_folder("smollm"), tmp_path / "moved")
    here = shutil.copytree(adapter, tmp_path / "adapter")
    meta = json.loads((here / META).read_text())
    meta["base_model"]["folder_or_id"] = str(tmp_path / "gone")
    (here / META).write_text(json.dumps(meta))
    with pytest.raises(ModelError, match="gone: no such model folder"):
        infer(settings(adapter=here), "Sort")
    assert infer(settings(adapter=here, base=moved), "Sort").predictions[0].model == str(here)


def test_what_cannot_serve_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    meta = json.loads((other / META).read_text())
    (other / META).write_text(json.dumps({**meta, "prompt_version": "0"}))
    with pytest.raises(ModelError, match="was trained with prompt version 0, this program asks with"):
        infer(settings(adapter=other), "Sort")
    (other / META).write_text(json.dumps({key: meta[key] for key in meta if key != "roles"}))
    with pytest.raises(ModelError, match="lacks roles"):
        infer(settings(adapter=other), "Sort")
    cut = shutil.copytree(adapter, tmp_path / "cut")
    with (cut / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ModelError, match="its adapter does not load"):
        infer(settings(adapter=cut), "Sort")
    with pytest.raises(ModelError, match="no such adapter folder"):
        infer(settings(adapter=tmp_path / "nowhere"), "Sort")
    with pytest.raises(ModelError, match="holds no trained router"):
        infer(settings(adapter=tmp_path), "Sort")
    with pytest.raises(UsageError, match="pass --adapter FOLDER, or --base MODEL"):
        infer(settings(), "Sort")


def test_there_must_be_one_thing_to_decide(adapter: Path, tmp_path: Path) -> None:
    for text, values in ((None, {}), ("Sort", {"data": tasks_file(tmp_path)})):
        with pytest.raises(UsageError, match="either one task as text, or --data FILE"):
            infer(settings(adapter=adapter, **values), text)
    with pytest.raises(UsageError, match="the task is empty"):
        infer(settings(adapter=adapter), " \n")


def test_a_missing_file_is_said_before_a_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        infer(settings(adapter=tmp_path / "nowhere", data=tmp_path / "nothing.jsonl", output=tmp_path / "out.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl"):
        infer(settings(adapter=tmp_path / "nowhere", data=tmp_path / "empty.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


# -- continuing -------------------------------------------------------------------------------------------------


def heuristic(data: Path, output: Path, **values: Any) -> InferResult:
    return infer(settings(backend="heuristic", data=data, output=output, **values))


def test_a_file_cut_in_mid_line_is_continued(tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    heuristic(data, output)
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:4]) + lines[4][:25])
    result = heuristic(data, output, batch_size=4)
    assert (result.decided, result.resumed) == (6, 4)
    strip = [row.model_copy(update={"milliseconds": 0.0}) for row in predictions(output)]
    assert [row.task_id for row in strip] == [f"t{i}" for i in range(10)]
    assert output.read_text().splitlines(keepends=True)[:4] == lines[:4]
    again = heuristic(data, output)
    assert (again.decided, again.resumed) == (0, 10) and len(predictions(output)) == 10


def test_a_finished_file_needs_no_model(adapter: Path, tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path, 3), tmp_path / "out.jsonl"
    there = shutil.copytree(adapter, tmp_path / "adapter")
    infer(settings(adapter=there, data=data, output=output))
    (there / "adapter_model.safetensors").unlink()
    assert infer(settings(adapter=there, data=data, output=output)).resumed == 3


def test_a_longer_limit_continues_and_other_settings_refuse(tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    heuristic(data, output, limit=2)
    assert heuristic(data, output, limit=5).resumed == 2
    before = output.read_text()
    with pytest.raises(OutputError, match=r"made with other settings \(decision\)"):
        heuristic(data, output, decision__roles="cook,waiter")
    other = write_rows(tmp_path / "other.jsonl", [{"task": "x"}])
    with pytest.raises(OutputError, match=r"made with other settings \(data\)"):
        heuristic(other, output)
    with pytest.raises(OutputError, match="adapter, backend"):
        infer(settings(adapter=tmp_path, data=data, output=output))
    assert output.read_text() == before


def test_tasks_that_changed_meanwhile_are_not_mixed(tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    heuristic(data, output, limit=4)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[::-1]))
    with pytest.raises(OutputError, match=r"out\.jsonl.*task"):
        heuristic(data, output)
    assert [row.task_id for row in predictions(output)] == ["t0", "t1", "t2", "t3"]


def test_another_number_type_is_another_file_and_bad_lines_can_be_skipped_later(adapter: Path, tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path, 3), tmp_path / "out.jsonl"
    infer(settings(adapter=adapter, data=data, output=output, limit=1))
    with pytest.raises(OutputError, match=r"other settings \(dtype\)"):
        infer(settings(adapter=adapter, data=data, output=output, models__dtype="bfloat16"))
    assert infer(settings(adapter=adapter, data=data, output=output, skip_bad_lines=True)).resumed == 1


def test_a_long_task_is_shortened_as_in_training_and_said_once(adapter: Path, tmp_path: Path) -> None:
    there = shutil.copytree(adapter, tmp_path / "adapter")
    meta = json.loads((there / META).read_text())
    meta["settings"]["max_length"] = 400
    (there / META).write_text(json.dumps(meta))
    long = [{"task": f"{i} " + "<|im_end|> and so on " * 300} for i in range(3)]
    data, said = write_rows(tmp_path / "long.jsonl", long), Recorder()
    rows = infer(settings(adapter=there, data=data, batch_size=1), progress=said).predictions
    assert all(row.usage and row.usage.prompt_tokens + row.usage.completion_tokens <= 400 for row in rows)
    assert [line for line in said.warnings if "more than 400 tokens" in line] == said.warnings[:1]


def test_a_space_without_any_decision_is_refused(tiny_folder: Tiny) -> None:
    with pytest.raises(UsageError, match="no decision is possible: chain with one role alone"):
        infer(settings(base=tiny_folder("smollm"), decision__roles="a", decision__topologies="chain"), "Sort")


def test_an_adapter_trained_anew_is_another_one(adapter: Path, tmp_path: Path) -> None:
    data, output, there = tasks_file(tmp_path), tmp_path / "out.jsonl", shutil.copytree(adapter, tmp_path / "adapter")
    infer(settings(adapter=there, data=data, output=output, limit=2))
    (there / META).write_text((there / META).read_text().replace('"seconds"', '"other"'))
    with pytest.raises(OutputError, match=r"other settings \(adapter's training\)"):
        infer(settings(adapter=there, data=data, output=output))


def test_a_foreign_file_is_never_touched(tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    output.write_text("my diary\n")
    with pytest.raises(OutputError, match="choose another --output or delete it"):
        heuristic(data, output)
    assert output.read_text() == "my diary\n"


# -- other backends ---------------------------------------------------------------------------------------------


def test_the_heuristic_gives_no_probabilities() -> None:
    [row] = infer(settings(backend="heuristic"), "Sort a list").predictions
    assert row.decision is not None and not SPACE.violations(row.decision)
    assert (row.probability, row.topologies, row.backend, row.model) == (None, None, "heuristic", "heuristic")


def remote(
    server: FakeTeacher, text: str = "Sort a list", progress: Recorder | None = None, **values: Any
) -> Prediction:
    values = {"endpoint__api_key": "k", "model": "router-lora", "endpoint__retries": 0, **values}
    values |= {"backend": "remote", "endpoint__base_url": server.url}
    [row] = infer(settings(**values), text, progress or Recorder()).predictions
    return row


def test_a_server_is_asked_with_the_prompt_of_the_training() -> None:
    with FakeTeacher(Reply(SINGLE)) as server:
        row = remote(server)
    [call] = server.calls
    assert call.messages == [message.model_dump() for message in prompts.router_messages("Sort a list", SPACE)]
    assert call.body["model"] == "router-lora" and call.body["temperature"] == 0
    assert call.body["logprobs"] is True and call.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert row.decision is not None and prompts.render(row.decision) == SINGLE
    assert (row.backend, row.model, row.fallback, row.topologies) == ("remote", "router-lora", None, None)


def test_the_space_of_an_adapter_is_asked_for(adapter: Path) -> None:
    with FakeTeacher(Reply(SINGLE)) as server:
        remote(server, adapter=adapter, decision__roles="cook,waiter")
    assert "Roles: planner, builder, tester, refractor" in server.calls[0].messages[0]["content"]


def test_an_invalid_answer_is_asked_again_and_then_decided_by_the_rules() -> None:
    bad = SINGLE.replace('"max_steps":1', '"max_steps":9')
    with FakeTeacher(Reply(bad), Reply(SINGLE)) as server:
        assert remote(server).fallback is None
    with FakeTeacher(behave=lambda call: Reply(bad)) as server:
        result = infer(
            settings(backend="remote", model="m", endpoint__api_key="k", endpoint__base_url=server.url), "Sort a list"
        )
    [row] = result.predictions
    assert row.fallback == "heuristic (steps_out_of_range)" and result.fallbacks == 1
    assert row.decision is not None and not SPACE.violations(row.decision)
    assert row.probability is None and len(server.calls) == 3


def logprobs(tokens: list[tuple[str, list[tuple[str, float]]]]) -> dict[str, Any]:
    return {
        "content": [
            {"token": token, "logprob": math.log(top[0][1]) if top else 0.0, "bytes": None}
            | {"top_logprobs": [{"token": other, "logprob": math.log(share), "bytes": None} for other, share in top]}
            for token, top in tokens
        ]
    }


def with_logprobs(content: str, given: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "model": "m", "choices": [{**choice, "logprobs": given}]}
    return Reply(body=json.dumps(body).encode())


@pytest.mark.parametrize(
    "tokens",
    [
        [
            ('{"', []),
            ("topology", []),
            ('":"', []),
            ("single", [("single", 0.5), ("chain", 0.25), ("x", 0.1)]),
            ('"}', []),
        ],
        [('{"topology":', []), (' "', []), ("s", [("s", 0.5), ("ch", 0.25), ("c", 0.2)]), ("ingle", [("ingle", 1.0)])],
        [('{"topology": "single', [('{"topology": "single', 1.0)])],
    ],
)
def test_the_servers_log_probabilities_become_the_distribution(tokens: Any) -> None:
    with FakeTeacher(with_logprobs(SINGLE, logprobs(tokens))) as server:
        row = remote(server)
    if len(tokens) == 1:  # the token of the name shows no alternatives that can be told apart
        assert row.topologies is None and row.probability is None
        return
    # "c" may go on as chain or as centralized.
    either = 0.1 if tokens[1][0] == ' "' else 0.0
    shares = {"single": 0.5, "chain": 0.25 + either, "decentralized": 0.0, "centralized": either}
    whole = sum(shares.values())
    assert row.topologies == pytest.approx({name: share / whole for name, share in shares.items()})
    assert row.probability == pytest.approx(0.5 / whole)


def test_what_a_server_does_not_take_is_left_off() -> None:
    def behave(call: Call) -> Reply:
        for name in ("chat_template_kwargs", "logprobs", "response_format"):
            if name in call.body:
                words = f"Unrecognized request argument supplied: {name}"
                return Reply(status=400, error={"message": words, "param": name, "type": "invalid_request_error"})
        return Reply(SINGLE)

    said = Recorder()
    with FakeTeacher(behave=behave) as server:
        row = remote(server, progress=said)
    assert row.fallback is None and row.topologies is None
    last = server.calls[-1].body
    assert not {"chat_template_kwargs", "logprobs", "top_logprobs"} & last.keys()
    assert sum("refuses" in text for text in said.notices) >= 2


def test_many_tasks_are_answered_in_order(tmp_path: Path) -> None:
    chain = (
        '{"topology":"chain","roles":["planner","builder"],"manager_role":null,"entry_role":"planner","max_steps":2}'
    )
    data = tasks_file(tmp_path)
    with FakeTeacher(
        behave=lambda call: Reply(chain if "3" in call.task else SINGLE, delay=0.05 * ("0" in call.task))
    ) as server:
        values = {"backend": "remote", "model": "m", "endpoint__api_key": "k", "endpoint__base_url": server.url}
        rows = infer(settings(data=data, **values)).predictions
    assert [row.decision.topology for row in rows if row.decision] == [
        "chain" if i == 3 else "single" for i in range(10)
    ]


def test_a_file_of_one_server_is_not_continued_by_another(tmp_path: Path) -> None:
    values = {"data": tasks_file(tmp_path), "output": tmp_path / "p.jsonl", "model": "m", "endpoint__api_key": "k"}
    with FakeTeacher(Reply(SINGLE)) as one, FakeTeacher(Reply(SINGLE)) as other:
        infer(settings(backend="remote", limit=2, endpoint__base_url=one.url, **values))
        with pytest.raises(OutputError, match=r"made with other settings \(server\)"):
            infer(settings(backend="remote", endpoint__base_url=other.url, **values))
        note = tmp_path / ".p.jsonl.infer.json"  # as earlier versions wrote it
        note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "server"}))
        assert infer(settings(backend="remote", limit=2, endpoint__base_url=other.url, **values)).resumed == 2
        address = one.url.replace("//", "//user:hidden@")
        assert infer(settings(backend="remote", endpoint__base_url=address, **values)).resumed == 2
    assert "hidden" not in (tmp_path / ".p.jsonl.infer.json").read_text()


def test_a_server_that_is_not_there_or_refuses_ends_with_one_line() -> None:
    with FakeTeacher(behave=lambda call: Reply(status=401)) as server, pytest.raises(TeacherError):
        remote(server)
    with pytest.raises(UsageError, match="--backend remote needs the server"):
        infer(settings(backend="remote", model="m"), "Sort")
    with pytest.raises(UsageError, match="--backend remote needs --model"):
        infer(settings(backend="remote", endpoint__base_url="http://127.0.0.1:9/v1"), "Sort")
