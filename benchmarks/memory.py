"""Peak memory of training against what `router train` says before it: `python -m benchmarks.memory`.

On a CPU: SmolLM2-135M in float32 and in the type that the machine is fast in, three lengths, micro-batches of 1 and 4,
adapters on all layers and on the last ten. Every case is a whole `train` (load, two steps, validation, calibration) in
a process of its own; what is counted is that process's peak resident memory (ru_maxrss, nothing taken off).
On CUDA: Qwen3-0.6B, 1.7B, 4B and 8B shapes with random weights in NF4, three lengths, micro-batches of 4, with and
without gradient checkpointing; what is counted is the most that torch's allocator had taken from the GPU when training
and its validation were over, and what CUDA itself takes there. Calibration comes after that: it loads the base once
more, where there is room. Needs 17 GB of disk, and a GPU that nobody else uses.

Ends with 1 if an estimate is more than 25 % (CPU) or 15 % (CUDA) from what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_cli import dataset
from router_cli.footprint import forecast
from router_cli.footprint.shapes import shape_of
from router_cli.models import resolve
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
BOUND = {"cpu": 0.25, "cuda": 0.15}
LENGTHS = (256, 512, 1024)
WORDS = ("sort", "the", "list", "of", "orders", "by", "date", "and", "write", "a", "report", "to", "each", "page")
QWEN3 = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")


def label_file(path: Path, tokenizer: Any, length: int, train: int, held_out: int) -> Path:
    """Label rows whose prompts and answers take about `length` tokens, no two alike; written to `path`."""
    from router_cli import prompts

    rows, decisions = [], list(SPACE.enumerate())
    for i in range(train + held_out):
        decision = decisions[i * 7 % len(decisions)]
        text = f"Case {i}:"
        words = itertools.cycle(WORDS[i % len(WORDS) :] + WORDS[: i % len(WORDS)])
        while len(prompts.encode_example(text, decision, SPACE, tokenizer, 10**6).input_ids) < length - i % 4 - 8:
            text += "".join(f" {next(words)}" for _ in range(6))
        split = "train" if i < train else "validation"
        rows.append({"id": f"t{i}", "task": text, "decision": decision.model_dump(mode="json"), "split": split})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_for(data: Path, model: str, output: Path, values: dict[str, Any]) -> Settings:
    """Settings as a command line gives them."""
    chosen = {"train.data": str(data), "train.model": model, "train.output_dir": str(output)}
    chosen |= {"train.grad_accum": "1", "train.lora_dropout": "0", "decision.roles": ",".join(SPACE.roles), **values}
    return load({key: ("benchmark", str(value)) for key, value in chosen.items()}, environ={})


def foreseen(settings: Settings) -> forecast.Footprint:
    """What the program says before it trains."""
    data = dataset.build(settings, SPACE)
    return forecast.Forecast(settings, SPACE, data.train, data.validation).footprint()


class Phases:
    """A progress that remembers this process's peak at the end of every bar, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def bar(self, title: str, total: int | None, done: int = 0) -> Iterator[Any]:
        self.peaks[f"before {title}"] = taken()
        yield self
        self.peaks[title] = taken()

    def advance(self, steps: int = 1, status: str = "") -> None:
        pass

    def notice(self, text: str) -> None:
        self.peaks[text[:24]] = taken()

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr)


def taken() -> int:
    """The most memory of the device that this process has had so far, in bytes."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        import torch

        free, whole = torch.cuda.mem_get_info()
        context = whole - free - torch.cuda.memory_reserved()
        return int(torch.cuda.max_memory_reserved() + context)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child(arguments: dict[str, Any]) -> None:
    """Train as told, and print the peak."""
    from router_cli.train import train

    said, started = Phases(), time.perf_counter()
    train(settings_for(**arguments), said)
    peak = said.peaks["train"] if os.environ.get("CUDA_VISIBLE_DEVICES", "all") else taken()
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - started, "phases": said.peaks}))


def case(name: str, tokenizer: Any, base: Path, length: int, values: dict[str, Any], device: str) -> dict[str, Any]:
    """One training: what is said of it, and what it takes in a process of its own."""
    batch = values["train.batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        data = label_file(Path(scratch) / "labels.jsonl", tokenizer, length, 2 * batch, 8)
        settings = settings_for(data, str(base), Path(scratch) / "adapter", values)
        said = foreseen(settings)
        told = {"data": str(data), "model": str(base), "output": f"{scratch}/adapter", "values": values}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(told)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})},
        )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    row = {"case": name, "measured": found["peak"], "estimate": said.total, "phase": said.phase}
    row["detail"] = {"memory": said.memory, "foreseen_seconds": said.seconds, **found}
    show(row, device)
    return row


def on_cpu(lengths: Sequence[int], dtypes: Sequence[str], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Every case on this machine's CPU."""
    from transformers import AutoTokenizer

    base = resolve("smollm2-135m", load({}, environ={}))
    tokenizer, rows = AutoTokenizer.from_pretrained(base.folder), []
    for dtype, length, batch, last in itertools.product(dtypes, lengths, batches, (None, 10)):
        values = {"models.dtype": dtype, "train.batch_size": batch, "train.check_memory": "false"}
        values |= {"train.lora_last_layers": last} if last else {}
        name = f"{dtype}, {length} tokens, batch {batch}, {'last 10' if last else 'all'} layers"
        rows.append(case(name, tokenizer, base.folder, length, values, "cpu"))
    return rows


def on_cuda(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Every case on this machine's GPU."""
    from tests.tiny import tiny_tokenizer

    tokenizer, rows = tiny_tokenizer("qwen3"), []
    values = {"train.use_4bit": "true", "train.bf16": "true", "train.batch_size": 4, "train.check_memory": "false"}
    for model in QWEN3:
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch) / "base"
            random_model(model, base)
            tokenizer.save_pretrained(base)
            for length, again in itertools.product(lengths, (True, False)):
                name = f"{model}, {length} tokens, {'with' if again else 'without'} checkpointing"
                chosen = {**values, "train.gradient_checkpointing": str(again).lower()}
                rows.append(case(name, tokenizer, base, length, chosen, "cuda"))
    return rows


def random_model(name: str, folder: Path) -> None:
    """Save a model of that shape with random weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shape_of(name, load({}, environ={})).config
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def off(row: dict[str, Any]) -> float:
    """How far an estimate is from what was measured, as a share of the latter."""
    return float(row["estimate"] / row["measured"] - 1)


def show(row: dict[str, Any], device: str) -> None:
    """Print a row of the table."""
    out = " out of bounds" if abs(off(row)) > BOUND[device] else ""
    figures = f"{row['measured'] / 1e9:.2f} | {row['estimate'] / 1e9:.2f} | {off(row):+.0%}"
    print(f"| {row['case']} | {figures} | {row['phase']} |{out}", flush=True)


def main() -> int:
    """Measure, print, and say by the exit code whether all estimates hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help="one case as JSON; used by this program itself")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--dtypes", default="")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--details", help="file for every figure, as JSON")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return 0
    import torch

    from router_cli.backends.device import fast_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | measured GB | estimate GB | off | peak in |\n|---|---:|---:|---:|---|")
    lengths = [int(one) for one in given.lengths.split(",")]
    dtypes = given.dtypes.split(",") if given.dtypes else sorted({"float32", fast_dtype("cpu")})
    batches = [int(one) for one in given.batches.split(",")]
    rows = on_cuda(lengths) if device == "cuda" else on_cpu(lengths, dtypes, batches)
    if given.details:
        Path(given.details).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    wrong = sum(abs(off(row)) > BOUND[device] for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} within {BOUND[device]:.0%}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
