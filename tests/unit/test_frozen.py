"""The short cuts of training on a CPU are exact: same loss, same gradients of the adapter, model as before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.space import DecisionSpace
from router_cli.training.frozen import FrozenLayers, hidden_states
from tests.tiny import Style

SPACE = DecisionSpace(("planner", "builder", "tester"))
# Of different length, so that the batch is padded; two are the same, and one is far longer than the rest.
TEXTS = ["Sort a list.", "x", "Plan it, build it and test it; " * 6, "x"]
FIRST = 2


@pytest.fixture(params=["smollm", "qwen3", "llama3"])
def style(request: pytest.FixtureRequest) -> Style:
    return request.param  # type: ignore[no-any-return]


def adapted(folder: Path) -> tuple[Any, Any]:
    """The model with an adapter on its last layers, its weights no longer zero, and the tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[2, 3])
    peft = get_peft_model(model, config)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return peft, AutoTokenizer.from_pretrained(folder)


def batch(tokenizer: Any) -> tuple[list[list[int]], Any, Any, Any]:
    """Rows of ids; ids, mask and labels padded on the right with the tokenizer's own padding token."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    decisions = list(SPACE.enumerate())[:: len(TEXTS)]
    made = [
        prompts.encode_example(text, one, SPACE, tokenizer, 2048) for text, one in zip(TEXTS, decisions, strict=False)
    ]
    rows = [one.input_ids for one in made]
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    labels = torch.full_like(ids, -100)
    for i, one in enumerate(made):
        labels[i, one.prompt_length : len(one.input_ids)] = tensors[i][one.prompt_length :]
    return rows, ids, mask, labels


def ordinary(model: Any, ids: Any, mask: Any, labels: Any) -> tuple[float, dict[str, Any]]:
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return gradients(model, loss)


def gradients(model: Any, loss: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert found and all("lora" in name for name in found)
    return loss.item(), found


def shared_start(rows: list[list[int]]) -> int:
    return next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "whole"])
@pytest.mark.parametrize("standing_aside", [True, False], ids=["frozen", "running"])
def test_loss_and_gradients_are_those_of_an_ordinary_forward(
    tiny_folder: Callable[..., Path], style: Style, sharing: bool, standing_aside: bool
) -> None:
    import torch

    model, tokenizer = adapted(tiny_folder(style, 4))
    rows, ids, mask, labels = batch(tokenizer)
    assert len({len(row) for row in rows}) > 1
    expected, right = ordinary(model, ids, mask, labels)
    shared = shared_start(rows) if sharing else 0
    assert shared > 20 or not sharing
    base = model.get_base_model()
    with ExitStack() as stack:
        if standing_aside:
            frozen = FrozenLayers(model, FIRST, tokenizer.pad_token_id, shared)
            done: list[int] = []
            frozen.compute(rows, done.append)
            assert sum(done) == len(rows)
            stack.enter_context(frozen.in_place())
        states = hidden_states(base.get_decoder(), ids, mask, shared, FIRST if standing_aside else 0)
        logits = base.get_output_embeddings()(states[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, shared + 1 :], ignore_index=-100)
        found, mine = gradients(model, loss)
    assert found == pytest.approx(expected, abs=1e-5)
    assert mine.keys() == right.keys()
    for name, gradient in mine.items():
        assert torch.allclose(gradient, right[name], atol=1e-5, rtol=1e-4), name


def test_the_model_is_whole_again_afterwards(tiny_folder: Callable[..., Path], style: Style) -> None:
    model, tokenizer = adapted(tiny_folder(style, 4))
    rows, ids, mask, labels = batch(tokenizer)
    expected, _ = ordinary(model, ids, mask, labels)
    decoder = model.get_base_model().get_decoder()
    layers, names = list(decoder.layers), list(model.state_dict())
    frozen = FrozenLayers(model, FIRST, tokenizer.pad_token_id, 0)
    frozen.compute(rows, lambda count: None)
    assert ordinary(model, ids, mask, labels)[0] == expected
    with pytest.raises(ZeroDivisionError), frozen.in_place():
        assert list(decoder.layers) != layers
        raise ZeroDivisionError
    assert list(decoder.layers) == layers and list(model.state_dict()) == names
    assert decoder.config.num_hidden_layers == len(layers)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in decoder.modules())
    assert ordinary(model, ids, mask, labels)[0] == expected


def test_layers_come_back_when_computing_fails(tiny_folder: Callable[..., Path]) -> None:
    model, tokenizer = adapted(tiny_folder("smollm", 4))
    rows, *_ = batch(tokenizer)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FrozenLayers(model, FIRST, tokenizer.pad_token_id, 5).compute(rows, stop)
    decoder = model.get_base_model().get_decoder()
    assert decoder.config.num_hidden_layers == 4
    assert not any(part._forward_pre_hooks for part in decoder.layers)


def test_no_room_means_no_frozen_layers(tiny_folder: Callable[..., Path]) -> None:
    model, _ = adapted(tiny_folder("smollm", 4))
    assert FrozenLayers.fits(model, [range(100)])
    assert not FrozenLayers.fits(model, [range(10**12)])
