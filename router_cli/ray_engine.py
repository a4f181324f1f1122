"""Shards decided by the workers of a Ray cluster: Ray Data hands them out, each worker has one loaded router.

Which worker takes a shard, and how often, means nothing: it is written beside its place and moved there once it is
whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from router_cli.errors import PartialError, RouterError, UsageError
from router_cli.jsonl import writing
from router_cli.progress import Progress, Silent
from router_cli.settings import Settings, fields
from router_cli.shards import Done, Worker

_BLOCKS = 2000
TRIES = 4
"""How often a shard is tried. Ray hands it on whenever its worker dies: one that kills them would go round for ever."""


class _Notes(Silent):
    """What a worker wants said, for the one who can be heard."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


class RayWorker:
    """A `Worker` as Ray Data calls it: batches of one shard's name in, its `Done` as JSON out."""

    def __init__(self, settings: Settings, folder: str) -> None:
        # Paths are relative to where the command was given, and stand in the rows as they were given.
        with contextlib.suppress(OSError):  # then a missing file is said with its name
            os.chdir(folder)
        self._notes = _Notes()
        self._worker, self._output = Worker(settings, self._notes), Path(settings.infer.output or "")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Decide the shards of a batch."""
        found = []
        for name in map(str, batch["shard"]):
            done = asdict(self._tried(name))
            found.append(json.dumps({**done, "said": self._notes.said, "warned": self._notes.warned}))
        return {"done": found}

    def _tried(self, name: str) -> Done:
        target = self._output / name
        mark = target.with_name(f".{target.name}.tries.part")  # cleared away with what else is half done
        try:
            with writing(mark):
                mark.parent.mkdir(parents=True, exist_ok=True)
                with mark.open("ab") as file:
                    file.write(b".")
                tries = mark.stat().st_size
            if tries > TRIES:
                words = f"{name}: every worker that took it died, {TRIES} of them; is there enough memory?"
                return Done(name, error=words, kind=PartialError.__name__)
            return self._worker.attempt(name)
        finally:
            mark.unlink(missing_ok=True)


def by_ray(settings: Settings, names: Sequence[str], progress: Progress) -> Iterator[Done]:
    """Decide the shards `names` on the cluster of RAY_ADDRESS, or on one of this machine's own; in any order.

    Raises UsageError where Ray or the cluster is missing, RouterError where workers keep dying.
    """
    ray = _ray()
    # Ray prints what happens to its workers to standard output, which carries results only.
    with contextlib.redirect_stdout(sys.stderr):
        own = not ray.is_initialized()
        try:
            if own:
                _join(ray)
            workers, share = _shares(ray, settings, len(names), progress)
            rows = ray.data.from_items(
                [{"shard": name} for name in names], override_num_blocks=min(len(names), _BLOCKS)
            )
            rows = rows.map_batches(
                RayWorker,
                batch_size=1,
                # One at a time: a worker that is handed several would keep them from those that have none.
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                fn_constructor_args=(without_secrets(settings), str(Path.cwd())),
                **share,
            )
            for row in rows.iter_rows():
                yield Done(**json.loads(row["done"]))
        except ray.exceptions.RayError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise RouterError(
                f"Ray gave up: {first}: the finished shards stand; the same command again goes on from there"
            ) from error
        finally:
            if own:
                ray.shutdown()


def _ray() -> Any:
    """The package. Raises UsageError where it is missing."""
    # Both are read when it is imported or started: it reports to its makers, and logs its own affairs to our terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray ({error}): pip install 'router-cli[ray]'") from None
    return ray


def _join(ray: Any) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that ends with this process."""
    import logging

    # Only names travel, so that the object store needs hardly any memory.
    new = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "object_store_memory": 128 << 20}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **new)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"no Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: {error}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _shares(ray: Any, settings: Settings, shards: int, progress: Progress) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each has of the cluster: a GPU where there are any, else its CPUs.

    Without `infer.workers`, one a GPU, or one a machine.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    wanted = min(settings.infer.workers or gpus or len(nodes), shards)
    workers = min(wanted, max(1, cpus))
    if workers < wanted:
        progress.notice(f"{workers} workers instead of {wanted}: the cluster has no more CPUs")
    if gpus:
        return workers, {"num_cpus": 1, "num_gpus": 1 / math.ceil(workers / gpus)}
    smallest = min(int(node.get("CPU", 0)) or cpus for node in nodes)
    return workers, {"num_cpus": max(1, min(cpus // workers, smallest))}


def without_secrets(settings: Settings) -> Settings:
    """The settings as they may travel; workers find their machine's own Hub token."""
    held = [key for key, _ in fields() if isinstance(_value(settings, key), SecretStr)]
    return settings.with_values(**{key.replace(".", "__"): None for key in held})


def _value(settings: Settings, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)
