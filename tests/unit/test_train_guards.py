"""What a training run holds on to whatever the machine, the data or a second command does meanwhile."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from router_cli import models
from router_cli import train as training
from router_cli.backends.device import available_memory, out_of_memory
from router_cli.backends.local import META, LocalBackend
from router_cli.dataset import build
from router_cli.errors import OutputError, TrainingError, UsageError
from router_cli.models import BaseModel
from router_cli.settings import load
from router_cli.train import TrainResult, _load, _space, train
from router_cli.training import qlora, watch
from router_cli.training.checkpoints import Run
from tests.training import Recorder, begun, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]


def settings_for(tmp_path: Path, base: Path, **values: Any) -> Any:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 4))
    return train_settings(data, base, tmp_path / "a", **values)


def test_the_projects_own_tasks_train_by_their_name(tiny_folder: Tiny, tmp_path: Path) -> None:
    settings = train_settings("rubric", tiny_folder("smollm"), tmp_path / "a", max_samples=4, validation_share=0)
    result: TrainResult = train(settings)
    assert result.steps == 1
    [data] = json.loads((tmp_path / "a" / META).read_text())["data"]
    assert data["file"] == "rubric" and len(data["sha256"]) == 64


def test_two_runs_do_not_share_a_folder(tiny_folder: Tiny, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tiny_folder("smollm"))
    (tmp_path / "a").mkdir()
    with (
        FileLock(tmp_path / "a" / ".train.lock"),
        pytest.raises(OutputError, match=r"a: another `router train` is writing it"),
    ):
        train(settings)
    assert train(settings).steps == 2
    assert not (tmp_path / "a" / ".train.lock").exists()


def test_what_another_run_finished_meanwhile_is_not_trained_over(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, ordinary = settings_for(tmp_path, tiny_folder("smollm")), models.resolve
    rivals = [settings.with_values(train__lr=1e-3)]

    def slow(*args: Any) -> BaseModel:
        """A fetch that takes as long as another whole run."""
        if rivals:
            train(rivals.pop())
        return ordinary(*args)

    monkeypatch.setattr(models, "resolve", slow)
    with pytest.raises(TrainingError, match=r"holds an adapter trained with other train\.lr"):
        train(settings)
    rivals.append(settings)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(OutputError, match="another `router train` has finished it meanwhile"):
        train(settings)


def other_weights(folder: Path, to: Path) -> Path:
    """A base of the same shape whose weights were trained a little further."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: one * 1.001 for name, one in weights.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def test_weights_that_were_replaced_are_another_base(tiny_folder: Tiny, tmp_path: Path) -> None:
    def kill(step: int) -> None:
        if step == 3:
            raise ZeroDivisionError  # as good as a kill: nothing is put away

    base = tmp_path / "base"
    shutil.copytree(tiny_folder("smollm"), base)
    settings = settings_for(tmp_path, base, epochs=2, save_steps=1)
    with pytest.raises(ZeroDivisionError):
        train(settings, Recorder(kill))
    kept = other_weights(base, tmp_path / "kept")
    base.rename(tmp_path / "first")
    kept.rename(base)
    with pytest.raises(TrainingError, match=r"a: was trained on other weights than .*base has now"):
        train(settings)
    base.rename(kept)
    (tmp_path / "first").rename(base)
    assert train(settings).steps == 4
    shutil.rmtree(base)
    kept.rename(base)
    with pytest.raises(TrainingError, match="was trained on other weights"):
        train(settings)


def test_content_tells_weights_apart_wherever_they_lie(tiny_folder: Tiny, tmp_path: Path) -> None:
    one = BaseModel("x", tiny_folder("smollm"), "folder")
    shutil.copytree(one.folder, tmp_path / "copy")
    copy = BaseModel("y", tmp_path / "copy", "folder")
    assert models.content(one) == models.content(copy)
    other = BaseModel("x", other_weights(one.folder, tmp_path / "other"), "folder")
    assert models.content(one) != models.content(other)
    # Who wrote the files, and what lies beside them, says nothing of the model.
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    (copy.folder / "consolidated.safetensors").write_bytes(b"more")
    assert models.content(one) == models.content(copy)
    (copy.folder / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert models.content(one) != models.content(copy)
    older = BaseModel("z", tmp_path / "older", "folder")
    older.folder.mkdir()
    shutil.copy(one.folder / "config.json", older.folder)
    found = set()
    for text in (b"weights", b"others!"):
        (older.folder / "pytorch_model.bin").write_bytes(text)
        found.add(models.content(older))
    assert len(found) == 2


def test_an_adapter_names_its_base_where_others_find_it(tiny_folder: Tiny, tmp_path: Path) -> None:
    folder = tiny_folder("smollm")
    assert models.hub_id(BaseModel("smollm2-135m", folder, "package")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models.hub_id(BaseModel("Qwen/Qwen3-8B", folder, "cache", "abc")) == "Qwen/Qwen3-8B"
    assert models.hub_id(BaseModel("./base", folder, "folder")) is None
    settings = settings_for(tmp_path, folder)
    said = Recorder()
    space = _space(settings)
    run = begun(tmp_path)
    base = BaseModel("Qwen/Qwen3-8B", folder, "cache", "abc")
    training._fit(settings, space, build(settings, space), base, run, said, None)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen3-8B", "abc")
    assert "base_model: Qwen/Qwen3-8B\n" in (tmp_path / "a" / "README.md").read_text()


def test_a_run_goes_on_in_the_precision_it_was_begun_in(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this is about CPUs")
    settings = settings_for(tmp_path, tiny_folder("smollm"), bf16=True, use_4bit=True)
    base, run = models.resolve(settings.train.model, settings), begun(tmp_path)
    monkeypatch.setattr(training, "fast_dtype", lambda device: "float32")
    assert _load(settings, base, run, Recorder())[0].dtype == torch.float32
    # Meanwhile the machine has become quiet, and its memory full.
    monkeypatch.setattr(training, "fast_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(qlora, "ROOM", 0.0)
    model = _load(settings, base, run, Recorder())[0]
    assert model.dtype == torch.float32 and not qlora.is_quantised(model)


def test_weights_that_are_no_numbers_are_never_gone_on_from(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import Trainer

    ordinary = Trainer.training_step
    steps: list[int] = []

    def poisoned(self: Any, model: Any, *args: Any, **given: Any) -> Any:
        loss = ordinary(self, model, *args, **given)
        steps.append(1)
        if len(steps) == 6:  # the third step's second micro-batch; the next log comes after ten
            next(part for part in model.parameters() if part.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    settings = settings_for(tmp_path, tiny_folder("smollm"), epochs=4, save_steps=2, logging_steps=10)
    settings = settings.with_values(train__validation_share=0)
    with pytest.raises(TrainingError, match=r"no numbers any more at step 4: lower --lr.*another --output-dir"):
        train(settings)
    newest = Run(tmp_path / "a", {}).newest()
    assert newest is not None and newest.name == "checkpoint-2"
    assert torch.load(newest / "optimizer.pt", weights_only=True)


def test_held_out_tasks_are_asked_in_as_many_tokens_as_served_ones(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    class Noted(watch.Decoder):
        def topologies(self, encoded: Any) -> list[str]:
            limits.append(self.limit)
            return super().topologies(encoded)

    monkeypatch.setattr(watch, "Decoder", Noted)
    said = Recorder()
    assert train(settings_for(tmp_path, tiny_folder("smollm"), max_length=300, epochs=2), said).steps == 4
    assert limits == [300, 300]
    [first, _] = [text for text in said.notices if "on the validation tasks" in text]
    assert first.endswith("% right)") and "(in training " in first


def test_memory_that_runs_out_beside_the_steps_is_one_line(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_cli.training import frozen

    def none(*args: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(frozen.FrozenLayers, "compute", none)
    settings = settings_for(tmp_path, tiny_folder("smollm"), lora_last_layers=1)
    with pytest.raises(TrainingError, match="out of memory beside the training steps; what helps: "):
        train(settings)


def test_a_full_disk_at_the_end_is_one_line_and_costs_no_training(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    @contextmanager
    def full() -> Any:
        import peft

        def save(self: Any, folder: Any, **given: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(peft.PeftModel, "save_pretrained", save)
            yield

    settings = settings_for(tmp_path, tiny_folder("smollm"), save_steps=1, validation_share=0)
    plain = training._write

    def write(*args: Any) -> None:
        with full():
            plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write", write)
        with pytest.raises(OutputError, match="a: cannot be written: I/O error: No space left on device"):
            train(settings)
    said = Recorder()
    assert train(settings, said).steps == 2 and "continuing from step 2" in said.notices


@pytest.mark.parametrize("older", [False, True])
def test_memory_is_what_the_container_leaves_and_its_page_cache_is_free(older: bool, tmp_path: Path) -> None:
    most, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if older
        else ("memory.max", "memory.current", "inactive_file")
    )
    folder = tmp_path / "memory" if older else tmp_path
    folder.mkdir(exist_ok=True)
    assert available_memory(tmp_path) > 50_000_000  # no limit
    (folder / most).write_text("100000000\n")
    (folder / used).write_text("90000000\n")
    (folder / "memory.stat").write_text(f"anon 1\n{cached} 30000000\n")
    assert available_memory(tmp_path) == 40_000_000
    (folder / used).write_text("200000000\n")
    assert available_memory(tmp_path) == 0
    (folder / most).write_text("max\n")
    assert available_memory(tmp_path) > 50_000_000


@pytest.mark.parametrize("style", ["smollm", "qwen3"])
def test_the_topology_is_measured_beside_trls_own_loss_too(style: str, tiny_folder: Tiny, tmp_path: Path) -> None:
    """As on a GPU, where the plain recipe takes TRL's loss."""
    from router_cli.training import lessons, recipe

    settings = settings_for(tmp_path, tiny_folder(style), batch_size=4)
    space, run = _space(settings), begun(tmp_path)
    model, tokenizer = _load(settings, models.resolve(settings.train.model, settings), run, Recorder())
    rows = lessons.encode(build(settings, space).train, space, tokenizer, 2048, Recorder())
    loop = recipe.make_trainer(model, tokenizer, space, rows, list(range(4)), settings, run)
    loop.model.train()
    loop.current_gradient_accumulation_steps = 1
    found = {}
    for own in (True, False):
        loop._own_loss = own
        for name in ("topology_loss", "topology_accuracy"):
            loop._metrics["train"].pop(name, None)
        for batch in loop.get_train_dataloader():
            batch.pop("position_ids", None)
            loop.compute_loss(loop.model, batch)
        found[own] = [
            [float(one) for one in loop._metrics["train"][f"topology_{kind}"]] for kind in ("loss", "accuracy")
        ]
        assert all(not one.requires_grad for one in loop._metrics["train"]["topology_loss"])
    assert found[False][0] == pytest.approx(found[True][0], abs=1e-4) and found[False][1] == found[True][1]
    assert len(found[True][0]) == 2


def test_a_tracker_gets_the_log_and_a_missing_one_is_named_first(tiny_folder: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings_for(tmp_path, tiny_folder("smollm"), report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "a" / "runs"))
    events.Reload()
    logged = {entry["step"]: entry["loss"] for entry in json.loads((tmp_path / "a" / "loss.json").read_text())[:2]}
    assert {one.step: pytest.approx(one.value) for one in events.Scalars("train/loss")} == logged
    assert "train/topology_accuracy" in events.Tags()["scalars"]
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(UsageError, match="--report-to trackio needs a package: pip install trackio"):
            train(settings_for(tmp_path, tmp_path / "no model", report_to="trackio"))


def test_target_modules_are_whole_names(tiny_folder: Tiny, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--target-modules: the model has no module named proj"):
        train(settings_for(tmp_path, tiny_folder("smollm"), target_modules="q_proj,proj"))


def test_a_run_that_goes_on_counts_the_seconds_before(tiny_folder: Tiny, tmp_path: Path) -> None:
    def kill(step: int) -> None:
        if step == 3:
            raise ZeroDivisionError

    settings = settings_for(tmp_path, tiny_folder("smollm"), epochs=2, save_steps=2)
    with pytest.raises(ZeroDivisionError):
        train(settings, Recorder(kill))
    mark = tmp_path / "a" / "checkpoints" / "checkpoint-2" / "complete.json"
    kept = json.loads(mark.read_text())
    assert kept["seconds"] > 0
    mark.write_text(json.dumps({**kept, "seconds": 5000.0}))
    assert 5000 < train(settings).seconds < 5500


def test_of_several_data_files_the_changed_one_is_named(tiny_folder: Tiny, tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{n}.jsonl", label_rows(8, 0)[n::2]) for n in (0, 1))
    values: dict[str, Any] = {"model": tiny_folder("smollm"), "output": tmp_path / "a", "validation_share": 0}
    train(train_settings(f"{one},{two}", **values))
    write_rows(two, label_rows(12, 0)[1::2])
    with pytest.raises(TrainingError, match=r"trained with another data file \(number 2 of --data\)"):
        train(train_settings(f"{one},{two}", **values))
    with pytest.raises(TrainingError, match="trained with 2 data files, now 1"):
        train(train_settings(one, **values))


def test_an_adapter_above_other_weights_is_warned_about(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("smollm"), base)
    train(settings_for(tmp_path, base))
    served = load({"infer.adapter": ("test", str(tmp_path / "a")), "models.dtype": ("test", "float32")}, environ={})
    said = Recorder()
    LocalBackend(served, said)
    assert said.warnings == []
    kept = other_weights(base, tmp_path / "kept")
    shutil.rmtree(base)
    kept.rename(base)
    LocalBackend(served, said)
    assert len(said.warnings) == 1 and "has other weights than" in said.warnings[0]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried",
        "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_lack_of_memory_is_known_in_all_its_words(words: str) -> None:
    assert out_of_memory(RuntimeError(words)) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError(words))


def test_a_base_that_does_not_fit_gets_the_advice_of_training(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def none(*args: Any, **given: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", none)
    with pytest.raises(TrainingError, match=r"out of memory while .* is loaded; what helps: ") as error:
        train(settings_for(tmp_path, tiny_folder("smollm")))
    assert "--backend remote" not in str(error.value)
