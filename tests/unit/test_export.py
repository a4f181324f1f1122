"""`train --export`: the router as a model of its own decides as the adapter does, wherever it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.local import META, LocalBackend
from router_cli.errors import TrainingError
from router_cli.models import BaseModel
from router_cli.settings import load
from router_cli.train import train
from router_cli.training import export as module
from router_cli.training.export import GGUF_FILE, check, export
from tests.training import Recorder, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
TASKS = ["Sort a list.", "Plan stage 77, then build it, then test it.", "排序 x² 123"]

LLAMA31 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "rope_theta": 10000}
LLAMA31 |= {"original_max_position_embeddings": 2048}

# transformers reads no width of the heads out of a Qwen3 file: it takes the family's own 128.
SHAPES = {"smollm": (2, 32), "llama3": (2, 32), "qwen3": (1, 512)}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> tuple[Path, Any]:
    """An adapter that was trained with both exports, and its settings."""
    folder = tmp_path_factory.mktemp(request.param)
    data, base = write_rows(folder / "data.jsonl", label_rows(8, 4)), tiny_folder(request.param, *SHAPES[request.param])
    settings = train_settings(data, base, folder / "adapter", lr=0.02, epochs=2, export="merged,gguf")
    assert train(settings).exported == (folder / "adapter/merged", folder / "adapter/gguf" / GGUF_FILE)
    return folder / "adapter", settings


def decided(adapter: Path, cache: Path) -> list[Any]:
    chosen = {"infer.adapter": str(adapter), "models.dtype": "float32", "models.model_dir": str(cache)}
    return LocalBackend(load({key: ("test", value) for key, value in chosen.items()}, environ={})).decide(TASKS)


def test_a_merged_router_decides_as_its_adapter(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    for whole, part in zip(decided(folder / "merged", tmp_path), decided(folder, tmp_path), strict=True):
        # Calibrated, too.
        assert (whole.decision, whole.topologies) == (part.decision, pytest.approx(part.topologies, abs=1e-6))
    # A base on its own as well, as transformers and vLLM take it: no adapter beside it.
    assert not (folder / "merged" / "adapter_config.json").exists()
    assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= {
        file.name for file in (folder / "merged").iterdir()
    }


def test_a_gguf_file_holds_the_merged_weights_and_the_tokenizer(trained: tuple[Path, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, _ = trained
    whole, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "merged"), AutoTokenizer.from_pretrained(folder)
    read = {"gguf_file": GGUF_FILE, "dtype": torch.float32}
    read["quantization_config"] = GgufConfig(gguf_file=GGUF_FILE, dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(folder / "gguf", **read)
    assert found.state_dict().keys() == whole.state_dict().keys()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name]), name
    other = AutoTokenizer.from_pretrained(folder / "gguf", gguf_file=GGUF_FILE)
    chat = [{"role": "user", "content": text} for text in TASKS]
    asked = [one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for one in (tokenizer, other)]
    assert asked[0] == asked[1]
    ids = tokenizer(asked[0], add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.tolist() == other(asked[0], add_special_tokens=False, return_tensors="pt").input_ids.tolist()
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (other.eos_token_id, other.bos_token_id)
    # The config too: the same scores.
    assert torch.allclose(whole(ids).logits, found(ids).logits, atol=1e-4)
    assert {file.name for file in (folder / "gguf").iterdir()} == {GGUF_FILE, META}


def test_a_gguf_router_serves_with_roles_and_calibration(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    # The file is unpacked as bfloat16, which a wide model of chance weights takes badly.
    allowed = 0.05 if folder.parent.name.startswith(("smollm", "llama3")) else 0.5
    for whole, part in zip(decided(folder / "gguf", tmp_path), decided(folder, tmp_path), strict=True):
        assert whole.topologies == pytest.approx(part.topologies, abs=allowed)


def test_bfloat16_stays_what_it_is(tiny_folder: Tiny, tmp_path: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("smollm"), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("smollm"))
    module.write_gguf(tmp_path / "x.gguf", tiny_folder("smollm"), model, tokenizer, "x")
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert {one.tensor_type.name for one in tensors.values()} == {"BF16", "F32"}
    assert all((one.tensor_type.name == "F32") == ("norm" in name) for name, one in tensors.items())
    kept = torch.frombuffer(bytearray(tensors["token_embd.weight"].data.tobytes()), dtype=torch.bfloat16)
    assert torch.equal(kept.view(model.get_input_embeddings().weight.shape), model.get_input_embeddings().weight)


def test_the_same_command_again_exports_what_is_missing_and_trains_nothing(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, settings = trained
    moved = tmp_path / "adapter"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "merged")
    said = Recorder()
    result = train(settings.with_values(train__output_dir=moved), said)
    assert result.already_done and result.exported == (moved / "merged", moved / "gguf" / GGUF_FILE)
    assert said.bars == ["export merged"] and (moved / "merged" / META).is_file()
    assert sum("made of this very adapter" in text for text in said.notices) == 1
    # Of another adapter: made anew.
    meta = json.loads((moved / "merged" / META).read_text())
    (moved / "merged" / META).write_text(json.dumps({**meta, "adapter_sha256": "0"}))
    said = Recorder()
    export(moved, ["merged"], settings, said)
    assert said.bars == ["export merged"] and not (moved / "merged.part").exists()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"model_type": "gpt2"}, "writes llama and qwen3 models, not gpt2; pass --export merged"),
        ("config.json", {"rope_scaling": LLAMA31}, "scales its rotary positions"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "llama.cpp's name for the base's tokenizer"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "llama.cpp's name for the base's tokenizer"),
    ],
)
def test_what_no_gguf_can_be_written_of_is_refused_before_training(
    file: str, change: dict[str, Any], words: str, tiny_folder: Tiny, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder("smollm"), tmp_path / "base")
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    with pytest.raises(TrainingError, match=words):
        check(BaseModel("x", base, "folder"), ["gguf"])
    check(BaseModel("x", base, "folder"), ["merged"])
    data = write_rows(tmp_path / "data.jsonl", label_rows(8, 4))
    with pytest.raises(TrainingError, match=words):
        train(train_settings(data, base, tmp_path / "adapter", export="gguf"))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {"pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
            "smollm",
        ),
        (
            {
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": next(iter(module._SPLITS))}},
                    {"type": "ByteLevel"},
                ]
            },
            "qwen2",
        ),
        (
            {
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": list(module._SPLITS)[1]}},
                    {"type": "ByteLevel"},
                ]
            },
            "llama-bpe",
        ),
    ],
)
def test_how_texts_are_split_is_told_by_llama_cpps_own_name(rule: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": rule}))
    assert module._pre_tokenizer(BaseModel("x", tmp_path, "folder")) == name


def test_an_activated_adapter_is_not_merged(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, settings = trained
    shutil.copytree(folder, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [1, 2]}))
    with pytest.raises(TrainingError, match="activated LoRA cannot be merged"):
        export(tmp_path / "a", ["merged"], settings)
