"""How fast `router train` trains, beside plain TRL: `python -m benchmarks.train`.

On a CPU, SmolLM2 on the project's own tasks, each contender in a process of its own; the time is the process's, from
its start to the saved adapter: imports, loading, preparation and caches counted.

stock   TRL's SFTTrainer as a careful user writes it: rows of prompt and completion (loss on the answer alone),
        adapters on all linear layers of all layers, batch 1 and accumulation 8 (no padding), no checkpointing, no
        autocast, the base in the number type that this machine is fast in (`--stock-dtype float32` for the usual one)
exact   `router train`: adapters on the last third of the layers, everything else as stock
fast    `router train --preset cpu-fast`
equal   (not timed) float32: the losses of `exact` beside those of stock given the same adapters, rows and order

Afterwards every adapter decides the test split: macro-F1 of the topology with its bootstrap interval. Sizes are
options: `--examples 48 --epochs 1` takes minutes. `--stock-steps N` runs stock for N steps only and multiplies; the
table says so and has no score for it.

With a CUDA GPU (`--gpu`): the shape of Qwen3-8B with random weights in NF4, rows of 250 and of 1,024 tokens: the plain
recipe of the old guide (batch 1, accumulation 8, checkpointing, torch's AdamW) against this project's trainer; samples
a second, peak memory, model-FLOPs utilisation (6 FLOP a weight and token are 4 with a frozen base: forward, and the
gradient of the activations; recomputation is not counted as useful). Written where no GPU was: untried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
TASKS = Path(__file__).parents[1] / "data" / "tasks.jsonl"
BATCH = 8  # rows in a step, of every contender


def label_file(folder: Path, examples: int) -> Path:
    """The longest `examples` training tasks of the project, as a label file without a validation split."""
    from router_cli.jsonl import read_rows

    rows = [row for _, row in read_rows(str(TASKS)) if row["split"] == "train"]
    chosen = sorted(rows, key=lambda row: len(row["task"]))[-examples:]
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


def settings_for(options: argparse.Namespace, folder: Path, **values: Any) -> Any:
    """Settings of a run on the benchmark's rows; `values` as on the command line."""
    from router_cli.settings import load

    chosen = {
        "train.data": str(folder / "labels.jsonl"),
        "train.model": MODEL,
        "train.output_dir": str(folder / options.child),
        "train.epochs": options.epochs,
        "train.validation_share": 0,
        "train.save_steps": 100_000,
        "train.seed": options.seed,
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return load({key: (f"--{key}", value) for key, value in chosen.items()}, environ={})


EXACT = {
    "train__lora_last_layers": 10,
    "train__batch_size": BATCH,
    "train__grad_accum": 1,
    "train__lora_r": 16,
    "train__lora_alpha": 32,
    "train__lora_dropout": 0.0,
}


def prepared(settings: Any) -> tuple[Any, Any, Any, list[Any]]:
    """Base folder, decision space, tokenizer and examples as `router train` sees them."""
    from transformers import AutoTokenizer

    from router_cli import dataset, models
    from router_cli.backends import space_from

    space, base = space_from(settings), models.resolve(MODEL, settings)
    return base, space, AutoTokenizer.from_pretrained(base.folder), dataset.build(settings, space).train


def stock_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], options: argparse.Namespace, **more: Any
) -> Any:
    """TRL as it comes, told what a CPU wants."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(options.seed)
    layers = more.pop("layers", None)
    arguments: dict[str, Any] = {
        "output_dir": str(Path(options.folder) / "stock-checkpoints"),
        "max_length": None,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": BATCH,
        "num_train_epochs": options.epochs,
        "learning_rate": options.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "completion_only_loss": True,  # rows that come as tokens say where with a mask
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": options.seed,
        **more,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA, layers_to_transform=layers),
    )


def stock(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from router_cli import prompts
    from router_cli.backends.device import fast_dtype

    base, space, tokenizer, examples = prepared(settings_for(options, folder))
    name = fast_dtype("cpu") if options.stock_dtype == "auto" else options.stock_dtype
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, name))
    rows = [
        {
            "prompt": [message.model_dump() for message in prompts.router_messages(one.text, space)],
            "completion": [{"role": "assistant", "content": prompts.render(one.decision)}],
        }
        for one in examples
    ]
    trainer = stock_trainer(model, tokenizer, rows, options, max_steps=options.stock_steps or -1)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    before = time.perf_counter()
    trainer.train()
    seconds, steps = time.perf_counter() - before, trainer.state.global_step
    trainer.save_model(str(folder / "stock"))
    whole = -(-len(rows) // BATCH) * options.epochs
    return {"steps": steps, "of": whole, "loop": seconds, "dtype": name, "tokens": sum(lengths) / len(lengths)}


def project(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from router_cli.train import train

    values: dict[str, Any] = {"train__preset": "cpu-fast"}
    if options.child == "exact":
        values = {**EXACT, "train__lr": options.lr}
    result = train(settings_for(options, folder, **values))
    return {"steps": result.steps, "loop": result.seconds, "loss": result.last_loss}


def equal(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses step by step of both trainers in float32, on the same adapters and rows in the same order."""
    import torch
    from transformers import AutoModelForCausalLM

    from router_cli import prompts
    from router_cli.train import train
    from router_cli.training.loss import ByLength

    options.examples, options.epochs = min(options.examples, 6 * BATCH), 1
    label_file(folder, options.examples)
    values = {**EXACT, "train__lr": options.lr, "train__logging_steps": 1, "models__dtype": "float32"}
    settings = settings_for(options, folder, **values)
    train(settings)
    ours = losses(json.loads((folder / "equal" / "loss.json").read_text()))
    base, space, tokenizer, examples = prepared(settings)
    encoded = [prompts.encode_example(one.text, one.decision, space, tokenizer, 2048) for one in examples]
    order = ByLength([len(row.input_ids) for row in encoded], BATCH, options.seed, lambda: 0)
    rows = [
        {
            "input_ids": encoded[i].input_ids,
            "completion_mask": [int(at >= encoded[i].prompt_length) for at in range(len(encoded[i].input_ids))],
        }
        for i in order
    ]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    count = model.config.num_hidden_layers
    trainer = stock_trainer(
        model,
        tokenizer,
        rows,
        options,
        layers=list(range(count - 10, count)),
        logging_steps=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    theirs = losses(trainer.state.log_history)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {"ours": ours, "stock": theirs, "greatest difference": worst}


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def score(options: argparse.Namespace, folder: Path, name: str) -> dict[str, float]:
    """Macro-F1 of the topology on the test split, with the ends of its 95 % interval, by the decoder that serves."""
    import numpy as np

    from router_cli.backends.adapters import adapted
    from router_cli.backends.decoding import Decoder
    from router_cli.backends.local import load
    from router_cli.jsonl import read_rows
    from router_cli.scoring import metrics

    settings = settings_for(options, folder)
    base, space, _, _ = prepared(settings)
    model, tokenizer = load(base, settings)
    decoder = Decoder(adapted(model, folder / name), tokenizer, space)
    rows = [row for _, row in read_rows(str(TASKS)) if row["split"] == "test"][: options.test]
    found = decoder.topologies([decoder.prompt(row["task"]) for row in rows])
    names = space.topologies
    gold = np.array([names.index(row["decision"]["topology"]) for row in rows])
    mine, draw = np.array([names.index(one) for one in found]), np.random.default_rng(0)
    picks = [draw.integers(0, len(rows), len(rows)) for _ in range(1000)]
    low, high = np.quantile([metrics.macro_f1(gold[pick], mine[pick], len(names)) for pick in picks], [0.025, 0.975])
    return {"macro_f1": float(metrics.macro_f1(gold, mine, len(names))), "low": float(low), "high": float(high)}


def child(options: argparse.Namespace) -> None:
    """What one process does; its result is the last line it prints."""
    folder = Path(options.folder)
    work = {"stock": stock, "exact": project, "fast": project, "equal": equal, "gpu": gpu}
    print(json.dumps(work[options.child](options, folder) if options.child in work else score_of(options, folder)))


def score_of(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    return score(options, folder, options.child.removeprefix("score-"))


def run(name: str, arguments: list[str], folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds and result of a child process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.train", *arguments, "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, dict(json.loads(done.stdout.splitlines()[-1]))


# -- the GPU half -----------------------------------------------------------------------------------------------


def gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One contender on the GPU: `--recipe guide|project|low-memory`, `--length` tokens a row; random weights."""
    import torch
    from transformers import AutoTokenizer

    from router_cli.backends import space_from
    from router_cli.models import resolve
    from router_cli.progress import SILENT
    from router_cli.training import trainer
    from router_cli.training.checkpoints import Run

    values = {
        "guide": {"train__batch_size": 1, "train__grad_accum": 8, "train__gradient_checkpointing": True},
        "project": {"train__batch_size": 8, "train__grad_accum": 1},
        "low-memory": {"train__batch_size": 1, "train__grad_accum": 8, "train__gradient_checkpointing": True},
    }[options.recipe]
    values |= {"train__lora_dropout": 0.0, "train__epochs": 1, "train__use_4bit": True, "train__bf16": True}
    settings = settings_for(options, folder, **values)
    space = space_from(settings)
    # Only the tokenizer is taken from the small model: its ids are all below Qwen3's vocabulary.
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL, settings).folder)
    model = random_qwen3_8b()
    examples = _words(options.rows, options.length, space, tokenizer)
    weights = sum(part.in_features * part.out_features for part in model.modules() if trainer._is_linear(part))
    torch.cuda.reset_peak_memory_stats()
    if options.recipe == "guide":
        rows = [
            {
                "input_ids": one.input_ids,
                "completion_mask": [int(at >= one.prompt_length) for at in range(len(one.input_ids))],
            }
            for one in examples
        ]
        plain = stock_trainer(
            model, tokenizer, rows, options, bf16=True, gradient_checkpointing=True, use_cpu=False, max_steps=-1
        )
        fit: Any = plain.train
    else:
        made = Run(folder / options.recipe, {})
        made.begin()

        def fit() -> Any:
            return trainer.fit(model, tokenizer, space, examples, [], settings, made, SILENT)

    before = time.perf_counter()
    fit()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - before
    tokens = sum(len(one.input_ids) for one in examples)
    return {
        "samples a second": len(examples) / seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "MFU": 4 * weights * tokens / seconds / (options.peak_tflops * 1e12),
        "tokens a row": tokens / len(examples),
        "seconds": seconds,
    }


def random_qwen3_8b() -> Any:
    """Qwen3-8B's shape in NF4 on the GPU, its weights drawn layer by layer, so that 16 GB never stand anywhere."""
    import bitsandbytes as bnb
    import torch
    from accelerate import init_empty_weights
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config

    shape = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads), dtype=torch.bfloat16)
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.nn.Linear) and "lm_head" not in name:
            weight = torch.randn(part.out_features, part.in_features, dtype=torch.bfloat16) * 0.02
            fresh = bnb.nn.Linear4bit(
                part.in_features,
                part.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            fresh.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, fresh.to("cuda"))
        else:
            for own, weight in list(part.named_parameters(recurse=False)):
                drawn = torch.randn(weight.shape, dtype=torch.bfloat16, device="cuda") * 0.02
                value = torch.ones_like(drawn) if weight.dim() == 1 else drawn
                setattr(part, own, torch.nn.Parameter(value, requires_grad=False))
    model = model.to("cuda")
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def _words(count: int, length: int, space: Any, tokenizer: Any) -> list[Any]:
    """Rows of about `length` tokens, the decisions in turn."""
    from router_cli import prompts

    decisions, made = list(space.enumerate()), []
    for i in range(count):
        room = length - len(prompts.encode_example("", decisions[i % len(decisions)], space, tokenizer, 4096).input_ids)
        text = " ".join(f"stage {i + n}" for n in range(room))
        made.append(prompts.encode_example(text, decisions[i % len(decisions)], space, tokenizer, length))
    return made


# -- the tables -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test", type=int, default=192, help="test tasks to score on; 0: no scores")
    parser.add_argument("--lr", type=float, default=1e-3, help="of stock and exact")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stock-dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--stock-steps", type=int, default=0, help="run stock for N steps only, and multiply")
    parser.add_argument("--only", default="stock,exact,fast,equal")
    parser.add_argument("--gpu", action="store_true", help="the GPU half")
    parser.add_argument("--rows", type=int, default=64, help="rows of a GPU run")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bf16 peak of the GPU (H100 SXM: 989)")
    for hidden in ("--child", "--folder", "--recipe"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=250, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    with tempfile.TemporaryDirectory() as name:
        gpu_table(Path(name)) if options.gpu else cpu_table(options, Path(name))
    return None


def cpu_table(options: argparse.Namespace, folder: Path) -> None:
    arguments, seconds = sys.argv[1:], dict[str, float]()
    label_file(folder, options.examples)
    for name in [name for name in ("stock", "exact", "fast") if name in options.only]:
        took, result = run(name, arguments, folder)
        note = ""
        if name == "stock" and result["steps"] < result["of"]:
            rest = result["loop"] / result["steps"] * (result["of"] - result["steps"])
            note = f" EXTRAPOLATED from {result['steps']} of {result['of']} steps, which took {took:.1f} s"
            took += rest
        seconds[name] = took
        ratio = f", {seconds['stock'] / took:.2f} times stock" if "stock" in seconds and name != "stock" else ""
        print(f"{name:6s} {took:7.1f} s{ratio}{note} {json.dumps(result)}", flush=True)
        if options.test and not note:
            _, found = run(f"score-{name}", arguments, folder)
            print("       macro-F1 {macro_f1:.3f} [{low:.3f}, {high:.3f}]".format(**found), flush=True)
    if "equal" in options.only:
        _, result = run("equal", arguments, folder)
        for step, (mine, theirs) in enumerate(zip(result["ours"], result["stock"], strict=True), 1):
            print(f"step {step}: exact {mine:.5f} stock {theirs:.5f}")
        print(f"greatest difference of a step's loss: {result['greatest difference']:.2e}")


def gpu_table(folder: Path) -> None:
    for length in (250, 1024):
        first = 0.0
        for recipe in ("guide", "project", "low-memory"):
            label_file(folder, 8)
            _, result = run("gpu", [*sys.argv[1:], "--recipe", recipe, "--length", str(length)], folder)
            first = first or result["samples a second"]
            shown = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
            print(f"{length:5d} tokens {recipe:10s} {result['samples a second'] / first:.2f} times the guide: {shown}")


if __name__ == "__main__":
    main()
