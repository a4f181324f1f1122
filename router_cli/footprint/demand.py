"""How much memory and work a training run takes: the dry run, put together with what the settings and the data say."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from router_cli import prompts, ranks
from router_cli.backends.device import ROWS_AT_ONCE, available_memory, best_device, fast_dtype
from router_cli.footprint import dryrun
from router_cli.footprint.dryrun import Setup
from router_cli.footprint.shapes import Shape
from router_cli.schema import Example
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.training import qlora
from router_cli.training.frozen import MEMORY_SHARE
from router_cli.training.recipe import own_loss

PROCESS = 0.72e9
"""Bytes of a Python process with torch, transformers, PEFT and TRL loaded (measured: CPU build of torch 2.13)."""
CUDA_CONTEXT = 0.55e9
"""Bytes that CUDA takes on the GPU for its kernels and libraries before the first tensor."""
SLACK = {"cpu": 0.10, "cuda": 0.06, "mps": 0.10}
"""What an allocator holds beyond the tensors that are alive: holes and rounding, as a share of a step's tensors."""
CHARS_A_TOKEN = 3.4
"""Without a tokenizer (facts: 2.2 % off in the median of English task texts)."""
COUNTED = 1000
"""Examples whose tokens are counted; of more, so many are, evenly drawn, and the longest ones."""
VALIDATED_AT_ONCE = 32
"""Rows that the decoder decides at once."""
TEMPLATE_TOKENS = 24
"""Tokens that a chat template adds around a prompt and its answer, where no tokenizer can tell."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the lessons: what the dry run needs to know of the data."""

    examples: int
    mean: float
    longest: int
    answer: int
    shared: int
    validation: int
    validation_longest: int
    counted_by: str
    verdicts: int = 0


def measure(
    shape: Shape, settings: Settings, space: DecisionSpace, train: Sequence[Example], validation: Sequence[Example]
) -> Lengths:
    """The lengths of the examples, in the model's own tokens where its tokenizer is here."""
    limit, tokenizer = settings.train.max_length, shape.tokenizer

    def one(example: Example) -> tuple[list[int], int]:
        """Token ids, or as many zeros, and the answer's length."""
        if tokenizer is None:
            system, user = (message.content for message in prompts.router_messages(example.text, space))
            answer = round(len(prompts.render(example.decision)) / CHARS_A_TOKEN)
            ids = round(len(system + user) / CHARS_A_TOKEN) + TEMPLATE_TOKENS + answer
            return [0] * min(limit, ids), answer
        try:
            made = prompts.encode_example(example.text, example.decision, space, tokenizer, limit)
        except ValueError:  # not even the prompt fits: training says so, with the example's name
            return [0] * limit, 1
        return made.input_ids, len(made.input_ids) - made.prompt_length

    by_length = sorted(train, key=lambda example: len(example.text))
    chosen = by_length[:: max(1, len(train) // COUNTED)]
    whole = [one(example) for example in chosen]
    longest = max(len(one(example)[0]) for example in by_length[-16:])
    rows = [ids for ids, _ in whole]
    asked = [len(one(example)[0]) for example in sorted(validation, key=lambda each: len(each.text))[-4:]]
    return Lengths(
        examples=len(train),
        mean=sum(map(len, rows)) / len(rows),
        longest=longest,
        answer=max(answer for _, answer in whole),
        shared=0 if tokenizer is None or settings.train.augment else _shared_start(rows),
        validation=len(validation),
        validation_longest=max(asked, default=0),
        counted_by="the model's tokenizer" if tokenizer is not None else f"characters / {CHARS_A_TOKEN}",
        verdicts=_verdicts(settings, train),
    )


def _verdicts(settings: Settings, train: Sequence[Example]) -> int:
    """Lessons that end at whether a topology solves the task."""
    known = [each for example in train for name, each in example.solved.items() if name in settings.decision.topologies]
    return sum(runs for _, runs in known) if settings.train.objective == "solve" else 0


def _shared_start(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    pairs = zip(min(rows), max(rows), strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), 0)


def setup_of(config: Any, settings: Settings, lengths: Lengths) -> Setup:
    """How `train` will hold the model and what it will adapt, on this machine."""
    import torch

    train, device = settings.train, best_device()
    dtype, four_bit = base_type(settings)
    layers = config.num_hidden_layers
    adapted = min(train.lora_last_layers or layers, layers)
    states = (lengths.examples + lengths.verdicts) * lengths.mean * config.hidden_size * getattr(torch, dtype).itemsize
    setup = Setup(
        dtype=dtype,
        device=device,
        adapted=adapted,
        targets=tuple(train.target_modules),
        rank=train.lora_r,
        dropout=train.lora_dropout,
        four_bit=four_bit,
        rest="float32" if dtype == "float16" else dtype,
        autocast=device == "cuda" and dtype != "float32",
        fused_head=device == "cuda" and not own_loss(train),
        kept=device == "cpu"
        and adapted < layers
        and not train.activated
        and states < MEMORY_SHARE * free_memory("cpu"),
        checkpointing=train.gradient_checkpointing,
    )
    if train.use_4bit and device == "cpu" and importlib.util.find_spec("bitsandbytes") is not None:
        plain = dryrun.weights(config, setup)
        return replace(setup, four_bit=not qlora.fits(plain.layers + plain.embeddings + plain.rest))
    return setup


def base_type(settings: Settings) -> tuple[str, bool]:
    """The number type that training holds and computes the base in here, and whether it is quantised to 4 bits."""
    train, device = settings.train, best_device()
    wanted = fast_dtype(device) if settings.models.dtype == "auto" else settings.models.dtype
    if train.bf16 or train.fp16:
        slow = device == "cpu" and (train.fp16 or fast_dtype("cpu") == "float32")
        wanted = "float32" if slow else "bfloat16" if train.bf16 else "float16"
    return wanted, train.use_4bit and device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def peak(config: Any, settings: Settings, lengths: Lengths) -> tuple[str, dict[str, float]]:
    """The phase of a run that takes most, and its bytes by component."""
    import torch

    train, setup = settings.train, setup_of(config, settings, lengths)
    weights, slack = dryrun.weights(config, setup), 1 + SLACK[setup.device]
    on_cuda = setup.device == "cuda"
    shared = lengths.shared if setup.device == "cpu" and not train.train_on_inputs else 0
    scored = lengths.longest if train.train_on_inputs else lengths.answer
    rows = min(train.batch_size, lengths.examples)
    hidden, kept, standing = config.hidden_size * getattr(torch, setup.dtype).itemsize, 0.0, 0.0
    if train.activated:  # the answers alone are run, behind the prompts' keys and values (backends/activated.py)
        token = dryrun.prefill(config, setup, 1, 8).states / 8
        step = dryrun.train_step(config, setup, rows, lengths.answer, lengths.answer, 0)
        kept = token * lengths.examples * (lengths.mean - lengths.answer - lengths.shared)
        standing = token * rows * lengths.longest
    else:
        step = dryrun.train_step(config, setup, rows, lengths.longest, scored, shared)
        if setup.kept:
            kept = hidden * lengths.examples * (lengths.mean - lengths.shared)
    outside = setup.rest if setup.four_bit else setup.dtype
    base: dict[str, float] = {
        "CUDA context" if on_cuda else "Python, torch and libraries": CUDA_CONTEXT if on_cuda else PROCESS,
        f"base layers ({'NF4' if setup.four_bit else setup.dtype})": weights.layers,
        f"embeddings and head ({outside})": weights.embeddings,
        "norms and the rest": weights.rest,
    }
    trained: dict[str, float] = {
        "adapters": 4 * weights.adapter,
        "optimizer (two moments)": (2 if setup.four_bit and on_cuda else 8) * weights.adapter,
        "kept states of frozen layers or prompts": kept,
    }
    behind = max(step.head, step.body)
    phases: dict[str, dict[str, float]] = {
        "a training step": {
            **base,
            **trained,
            "gradients": 4 * weights.adapter,
            "activations": step.states + standing,
            "logits and loss" if step.head >= step.body else "recomputation and backward": behind - step.states,
            "allocator": behind * (slack - 1),
        }
    }
    if lengths.validation:
        decoding = _decoding(config, setup, lengths)
        phases["validation"] = {**base, **trained, "keys, values and activations of validation": decoding * slack}
    if not on_cuda:
        stored = weights.stored if str(getattr(config, "dtype", "")).removeprefix("torch.") != setup.dtype else 0
        phases["loading"] = {**base, "the model file": stored}
        serving = settings.models.dtype if settings.models.dtype != "auto" else fast_dtype(setup.device)
        if lengths.validation and (serving != setup.dtype or setup.four_bit):
            again = weights.stored / _stored_size(config) * getattr(torch, serving).itemsize
            more = {"the base again, as it will serve": again, "the model file": weights.stored}
            phases["calibration"] = {**base, **trained, **more}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return phase, phases[phase]


def _stored_size(config: Any) -> int:
    import torch

    return int((getattr(config, "dtype", None) or torch.float32).itemsize)


def _decoding(config: Any, setup: Setup, lengths: Lengths) -> float:
    """Bytes beside the weights while validation tasks are decided (backends/decoding.py)."""
    rows = min(VALIDATED_AT_ONCE, lengths.validation)
    length = max(lengths.validation_longest - lengths.answer, 1)
    if setup.device != "cpu":
        return dryrun.prefill(config, setup, rows, length).body
    # A CPU encodes few prompts at a time; then the caches of all parts are copied together.
    some = dryrun.prefill(config, setup, min(ROWS_AT_ONCE, rows), length)
    cache = some.states / min(ROWS_AT_ONCE, rows) * rows
    return max(cache + some.body - some.states, 2 * cache if rows > ROWS_AT_ONCE else cache)


def work(config: Any, settings: Settings, lengths: Lengths) -> tuple[int, float]:
    """Optimizer steps, and floating-point operations of the whole training."""
    train, setup = settings.train, setup_of(config, settings, lengths)
    whole = 1 + train.augment
    lessons = lengths.examples * (whole + train.topology_passes) + lengths.verdicts
    steps = max(1, round(train.epochs * -(-lessons // (train.batch_size * train.grad_accum * ranks.count()))))
    shared = lengths.shared if setup.device == "cpu" and not train.train_on_inputs else 0
    mean, rows = round(lengths.mean), min(train.batch_size, lengths.examples)
    # A lesson that ends at the topology, or soon after, is a row without most of its answer.
    short = max(1, mean - shared - lengths.answer) / max(1, mean - shared)
    passes = train.epochs * (lengths.examples * (whole + train.topology_passes * short) + lengths.verdicts * short)
    if train.activated:
        once = dryrun.prefill(config, setup, 1, mean).flops
        return steps, once * lengths.examples + passes * dryrun.train_step(config, setup, 1, lengths.answer, 1, 0).flops
    scored = mean if train.train_on_inputs else lengths.answer
    flops = passes * dryrun.train_step(config, setup, rows, mean, scored, shared).flops / rows
    if setup.adapted < config.num_hidden_layers:
        below = 1 - setup.adapted / config.num_hidden_layers
        frozen = below * dryrun.prefill(config, setup, 1, mean).flops
        flops += frozen * (lengths.examples if setup.kept else passes)
    return steps, flops


def speed(setup: Setup, config: Any) -> float:
    """Floating-point operations a second of a product on this device in the base's type, by a probe of milliseconds."""
    import torch

    # Large enough to be fast, small enough to take milliseconds.
    rows, most = (128, 1024) if setup.device == "cpu" else (4096, 4096)
    deep = min(int(config.hidden_size), most)
    wide = 4 * deep
    dtype = getattr(torch, setup.dtype)
    left = torch.ones(rows, deep, dtype=dtype, device=setup.device)
    right = torch.ones(deep, wide, dtype=dtype, device=setup.device)

    def once() -> float:
        started = time.perf_counter()
        result = left @ right
        float(result[0, 0])  # waits for a GPU
        return time.perf_counter() - started

    once()
    return 2.0 * rows * deep * wide / min(once() for _ in range(3))


def free_memory(device: str) -> int:
    """Bytes that a run may take on `device`: what is free, and what this process has already and will count."""
    import psutil
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() + CUDA_CONTEXT)
    mine: int = psutil.Process().memory_info().rss
    return available_memory() + mine
