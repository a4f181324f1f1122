"""What this machine has and what it lacks for the router: the half of `router doctor` that needs no network."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from router_cli import models
from router_cli.backends.device import available_memory, best_device, fast_dtype
from router_cli.sections import SMALL_MODEL
from router_cli.settings import Settings

DISTRIBUTION = "router-cli"

GB = 1e9
DISK_GB = 17
"""An 8B model in bfloat16, as the Hub has it."""
GPU_GB = 12
"""What QLoRA of an 8B model takes at batch size 1."""
RAM_GB = 4
"""What the small model takes in training, with the libraries."""

LESS_MEMORY = "--use-4bit --gradient-checkpointing --batch-size 1 --grad-accum 16 --max-length 1024 --lora-r 4"

State = Literal["fine", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `wrong` is what makes every use impossible; a `note` only narrows what can be done."""

    name: str
    state: State
    words: str
    fix: str = ""


def python() -> list[Finding]:
    """Python's version against what this distribution declares."""
    from packaging.specifiers import SpecifierSet

    words, wanted = f"{platform.python_version()} on {platform.system()} {platform.machine()}", ""
    with contextlib.suppress(metadata.PackageNotFoundError):
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return [Finding("python", "wrong", words, f"install Python {wanted}")]
    return [Finding("python", "fine", words)]


def packages() -> list[Finding]:
    """Installed versions against what this distribution declares; nothing is imported."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return [Finding("packages", "note", f"{DISTRIBUTION} itself is not installed", "pip install . in its folder")]
    found: list[Finding] = []
    # An extra's requirements are of no concern to whoever did not ask for it; bitsandbytes has its own line.
    needed = [one for one in wanted if (one.marker is None or one.marker.evaluate({"extra": ""}))]
    for one in needed:
        fix = f'pip install "{one.name}{one.specifier}"'
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if one.name != "bitsandbytes":
                found.append(Finding("packages", "wrong", f"{one.name} is not installed", fix))
            continue
        if not one.specifier.contains(version, prereleases=True):
            found.append(Finding("packages", "note", f"{one.name} {version} is outside {one.specifier}", fix))
    return found or [Finding("packages", "fine", f"all {len(needed)} installed, in the versions asked for")]


def memory() -> list[Finding]:
    """Memory and cores."""
    import psutil

    total, free = psutil.virtual_memory().total, available_memory()
    words = f"{total / GB:.0f} GB, {free / GB:.0f} GB of it free; {os.cpu_count()} CPU cores"
    if free < RAM_GB * GB:
        return [Finding("memory", "note", words, f"training even {SMALL_MODEL} takes {RAM_GB} GB: close something")]
    return [Finding("memory", "fine", words)]


def gpu() -> list[Finding]:
    """GPU and its memory, whether 4-bit works, and the fast number type. The only check that loads torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return []  # said among the packages
    except Exception as error:  # a broken installation fails in many ways
        return [
            Finding(
                "torch",
                "wrong",
                f"cannot be loaded: {' '.join(str(error).split())[:200]}",
                "pip install --force-reinstall torch",
            )
        ]
    device = best_device()
    found = []
    for number in range(torch.cuda.device_count() if device == "cuda" else 0):
        free, whole = torch.cuda.mem_get_info(number)
        words = f"{torch.cuda.get_device_name(number)}, {whole / GB:.0f} GB, {free / GB:.0f} GB of it free"
        small = free < GPU_GB * GB
        fix = f"an 8B model takes about {GPU_GB} GB: {LESS_MEMORY}" if small else ""
        found.append(Finding("gpu", "note" if small else "fine", words, fix))
    if device == "mps":
        found.append(Finding("gpu", "fine", "Apple GPU, which shares the machine's memory"))
    elif device == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch, as pytorch.org/get-started says"
        found.append(Finding("gpu", "note", f"torch {torch.__version__} cannot use the NVIDIA GPU here", fix))
    elif device == "cpu":
        fix = f"small models train on the CPU: --model {SMALL_MODEL}; an 8B model needs a CUDA GPU of {GPU_GB} GB"
        found.append(Finding("gpu", "note", "none", fix))
    found.append(_four_bit(device))
    found.append(Finding("number type", "fine", f"{fast_dtype(device)} is the fast one on this {device.upper()}"))
    return found


def _four_bit(device: str) -> Finding:
    if device != "cuda":
        return Finding("4-bit", "note", "needs a CUDA GPU", "nothing to do: --use-4bit goes on with plain LoRA here")
    if find_spec("bitsandbytes") is None:
        return Finding("4-bit", "note", "needs the package bitsandbytes", "pip install bitsandbytes")
    return Finding("4-bit", "fine", f"bitsandbytes {metadata.version('bitsandbytes')}")


def disk(settings: Settings) -> list[Finding]:
    """Room, and the right to write, where models and results go."""
    found = []
    places = {"models": models.cache_folder(settings), "outputs": settings.train.output_dir}
    for what, folder in places.items():
        there = _existing(folder.absolute())
        free = shutil.disk_usage(there).free / GB
        option = "--model-dir" if what == "models" else "--output-dir"
        words = f"{free:.0f} GB free for {what} in {folder}"
        if not there.is_dir() or not os.access(there, os.W_OK):
            found.append(
                Finding("disk", "note", f"{there} cannot be written to", f"choose another folder with {option}")
            )
        elif what == "models" and free < DISK_GB:
            fix = f"an 8B model takes {DISK_GB} GB: make room, or choose another folder with {option}"
            found.append(Finding("disk", "note", words, fix))
        else:
            found.append(Finding("disk", "fine" if free > 1 else "note", words, "" if free > 1 else "make room"))
    return found


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.exists())


def completion() -> list[Finding]:
    """Whether a shell has the completion script that `--install-completion` writes."""
    home = Path.home()
    known = (".bash_completions/router.sh", ".zfunc/_router", ".config/fish/completions/router.fish")
    if any((home / one).exists() for one in known):
        return [Finding("completion", "fine", "installed for your shell")]
    return [Finding("completion", "note", "not installed for your shell", "router --install-completion")]
