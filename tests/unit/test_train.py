"""`train`: what is learnt from, what every option does, what stands in the folder, when a run is the same run."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router_cli import prompts, tasks
from router_cli.backends.local import META, LocalBackend
from router_cli.dataset import build
from router_cli.errors import InputError, ModelError, TrainingError, UsageError
from router_cli.label import label
from router_cli.models import resolve
from router_cli.schema import Decision
from router_cli.scoring.calibration import Calibration, fit
from router_cli.settings import Settings, load
from router_cli.train import TrainResult, _load, _space, train
from router_cli.training import loss, recipe, trainer
from router_cli.training.checkpoints import Run
from router_cli.training.lessons import encode
from router_cli.training.watch import rising, stale
from tests.tiny import STYLES, Style
from tests.training import Recorder, adapter_weights, begun, equal, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in json.loads((folder / "loss.json").read_text()) if key in entry]


def fingerprint_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


# -- one training from the labels on, looked at from all sides -------------------------------------------------


@dataclass(frozen=True)
class Trained:
    folder: Path
    base: Path
    labels: Path
    result: TrainResult
    before: dict[str, str]
    said: Recorder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    data, base, said = write_rows(folder / "tasks.jsonl", label_rows()), tiny_folder("smollm"), Recorder()
    wanted = {"label.data": str(data), "label.output": str(folder / "labels.jsonl"), "label.teacher": "recorded"}
    labelled = label(load({key: ("test", value) for key, value in wanted.items()}, environ={}))
    before = fingerprint_of(base)
    result = train(train_settings(labelled.output, base, folder / "adapter", epochs=6, lr=0.01), said)
    return Trained(folder / "adapter", base, labelled.output, result, before, said)


def test_the_loss_falls(trained: Trained) -> None:
    found = losses(trained.folder)
    assert len(found) == trained.result.steps == 24
    assert trained.result.first_loss == found[0] and trained.result.last_loss == found[-1]
    # That the topology is learnt too, not only JSON, needs its own lessons: see the test of topology passes.
    assert sum(found[-4:]) < 0.7 * sum(found[:4])


def test_the_adapter_changes_and_the_base_does_not(trained: Trained) -> None:
    weights = adapter_weights(trained.folder)
    # B is zero before training.
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert len([name for name in weights if "lora_B" in name]) == 2 * 7
    assert fingerprint_of(trained.base) == trained.before


def test_the_folder_holds_all_that_is_promised(trained: Trained) -> None:
    names = {"adapter_config.json", "adapter_model.safetensors", META, "tokenizer_config.json", "tokenizer.json"}
    names |= {"README.md", "loss.json", "curves.png", "chat_template.jinja"}
    assert {file.name for file in trained.folder.iterdir()} == names
    assert (trained.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "THIS_FOLDER" in (trained.folder / "README.md").read_text()


def test_the_description_says_how_it_was_made(trained: Trained) -> None:
    meta = json.loads((trained.folder / META).read_text())
    assert meta["roles"] == ["planner", "builder", "tester", "refractor"]
    assert meta["topologies"] == ["single", "chain", "decentralized", "centralized"]
    assert (meta["step_bound"], meta["prompt_version"]) == (12, prompts.PROMPT_VERSION)
    assert sorted(meta["split"]["train"]) == sorted(f"t{i}" for i in range(16))
    assert sorted(meta["split"]["validation"]) == sorted(f"t{i}" for i in range(16, 20))
    sha = hashlib.sha256(trained.labels.read_bytes()).hexdigest()
    assert meta["data"] == [{"file": str(trained.labels), "sha256": sha}]
    assert meta["base_model"]["folder_or_id"] == str(trained.base) and meta["base_model"]["source"] == "folder"
    assert meta["settings"]["lr"] == 0.01 and meta["settings"]["epochs"] == 6
    assert set(meta["versions"]) == {"torch", "transformers", "peft", "trl"} and all(meta["versions"].values())
    assert meta["metrics"]["steps"] == 24 and meta["metrics"]["train_examples"] == 16
    assert meta["metrics"]["validation_macro_f1"] == trained.result.validation_macro_f1


def test_the_calibration_is_measured_as_the_adapter_serves(trained: Trained, tmp_path: Path, tiny_folder: Tiny) -> None:
    other = tmp_path / "bf16"  # trained in another type than it is served in, where the machine has it
    train(train_settings(trained.labels, tiny_folder("qwen3"), other, epochs=2, bf16=True))
    for folder in (trained.folder, other):
        file = folder / META
        meta = json.loads(file.read_text())
        held_out = [example for example in label_rows() if example["split"] == "validation"]
        without = shutil.copytree(folder, tmp_path / f"{folder.name} uncalibrated")
        (without / META).write_text(json.dumps({**meta, "calibration": None}))
        served, own = (
            LocalBackend(
                load({"infer.adapter": ("test", str(one)), "models.dtype": ("test", "float32")}, environ={})
            ).decide([example["task"] for example in held_out])
            for one in (folder, without)
        )
        names = meta["topologies"]
        shares = [[one.topologies[name] for name in names] for one in own if one.topologies]
        gold = [names.index(example["decision"]["topology"]) for example in held_out]
        again = fit(np.array(shares), np.array(gold), tuple(names), "float32")
        stored = Calibration.model_validate(meta["calibration"])
        assert (stored.n, stored.dtype, stored.biases) == (4, "float32", {})
        assert stored.temperature == pytest.approx(again.temperature, rel=1e-3)
        assert stored.ece_before == pytest.approx(again.ece_before, abs=2e-3)
        assert served[0].topologies == pytest.approx(stored.apply(own[0].topologies or {}), abs=1e-5)
    assert any(line.startswith("calibrated on 4 validation tasks") for line in trained.said.notices)


def test_without_validation_tasks_nothing_is_calibrated(trained: Trained, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "labels.jsonl", label_rows(8, 0))
    train(train_settings(data, trained.base, tmp_path / "adapter", validation_share=0))
    assert json.loads((tmp_path / "adapter" / META).read_text())["calibration"] is None


def test_the_best_epoch_is_the_one_kept(trained: Trained) -> None:
    key = "validation_macro_f1"
    scores = {
        entry["epoch"]: entry[key] for entry in json.loads((trained.folder / "loss.json").read_text()) if key in entry
    }
    # Every epoch of the later half is validated.
    assert {4, 5, 6} <= scores.keys() and trained.result.validation_macro_f1 == max(scores.values())
    meta = json.loads((trained.folder / META).read_text())
    assert meta["metrics"]["best_epoch"] == max(scores, key=scores.__getitem__)


def test_it_loads_by_plain_peft_and_generates(trained: Trained) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), trained.folder).eval()
    chat = [{"role": "system", "content": "You are a meta-router."}, {"role": "user", "content": "Task: Sort a list."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_it_serves_and_decides_validly(trained: Trained) -> None:
    chosen = {"infer.adapter": str(trained.folder), "models.dtype": "float32"}
    backend = LocalBackend(load({key: ("test", value) for key, value in chosen.items()}, environ={}))
    for choice in backend.decide(["Sort a list.", "Plan stage 77, then build it, then test it."]):
        assert not backend.space.violations(choice.decision)
        assert choice.topologies is not None and sum(choice.topologies.values()) == pytest.approx(1.0)


def test_the_same_command_again_does_nothing(trained: Trained) -> None:
    before, said = fingerprint_of(trained.folder), Recorder()
    again = train(train_settings(trained.labels, trained.base, trained.folder, epochs=6, lr=0.01), said)
    assert again.already_done and again.steps == 24 and again.last_loss == trained.result.last_loss
    assert "nothing to do" in said.notices[-1]
    assert fingerprint_of(trained.folder) == before


def test_other_settings_refuse_a_finished_folder_and_are_named(trained: Trained, tmp_path: Path) -> None:
    before = fingerprint_of(trained.folder)
    with pytest.raises(TrainingError, match=r"other train\.lr \(0\.01, now 0\.001\)"):
        train(train_settings(trained.labels, trained.base, trained.folder, epochs=6, lr=1e-3))
    with pytest.raises(TrainingError, match=r"train\.epochs, train\.seed"):
        train(train_settings(trained.labels, trained.base, trained.folder, seed=1, lr=0.01))
    other = write_rows(tmp_path / "other.jsonl", label_rows(12))
    with pytest.raises(TrainingError, match="another data file"):
        train(train_settings(other, trained.base, trained.folder, epochs=6, lr=0.01))
    with pytest.raises(TrainingError, match=r"models\.dtype"):
        train(train_settings(trained.labels, trained.base, trained.folder, epochs=6, lr=0.01, models__dtype="bfloat16"))
    assert fingerprint_of(trained.folder) == before


def test_a_damaged_description_refuses(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "copy")
    (tmp_path / "copy" / META).write_text("{")
    with pytest.raises(TrainingError, match=r"is not JSON.*choose another --output-dir"):
        train(train_settings(trained.labels, trained.base, tmp_path / "copy", epochs=6, lr=0.01))


# -- what the trainer gets --------------------------------------------------------------------------------------


def made(settings: Settings, said: Recorder | None = None) -> Any:
    """The trainer that `train` would run, not run."""
    said = said or Recorder()
    space = _space(settings)
    data = build(settings, space)
    model, tokenizer = _load(settings, resolve(settings.train.model, settings), begun(settings.train.output_dir), said)
    wanted = settings.train
    rows = encode(data.train, space, tokenizer, wanted.max_length, said, wanted.augment, wanted.seed)
    layers = list(range(model.config.num_hidden_layers))
    run = Run(settings.train.output_dir, {})
    return recipe.make_trainer(model, tokenizer, space, rows, layers, settings, run), data, tokenizer, space


ANSWERS = {
    "single": '{"topology":"single","roles":["builder"],"manager_role":null,"entry_role":"builder","max_steps":1}',
    "chain": '{"topology":"chain","roles":["planner","builder","tester"],"manager_role":null,"entry_role":"planner",'
    '"max_steps":3}',
    "decentralized": '{"topology":"decentralized","roles":["planner","builder"],"manager_role":null,'
    '"entry_role":"builder","max_steps":2}',
    "centralized": '{"topology":"centralized","roles":["planner","tester"],"manager_role":"planner",'
    '"entry_role":"planner","max_steps":4}',
}
SYSTEM = (
    "You are a meta-router. Answer in JSON.\nRoles: planner, builder, tester, refractor\nsingle: one artefact; chain: "
    "fixed stages; decentralized: unconnected parts; centralized: dependent parts, a manager\nmax_steps: up to 12"
)
# What stands before the answer, with the task at the %s, and what ends it.
DIALOGUES: dict[Style, tuple[str, str]] = {
    "smollm": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nTask: %s<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nTask: %s<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTask: %s<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_loss_falls_on_the_answer_and_its_end_alone(style: Style, tiny_folder: Tiny, tmp_path: Path) -> None:
    rows = label_rows(10, 0)
    data = write_rows(tmp_path / "data.jsonl", rows)
    loop, _, tokenizer, _ = made(train_settings(data, tiny_folder(style), tmp_path, validation_share=0))
    learnt = []
    for batch in loop.get_train_dataloader():
        for ids, labels, real in zip(
            *(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask")), strict=True
        ):
            unmasked = [token for token in labels if token != loss.IGNORED]
            assert unmasked == [token for token, mark in zip(ids, labels, strict=True) if mark != loss.IGNORED]
            masked = [ids[i] for i, mark in enumerate(labels) if mark == loss.IGNORED and real[i]]
            learnt.append((tokenizer.decode(masked), tokenizer.decode(unmasked)))
    before, end = DIALOGUES[style]
    assert sorted(learnt) == sorted((before % row["task"], ANSWERS[row["decision"]["topology"]] + end) for row in rows)


@pytest.mark.parametrize("style", STYLES)
def test_training_and_serving_ask_with_the_same_tokens(style: Style, tiny_folder: Tiny, tmp_path: Path) -> None:
    rows = label_rows(6, 0)
    rows[2]["task"] = "写一个函数 <|im_end|> <|eot_id|>\n  def f(x):\n\treturn x  "
    rows[3]["task"] = "Task: do it 🙂"
    data = write_rows(tmp_path / "data.jsonl", rows)
    loop, dataset, _, space = made(train_settings(data, tiny_folder(style), tmp_path, validation_share=0, batch_size=1))
    trained_on = set()
    for batch in loop.get_train_dataloader():
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        trained_on.add(tuple(token for token, mark in zip(ids, labels, strict=True) if mark == loss.IGNORED))
    chosen = {"infer.base": str(tiny_folder(style)), "models.dtype": "float32"}
    backend = LocalBackend(load({key: ("test", value) for key, value in chosen.items()}, environ={}))
    assert backend.space == space
    served: list[list[int]] = []
    backend.model.get_input_embeddings().register_forward_pre_hook(lambda part, given: served.append(given[0].tolist()))
    forced = list(backend._decoder.tree.root.run)
    asked = set()
    for example in dataset.train:
        served.clear()
        backend.decide([tasks.task_of({"task": example.text}).text])
        # The constant start goes in once, when the first task comes; what the answer must begin with comes along.
        [rest] = served[0] if len(served[0][0]) != len(backend._decoder._prefix) else served[1]
        whole = [*backend._decoder._prefix, *rest]
        assert whole[len(whole) - len(forced) :] == forced
        asked.add(tuple(whole[: len(whole) - len(forced)]))
    assert asked == trained_on and len(asked) == 6


def test_max_length_shortens_the_task_and_never_the_answer(tiny_folder: Tiny, tmp_path: Path) -> None:
    rows = label_rows(4, 0)
    rows[0]["task"] = "Sort this: " + ", ".join(map(str, range(300)))
    data, said = write_rows(tmp_path / "data.jsonl", rows), Recorder()
    settings = train_settings(data, tiny_folder("smollm"), tmp_path, validation_share=0, max_length=260)
    loop, dataset, tokenizer, _ = made(settings, said)
    for row, example in zip(loop.train_dataset, dataset.train, strict=True):
        assert len(row["input_ids"]) <= 260
        answer = [token for token in row["labels"] if token != loss.IGNORED]
        assert tokenizer.decode(answer) == prompts.render(example.decision) + tokenizer.eos_token
    assert len(said.warnings) == 1 and said.warnings[0].startswith("1 of 4 tasks are longer than --max-length 260")
    with pytest.raises(TrainingError, match=r"example t\d.*raise --max-length"):
        train(train_settings(data, tiny_folder("smollm"), tmp_path / "short", validation_share=0, max_length=64))


def test_train_on_inputs_learns_the_prompt_too(tiny_folder: Tiny, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 0))
    loop, *_ = made(train_settings(data, tiny_folder("smollm"), tmp_path, train_on_inputs=True))
    assert all(row["labels"] == row["input_ids"] for row in loop.train_dataset)
    both = {}
    for on in (True, False):
        result = train(train_settings(data, tiny_folder("smollm"), tmp_path / str(on), train_on_inputs=on))
        both[on] = result.first_loss
    assert both[True] != pytest.approx(both[False], rel=1e-3)


def test_the_trainers_arguments_are_the_settings(tiny_folder: Tiny, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8))
    settings = train_settings(
        data,
        tiny_folder("smollm"),
        tmp_path,
        weight_decay=0.1,
        warmup_ratio=0.25,
        lr_scheduler="constant_with_warmup",
        seed=7,
        save_steps=3,
        logging_steps=4,
        lora_r=4,
        lora_alpha=12,
        lora_dropout=0.2,
    )
    loop, *_ = made(settings)
    found = loop.args
    assert (found.weight_decay, found.seed, found.save_steps, found.logging_steps) == (0.1, 7, 3, 4)
    assert str(found.lr_scheduler_type.value) == "constant_with_warmup" and found.get_warmup_steps(100) == 25
    config = loop.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.2)


# -- what every option does -------------------------------------------------------------------------------------


def run(tmp_path: Path, base: Path, name: str = "adapter", rows: Any = None, **values: Any) -> tuple[TrainResult, Path]:
    """A short training (4 steps unless told otherwise) and its folder."""
    data = write_rows(tmp_path / f"{name}.jsonl", label_rows(16, 0) if rows is None else rows)
    values = {"validation_share": 0, **values}
    return train(train_settings(data, base, tmp_path / name, **values)), tmp_path / name


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"batch_size": 4, "grad_accum": 2}, 2),
        ({"batch_size": 1, "grad_accum": 3}, 6),
        ({"epochs": 2}, 8),
        ({"epochs": 0.5}, 2),
        ({"max_samples": 8}, 2),
        ({"batch_size": 64}, 1),
    ],
)
def test_steps_follow_batch_accumulation_epochs_and_samples(
    values: dict[str, Any], steps: int, tiny_folder: Tiny, tmp_path: Path
) -> None:
    result, folder = run(tmp_path, tiny_folder("smollm"), **values)
    assert result.steps == steps == len(losses(folder))
    assert result.train_examples == values.get("max_samples", 16)


def test_seed_weight_decay_and_topology_weight_change_the_weights_and_nothing_else_does(
    tiny_folder: Tiny, tmp_path: Path
) -> None:
    base = tiny_folder("smollm")
    plain = adapter_weights(run(tmp_path, base)[1])
    assert equal(plain, adapter_weights(run(tmp_path, base, "again")[1]))
    for name, values in {
        "seed": {"seed": 1},
        "decay": {"weight_decay": 0.9},
        "topology": {"topology_weight": 5},
        "passes": {"topology_passes": 1, "epochs": 0.5},
        "dropout": {"lora_dropout": 0.5},
    }.items():
        assert not equal(plain, adapter_weights(run(tmp_path, base, name, **values)[1])), name


def test_topology_passes_are_more_lessons_that_teach_the_topology(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    result, folder = run(tmp_path, base, topology_passes=2)
    assert result.steps == 12  # 16 tasks, each as one whole lesson and two short ones, four a step
    _, folder = run(tmp_path, base, "longer", topology_passes=2, epochs=6, lr=2e-3)
    seen = losses(folder, "topology_loss")
    assert sum(seen[-12:]) < 0.8 * sum(seen[:12])


def test_the_topology_loss_is_taken_among_the_topologies_alone(tiny_folder: Tiny, tmp_path: Path) -> None:
    """An untrained model is about undecided among four, but far from it among its whole vocabulary."""
    _, folder = run(tmp_path, tiny_folder("smollm"), topology_weight=1, batch_size=16, grad_accum=1)
    assert (
        losses(folder, "topology_loss")[0] < math.log(4) + 1 < losses(run(tmp_path, tiny_folder("smollm"), "b")[1])[0]
    )


def test_loss_on_the_prompt_excludes_lessons_in_the_topology(tiny_folder: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--train-on-inputs"):
        run(tmp_path, tiny_folder("smollm"), train_on_inputs=True, topology_passes=1)


def test_the_learning_rate_follows_its_scheduler(tiny_folder: Tiny, tmp_path: Path) -> None:
    def rates(**values: Any) -> list[float]:
        name = "-".join(map(str, values.values()))
        values = {"batch_size": 1, "grad_accum": 2, "warmup_ratio": 0, "lr": 1e-3, **values}
        return losses(run(tmp_path, tiny_folder("smollm"), name, **values)[1], "learning_rate")

    # Eight steps; the log has the rate of the step just taken.
    assert rates(lr_scheduler="constant") == pytest.approx([1e-3] * 8)
    assert rates(lr_scheduler="linear") == pytest.approx([1e-3 * (8 - i) / 8 for i in range(8)])
    cosine = rates(lr_scheduler="cosine")
    assert cosine[0] == pytest.approx(1e-3) and cosine[4] == pytest.approx(5e-4) and cosine[7] < 1e-4
    warm = rates(lr_scheduler="constant_with_warmup", warmup_ratio=0.5)
    assert warm == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 4])


def test_checkpoints_come_every_save_steps_and_no_more_are_kept_than_asked(tiny_folder: Tiny, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(step: int) -> None:
        seen.append({folder.name for folder in (tmp_path / "a" / "checkpoints").glob("checkpoint-*")})

    data = write_rows(tmp_path / "data.jsonl", label_rows(16, 0))
    settings = train_settings(
        data, tiny_folder("smollm"), tmp_path / "a", epochs=3, save_steps=2, save_total_limit=1, validation_share=0
    )
    train(settings, Recorder(look))
    assert seen[1] == set() and seen[3] == {"checkpoint-2"} and seen[11] == {"checkpoint-10"}
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_logging_steps_thin_the_log(tiny_folder: Tiny, tmp_path: Path) -> None:
    _, folder = run(tmp_path, tiny_folder("smollm"), epochs=2, logging_steps=4)
    steps = [entry["step"] for entry in json.loads((folder / "loss.json").read_text()) if "loss" in entry]
    assert steps == [1, 4, 8]


def test_nothing_is_printed(tiny_folder: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    run(tmp_path, tiny_folder("smollm"))
    assert capfd.readouterr() == ("", "")


def test_target_modules_choose_what_is_adapted(tiny_folder: Tiny, tmp_path: Path) -> None:
    _, folder = run(tmp_path, tiny_folder("smollm"), target_modules="q_proj,v_proj", lora_r=3)
    weights = adapter_weights(folder)
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "v_proj"}
    assert {min(weight.shape) for weight in weights.values()} == {3}
    with pytest.raises(TrainingError, match="--target-modules: the model has no module named q_prog"):
        run(tmp_path, tiny_folder("smollm"), "wrong", target_modules="q_prog")


@pytest.mark.parametrize("style", STYLES)
def test_last_layers_alone_are_adapted_and_freezing_the_rest_changes_no_loss(
    style: Style, tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_cli.training import frozen

    said, rows = Recorder(), label_rows(12, 4)
    data = write_rows(tmp_path / "data.jsonl", rows)
    # Lessons that end at the topology look their states up as the whole rows do.
    values = {"lora_last_layers": 1, "epochs": 2, "batch_size": 3, "grad_accum": 1, "topology_passes": 1}
    train(train_settings(data, tiny_folder(style, 3), tmp_path / "frozen", **values), said)
    assert "compute 2 frozen layers once" in said.bars
    weights = adapter_weights(tmp_path / "frozen")
    assert weights and {name.partition("layers.")[2].split(".")[0] for name in weights} == {"2"}
    monkeypatch.setattr(frozen, "MEMORY_SHARE", 0.0)
    said = Recorder()
    train(train_settings(data, tiny_folder(style, 3), tmp_path / "running", **values), said)
    assert not any("frozen" in title for title in said.bars)
    assert losses(tmp_path / "running") == pytest.approx(losses(tmp_path / "frozen"), abs=1e-5)
    key = "validation_macro_f1"
    assert losses(tmp_path / "running", key) == losses(tmp_path / "frozen", key)


def test_gradient_checkpointing_trains_to_the_same_losses(tiny_folder: Tiny, tmp_path: Path) -> None:
    plain = run(tmp_path, tiny_folder("smollm"), lora_dropout=0)[1]
    other = run(tmp_path, tiny_folder("smollm"), "other", lora_dropout=0, gradient_checkpointing=True)[1]
    assert losses(other) == pytest.approx(losses(plain), abs=1e-4)
    last = {"lora_dropout": 0, "lora_last_layers": 1}
    plain = run(tmp_path, tiny_folder("smollm"), "last", **last)[1]
    other = run(tmp_path, tiny_folder("smollm"), "last-other", **last, gradient_checkpointing=True)[1]
    assert losses(other) == pytest.approx(losses(plain), abs=1e-4)


def test_four_bit_without_a_gpu_warns_once_and_goes_on(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine can do it")
    data, said = write_rows(tmp_path / "data.jsonl", label_rows(4, 4)), Recorder()
    result = train(train_settings(data, tiny_folder("smollm"), tmp_path / "a", use_4bit=True), said)
    assert result.steps == 1 and [text for text in said.warnings if "4bit" in text] == [
        "--use-4bit is slow on a CPU, and the base fits as it is: going on with plain LoRA"
    ]


def test_half_precision_is_one_or_the_other(tiny_folder: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bf16 and --fp16 exclude each other"):
        run(tmp_path, tiny_folder("smollm"), bf16=True, fp16=True)
    for name in ("bf16", "fp16"):
        result, folder = run(tmp_path, tiny_folder("smollm"), name, **{name: True})
        assert result.steps == 4 and all(loss > 0 for loss in losses(folder))


# -- the rows ---------------------------------------------------------------------------------------------------


# Texts that are not nearly the same, which a split would keep together.
TEXTS = [json.loads(line)["task"] for line in Path("data/tasks.jsonl").read_text(encoding="utf-8").splitlines()[:40]]


def old_row(i: int, answer: str) -> dict[str, Any]:
    """A row as the old generator wrote it."""
    system = "You are a meta-router.\nAvailable roles: planner, builder, tester, refractor."
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Task: {TEXTS[i]}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "sample_type": "humaneval_teacher_distilled", "origin_task_id": f"HumanEval/{i}"}


def old_answer(i: int) -> str:
    decision = Decision.model_validate(label_rows(4, 0)[i % 4]["decision"], strict=False)
    return "```json\n" + json.dumps(decision.model_dump(), indent=2) + "\n```"


def test_rows_of_the_old_generator_train_as_they_are(tiny_folder: Tiny, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "old.jsonl", [old_row(i, old_answer(i)) for i in range(28)])
    chosen = {"data": str(data), "model": str(tiny_folder("smollm")), "output_dir": str(tmp_path / "a")}
    result = train(load({f"train.{key}": ("test", value) for key, value in chosen.items()}, environ={}))
    meta = json.loads((tmp_path / "a" / META).read_text())
    assert result.train_examples + result.validation_examples == 28 and result.validation_examples > 0
    assert meta["roles"] == ["planner", "builder", "tester", "refractor"]
    assert set(meta["split"]["train"]) | set(meta["split"]["validation"]) == {f"HumanEval/{i}" for i in range(28)}


def test_roles_come_from_the_data_unless_they_are_given(tiny_folder: Tiny, tmp_path: Path) -> None:
    rows = [
        {
            "task": f"Do {i}",
            "decision": {"topology": "single", "roles": [role], "manager_role": None}
            | {"entry_role": role, "max_steps": 1},
        }
        for i, role in enumerate(["cook", "waiter"] * 4)
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    for given, roles in ((None, ["cook", "waiter"]), ("waiter,cook,host", ["waiter", "cook", "host"])):
        chosen = {"train.data": str(data), "train.model": str(tiny_folder("smollm"))}
        chosen |= {"train.output_dir": str(tmp_path / roles[0])} | ({"decision.roles": given} if given else {})
        train(load({key: ("test", value) for key, value in chosen.items()}, environ={}))
        assert json.loads((tmp_path / roles[0] / META).read_text())["roles"] == roles


def test_sample_types_and_rows_without_output(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    rows: list[dict[str, Any]] = [old_row(i, old_answer(i)) for i in range(8)]
    rows += [old_row(i, old_answer(i)) | {"sample_type": "other"} for i in range(8, 12)]
    assert run(tmp_path, base, "all", rows)[0].train_examples == 12
    assert run(tmp_path, base, "one", rows, sample_types="other")[0].train_examples == 4
    broken = [*rows, old_row(12, "I cannot say."), old_row(13, "")]
    with pytest.raises(InputError, match=r"broken\.jsonl:13: .*--drop-no-output"):
        run(tmp_path, base, "broken", broken)
    assert run(tmp_path, base, "dropped", broken, drop_no_output=True)[0].train_examples == 12


def test_raw_humaneval_rows_are_labelled_on_the_way_in(tiny_folder: Tiny, tmp_path: Path) -> None:
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def f{i}(x):\n    """Return x plus {i}."""\n',
            "entry_point": f"f{i}",
            "canonical_solution": "    return x\n",
            "test": "def check(f): pass\n",
        }
        for i in range(6)
    ]
    with pytest.raises(InputError, match="--convert-humaneval labels it offline"):
        run(tmp_path, tiny_folder("smollm"), "raw", rows)
    result, folder = run(tmp_path, tiny_folder("smollm"), "converted", rows, convert_humaneval=True)
    assert result.train_examples == 6
    assert "return x" not in (folder / META).read_text()


def test_several_files_are_one_set(tiny_folder: Tiny, tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{i}.jsonl", label_rows(16, 0)[8 * i : 8 * i + 8]) for i in (0, 1))
    result = train(train_settings(f"{one},{two}", tiny_folder("smollm"), tmp_path / "a", validation_share=0))
    assert result.train_examples == 16


# -- going wrong ------------------------------------------------------------------------------------------------


def test_a_model_without_data_is_only_fetched(tiny_folder: Tiny, tmp_path: Path) -> None:
    settings = train_settings("", tiny_folder("smollm"), tmp_path / "a", download_model=True)
    result = train(settings)
    assert result.adapter is None and result.base.folder == tiny_folder("smollm").resolve()
    with pytest.raises(UsageError, match="pass --data FILE"):
        train(train_settings("", tiny_folder("smollm"), tmp_path / "a"))
    with pytest.raises(ModelError, match="no such model folder"):
        train(train_settings(write_rows(tmp_path / "d.jsonl", label_rows()), "./nowhere", tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_no_number_stops_with_advice(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_folder("smollm"), base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower --lr"):
        run(tmp_path, base, epochs=3)
    assert not (tmp_path / "adapter" / META).exists()


def test_a_loss_that_is_no_number_between_two_logs_stops_too(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch

    def poison(step: int) -> None:
        # A jump far beyond what any weight can hold, as too high a rate makes it.
        if step == 3:
            torch.nn.init.constant_(next(part for part in models[0].parameters() if part.requires_grad), float("inf"))

    data = write_rows(tmp_path / "data.jsonl", label_rows(16, 0))
    settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", logging_steps=100, validation_share=0)
    space = _space(settings)
    model, tokenizer = _load(settings, resolve(settings.train.model, settings), begun(tmp_path), Recorder())
    models = [model]
    rows = encode(build(settings, space).train, space, tokenizer, 2048, Recorder())
    fitting = Run(tmp_path / "a", {})
    fitting.begin()
    with pytest.raises(TrainingError, match="the adapter's weights are no numbers any more at step 4"):
        trainer.fit(model, tokenizer, space, rows, [], settings, fitting, Recorder(poison))


def logged(losses: list[float], spacing: int = 1) -> list[dict[str, Any]]:
    return [{"step": (i + 1) * spacing, "loss": loss} for i, loss in enumerate(losses)]


def test_only_a_loss_that_really_rises_is_said_to() -> None:
    chance = random.Random(1)
    for _ in range(60):
        # As loud as losses of single rows are, flat or falling: never an alarm on the way.
        start, speed = chance.uniform(0.5, 4), chance.choice([0, 0.01, 0.1])
        noisy = [start * math.exp(-speed * i) + 0.2 + abs(chance.gauss(0, 0.5 * start)) for i in range(120)]
        assert not any(rising(logged(noisy[:n])) for n in range(40, 121, 10))
    falling = [3 * math.exp(-i / 10) + chance.gauss(0, 0.05) for i in range(60)]
    assert not rising(logged([*falling, *[1.0] * 10]))  # ten steps are a bad stretch, not a trend
    risen = rising(logged([*falling, *(2.5 + chance.gauss(0, 0.05) for _ in range(20))]))
    assert re.fullmatch(r"the loss rises: 0\.\d+ in the mean over 20 steps at its best, 2\.\d+ now", risen)
    # Without anything gained before, too; and where only every tenth step is logged.
    assert rising(logged([2.0] * 20 + [3.1] * 20)) and not rising(logged([2.0] * 20 + [2.9] * 20))
    assert rising(logged([2.0, 1.8, 1.7, 1.6, 1.5, 4, 4, 4.1, 4, 4], spacing=10))


def test_a_rising_loss_stops_with_advice_and_its_weights_are_not_saved(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch

    def derail(step: int) -> None:
        if step == 22:  # sure of itself, and wrong
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(100)

    data = write_rows(tmp_path / "data.jsonl", label_rows(16, 0))
    settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", epochs=20, validation_share=0, lr=1e-4)
    settings = settings.with_values(train__save_steps=1)
    space = _space(settings)
    model, tokenizer = _load(settings, resolve(settings.train.model, settings), begun(tmp_path), Recorder())
    rows = encode(build(settings, space).train, space, tokenizer, 2048, Recorder())
    fitting = Run(tmp_path / "a", {})
    fitting.begin()
    with pytest.raises(TrainingError, match=r"the loss rises: .* at step \d\d: lower --lr \(0\.0001\)") as caught:
        trainer.fit(model, tokenizer, space, rows, [], settings, fitting, Recorder(derail))
    at = int(str(caught.value).split("at step ")[1].split(":")[0])
    newest = fitting.newest()
    assert 30 < at < 45 and newest is not None and newest.name == f"checkpoint-{at - 1}"


def stopped(tmp_path: Path, base: Path, at: int, **values: Any) -> Settings:
    """A run that broke off after `at` steps; the settings that continue it."""

    def stop(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    data = write_rows(tmp_path / "data.jsonl", label_rows())
    settings = train_settings(data, base, tmp_path / "a", **{"epochs": 3, "save_steps": 2, **values})
    with pytest.raises(KeyboardInterrupt):
        train(settings, Recorder(stop))
    return settings


def test_an_unfinished_run_refuses_other_data_and_settings(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    settings = stopped(tmp_path, base, 5)
    other = write_rows(tmp_path / "other.jsonl", label_rows(12))
    again = train_settings(other, base, tmp_path / "a", epochs=3, save_steps=2)
    with pytest.raises(TrainingError, match="holds an unfinished run with another data file"):
        train(again)
    with pytest.raises(TrainingError, match=r"unfinished run with other train\.lr"):
        train(settings.with_values(train__lr=1e-3))
    with pytest.raises(ModelError, match="its training is unfinished"):
        LocalBackend(load({"infer.adapter": ("test", str(tmp_path / "a"))}, environ={}))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> TrainResult:
    folder = tmp_path_factory.mktemp("unbroken")
    data = write_rows(folder / "data.jsonl", label_rows())
    return train(train_settings(data, tiny_folder("smollm"), folder / "a", epochs=3, save_steps=2))


@pytest.mark.parametrize("at", [1, 5, 6, 8, 12])
def test_a_run_that_broke_off_ends_as_an_unbroken_one(
    at: int, unbroken: TrainResult, tiny_folder: Tiny, tmp_path: Path
) -> None:
    said, whole = Recorder(), unbroken
    assert whole.adapter is not None
    result = train(stopped(tmp_path, tiny_folder("smollm"), at), said)
    # The step at which it broke off had not been saved.
    newest = (at - 1) // 2 * 2
    assert [text for text in said.notices if "continuing" in text] == [f"continuing from step {newest}"] * (newest > 0)
    assert result.steps == whole.steps == 12
    assert (result.validation_macro_f1, result.last_loss) == (whole.validation_macro_f1, whole.last_loss)
    assert equal(adapter_weights(tmp_path / "a"), adapter_weights(whole.adapter))
    scores = "validation_macro_f1"
    assert losses(tmp_path / "a", scores) == losses(whole.adapter, scores)


def test_held_out_tasks_are_decided_every_eval_steps(tiny_folder: Tiny, tmp_path: Path) -> None:
    said = Recorder()
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", epochs=2, eval_steps=3)
    train(settings, said)
    log = json.loads((tmp_path / "a" / "loss.json").read_text())
    assert [entry["step"] for entry in log if "validation_macro_f1" in entry] == [3, 6, 8]
    assert any(text.startswith("step 3: topology macro-F1") for text in said.notices)


class Interrupter(Recorder):
    """Breaks off where the calibration would begin: after training, before the folder is finished."""

    def bar(self, title: str, total: int | None, done: int = 0) -> Any:
        if title == "calibrate":
            raise KeyboardInterrupt
        return super().bar(title, total, done)


@pytest.mark.parametrize(("values", "steps"), [({"eval_steps": 3}, 6), ({}, 8)], ids=["steps", "epochs"])
def test_training_stops_early_where_nothing_gets_better_and_a_kill_then_changes_nothing(
    values: dict[str, int], steps: int, tiny_folder: Tiny, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    # So low a rate changes no decision.
    wanted = {"epochs": 5, "lr": 1e-9, "patience": 1, "save_steps": 4, **values}
    whole = train(train_settings(data, tiny_folder("smollm"), tmp_path / "whole", **wanted))
    assert whole.steps == steps and whole.adapter is not None
    settings, said = train_settings(data, tiny_folder("smollm"), tmp_path / "a", **wanted), Interrupter()
    with pytest.raises(KeyboardInterrupt):
        train(settings, said)
    assert "stopping early: no better macro-F1 in 1 looks at the validation tasks" in said.notices
    again = Recorder()
    result = train(settings, again)
    assert "train" not in again.bars and result.steps == steps
    assert (result.last_loss, result.validation_macro_f1) == (whole.last_loss, whole.validation_macro_f1)
    assert equal(adapter_weights(tmp_path / "a"), adapter_weights(whole.adapter))


def test_a_scoreless_or_improving_run_is_not_stale() -> None:
    looks = [{"step": i, "validation_macro_f1": score} for i, score in enumerate([0.2, 0.5, 0.5, 0.4])]
    assert stale(looks, 2) and not stale(looks, 3) and not stale(looks[:2], 1) and not stale(looks, None)
    assert not stale([*looks, {"step": 9, "validation_macro_f1": 0.6}], 2) and not stale([{"loss": 1.0}], 1)


def test_balanced_class_weights_make_every_topology_count_alike(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch

    rows = [row for row in label_rows(24, 0) if row["decision"]["topology"] == "single" or int(row["id"][1:]) < 8]
    data = write_rows(tmp_path / "data.jsonl", rows)
    counts = {"single": 6, "chain": 2, "decentralized": 2, "centralized": 2}
    losses: dict[str, list[float]] = {}
    seen: list[str] = []
    for kind in ("none", "balanced"):
        values = {"validation_share": 0, "class_weights": kind, "topology_passes": 1, "batch_size": 1, "grad_accum": 1}
        loop, _, tokenizer, space = made(train_settings(data, tiny_folder("smollm"), tmp_path, **values))
        choices = recipe.topology_choice(space, tokenizer)[1]
        names = {tokenizer.decode([token]).strip('"'): token for token in choices}
        for batch in loop.get_train_dataloader():
            labels = batch["labels"][0][batch["labels"][0] != loss.IGNORED].tolist()
            if len(labels) > 1:
                continue
            loop.current_gradient_accumulation_steps = 1
            with torch.no_grad():
                losses.setdefault(kind, []).append(float(loop.compute_loss(loop.model.eval(), batch)))
            if kind == "none":
                seen.append(next(name for name, token in names.items() if token == labels[0]))
    ratios = [balanced / plain for balanced, plain in zip(losses["balanced"], losses["none"], strict=True)]
    expected = [next(12 / (4 * count) for name, count in counts.items() if name.startswith(part)) for part in seen]
    assert len(ratios) == 12 and ratios == pytest.approx(expected, rel=1e-4)


def test_class_weights_reach_the_whole_answers_topology_too(tiny_folder: Tiny, tmp_path: Path) -> None:
    plain = run(tmp_path, tiny_folder("smollm"), "plain", label_rows(12, 4)[1:], topology_weight=1, lora_dropout=0)[1]
    balanced = run(
        tmp_path, tiny_folder("smollm"), "balanced", label_rows(12, 4)[1:], topology_weight=1, lora_dropout=0,
        class_weights="balanced",
    )[1]  # fmt: skip
    assert losses(plain)[0] != losses(balanced)[0]
    # The figure that is logged stays the plain one: it is compared between runs.
    assert losses(plain, "topology_loss")[0] == pytest.approx(losses(balanced, "topology_loss")[0], abs=1e-5)
    with pytest.raises(UsageError, match=r"--train-on-inputs learns all tokens alike: it excludes .*--class-weights"):
        run(tmp_path, tiny_folder("smollm"), "wrong", train_on_inputs=True, class_weights="balanced")


def test_augmented_lessons_are_trained_beside_the_served_ones(tiny_folder: Tiny, tmp_path: Path) -> None:
    result, folder = run(
        tmp_path, tiny_folder("smollm", 3), "more", label_rows(12, 4), augment=1, lora_last_layers=1, topology_passes=1
    )
    assert result.train_examples == 12 and result.steps == 12 * 2 * 2 // 4
    assert json.loads((folder / META).read_text())["split"]["train"] == [f"t{i}" for i in range(12)]


def test_the_topology_is_logged_apart_and_shown(tiny_folder: Tiny, tmp_path: Path) -> None:
    shown: list[str] = []

    class Watcher(Recorder):
        @contextmanager
        def bar(self, title: str, total: int | None, done: int = 0) -> Any:
            yield SimpleNamespace(advance=lambda steps=1, status="": shown.append(status) if title == "train" else None)

    data = write_rows(tmp_path / "data.jsonl", label_rows())
    train(train_settings(data, tiny_folder("smollm"), tmp_path / "a"), Watcher())
    folder = tmp_path / "a"
    assert len(losses(folder, "topology_loss")) == len(losses(folder, "topology_accuracy")) == len(losses(folder)) == 4
    assert all(re.fullmatch(r"loss \d+\.\d{3}, topology \d+% right, .*", text) for text in shown[1:])


def test_an_incomplete_checkpoint_is_not_continued_from(tiny_folder: Tiny, tmp_path: Path) -> None:
    settings = stopped(tmp_path, tiny_folder("smollm"), 7)
    newest = tmp_path / "a" / "checkpoints" / "checkpoint-6"
    assert (newest / "complete.json").is_file()
    (newest / "complete.json").unlink()
    (newest / "optimizer.pt").unlink()
    said = Recorder()
    assert train(settings, said).steps == 12
    assert "continuing from step 4" in said.notices
