"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline by the clock makes property tests fail on a machine that others use at the same time.
settings.register_profile("router", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("router")

# The tokenizers library warns when a process that used its threads is forked, as tests that start commands do.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models of tests are so small that threads only wait for each other; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run in the background inherits an ignored Ctrl-C and hands it on to the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(style, layers, hidden)`: the folder of a tiny model, made once a session. Not to be written to."""
    from tests.tiny import tiny_model

    made: dict[tuple[object, ...], Path] = {}

    def folder(style: str = "smollm", layers: int = 2, hidden: int = 32) -> Path:
        key = (style, layers, hidden)
        if key not in made:
            made[key] = tiny_model(tmp_path_factory.mktemp("tiny") / "model", style, layers, hidden)  # type: ignore[arg-type]
        return made[key]

    return folder
