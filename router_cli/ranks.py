"""Several processes that train one adapter: which one this is, and how they wait for and agree with each other.

`accelerate launch` and `torchrun` start the same command once a GPU, and tell each process its number in the
environment. Only the first one writes and speaks. Started alone, everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def sharded() -> bool:
    """Whether each process holds a part of the model alone (FSDP, DeepSpeed ZeRO-3), as `accelerate launch` says."""
    said = os.environ.get
    in_stages = said("ACCELERATE_USE_DEEPSPEED") == "true" and said("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return count() > 1 and (said("ACCELERATE_USE_FSDP") == "true" or in_stages)


def join() -> None:
    """Meet the other processes: over NCCL between GPUs, over gloo on CPUs."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        # It also makes this process's GPU the current one, which `cuda` means from here on.
        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part from the other processes: what follows, however long it takes, nobody waits for."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def wait() -> None:
    """Go on when every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Run the block in one process a machine, then in the others, which find its work done (a download, a cache)."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def shared(value: Any) -> Any:
    """The first process's value, in every process."""
    return gathered(value)[0]


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process: what all of them must do at the same step."""
    return any(gathered(flag))


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    if count() == 1:
        return [value]
    import torch

    found = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found
