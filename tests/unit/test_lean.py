"""The lean forms of layers and attention give the losses and gradients of the ordinary ones, and step aside again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.lean import ATTENTION, lean
from tests.tiny import Style

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    """The model with an adapter on all its linear layers, its weights no longer zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return peft


def outcome(model: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients over two rows of unequal length, padded on the right."""
    import torch

    torch.manual_seed(2)
    ids = torch.randint(5, 250, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    torch.manual_seed(3)  # dropout draws the same
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert found and all("lora" in name for name in found)
    return loss.item(), found


@pytest.mark.parametrize("style", ["smollm", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_loss_and_gradients_are_the_ordinary_ones(
    tiny_folder: Callable[..., Path], style: Style, dropout: float
) -> None:
    import torch

    model = adapted(tiny_folder(style), lora_dropout=dropout).train()
    expected, right = outcome(model)
    with lean(model):
        assert any("forward" in vars(part) for part in model.modules())
        assert model.get_base_model().config._attn_implementation == ATTENTION
        found, mine = outcome(model)
    assert found == pytest.approx(expected, abs=1e-5)
    assert mine.keys() == right.keys()
    for name, gradient in mine.items():
        assert torch.allclose(gradient, right[name], atol=1e-5, rtol=1e-4), name


def test_bfloat16_stays_within_its_rounding(tiny_folder: Callable[..., Path]) -> None:
    exact, right = outcome(adapted(tiny_folder("smollm")))
    model = adapted(tiny_folder("smollm"), "bfloat16")
    _, theirs = outcome(model)
    with lean(model):
        found, mine = outcome(model)
    assert found == pytest.approx(exact, rel=0.02)

    def off(gradients: dict[str, Any]) -> float:
        return float(sum((gradients[name] - right[name]).square().sum() for name in right) ** 0.5)

    # No farther from the exact gradients than the ordinary way in this type.
    assert off(mine) < 1.25 * off(theirs)


def test_the_model_is_as_before_afterwards(tiny_folder: Callable[..., Path]) -> None:
    model = adapted(tiny_folder("smollm"))
    before = outcome(model)
    with pytest.raises(ZeroDivisionError), lean(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(part) for part in model.modules())
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert outcome(model)[0] == before[0]


def test_what_is_no_plain_adapter_is_left_alone(tiny_folder: Callable[..., Path]) -> None:
    model = adapted(tiny_folder("smollm"), use_dora=True)
    expected, _ = outcome(model)
    with lean(model):
        assert not any("forward" in vars(part) for part in model.modules())
        assert outcome(model)[0] == pytest.approx(expected, abs=1e-5)


def test_adapters_can_be_switched_off(tiny_folder: Callable[..., Path]) -> None:
    import torch

    model = adapted(tiny_folder("smollm")).eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode(), lean(model):
        with_adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    base = model.unload()
    with torch.inference_mode():
        assert torch.allclose(base(input_ids=ids).logits, without, atol=1e-5)
    assert not torch.allclose(with_adapter, without, atol=1e-2)
