"""4-bit training on a CPU through bitsandbytes: real NF4 weights, forward, backward, save and load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.backends.local import META, LocalBackend
from router_cli.dataset import build
from router_cli.models import BaseModel, resolve
from router_cli.settings import load
from router_cli.train import _load, _precision, _space, train
from router_cli.training import qlora, recipe
from router_cli.training.checkpoints import Run
from tests.training import Recorder, adapter_weights, begun, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
pytest.importorskip("bitsandbytes", reason="bitsandbytes is made for Linux and Windows")


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose memory does not hold the base in its own number type."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this is about CPUs")
    monkeypatch.setattr(qlora, "ROOM", 0.0)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "loss.json").read_text()) if "loss" in entry]


def settings_for(tmp_path: Path, base: Path, name: str, **values: Any) -> Any:
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 4))
    return train_settings(data, base, tmp_path / name, **{"lora_dropout": 0, "use_4bit": True, **values})


def test_the_base_is_nf4_doubly_quantised_and_the_adapter_float32(
    no_room: None, tiny_folder: Tiny, tmp_path: Path
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    settings, said = settings_for(tmp_path, tiny_folder("qwen3", 2, 64), "a"), Recorder()
    model, tokenizer = _load(settings, resolve(settings.train.model, settings), begun(tmp_path), said)
    assert len(said.warnings) == 1 and "--use-4bit on a CPU is slow, but" in said.warnings[0]
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Linear4bit)}
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    for part in layers.values():
        state = part.weight.quant_state
        assert (state.quant_type, state.nested, part.compute_dtype) == ("nf4", True, torch.float32)
        assert part.weight.dtype == torch.uint8 and not part.weight.requires_grad
    assert qlora.is_quantised(model) and qlora.compute_dtype(model) == torch.float32
    space = _space(settings)
    data = build(settings, space)
    rows = [prompts.encode_example(one.text, one.decision, space, tokenizer, 2048) for one in data.train]
    loop = recipe.make_trainer(model, tokenizer, space, rows, [0, 1], settings, Run(tmp_path / "a", {}))
    trained = {name: part for name, part in loop.model.named_parameters() if part.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {part.dtype for part in trained.values()} == {torch.float32}


def test_it_trains_saves_and_serves(no_room: None, tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("qwen3", 2, 64)
    result = train(settings_for(tmp_path, base, "four", epochs=3))
    assert result.steps == 6 and losses(tmp_path / "four")[-1] < losses(tmp_path / "four")[0]
    weights = adapter_weights(tmp_path / "four")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    # Near the unquantised base, and not equal to it.
    train(settings_for(tmp_path, base, "plain", use_4bit=False, epochs=3))
    first = losses(tmp_path / "four")[0], losses(tmp_path / "plain")[0]
    assert first[0] == pytest.approx(first[1], rel=0.2) and first[0] != pytest.approx(first[1], rel=1e-4)
    assert json.loads((tmp_path / "four" / META).read_text())["calibration"]["n"] == 4
    chosen = {"infer.adapter": str(tmp_path / "four"), "models.dtype": "float32"}
    backend = LocalBackend(load({key: ("test", value) for key, value in chosen.items()}, environ={}))
    assert not backend.space.violations(backend.decide(["Sort a list."])[0].decision)


def test_recomputed_activations_give_the_same_losses(no_room: None, tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("qwen3", 2, 64)
    train(settings_for(tmp_path, base, "kept"))
    train(settings_for(tmp_path, base, "again", gradient_checkpointing=True))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), abs=1e-4)


def test_a_quantised_base_is_saved_and_loaded_bit_for_bit(no_room: None, tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = settings_for(tmp_path, tiny_folder("qwen3", 2, 64), "a")
    model, _ = _load(settings, resolve(settings.train.model, settings), begun(tmp_path), Recorder())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    kept, found = dict(model.named_parameters()), dict(again.named_parameters())
    assert qlora.is_quantised(again) and kept.keys() == found.keys()
    for name, weight in kept.items():
        assert weight.dtype == found[name].dtype and torch.equal(weight, found[name]), name
    with torch.no_grad():  # another product is taken where gradients are wanted
        ids = torch.arange(20)[None]
        assert torch.allclose(model(ids).logits, again.eval()(ids).logits, atol=1e-4)


def test_a_cpu_that_has_the_memory_trains_the_plain_base_and_says_so(tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch

    base, said = BaseModel("x", tiny_folder("qwen3"), "folder"), Recorder()
    assert not qlora.wanted(base, "cpu", torch.float32, said)
    assert said.warnings == ["--use-4bit is slow on a CPU, and the base fits as it is: going on with plain LoRA"]


@pytest.mark.parametrize(
    ("style", "given", "warned"), [("qwen3", "fp16", 1), ("qwen3", "bf16", 0), ("llama3", "fp16", 0)]
)
def test_qwen_in_float16_is_warned_about(style: str, given: str, warned: int, tiny_folder: Tiny) -> None:
    said, base = Recorder(), BaseModel("x", tiny_folder(style), "folder")
    settings = train_settings("none", base.folder, Path("none"), **{given: True})
    found = _precision(settings, base, "cuda", said)
    assert found == {"dtype": {"fp16": "float16", "bf16": "bfloat16"}[given], "four_bit": False}
    assert len(said.warnings) == warned
    assert all("too narrow for some of Qwen's activations" in text for text in said.warnings)


def test_float16_keeps_norms_and_embeddings_in_float32(no_room: None, tiny_folder: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kinds = {}
    for dtype in ("float16", "bfloat16"):
        base, kind = BaseModel("x", tiny_folder("qwen3", 2, 64), "folder"), getattr(torch, dtype)
        chosen = qlora.configuration(kind)
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=kind, quantization_config=chosen)
        model = qlora.prepared(model, checkpointing=False)
        kinds[dtype] = {part.dtype for part in model.parameters() if part.dtype != torch.uint8}
        assert not any(part.requires_grad for part in model.parameters())
    assert kinds == {"float16": {torch.float32}, "bfloat16": {torch.bfloat16}}
