"""Weights in the layout of the CPU's products: the same numbers, and nothing is touched that is not plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.backends.decoding import Decoder
from router_cli.backends.lean import ATTENTION
from router_cli.backends.packed import _exact, packed
from router_cli.space import DecisionSpace
from tests.tiny import STYLES, Style

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
TEXTS = ("Sort a list.", "Plan the migration of the service, then build it, then test it.", "写一个函数。")
needs_products = pytest.mark.skipif(not _exact(), reason="this torch build has no such bfloat16 products")


def loaded(folder: Path, dtype: str = "bfloat16", **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()


def linear(model: Any) -> list[str]:
    import torch

    return [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]


@needs_products
@pytest.mark.parametrize("style", STYLES)
def test_linear_layers_give_the_same_numbers_to_the_last_bit(tiny_folder: Callable[..., Path], style: Style) -> None:
    import torch

    plain = loaded(tiny_folder(style), attn_implementation="eager")
    changed = packed(loaded(tiny_folder(style), attn_implementation="eager"))
    assert linear(changed) == ["lm_head"], "the head may share its weights with the embedding"
    ids = torch.randint(5, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(plain(input_ids=ids).logits, changed(input_ids=ids).logits)
        alone = [model.generate(input_ids=ids[:1], do_sample=False, max_new_tokens=8) for model in (plain, changed)]
    assert torch.equal(*alone)


@needs_products
@pytest.mark.parametrize("style", STYLES)
def test_decisions_are_those_of_the_ordinary_model(tiny_folder: Callable[..., Path], style: Style) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(style))
    asked = [prompts.encode_prompt(text, SPACE, tokenizer) for text in TEXTS]
    plain, changed = loaded(tiny_folder(style)), packed(loaded(tiny_folder(style)))
    assert changed.config._attn_implementation == ATTENTION
    for one, other in zip(
        Decoder(plain, tokenizer, SPACE).decide(asked), Decoder(changed, tokenizer, SPACE).decide(asked), strict=True
    ):
        # Attention rounds elsewhere: bfloat16 keeps eight bits.
        assert one.topologies == pytest.approx(other.topologies, abs=0.05)


@needs_products
def test_biases_are_kept() -> None:
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Linear(32, 48, bias=True, dtype=torch.bfloat16)
            self.head = torch.nn.Linear(48, 8, dtype=torch.bfloat16)
            self.device, self.dtype = torch.device("cpu"), torch.bfloat16
            self.config = type("Config", (), {"_attn_implementation": "eager"})

        def get_output_embeddings(self) -> Any:
            return self.head

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x))

    model, x = Small(), torch.randn(2, 5, 32).bfloat16()
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(packed(model)(x), expected) and not isinstance(model.body, torch.nn.Linear)


def test_other_types_and_adapters_beside_the_weights_stay_as_they_are(tiny_folder: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    wide = loaded(tiny_folder(), "float32")
    assert packed(wide) is wide and "model.layers.0.mlp.up_proj" in linear(wide)
    assert wide.config._attn_implementation == "sdpa"
    beside = get_peft_model(loaded(tiny_folder()), LoraConfig(r=4, target_modules="all-linear"))
    before = linear(beside)
    assert linear(packed(beside)) == before and before


@pytest.mark.parametrize("mask", [True, False])
def test_long_attention_is_the_same_without_its_scores_in_memory(monkeypatch: pytest.MonkeyPatch, mask: bool) -> None:
    import torch

    from router_cli.backends import lean

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16) for heads, length in ((4, 7), (2, 11), (2, 11)))
    hidden = torch.zeros(2, 1, 7, 11).masked_fill_(torch.rand(2, 1, 7, 11) < 0.3, torch.finfo(torch.float32).min)
    module = torch.nn.Module().eval()
    short = lean.attend(module, query, key, value, hidden if mask else None, 0.25)[0]
    monkeypatch.setattr(lean, "_SCORES", 1)
    fused = lean.attend(module, query, key, value, hidden if mask else None, 0.25)[0]
    assert fused.shape == short.shape == (2, 7, 4, 16)
    torch.testing.assert_close(fused, short)
