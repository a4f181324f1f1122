"""`train --objective solve`: one adapter that also knows how likely each topology is to solve a task."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli import dataset, prompts
from router_cli.backends.decoding import Decoder
from router_cli.backends.local import META, LocalBackend
from router_cli.errors import InputError, TrainingError, UsageError
from router_cli.infer import infer
from router_cli.schema import Example
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.train import train
from router_cli.training import lessons
from tests.tiny import tiny_model
from tests.training import ROLES, Recorder, train_settings, write_rows

Tiny = Callable[..., Path]

# A world whose probabilities of solving are known, by the kind of task.
WORLD = {
    "Write the function f{}.": {"single": 0.9, "chain": 0.9},
    "Plan stage {}, then build it, then test it.": {"single": 0.2, "chain": 0.8},
    "Lead the migration of service {}; find out what breaks.": {"single": 0.1, "chain": 0.1},
}
DECISIONS = {
    "single": {"roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1},
    "chain": {"roles": ["planner", "builder"], "manager_role": None, "entry_role": "planner", "max_steps": 2},
}


def rows(count: int, split: str, seed: int, runs: int) -> list[dict[str, Any]]:
    """`count` tasks a kind, executed `runs` times by each topology; the label is the cheapest good one."""
    draw, made = random.Random(seed), []
    for i in range(count):
        for kind, (text, chances) in enumerate(WORLD.items()):
            solved = {name: sum(draw.random() < chance for _ in range(runs)) for name, chance in chances.items()}
            topology = "single" if solved["single"] >= solved["chain"] - runs / 8 else "chain"
            made.append(
                {
                    "id": f"{split}{kind}-{i}",
                    "task": text.format(draw.randrange(1000)),
                    "decision": {"topology": topology, **DECISIONS[topology]},
                    "split": split,
                    "evidence": {name: {"solved": k / runs, "runs": runs} for name, k in solved.items()},
                }
            )
    return made


def solve_settings(data: Path, base: Path, folder: Path, **values: Any) -> Settings:
    chosen = {"objective": "solve", "epochs": 3, "batch_size": 16, "grad_accum": 1, "lr": 1e-2, "lora_r": 16}
    return train_settings(data, base, folder, decision__topologies="single,chain", **{**chosen, **values})


def schooled(base: Path) -> Path:
    """Teach the tiny model to tell kinds of tasks and topologies apart, in a world where all is nearly alike.

    A model with random weights has nothing that an adapter could build on.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    space = DecisionSpace(tuple(ROLES.split(",")), ("single", "chain"))
    lessons, draw = [], random.Random(3)
    for text, chances in WORLD.items():
        for name, chance in chances.items():
            for _ in range(12):
                way = prompts.encode_verdict(name, tokenizer)
                asked = prompts.encode_prompt(text.format(draw.randrange(1000)), space, tokenizer)
                lessons.append(([*asked, *way.start], [way.solved, way.unsolved], 0.35 + 0.3 * chance))
    longest = max(len(ids) for ids, _, _ in lessons)
    ids = torch.tensor([one + [0] * (longest - len(one)) for one, _, _ in lessons])
    ends = torch.tensor([len(one) - 1 for one, _, _ in lessons])
    pairs = torch.tensor([pair for _, pair, _ in lessons])
    wanted = torch.tensor([[share, 1 - share] for _, _, share in lessons])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(input_ids=ids).logits[torch.arange(len(ids)), ends].gather(1, pairs)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def solver(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    folder, said = tmp_path_factory.mktemp("solve"), Recorder()
    base = schooled(tiny_model(folder / "base", "smollm", 2, 64))
    data = write_rows(folder / "labels.jsonl", rows(40, "train", 1, 2) + rows(8, "validation", 2, 8))
    train(solve_settings(data, base, folder / "adapter"), said)
    return folder / "adapter", said


def by_value(adapter: Path, **values: Any) -> Settings:
    chosen = {"adapter": str(adapter), "value_of_solving": 1.0, "price": "single=0.1,chain=0.3", **values}
    dtype = chosen.pop("dtype", "float32")
    given = {f"infer.{key}": (f"--{key}", value) for key, value in chosen.items() if value is not None}
    return load({**given, "models.dtype": ("--dtype", dtype)}, environ={})


TASKS = [text.format(1234) for text in WORLD]


def test_what_topologies_solve_is_learnt_and_calibrated_apart(solver: tuple[Path, Recorder]) -> None:
    adapter, said = solver
    for choice, chances in zip(LocalBackend(by_value(adapter)).decide(TASKS), WORLD.values(), strict=True):
        assert choice.solving == pytest.approx(chances, abs=0.12)
    meta = json.loads((adapter / META).read_text())
    # At the noise floor: what a perfectly calibrated router would show, and what that varies by.
    assert meta["solving"]["ece_after"] <= meta["solving"]["ece_floor"] + 0.05
    assert meta["solving"]["n"] == 8 * 2 * meta["metrics"]["validation_examples"]
    assert any("P(solved) calibrated on" in notice for notice in said.notices)
    assert meta["calibration"] is not None  # of the topology's choice, apart


def test_the_choice_is_by_value(solver: tuple[Path, Recorder], tmp_path: Path) -> None:
    adapter, _ = solver
    data, output = write_rows(tmp_path / "tasks.jsonl", [{"task": text} for text in TASKS]), tmp_path / "out.jsonl"
    for worth, prices in (
        (1.0, (0.1, 0.3)),
        (1.0, (0.1, 0.9)),
        (1.0, (0.5, 0.0)),
        (0.01, (0.1, 0.3)),
        (1e6, (0.1, 0.3)),
    ):
        price = f"single={prices[0]},chain={prices[1]}"
        output.unlink(missing_ok=True)
        infer(by_value(adapter, data=str(data), output=str(output), value_of_solving=worth, price=price))
        for row in map(json.loads, output.read_text().splitlines()):
            topology, chances = row["decision"]["topology"], row["solving"]
            values = [worth * chances[name] - cost for name, cost in zip(("single", "chain"), prices, strict=True)]
            assert topology == ("single" if values[0] >= values[1] else "chain")
            assert row["probability"] == row["topologies"][topology]


def test_without_a_value_it_imitates(solver: tuple[Path, Recorder]) -> None:
    found = LocalBackend(by_value(solver[0], value_of_solving=None, price=None)).decide(TASKS)
    assert all(choice.solving is None for choice in found)
    assert [choice.decision.topology for choice in found] == [
        max(choice.topologies or {}, key=(choice.topologies or {}).__getitem__) for choice in found
    ]


@pytest.mark.parametrize("style", ["smollm", "qwen3", "llama3"])
def test_the_decoder_says_what_a_whole_forward_pass_says(style: str, tiny_folder: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder(style), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(style))
    space = DecisionSpace(("planner", "builder", "tester"))
    decoder = Decoder(model, tokenizer, space)
    encoded = [decoder.prompt(text) for text in ("Sort a list.", "x " * 40)]
    plain = decoder.decide(encoded, 3)
    for prompt, shares in zip(encoded, decoder.solving(encoded), strict=True):
        for name in space.topologies:
            way = prompts.encode_verdict(name, tokenizer)
            text = tokenizer.decode([*way.start, way.solved])
            assert prompts.render_verdict(name, True).startswith(text.strip())
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *way.start]])).logits[0, -1]
            right = torch.softmax(logits[[way.solved, way.unsolved]], 0)[0].item()
            assert shares[name] == pytest.approx(right, abs=1e-5)
    # Asking changes nothing but the topology.
    for one, other in zip(decoder.decide(encoded, 3, lambda shares: "chain"), plain, strict=True):
        assert one.decision.topology == "chain"
        assert one.topologies == pytest.approx(other.topologies, abs=1e-5)
        assert [each for each, _ in one.alternatives] == [each for each, _ in other.alternatives]


def test_a_lesson_a_run_with_loss_on_its_last_token_alone(tiny_folder: Tiny) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("qwen3"))
    space = DecisionSpace(("planner", "builder"), ("single", "chain"))
    decision = space.resolve({"topology": "single", **DECISIONS["single"]}).decision
    assert decision is not None
    example = Example(
        task_id="a",
        text="Sort a list.",
        decision=decision,
        sample_type="x",
        solved={"single": (1, 3), "chain": (2, 2), "centralized": (1, 1)},
    )
    (row,) = lessons.encode([example], space, tokenizer, 2048, Recorder())
    made = lessons.verdicts([example], [row], space, tokenizer)
    asked = row.input_ids[: row.prompt_length]
    assert all(one.input_ids[: len(asked)] == asked and one.verdict for one in made)
    ways = [prompts.encode_verdict(name, tokenizer) for name in ("single", "single", "single", "chain", "chain")]
    last = [ways[0].solved, ways[0].unsolved, ways[0].unsolved, ways[0].solved, ways[0].solved]
    assert [one.input_ids[len(asked) :] for one in made] == [
        [*way.start, token] for way, token in zip(ways, last, strict=True)
    ]
    assert {len(one.input_ids) - one.prompt_length for one in made} == {1}


def test_what_cannot_work_is_said(solver: tuple[Path, Recorder], tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    plain = [{key: value for key, value in row.items() if key != "evidence"} for row in rows(2, "train", 1, 2)]
    data = write_rows(tmp_path / "plain.jsonl", plain)
    with pytest.raises(TrainingError, match=r"plain\.jsonl: no training row holds evidence.*--from-outcomes"):
        train(solve_settings(data, base, tmp_path / "a"))
    broken = write_rows(tmp_path / "broken.jsonl", [{**plain[0], "evidence": {"single": {"solved": 2, "runs": 1}}}])
    with pytest.raises(InputError, match=r"broken\.jsonl:1: evidence of single: expected solved"):
        train(solve_settings(broken, base, tmp_path / "b"))
    for values in ({"train_on_inputs": True}, {"patience": 2}, {"eval_steps": 5}):
        with pytest.raises(UsageError, match="--objective solve excludes"):
            train(solve_settings(data, base, tmp_path / "c", **values))
    train(train_settings(data, base, tmp_path / "imitator", max_samples=4))
    with pytest.raises(UsageError, match="--objective solve"):
        LocalBackend(by_value(tmp_path / "imitator"))
    for values, words in (
        ({"price": None}, "needs the --price of single, chain too"),
        ({"price": "single=1"}, "needs the --price of chain too"),
        ({"value_of_solving": None}, "--price says nothing without --value-of-solving"),
        ({"fallback": "abstain", "min_confidence": 0.5}, "exclude each other"),
    ):
        with pytest.raises(UsageError, match=words):
            LocalBackend(by_value(solver[0], **values))


def test_evidence_of_label_rows_is_read(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "labels.jsonl", rows(1, "train", 1, 8))
    found = list(dataset.read_labels([str(data)], DecisionSpace(("planner", "builder"))))
    assert [one.solved["single"][1] for one in found] == [8] * 3
    assert all(0 <= solved <= runs for one in found for solved, runs in one.solved.values())
