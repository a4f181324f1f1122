"""The estimate of a training run: exact where it can be, a refusal in time, and a way on where memory ran out."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.local import META
from router_cli.cli import main
from router_cli.errors import ModelError, TrainingError, UsageError
from router_cli.footprint import dryrun
from router_cli.footprint.forecast import Footprint
from router_cli.footprint.shapes import KNOWN, shape_of
from router_cli.settings import Settings, load
from router_cli.train import estimate, train
from tests.training import Recorder, adapter_weights, equal, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
ALL = ("all-linear",)


def setup(**values: Any) -> dryrun.Setup:
    chosen = {"dtype": "float32", "device": "cpu", "adapted": 2, "targets": ALL, "rank": 8, **values}
    return dryrun.Setup(**chosen)


def nowhere(tmp_path: Path) -> Settings:
    """Settings whose cache of models is empty."""
    return load({"models.model_dir": ("test", str(tmp_path / "models"))}, environ={})


# -- shapes -----------------------------------------------------------------------------------------------------

# As the models' pages on the Hub count them.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_table_have_as_many_weights_as_published(name: str, tmp_path: Path) -> None:
    found = shape_of(name, nowhere(tmp_path))
    assert found.source == "table" and found.tokenizer is None
    assert dryrun.weights(found.config, setup()).base == 4 * PUBLISHED[name]


def test_old_names_and_aliases_have_the_shape_of_what_they_mean(tmp_path: Path) -> None:
    settings = nowhere(tmp_path)
    assert shape_of("Qwen/Qwen3-8B-Instruct", settings).config.hidden_size == KNOWN["Qwen/Qwen3-8B"]["hidden_size"]
    assert shape_of("smollm2-135m", settings).config.num_hidden_layers == 30
    assert not (tmp_path / "models").exists()


def test_a_folder_is_read_by_its_configuration_alone(tiny_folder: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder("qwen3") / "config.json").read_bytes())
    found = shape_of(str(tmp_path), nowhere(tmp_path))
    assert (found.source, found.config.num_hidden_layers, found.tokenizer) == ("folder", 2, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="its configuration cannot be read"):
        shape_of(str(tmp_path), nowhere(tmp_path))


# -- the dry run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"checkpointing": True}, {"dropout": 0.1}], ids=["plain", "again", "dropout"])
def test_the_dry_run_holds_what_a_real_step_holds(values: dict[str, Any], tiny_folder: Tiny) -> None:
    """Five layers are drawn out from two and three without content, and measured with content on this CPU."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from router_cli.backends.lean import lean
    from router_cli.training.frozen import hidden_states

    rows, length, scored, shared = 3, 40, 7, 0 if "checkpointing" in values else 11
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3", 5, 64))
    wanted = setup(adapted=5, **values)
    said = dryrun.train_step(model.config, wanted, rows, length, scored, shared)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_dropout=wanted.dropout, target_modules=names))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    if wanted.checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    adapted.train()
    ids = torch.arange(rows * length).reshape(rows, length) % 300
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    gc.collect()
    with lean(adapted), dryrun._Alive(adapted.parameters()) as alive:
        states = hidden_states(model.get_decoder(), ids, mask, shared, 0)
        begun, alive.peak = alive.now, alive.now
        logits = model.get_output_embeddings()(states[:, -scored:].flatten(0, 1)).float()
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, ids[:, -scored:].flatten()))
    assert said.states == pytest.approx(begun, rel=0.05)
    assert said.peak == pytest.approx(alive.peak, rel=0.10)
    assert said.flops == pytest.approx(alive.flops, rel=0.05)


def test_what_saves_memory_saves_it_in_the_dry_run(tmp_path: Path) -> None:
    config = shape_of("Qwen/Qwen3-0.6B", nowhere(tmp_path)).config
    whole = setup(adapted=28, dtype="bfloat16", device="cuda", autocast=True)

    def held(rows: int = 4, length: int = 256, **values: Any) -> float:
        from dataclasses import replace

        return dryrun.train_step(config, replace(whole, **values), rows, length, 40, 0).peak

    plain = held()
    assert held(checkpointing=True) < plain / 4
    assert held(adapted=9) < plain / 2
    assert held(rows=1) < plain / 3 and held(length=128) < 0.6 * plain
    assert held(fused_head=True) < plain
    assert held(rows=1, device="cpu") < held(device="cpu") / 3


def test_four_bits_weigh_what_bitsandbytes_makes_of_them() -> None:
    import torch

    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(256, 320)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    made = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert dryrun.nf4_bytes(weight.numel()) == made


# -- what is said -----------------------------------------------------------------------------------------------


def foreseen(tmp_path: Path, model: Path | str, rows: Any = None, **values: Any) -> Footprint:
    data = write_rows(tmp_path / "data.jsonl", label_rows() if rows is None else rows)
    return estimate(train_settings(data, model, tmp_path / "adapter", **values))


def test_steps_lengths_and_money_follow_data_and_settings(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    found = foreseen(tmp_path, base, epochs=3, price_per_hour=2)
    assert (found.examples, found.steps, found.counted_by) == (16, 12, "the model's tokenizer")
    assert found.longest >= found.mean > 100
    assert found.dollars == pytest.approx(2 * found.seconds / 3600)
    assert foreseen(tmp_path, base, max_length=140).longest == 140
    twice = foreseen(tmp_path, base, epochs=6)
    assert twice.dollars is None and twice.flops == pytest.approx(2 * found.flops)
    assert foreseen(tmp_path, base, topology_passes=1).steps == 8
    assert not (tmp_path / "adapter").exists()


def test_tokens_are_guessed_from_characters_without_a_tokenizer_and_that_is_said(tmp_path: Path) -> None:
    found = foreseen(tmp_path, "Qwen/Qwen3-0.6B", models__model_dir=str(tmp_path / "models"))
    assert found.counted_by == "characters / 3.4" and found.shape_from == "table"
    assert 100 < found.mean < 400
    rows = label_rows()
    rows[0]["task"] *= 40
    assert foreseen(tmp_path, "Qwen/Qwen3-0.6B", rows, models__model_dir=str(tmp_path / "m")).longest > found.longest


def test_the_command_prints_components_that_add_up_and_writes_nothing(
    tiny_folder: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    words = ["train", "--estimate", "--data", str(data), "--model", str(tiny_folder("smollm"))]
    words += ["--output-dir", str(tmp_path / "adapter"), "--price-per-hour", "2.5"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["memory"].values()) > 0.5e9 and found["fits"] is True
    assert {"adapters", "activations"} <= found["memory"].keys() or found["phase"] != "a training step"
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found["memory"]) and "about $" in shown and "very roughly" in shown
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(UsageError, match="nothing to estimate: pass --data"):
        estimate(train_settings("", tiny_folder("smollm"), tmp_path / "adapter"))


def test_training_says_the_estimate_first(tiny_folder: Tiny, tmp_path: Path) -> None:
    said, data = Recorder(), write_rows(tmp_path / "data.jsonl", label_rows(8, 0))
    train(train_settings(data, tiny_folder("smollm"), tmp_path / "a", validation_share=0), said)
    assert said.notices[0].startswith("estimate: ") and "2 steps" in said.notices[0]


@pytest.fixture
def monster(tiny_folder: Tiny, tmp_path: Path) -> Path:
    """A model folder whose configuration asks for terabytes; there are no weights."""
    folder = tmp_path / "monster"
    folder.mkdir()
    for file in tiny_folder("smollm").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 131072, "intermediate_size": 524288, "num_hidden_layers": 8, "head_dim": 32768}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_cannot_fit_is_refused_with_what_helps(monster: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 0))
    settings = train_settings(data, monster, tmp_path / "a", validation_share=0, batch_size=4)
    with pytest.raises(TrainingError) as refused:
        train(settings)
    said = str(refused.value)
    assert said.count("(saves ") == 3 and "GB are free" in said and "--no-check-memory" in said
    # What it names does save as much, by the estimate itself.
    flag, _, rest = said.split("what helps: ")[1].partition(" (saves ")
    assert flag == "--gradient-checkpointing" or flag.startswith(
        ("--batch-size 1", "--lora-last-layers", "--max-length")
    )
    assert float(rest.split(" GB")[0]) > 1
    assert not (tmp_path / "a").exists()
    # Whoever knows better goes on, here to weights that are not there.
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(settings.with_values(train__check_memory=False))


# -- out of memory ----------------------------------------------------------------------------------------------


@contextmanager
def little_memory(rows: int, after: int = 0) -> Iterator[list[int]]:
    """A machine that cannot train on more than `rows` rows at once, from the layer call number `after` on."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    asked: list[int] = []

    def hook(module: Any, given: Any) -> None:
        if not type(module).__name__.endswith("DecoderLayer") or not torch.is_grad_enabled():
            return
        if given[0].device.type != "meta":  # the estimate's dry run holds nothing
            asked.append(len(given[0]))
            if len(given[0]) > rows and len(asked) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = register_module_forward_pre_hook(hook)
    try:
        yield asked
    finally:
        handle.remove()


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "loss.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("values", [{}, {"lora_last_layers": 1}], ids=["all layers", "the last one"])
def test_out_of_memory_becomes_smaller_micro_batches_with_the_same_step(
    values: dict[str, Any], tiny_folder: Tiny, tmp_path: Path
) -> None:
    data, base = write_rows(tmp_path / "data.jsonl", label_rows()), tiny_folder("smollm")
    said = Recorder()
    with little_memory(1) as asked:
        train(train_settings(data, base, tmp_path / "a", batch_size=4, grad_accum=1, **values), said)
    assert max(asked) > 1, "nothing ran out"
    assert [line for line in said.warnings if "out of memory" in line] == [
        "out of memory with --batch-size 4: going on with --batch-size 2 --grad-accum 2, the same 4 examples a step, "
        "from the last complete checkpoint",
        "out of memory with --batch-size 2: going on with --batch-size 1 --grad-accum 4, the same 4 examples a step, "
        "from the last complete checkpoint",
    ]
    train(train_settings(data, base, tmp_path / "b", batch_size=1, grad_accum=4, **values))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(adapter_weights(tmp_path / "a"), adapter_weights(tmp_path / "b"))


def test_it_goes_on_from_the_last_complete_checkpoint(tiny_folder: Tiny, tmp_path: Path) -> None:
    data, base, said = write_rows(tmp_path / "data.jsonl", label_rows(16, 0)), tiny_folder("smollm"), Recorder()
    values = {"epochs": 2, "save_steps": 2, "validation_share": 0, "lora_dropout": 0}
    # Two layers, called for the shared start and for the rows: four calls a step.
    with little_memory(2, after=4 * 3):
        train(train_settings(data, base, tmp_path / "a", batch_size=4, grad_accum=1, **values), said)
    assert "continuing from step 2" in said.notices and sum("out of memory" in line for line in said.warnings) == 1
    train(train_settings(data, base, tmp_path / "b", batch_size=2, grad_accum=2, **values))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)


def test_where_not_even_one_example_fits_the_message_says_what_helps(tiny_folder: Tiny, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 0))
    settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", validation_share=0)
    with little_memory(0), pytest.raises(TrainingError, match="out of memory with --batch-size 1; what helps: "):
        train(settings)
    assert not (tmp_path / "a" / META).exists()
    said = Recorder()
    train(settings, said)  # with more memory, the same command again
    assert (tmp_path / "a" / META).is_file() and not any("memory" in line for line in said.warnings)


def test_another_error_stays_what_it_is(tiny_folder: Tiny, tmp_path: Path) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    def hook(module: Any, given: Any) -> None:
        if type(module).__name__.endswith("DecoderLayer"):
            raise RuntimeError("shapes cannot be multiplied")

    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 0))
    handle = register_module_forward_pre_hook(hook)
    try:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            train(train_settings(data, tiny_folder("smollm"), tmp_path / "a", validation_share=0, check_memory=False))
    finally:
        handle.remove()


def test_an_unfinished_run_may_go_on_with_other_micro_batches(tiny_folder: Tiny, tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    data = write_rows(tmp_path / "data.jsonl", label_rows(16, 0))
    settings = train_settings(
        data, tiny_folder("smollm"), tmp_path / "a", save_steps=2, validation_share=0, batch_size=4, grad_accum=1
    )
    with pytest.raises(KeyboardInterrupt):
        train(settings, Recorder(stop))
    said = Recorder()
    with pytest.raises(TrainingError, match="batch_size x grad_accum"):
        train(settings.with_values(train__batch_size=2), said)
    assert train(settings.with_values(train__batch_size=2, train__grad_accum=2), said).steps == 4
    assert "continuing from step 2" in said.notices
