"""Adapters that are active on the answer alone: trained and served as PEFT's own forward over whole rows has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.backends.activated import Activated, activated, invocation
from router_cli.backends.adapters import merged
from router_cli.backends.decoding import Decoder
from router_cli.backends.lean import lean
from router_cli.backends.local import LocalBackend
from router_cli.errors import ModelError, UsageError
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.train import train
from router_cli.training.kept import Prompts
from tests.tiny import Style
from tests.training import label_rows, train_settings, write_rows

SPACE = DecisionSpace(("planner", "builder", "tester"))
TEXTS = ["Sort a list.", "x", "Plan it, build it and test it; " * 6, "x"]
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(params=["smollm", "qwen3", "llama3"])
def style(request: pytest.FixtureRequest) -> Style:
    return request.param  # type: ignore[no-any-return]


def adapted(folder: Path, layers: list[int] | None = None) -> tuple[Any, Any]:
    """The model with an activated adapter whose weights are no longer zero, and the tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    tokens = invocation(SPACE, tokenizer)
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        alora_invocation_tokens=tokens,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return peft, tokenizer


def batch(tokenizer: Any) -> tuple[list[list[int]], Any, Any, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    decisions = list(SPACE.enumerate())[:: len(TEXTS)]
    made = [
        prompts.encode_example(text, one, SPACE, tokenizer, 2048) for text, one in zip(TEXTS, decisions, strict=False)
    ]
    tensors = [torch.tensor(one.input_ids) for one in made]
    ids = pad_sequence(tensors, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    labels = torch.full_like(ids, -100)
    for i, one in enumerate(made):
        labels[i, one.prompt_length : len(one.input_ids)] = tensors[i][one.prompt_length :]
    return [one.input_ids for one in made], ids, mask, labels


def gradients(model: Any, loss: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert found and all("lora" in name for name in found)
    return loss.item(), found


@pytest.mark.parametrize("shared", [0, 25])
@pytest.mark.parametrize("kept", ["all layers", "upper layers", ""])
@pytest.mark.parametrize("fast", [True, False], ids=["lean", "ordinary"])
def test_loss_and_gradients_are_those_of_whole_rows(
    tiny_folder: Callable[..., Path], style: Style, kept: str, shared: int, fast: bool
) -> None:
    import torch

    model, tokenizer = adapted(tiny_folder(style, 4), [2, 3] if "upper" in kept else None)
    rows, ids, mask, labels = batch(tokenizer)
    assert all(row[:shared] == rows[0][:shared] for row in rows)
    expected, right = gradients(model, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    here = Prompts(Activated(model), shared, tokenizer.pad_token_id, 2 if "upper" in kept else 0)
    assert here.fits(rows)
    done: list[int] = []
    if kept:
        here.compute(rows, done.append)
        assert sum(done) == len(rows)
    with lean(model) if fast else nullcontext(), here.in_place():
        states, ends = here.states(ids, mask, labels, -100)
        # A lesson that ends early is a row of its own.
        short = len(rows[2]) - 10
        if kept:
            here.share(rows[2], short)
        part, _ = here.states(ids[2:3, :short], mask[2:3, :short], labels[2:3, :short], -100)
        assert torch.allclose(part[0], states[2, : part.shape[1]], atol=1e-4)
    assert states.shape[1] < ids.shape[1]
    logits = model.get_base_model().get_output_embeddings()(states[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ends[:, 1:], ignore_index=-100)
    found, mine = gradients(model, loss)
    assert found == pytest.approx(expected, abs=1e-5)
    assert mine.keys() == right.keys()
    for name, gradient in mine.items():
        assert torch.allclose(gradient, right[name], atol=1e-5, rtol=1e-4), name


def test_every_prompt_ends_with_the_invocation(tiny_folder: Callable[..., Path], style: Style) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(style))
    tokens = invocation(SPACE, tokenizer)
    assert len(tokens) > 2
    for text in (*TEXTS, "Ends in 1.", "", "a\n", "{}"):
        assert prompts.encode_prompt(text, SPACE, tokenizer)[-len(tokens) :] == tokens


def test_decisions_are_those_of_whole_rows(tiny_folder: Callable[..., Path], style: Style) -> None:
    import torch

    model, tokenizer = adapted(tiny_folder(style))
    model.eval()
    decoder = Decoder(model, tokenizer, SPACE)
    asked = [decoder.prompt(text) for text in TEXTS]
    found = decoder.distributions(asked)
    root = decoder.tree.root
    for prompt, shares in zip(asked, found, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *root.run]])
            logits = model(input_ids=ids).logits[0, -1, list(root.groups)]
        expected = torch.softmax(logits.double(), 0).tolist()
        names = [min(decoder.tree.topologies(group)) for group in root.groups.values()]
        assert shares == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-4)
    with model.disable_adapter():
        untrained = Decoder(model.get_base_model(), tokenizer, SPACE).distributions(asked)
    assert any(abs(one[name] - two[name]) > 1e-3 for one, two in zip(found, untrained, strict=True) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("activated")
    data = write_rows(folder / "data.jsonl", label_rows(16, 4))
    train(train_settings(data, tiny_folder("smollm"), folder / "a", activated=True, epochs=6, lr=0.02))
    return folder / "a"


def test_a_trained_one_is_plain_peft_and_serves_what_peft_computes(trained: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert json.loads((trained / "adapter_config.json").read_text())["alora_invocation_tokens"]
    losses = [entry["loss"] for entry in json.loads((trained / "loss.json").read_text()) if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    settings = load({"infer.adapter": ("test", str(trained)), "models.dtype": ("test", "float32")}, environ={})
    backend = LocalBackend(settings)
    texts = [row["task"] for row in label_rows(8, 0)]
    choices = backend.decide(texts)
    meta = json.loads((trained / "router_lora_meta.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(meta["base_model"]["folder_or_id"], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    decoder = Decoder(base, tokenizer, backend.space)
    root = decoder.tree.root
    for text, choice in zip(texts, choices, strict=True):
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([[*decoder.prompt(text), *root.run]])).logits[0, -1]
        best = max(root.groups, key=lambda token: float(logits[token]))
        calibrated = meta["calibration"]
        if calibrated is None or not calibrated["biases"]:
            assert choice.decision.topology == min(decoder.tree.topologies(root.groups[best]))
    assert activated(plain) is not None


def test_it_cannot_be_merged_and_excludes_what_needs_the_prompt(
    trained: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("smollm"))
    with pytest.raises(ModelError, match="active on the answer alone"):
        merged(model, trained)
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    for name, value in (("train_on_inputs", True), ("gradient_checkpointing", True), ("export", "merged")):
        settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", activated=True, **{name: value})
        with pytest.raises(UsageError, match="--activated excludes"):
            train(settings)
