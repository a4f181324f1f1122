"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# A deadline by the clock makes property tests fail on a machine that others use at the same time.
settings.register_profile("router", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("router")

# The tokenizers library warns when a process that used its threads is forked, as tests that start commands do.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
