"""An adapter in the weights: as PEFT's own merge has it to the last bit, without PEFT where it is an ordinary one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.adapters import adapted
from router_cli.backends.library import quiet
from router_cli.errors import ModelError

Tiny = Callable[..., Path]


def model(folder: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of the base whose weights are no longer zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    with quiet():
        made = get_peft_model(model(base), LoraConfig(task_type="CAUSAL_LM", **chosen))
    for name, part in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(part, std=0.1)
    made.save_pretrained(folder)
    return folder


def merged(base: Any, folder: Path) -> dict[str, Any]:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()  # type: ignore[no-any-return]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", ["smollm", "qwen3", "llama3"])
def test_the_weights_are_those_of_pefts_merge(style: str, dtype: str, tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder(style)
    folder = adapter(base, tmp_path, layers_to_transform=[1])
    assert same(adapted(model(base, dtype), folder).state_dict(), merged(model(base, dtype), folder))
    assert not same(model(base, dtype).state_dict(), merged(model(base, dtype), folder))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_an_unusual_adapter_is_pefts(options: dict[str, Any], tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    folder = adapter(base, tmp_path, **options)
    assert same(adapted(model(base), folder).state_dict(), merged(model(base), folder))


def test_damage_is_said(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    whole = adapter(base, tmp_path / "whole")
    for name, cut in (("short", 200), ("empty", 0)):
        folder = Path(shutil.copytree(whole, tmp_path / name))
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(ModelError, match="does not load"):
            adapted(model(base), folder)
    with pytest.raises(ModelError, match="does not load"):  # of a wider model
        adapted(model(tiny_folder("smollm", 2, 64)), whole)


def test_serving_an_ordinary_adapter_imports_no_peft(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    folder = adapter(base, tmp_path)
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom transformers import AutoModelForCausalLM\n"
        "from router_cli.backends.adapters import adapted\n"
        f"adapted(AutoModelForCausalLM.from_pretrained({str(base)!r}), Path({str(folder)!r}))\n"
        "print(json.dumps([name for name in ('peft', 'bitsandbytes') if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
