"""Options become settings: every flag of the old guide in both spellings, `--set`, origins, refusals."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from router_cli.cli import BASES, ENDPOINT, SPACE, main
from router_cli.options import Call, dashed, with_settings
from router_cli.settings import Settings


@pytest.fixture(autouse=True)
def _nothing_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No router.toml of this folder and no variables of this machine play along."""
    monkeypatch.chdir(tmp_path)
    for name in ("LLM_API_KEY", "OPENAI_API_KEY", "LLM_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_BASE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def reach(section: str, *argv: str) -> Settings:
    """The settings that the command of `section` gets for a command line."""
    reached: list[Settings] = []
    app = typer.Typer()

    @app.command()
    @with_settings(section, *SPACE, *(ENDPOINT if section == "label" else BASES))
    def command(call: Call) -> None:
        reached.append(call.settings)

    app(args=dashed(list(argv)), standalone_mode=False)
    return reached[0]


def value(settings: Settings, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)


# What the old guide's commands say, and what the settings have to hold then.
TRAIN: list[tuple[str, str | None, str, Any]] = [
    ("--data", "a.jsonl,b.jsonl", "train.data", ["a.jsonl", "b.jsonl"]),
    ("--model", "Qwen/Qwen3-8B-Instruct", "train.model", "Qwen/Qwen3-8B-Instruct"),
    ("--output_dir", "models/x_y", "train.output_dir", Path("models/x_y")),
    ("--max_length", "1024", "train.max_length", 1024),
    ("--max_samples", "10", "train.max_samples", 10),
    (
        "--sample_types",
        "humaneval_teacher_distilled,custom_type",
        "train.sample_types",
        ["humaneval_teacher_distilled", "custom_type"],
    ),
    ("--train_on_inputs", None, "train.train_on_inputs", True),
    ("--drop_no_output", None, "train.drop_no_output", True),
    ("--convert_humaneval", None, "train.convert_humaneval", True),
    ("--batch_size", "2", "train.batch_size", 2),
    ("--grad_accum", "16", "train.grad_accum", 16),
    ("--epochs", "3", "train.epochs", 3.0),
    ("--lr", "2e-4", "train.lr", 2e-4),
    ("--warmup_ratio", "0.1", "train.warmup_ratio", 0.1),
    ("--weight_decay", "0.01", "train.weight_decay", 0.01),
    ("--lr_scheduler", "constant_with_warmup", "train.lr_scheduler", "constant_with_warmup"),
    ("--seed", "7", "train.seed", 7),
    ("--use_4bit", None, "train.use_4bit", True),
    ("--bf16", None, "train.bf16", True),
    ("--fp16", None, "train.fp16", True),
    ("--gradient_checkpointing", None, "train.gradient_checkpointing", True),
    ("--logging_steps", "5", "train.logging_steps", 5),
    ("--save_steps", "50", "train.save_steps", 50),
    ("--save_total_limit", "3", "train.save_total_limit", 3),
    ("--target_modules", "q_proj,v_proj", "train.target_modules", ["q_proj", "v_proj"]),
    ("--lora_r", "4", "train.lora_r", 4),
    ("--lora_alpha", "32", "train.lora_alpha", 32.0),
    ("--lora_dropout", "0", "train.lora_dropout", 0.0),
    ("--download_model", None, "train.download_model", True),
    ("--model_dir", "models/hf_cache", "models.model_dir", Path("models/hf_cache")),
    ("--hf_token", "hf_abc", "models.hf_token", "hf_abc"),
    ("--roles", "a_b,c", "decision.roles", ["a_b", "c"]),
]
LABEL: list[tuple[str, str | None, str, Any]] = [
    ("--data", "data/Humaneval/humaneval-py.jsonl", "label.data", ["data/Humaneval/humaneval-py.jsonl"]),
    ("--output", "data/router_labels_gpt4o.jsonl", "label.output", "data/router_labels_gpt4o.jsonl"),
    ("--model", "gpt-4o", "label.model", "gpt-4o"),
    (
        "--roles",
        "planner,builder,tester,refractor",
        "decision.roles",
        ["planner", "builder", "tester", "refractor"],
    ),
]


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "equals"])
@pytest.mark.parametrize("dashes", [False, True], ids=["underscores", "dashes"])
@pytest.mark.parametrize(
    ("section", "flag", "given", "key", "held"),
    [("train", *case) for case in TRAIN] + [("label", *case) for case in LABEL],
)
def test_every_flag_of_the_old_guide_reaches_the_settings(
    section: str, flag: str, given: str | None, key: str, held: Any, dashes: bool, joined: bool
) -> None:
    spelled = flag.replace("_", "-") if dashes else flag
    argv = [spelled] if given is None else [f"{spelled}={given}"] if joined else [spelled, given]
    settings = reach(section, *argv)
    found = value(settings, key)
    assert (found.get_secret_value() if hasattr(found, "get_secret_value") else found) == held
    assert settings.origin(key) == flag.replace("_", "-")


def test_the_old_guides_whole_commands_are_understood() -> None:
    command = """--data data/l.jsonl --model Qwen/Qwen3-8B-Instruct --output_dir models/router_lora_gpt4o --epochs 3
        --batch_size 1 --grad_accum 8 --lr 1e-4 --use_4bit --bf16 --gradient_checkpointing --save_steps 50"""
    settings = reach("train", *shlex.split(command))
    assert settings.train.use_4bit and settings.train.bf16 and settings.train.gradient_checkpointing
    assert (settings.train.epochs, settings.train.lr, settings.train.fp16) == (3, 1e-4, False)


def test_what_nobody_gave_keeps_its_default() -> None:
    settings = reach("train", "--epochs", "2")
    assert settings.train.lora_r == 8 and settings.origin("train.lora_r") == "default"


def test_flags_of_yes_and_no_have_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_TRAIN__USE_4BIT", "true")
    assert reach("train").train.use_4bit is True
    settings = reach("train", "--no_use_4bit")
    assert settings.train.use_4bit is False and settings.origin("train.use_4bit") == "--no-use-4bit"


def test_set_reaches_any_setting_and_beats_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "router.toml").write_text("[train]\nlr = 1e-5\n[label]\nmodel = 'from-file'\n")
    monkeypatch.setenv("ROUTER_TRAIN__LR", "2e-5")
    assert reach("train").train.lr == 2e-5
    settings = reach("train", "--set", "train.lr=3e-5", "--set", "label.temperature=0.5", "--set", "decision.roles=x,y")
    assert settings.train.lr == 3e-5 and settings.origin("train.lr") == "--set train.lr"
    assert settings.label.temperature == 0.5 and settings.decision.roles == ["x", "y"]
    assert settings.label.model == "from-file" and settings.origin("label.model") == "router.toml"


def test_set_takes_underscores_dashes_and_values_with_equals_signs() -> None:
    assert reach("eval", "--set", "eval.output-dir=a_b").eval.output_dir == Path("a_b")
    assert reach("eval", "--set", "eval.compare=x=f_1.jsonl").eval.compare == ["x=f_1.jsonl"]


def test_values_that_look_like_options_stay_as_they_are() -> None:
    assert dashed(["infer", "--", "--not_an_option"]) == ["infer", "--", "--not_an_option"]
    assert dashed(["--output_dir=a_b", "c_d", "-q"]) == ["--output-dir=a_b", "c_d", "-q"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--lrr", "1"], "--lr"),
        (["train", "--outptu_dir", "x"], "--output-dir"),
        (["label", "--temprature", "1"], "--temperature"),
        (["trian"], "train"),
        (["train", "--set", "train.lora_rank=1"], "train.lora_r'"),
        (["train", "--set", "trian.epochs=1"], "train.epochs"),
    ],
)
def test_an_unknown_name_is_a_usage_error_that_knows_the_nearest(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err.removeprefix(f"error: No such option: {argv[1] if len(argv) > 1 else ''}")


@pytest.mark.parametrize(
    ("argv", "variable", "said"),
    [
        (["--lr", "-1"], "", "train.lr (--lr): must be > 0, got '-1'"),
        (["--set", "train.lr=-1"], "", "train.lr (--set train.lr): must be > 0, got '-1'"),
        ([], "-1", "train.lr (ROUTER_TRAIN__LR): must be > 0, got '-1'"),
        (["--lr", "much"], "", "train.lr (--lr): "),
        (["--lr_scheduler", "cos"], "", "train.lr_scheduler (--lr-scheduler): must be 'cosine'"),
        (["--roles", "a,a"], "", "decision.roles (--roles): must not name anything twice"),
        (["--topologies", "chian"], "", "decision.topologies (--topologies): "),
        (["--set", "train.lr"], "", "expected section.field=value"),
    ],
)
def test_a_bad_value_is_told_with_where_it_comes_from(
    argv: list[str], variable: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if variable:
        monkeypatch.setenv("ROUTER_TRAIN__LR", variable)
    assert main(["train", *argv]) == 2
    assert said in capsys.readouterr().err


def test_global_options_work_after_the_subcommand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[train]\nlora_r = 3\n")
    assert main(["config", "show", "--json", "-q", "--config", str(config), "--set", "train.epochs=2", "-v"]) == 0
    out, err = capsys.readouterr()
    assert f'"from": "{config}"' in out and '"from": "--set train.epochs"' in out and err == ""


def test_an_option_given_twice_holds_its_last_value() -> None:
    assert reach("train", "--epochs", "2", "--epochs", "4").train.epochs == 4
