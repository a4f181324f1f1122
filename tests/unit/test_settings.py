"""Where a setting's value comes from, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router_cli.errors import SettingsError
from router_cli.settings import KEYS, Settings, fields, load, variable

SECRET = "sk-0123456789"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No router.toml of the developer's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(
    options: dict[str, Any] | None = None, environ: dict[str, str] | None = None, config: str | None = None
) -> str:
    with pytest.raises(SettingsError) as caught:
        load({key: (f"--{key}", value) for key, value in (options or {}).items()}, config, environ or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- precedence -----------------------------------------------------------------------------------------------


def test_an_option_beats_the_environment_beats_the_file_beats_the_default(empty_folder: Path) -> None:
    (empty_folder / "router.toml").write_text("[train]\nlr = 0.001\nseed = 1\nepochs = 9\n")
    environ = {"ROUTER_TRAIN__LR": "0.002", "ROUTER_TRAIN__SEED": "2"}
    settings = load({"train.lr": ("--lr", "0.003")}, environ=environ)
    train = settings.train
    assert (train.lr, train.seed, train.epochs, train.batch_size) == (0.003, 2, 9, 1)
    keys = ("train.lr", "train.seed", "train.epochs", "train.batch_size")
    assert [settings.origin(key) for key in keys] == ["--lr", "ROUTER_TRAIN__SEED", "router.toml", "default"]


def test_a_named_file_is_read_in_place_of_the_one_here(empty_folder: Path) -> None:
    (empty_folder / "router.toml").write_text("[train]\nlr = 0.001\n")
    (empty_folder / "mine.toml").write_text("\ufeff[train]\r\nseed = 5\r\n", encoding="utf-8")
    settings = load(config="mine.toml", environ={})
    assert (settings.train.lr, settings.train.seed) == (1e-4, 5)
    assert settings.origin("train.seed") == "mine.toml"


@pytest.mark.parametrize(
    ("environ", "value", "origin"),
    [
        ({"LLM_API_KEY": "a", "OPENAI_API_KEY": "b"}, "a", "LLM_API_KEY"),
        ({"LLM_API_KEY": "", "OPENAI_API_KEY": "b"}, "b", "OPENAI_API_KEY"),
        ({"ROUTER_ENDPOINT__API_KEY": "c", "LLM_API_KEY": "a"}, "c", "ROUTER_ENDPOINT__API_KEY"),
        ({"ROUTER_ENDPOINT__API_KEY": "", "LLM_API_KEY": "a"}, "a", "LLM_API_KEY"),
    ],
)
def test_known_names_of_the_key(environ: dict[str, str], value: str, origin: str) -> None:
    settings = load(environ=environ)
    assert settings.endpoint.api_key is not None and settings.endpoint.api_key.get_secret_value() == value
    assert settings.origin("endpoint.api_key") == origin


def test_known_names_of_the_endpoint_and_the_hubs_token() -> None:
    urls = ("LLM_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_BASE")
    for at in range(3):
        assert load(environ=dict.fromkeys(urls[at:], "") | {urls[at]: "http://x"}).endpoint.base_url == "http://x"
    assert load(environ={name: name for name in urls}).endpoint.base_url == "LLM_API_BASE"
    assert load(environ={"HF_TOKEN": "hf"}).origin("models.hf_token") == "HF_TOKEN"


def test_lists_come_as_text_with_commas_or_as_lists(empty_folder: Path) -> None:
    assert load({"decision.roles": ("--roles", " a, b ,")}, environ={}).decision.roles == ["a", "b"]
    (empty_folder / "router.toml").write_text('[decision]\nroles = ["a", "b"]\n')
    assert load(environ={}).decision.roles == ["a", "b"]


def test_a_home_folder_is_expanded() -> None:
    settings = load({"train.data": ("--data", "~/a.jsonl,b.jsonl"), "train.output_dir": ("-o", "~/out")}, environ={})
    assert settings.train.data == [str(Path.home() / "a.jsonl"), "b.jsonl"]
    assert settings.train.output_dir == Path.home() / "out"


def test_every_setting_has_a_variable_and_a_help_text() -> None:
    assert variable("train.lr") == "ROUTER_TRAIN__LR"
    assert {key for key, _ in fields()} == KEYS
    assert all(field.description for _, field in fields())
    # The defaults are not checked when settings are made, so they are here.
    for section in Settings():
        type(section[1])(**section[1].model_dump())


def test_values_set_by_code_keep_the_others_and_are_checked() -> None:
    settings = load({"train.seed": ("--seed", "7")}, environ={}).with_values(train__lr=0.5)
    assert (settings.train.seed, settings.train.lr) == (7, 0.5)
    assert (settings.origin("train.seed"), settings.origin("train.lr")) == ("--seed", "set by router")
    with pytest.raises(SettingsError, match=r"train\.lr"):
        settings.with_values(train__lr=-1)


# -- unknown names --------------------------------------------------------------------------------------------


def test_an_unknown_option_names_the_nearest_setting() -> None:
    assert refused({"train.seeed": 1}) == "--train.seeed: there is no setting 'train.seeed'; did you mean 'train.seed'?"


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[train]\nlrr = 1e-3", "router.toml: there is no setting 'train.lrr'; did you mean 'train.lr'?"),
        ("[trian]\nlr = 1e-3", "router.toml: there is no section 'trian'; did you mean 'train'?"),
        ("[train.sub]\nx = 1", "router.toml: there is no setting 'train.sub'"),
        ("train = 3", "router.toml: train must be a table, [train]"),
    ],
)
def test_unknown_names_in_the_file(empty_folder: Path, toml: str, words: str) -> None:
    (empty_folder / "router.toml").write_text(toml)
    assert refused().startswith(words)


@pytest.mark.parametrize(
    "name", ["ROUTER_TRAIN__LRR", "ROUTER_TRAIN_LR", "router_train__lrr", "ROUTER_TRIAN__LR", "ROUTER_TRIAN_LR"]
)
def test_an_unknown_variable_names_the_nearest(name: str) -> None:
    assert refused(environ={name: "1"}) == f"{name}: there is no such setting; did you mean 'ROUTER_TRAIN__LR'?"


def test_variables_of_other_programs_are_let_pass() -> None:
    load(environ={"ROUTER_MODEL": "x", "ROUTER_LOG_LEVEL": "debug", "ROUTER_HOST": "h", "PATH": "/bin"})


@pytest.mark.parametrize("service", ["ROUTER", "ROUTER_SERVE", "ROUTER_TRAIN"])
def test_variables_that_kubernetes_sets_for_a_service_are_let_pass(service: str) -> None:
    tcp = f"{service}_PORT_8000_TCP"
    load(
        environ={
            f"{service}_SERVICE_HOST": "10.0.0.1",
            f"{service}_SERVICE_PORT": "8000",
            f"{service}_SERVICE_PORT_HTTP": "8000",
            f"{service}_PORT": "tcp://10.0.0.1:8000",
            tcp: "tcp://10.0.0.1:8000",
            f"{tcp}_PROTO": "tcp",
            f"{tcp}_PORT": "8000",
            f"{tcp}_ADDR": "10.0.0.1",
        }
    )
    assert "ROUTER_SERVE__PORT" in refused(environ={"ROUTER_SERVE_PORT": "8000"})


# -- wrong values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.lr", -1, "must be > 0, got -1"),
        ("train.lr", "abc", "must be a valid number, unable to parse string as a number, got 'abc'"),
        ("train.lr", "nan", "must be a finite number, got 'nan'"),
        ("train.epochs", "inf", "must be a finite number, got 'inf'"),
        ("train.warmup_ratio", 1, "must be < 1, got 1"),
        ("train.max_length", 3, "must be >= 64, got 3"),
        ("train.batch_size", 1.5, "must be a valid integer"),
        ("train.max_samples", "", "must be a valid integer"),
        ("train.use_4bit", "maybe", "must be a valid boolean"),
        ("train.data", 5, "must be a valid list, got 5"),
        ("train.output_dir", 5, "is not a valid path, got 5"),
        ("train.lr_scheduler", "sine", "must be 'cosine', 'linear'"),
        ("decision.roles", "", "must have at least 1 item"),
        ("decision.roles", "a,b,a", "must not name anything twice"),
        ("decision.roles", ["a", "b,c"], "must be names without commas"),
        ("decision.roles", ["a", " "], "must be names without commas"),
        ("decision.roles", "a\nb", "must be names without commas"),
        ("decision.topologies", "single,star", "got 'star'"),
    ],
)
def test_a_wrong_value_is_named_with_key_and_origin(key: str, value: Any, words: str) -> None:
    message = refused({key: value})
    assert message.startswith(f"{key} (--{key}): ") and words in message


def test_a_wrong_value_names_the_variable_or_file_it_came_from(empty_folder: Path) -> None:
    assert refused(environ={"ROUTER_TRAIN__LR": "-1"}) == "train.lr (ROUTER_TRAIN__LR): must be > 0, got '-1'"
    (empty_folder / "router.toml").write_text("[train]\nlr = 'x'")
    assert refused().startswith("train.lr (router.toml): must be a valid number")


# -- files that are no settings -------------------------------------------------------------------------------


def test_a_missing_named_file_is_refused_and_a_missing_default_is_not() -> None:
    assert refused(config="none.toml") == "--config none.toml: no such file"
    assert load(environ={}) == Settings()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[train\n", "is not TOML: Expected ']'"),
        (b"\xff\xfe[\x00", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_toml_is_refused(empty_folder: Path, content: bytes, words: str) -> None:
    (empty_folder / "router.toml").write_bytes(content)
    assert refused().startswith(f"router.toml: {words}")


def test_a_folder_in_place_of_the_file_is_refused(empty_folder: Path) -> None:
    (empty_folder / "router.toml").mkdir()
    assert refused() == "router.toml: cannot be read: is a directory"
    assert refused(config="") == "--config : cannot be read: is a directory"


# -- secrets --------------------------------------------------------------------------------------------------


def test_secrets_are_masked_wherever_settings_are_shown(empty_folder: Path) -> None:
    settings = load({"models.hf_token": ("--hf-token", SECRET)}, environ={"LLM_API_KEY": SECRET})
    shown = f"{settings!r} {settings} {settings.endpoint} {settings.model_dump_json()} {settings.model_dump()}"
    assert SECRET not in shown and "**********" in shown
    assert settings.models.hf_token is not None and settings.models.hf_token.get_secret_value() == SECRET


def test_a_wrong_secret_is_not_quoted(empty_folder: Path) -> None:
    (empty_folder / "router.toml").write_text(f'[endpoint]\napi_key = ["{SECRET}"]\n')
    assert SECRET not in refused()
