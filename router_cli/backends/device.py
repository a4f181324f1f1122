"""What this machine computes fastest in. Probed, never assumed: CPUs differ by a factor of sixty here.

One machine with AMX did bf16 products nine times faster than fp32, one Zen 3 did them seven times slower.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from router_cli.errors import RouterError

ROWS_AT_ONCE = 8
"""Short prompts that a CPU encodes together: with more, their activations leave its caches."""


@cache
def fast_dtype(device: str) -> str:
    """`bfloat16`, `float16` or `float32`: the type to hold and run a model in on `device` (a few milliseconds)."""
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "mps":
        return "float32"
    # A margin, because bf16 also pays for casts around the products and rounds what it computes.
    return "bfloat16" if _seconds(torch.bfloat16) * 1.5 < _seconds(torch.float32) else "float32"


def _seconds(dtype: Any, repeats: int = 3) -> float:
    import torch

    # The shape of a small model's MLP over one short prompt.
    left, right = torch.ones(128, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    left @ right
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return best


KERNELS = 256
"""Compiled products that a server keeps: at 0.6 MB each, oneDNN's own 1,024 fill slowly to 600 MB."""


def keep_few_kernels() -> None:
    """Let oneDNN keep `KERNELS` compiled products, unless the environment says how many; before it is first used.

    It compiles one for every shape, and batches of all sizes and lengths bring thousands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def hand_back() -> None:
    """Give the memory that is free inside this process back to the system, where the C library is glibc.

    Batches of many shapes leave holes that glibc keeps: a server grows by half for minutes, though nothing is held.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


_NO_MEMORY = ("DefaultCPUAllocator: not enough memory", "error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How Windows, and CUDA outside torch's allocator, say it; what else is said accelerate knows."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU; one of ours, made of such a one, too."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, RouterError):
        return error.__context__ is not None and out_of_memory(error.__context__)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return said or (isinstance(error, Exception) and should_reduce_batch_size(error))


def give_back() -> None:
    """Return what nobody holds any more to the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that this process can still take, in a container by the limit that `groups` states.

    What a group's files hold in the page cache is counted as used there, but given up where it is wanted.
    """
    import psutil

    free: int = psutil.virtual_memory().available
    second, first = ("memory.max", "memory.current", "memory.stat", "inactive_file"), groups / "memory"
    older = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
    for folder, (most, used, stat, cached) in ((groups, second), (first, older)):
        try:
            limit, taken = (folder / most).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():  # or "max"
            free = min(free, int(limit) - taken + int(counts.get(cached, 0)))
    return max(0, free)


def best_device() -> str:
    """`cuda`, `mps` or `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
