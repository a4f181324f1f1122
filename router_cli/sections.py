"""Every knob of `router`: name, type, bounds, default and help, each declared once.

A field here becomes the option `--lr`, the TOML key `train.lr`, the variable `ROUTER_TRAIN__LR` and a row of the docs.
`settings` reads their values.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from router_cli.schema import Topology

SMALL_MODEL = "smollm2-135m"
TASK_SETS = ("humaneval", "rubric")  # names that stand for files
_BASES: list[Any] = [SMALL_MODEL, "Qwen/Qwen3-8B"]
TOPOLOGY_NAMES = get_args(Topology)
TRIGGERS = ("examples", "runs", "disagree", "unsure")
# Recorded executions that come with the project (data/outcomes/).
OUTCOME_TABLES = ("humaneval-mapcoder", "mbpp-mapcoder", "mbpp-et-mapcoder", "xcodeeval-mapcoder")
MOST_EXAMPLES = 64
"""Few-shot examples travel with every request: more of them is a mistake, not a wish."""


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _distinct(value: list[str]) -> list[str]:
    if len(set(value)) < len(value):
        raise ValueError("must not name anything twice")
    # A list in a TOML file is not split at commas; names stand between commas in prompts and on command lines.
    if any(name != name.strip() or not name.isprintable() or not name or "," in name for name in value):
        raise ValueError("must be names without commas, line breaks or space around them")
    return value


def _files(value: list[str]) -> list[str]:
    return [str(Path(part).expanduser()) if part.startswith("~") else part for part in value]


def _triggers(value: list[str]) -> list[str]:
    if unknown := [name for name in value if name not in TRIGGERS]:
        raise ValueError(f"must be among {', '.join(TRIGGERS)}, not {unknown[0]}")
    return value


def _prices(value: list[str]) -> list[str]:
    for one in value:
        name, _, price = one.partition("=")
        try:
            sound = name in TOPOLOGY_NAMES and 0 <= float(price) < float("inf")
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"must be like single=0.002,chain=0.01, not {one}")
    if len({one.partition("=")[0] for one in value}) < len(value):
        raise ValueError("must not price a topology twice")
    return value


def _fallback(value: str | None) -> str | None:
    if value is not None and value not in ("teacher", "heuristic", "abstain") and not value.lstrip().startswith("{"):
        raise ValueError("must be teacher, heuristic, abstain or a decision as JSON")
    return value


def _token(value: SecretStr | None) -> SecretStr | None:
    if value is not None:
        text = value.get_secret_value()
        # It goes into a header.
        if len(text) < 16 or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must be 16 or more ASCII characters without spaces")
    return value


Names = Annotated[list[str], BeforeValidator(_split), AfterValidator(_distinct)]
Exports = Annotated[list[Literal["merged", "gguf"]], BeforeValidator(_split), AfterValidator(_distinct)]
Files = Annotated[list[str], BeforeValidator(_split), AfterValidator(_files)]
File = Annotated[str, AfterValidator(os.path.expanduser)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """One group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)


class DecisionSettings(Section):
    """What a decision may look like."""

    roles: Annotated[Names, Field(min_length=1, max_length=16)] = Field(
        ["planner", "builder", "tester", "refractor"], description="Roles that agents can take, separated by commas."
    )
    topologies: Annotated[list[Topology], BeforeValidator(_split), AfterValidator(_distinct), Field(min_length=1)] = (
        Field(["single", "chain", "decentralized", "centralized"], description="Formations to choose from.")
    )
    step_bound: int = Field(12, ge=2, le=99, description="Upper bound of max_steps for teams.")


class EndpointSettings(Section):
    """The OpenAI-compatible server of the teacher, and of `infer --backend remote`."""

    api_key: SecretStr | None = Field(None, description="API key; also LLM_API_KEY or OPENAI_API_KEY.")
    base_url: str | None = Field(None, description="Base URL; also LLM_API_BASE, OPENAI_BASE_URL or OPENAI_API_BASE.")
    timeout: float = Field(60.0, gt=0, description="Seconds until a request is given up.")
    retries: int = Field(6, ge=0, description="How often a failed request is sent again.")


class ModelSettings(Section):
    """Where base models come from."""

    model_dir: Folder | None = Field(None, description="Folder for downloaded models (default: the Hub's own cache).")
    hf_token: SecretStr | None = Field(None, description="Hugging Face token for gated models; also HF_TOKEN.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number type of the base model; auto measures which one this machine is fast in."
    )


class LabelSettings(Section):
    """`router label`."""

    data: Files = Field(
        [],
        description="Task files, separated by commas; humaneval, rubric, or - for standard input.",
        examples=list(TASK_SETS),
    )
    output: File = Field("humaneval_router_labels.jsonl", description="Label file to write.")
    teacher: Literal["openai", "heuristic", "recorded"] = Field(
        "openai",
        description="Who decides: a model behind an endpoint, offline rules, or the decision in the task's own row.",
    )
    model: str = Field("gpt-4o", min_length=1, description="Teacher model.")
    strategy: Literal["balanced", "prefer-single", "prefer-teams"] = Field(
        "balanced", description="The teacher's leaning."
    )
    temperature: float = Field(0.1, ge=0, le=2, description="Sampling temperature of the teacher.")
    examples: File | None = Field(
        None,
        description="File of solved tasks (label or task rows with a decision) to show the teacher before each task.",
    )
    shots: int | None = Field(
        None,
        ge=1,
        le=MOST_EXAMPLES,
        description="Show the teacher N solved tasks of the project's own training split, of all topologies alike.",
    )
    audit: bool = Field(
        False, description="Ask again about a sample of the finished label file, to see how far the teacher agrees."
    )
    audit_sample: int = Field(100, ge=2, description="How many labels to ask again about, with --audit.")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests in flight at once.")
    reask: int = Field(2, ge=0, le=10, description="How often an invalid answer is handed back.")
    votes: int = Field(1, ge=1, le=32, description="Ask N times about each task and take what most answers say.")
    tie: Literal["reject", "first"] = Field(
        "reject", description="What a tie of the votes is: a recorded rejection, or the leader that was given first."
    )
    retry_rejected: bool = Field(False, description="Ask again about the rejected tasks, and about nothing else.")
    confirm_above: float = Field(
        1.0, ge=0, description="Estimated bill in US dollars above which to ask before paying."
    )
    yes: bool = Field(False, description="Pay without asking, whatever the estimate.")
    dry_run: bool = Field(False, description="Print the estimate and stop: nothing is sent, nothing is written.")
    price_in: float | None = Field(
        None, ge=0, description="US dollars for a million prompt tokens (default: the price list's)."
    )
    price_out: float | None = Field(
        None, ge=0, description="US dollars for a million answer tokens (default: the price list's)."
    )
    max_cost: float | None = Field(
        None, ge=0, description="Hard cap in US dollars: no request is sent whose worst case would pass it."
    )
    rpm: float | None = Field(
        None, gt=0, description="Requests a minute (default: as the endpoint's headers say, else found out)."
    )
    tpm: float | None = Field(None, gt=0, description="Tokens a minute (default: as the endpoint's headers say).")
    batch: bool = Field(
        False, description="Ask through the provider's Batch API: half the price, an answer within a day."
    )
    wait: bool = Field(
        True, description="With --batch: wait for the answers. --no-wait collects what is there and ends."
    )
    batch_size: int = Field(50_000, ge=1, le=50_000, description="Requests in a batch, at most.")
    batch_poll: float = Field(30.0, gt=0, description="Seconds between two looks at the batches.")
    limit: int | None = Field(None, ge=1, description="Label only the first N tasks.")
    skip_bad_lines: bool = Field(False, description="Record unreadable lines and go on.")
    from_outcomes: File | None = Field(
        None,
        description="Label by recorded executions: a file, a folder of runs, or the name of a carried table.",
        examples=list(OUTCOME_TABLES),
    )
    worker: str | None = Field(None, description="Label by the runs of this worker alone, with --from-outcomes.")
    margin: float = Field(
        0.05,
        ge=0,
        le=1,
        description="How much less often than the best a cheaper topology may solve a task to be its label.",
    )
    pairs: File | None = Field(None, description="Preference pairs for DPO to write beside, with --from-outcomes.")


PRESETS: dict[str, dict[str, Any]] = {
    "cpu-fast": {
        "train.activated": True,
        "train.batch_size": 8,
        "train.grad_accum": 1,
        "train.lr": 2e-3,
        "train.lora_r": 16,
        "train.lora_alpha": 32,
        "train.lora_dropout": 0.0,
        "train.lora_last_layers": 10,
        "train.topology_weight": 1.0,
        "train.topology_passes": 1,
    }
}
"""What `train.preset` stands for: it beats the defaults, and everything that is set beats it."""


class TrainSettings(Section):
    """`router train`."""

    preset: Literal["cpu-fast"] | None = Field(
        None, description="Values that suit a purpose, for all that is not set otherwise (docs/train.md)."
    )
    data: Files = Field([], description="Label files, separated by commas; or rubric.", examples=list(TASK_SETS))
    model: str = Field(
        "Qwen/Qwen3-8B",
        min_length=1,
        description="Base model: Hub id, folder, .gguf file or alias.",
        examples=_BASES,
    )
    output_dir: Folder = Field(Path("outputs/adapter"), description="Folder for the adapter.")
    max_length: int = Field(2048, ge=64, description="Greatest number of tokens of an example.")
    max_samples: int | None = Field(None, ge=1, description="Train on at most N examples.")
    sample_types: Names = Field([], description="Use only rows of these sample types.")
    objective: Literal["imitate", "solve"] = Field(
        "imitate",
        description="Learn the labels' decisions, or also how likely each topology is to solve a task, from rows with "
        "evidence (`router label --from-outcomes`).",
    )
    train_on_inputs: bool = Field(False, description="Learn the prompt too, not the answer alone.")
    drop_no_output: bool = Field(False, description="Drop rows without a usable decision instead of refusing them.")
    convert_humaneval: bool = Field(False, description="Label raw HumanEval rows offline on the way in.")
    batch_size: int = Field(1, ge=1, description="Examples in a micro-batch.")
    grad_accum: int = Field(8, ge=1, description="Micro-batches in a step.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training examples.")
    lr: float = Field(1e-4, gt=0, lt=1, description="Peak learning rate.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls."
    )
    seed: int = Field(42, ge=0, description="Seed of everything random.")
    use_4bit: bool = Field(False, description="Load the base in 4-bit NF4 with double quantisation (QLoRA).")
    bf16: bool = Field(False, description="Compute in bfloat16 whatever the machine is fast in.")
    fp16: bool = Field(False, description="Compute in float16.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    logging_steps: int = Field(10, ge=1, description="Log every N steps.")
    save_steps: int = Field(50, ge=1, description="Write a checkpoint every N steps.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints to keep.")
    target_modules: Names = Field(["all-linear"], description="Modules that get an adapter.")
    lora_r: int = Field(8, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapter.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in the adapter.")
    lora_last_layers: int | None = Field(
        None, ge=1, description="Adapt only the last N layers; what lies below is then computed once."
    )
    activated: bool = Field(
        False, description="Adapt the answer's tokens alone (activated LoRA): prompts are computed once, by the base."
    )
    topology_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the topology's choice in the loss, beside the mean over all tokens (1: as much).",
    )
    topology_passes: int = Field(
        0, ge=0, description="More lessons a task that end at the topology: cheap ones in the choice alone."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="Weigh the topology's choice so that rare topologies count as much as frequent ones."
    )
    augment: int = Field(
        0, ge=0, le=8, description="More lessons a task, each asked in other words around the task's own."
    )
    validation_share: float = Field(
        0.15, ge=0, lt=1, description="Share held out where the rows bring no split of their own."
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Decide the held-out tasks every N steps (default: after each epoch of the later half)."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after N looks at the held-out tasks without a better macro-F1."
    )
    export: Exports = Field(
        [],
        description="Write the router as a model of its own too: merged (transformers, vLLM), gguf (llama.cpp).",
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="Send the log to a tracker too; tensorboard writes below --output-dir."
    )
    download_model: bool = Field(False, description="Fetch the base model and stop if there is no --data.")
    estimate: bool = Field(False, description="Print what training will take (memory, time, money) and stop.")
    check_memory: bool = Field(True, description="Refuse to start what cannot fit into the memory that is free.")
    price_per_hour: float | None = Field(
        None, gt=0, description="US dollars for an hour of one GPU, for the estimate and the bill so far."
    )


class InferSettings(Section):
    """`router infer`."""

    adapter: Folder | None = Field(None, description="Folder of a trained adapter.")
    base: str | None = Field(
        None, description="Base model: overrides the adapter's, or is asked untrained without one.", examples=_BASES
    )
    data: Files = Field(
        [],
        description="Task files, separated by commas; humaneval, rubric, or - for standard input.",
        examples=list(TASK_SETS),
    )
    output: File | None = Field(None, description="Predictions file to write (default: standard output).")
    backend: Literal["local", "remote", "heuristic"] = Field("local", description="What decides.")
    model: str | None = Field(None, description="Model name on the remote server.")
    batch_size: int = Field(32, ge=1, description="Tasks decided at once.")
    engine: Literal["local", "ray"] = Field(
        "local", description="Who goes over a folder of shards: this process, or the workers of a Ray cluster."
    )
    workers: int | None = Field(
        None, ge=1, description="Workers of --engine ray (default: one a GPU, or one a machine)."
    )
    alternatives: int | None = Field(
        None, ge=1, le=1000, description="Also give the N most likely decisions, each with its probability."
    )
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="Least probability of the likeliest topology; below it --fallback decides."
    )
    target_agreement: float | None = Field(
        None, gt=0, le=1, description="Choose --min-confidence so that what the router decides agrees as often as this."
    )
    target_cost: float | None = Field(
        None,
        ge=0,
        description="Choose --min-confidence so that the teacher costs so many US dollars a task on average.",
    )
    fallback: Annotated[Literal["teacher", "heuristic", "abstain"] | str | None, AfterValidator(_fallback)] = Field(
        None, description="Who decides below --min-confidence: a name, or a decision as JSON."
    )
    value_of_solving: float | None = Field(
        None,
        gt=0,
        description="What a solved task is worth: choose the topology of the highest P(solved) x this - --price, with "
        "an adapter of --objective solve.",
    )
    price: Annotated[Names, AfterValidator(_prices)] = Field(
        [], description="What a run of each topology costs, in the same money, as single=0.002,chain=0.01."
    )
    split: Literal["train", "validation", "test", "all"] = Field(
        "all", description="Which tasks, where the rows say their split."
    )
    limit: int | None = Field(None, ge=1, description="Decide only the first N tasks.")
    skip_bad_lines: bool = Field(False, description="Record unreadable lines and go on.")


class ServeSettings(Section):
    """`router serve`."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen at; another than this machine's needs a token."
    )
    port: int = Field(8808, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    token: Annotated[SecretStr | None, AfterValidator(_token)] = Field(
        None, description="What clients have to send as their API key."
    )
    name: str = Field("router", min_length=1, description="Model name for chat completions.")
    queue: int = Field(512, ge=1, le=100_000, description="Tasks that may wait; who comes then gets 429.")
    batch_wait_ms: float = Field(
        5.0, ge=0, le=10_000, description="Milliseconds that an idle model waits for more tasks to share a batch."
    )
    max_body: int = Field(1_048_576, ge=1024, description="Bytes of a request, at most.")
    time_limit: float = Field(60.0, gt=0, description="Seconds until a request is given up.")
    drain: int = Field(30, ge=1, description="Seconds that requests in flight have to end, when the server is told to.")


class EvalSettings(Section):
    """`router eval`."""

    predictions: File | None = Field(None, description="Predictions file of `router infer`.")
    labels: Files = Field(
        [],
        description="Label files to judge against, or rubric; rows of the training split fit the baselines.",
        examples=["rubric"],
    )
    adapter: Folder | None = Field(None, description="Predict with this adapter first.")
    data: Files = Field(
        [], description="Label files to predict and judge against, with --adapter.", examples=list(TASK_SETS)
    )
    compare: Names = Field(
        [], description="More routers to judge beside: NAME=FILE, files or run folders, separated by commas."
    )
    flip: int | None = Field(
        None, ge=1, description="Ask about N judged tasks otherwise, and report what changes; with --adapter."
    )
    probe: str | None = Field(None, description="Frozen base model for the linear-probe baseline.", examples=_BASES)
    outcomes: File | None = Field(
        None,
        description="Recorded executions to judge by: a file, a folder of runs, or the name of a carried table.",
        examples=list(OUTCOME_TABLES),
    )
    worker: str | None = Field(None, description="Judge by the runs of this worker alone, with --outcomes.")
    unsolved_penalty: float | None = Field(
        None,
        ge=0,
        description="US dollars that an unsolved task costs beside its runs, with --outcomes (default: no bill).",
    )
    split: Literal["train", "validation", "test", "all"] = Field("test", description="Which rows to judge on.")
    execute: bool = Field(
        False, description="Let teams of --worker-model work on the tasks of --data, which have hidden tests, first."
    )
    allow_code_execution: bool = Field(
        False, description="Run the code that models write, in the sandbox, with --execute."
    )
    repeats: int = Field(1, ge=1, le=1000, description="Executions of each task by each topology, with --execute.")
    limit: int | None = Field(None, ge=1, description="Execute only the first N tasks, with --execute.")
    output_dir: Folder = Field(Path("outputs/eval"), description="Folder for report.json and report.html.")
    resamples: int = Field(2000, ge=100, le=100_000, description="Bootstrap resamples for intervals.")
    seed: int = Field(42, ge=0, description="Seed of the resampling and of the random baseline.")


class RunSettings(Section):
    """`router run`."""

    worker_model: str = Field("gpt-4o-mini", min_length=1, description="Model that speaks for every role of the team.")
    decision: str | None = Field(
        None, description="A topology, or a whole decision as JSON, in place of a router's.", examples=[*TOPOLOGY_NAMES]
    )
    cascade: Annotated[Names, AfterValidator(_triggers)] = Field(
        [],
        description="Try a single agent first, and the decided team where one of these says so: "
        "examples, runs, disagree, unsure.",
        examples=list(TRIGGERS),
    )
    unsure_below: float = Field(
        0.5, ge=0, le=1, description="Probability of a single agent below which --cascade unsure takes the team."
    )
    allow_code_execution: bool = Field(
        False, description="Run the code that models write, in the sandbox: what --cascade examples and runs need."
    )
    output_dir: Folder = Field(Path("outputs/runs"), description="Folder for the traces.")
    temperature: float = Field(0.2, ge=0, le=2, description="Sampling temperature of the worker.")
    answer_tokens: int = Field(
        4096, ge=16, le=65_536, description="Tokens of an answer, at most; what is longer is cut there."
    )
    concurrency: int = Field(16, ge=1, le=1024, description="Requests in flight at once.")
    rpm: float | None = Field(None, gt=0, description="Requests a minute (default: as the endpoint's headers say).")
    max_cost: float | None = Field(
        None, ge=0, description="Hard cap in US dollars: no request is sent whose worst case would pass it."
    )
    price_in: float | None = Field(
        None, ge=0, description="US dollars for a million prompt tokens (default: the price list's)."
    )
    price_out: float | None = Field(
        None, ge=0, description="US dollars for a million answer tokens (default: the price list's)."
    )


class QuickstartSettings(Section):
    """`router quickstart`."""

    output_dir: Folder = Field(Path("outputs/quickstart"), description="Folder for the whole run.")
    model: str = Field(SMALL_MODEL, min_length=1, description="Base model.", examples=_BASES)
    teacher: Literal["recorded", "heuristic"] = Field(
        "recorded", description="Who labels the training tasks: their written rubric decisions, or the offline rules."
    )
