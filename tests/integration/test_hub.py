"""`router train --download-model` from a mirror (HF_ENDPOINT): progress, and a download that goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants

from tests.fake_hub import COMMIT, FakeHub, serving


def fetch(hub: FakeHub, cache: Path) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-m", "router_cli", "train", "--download-model", "--model", "org/tiny"]
    return subprocess.run(
        [*command, "--model-dir", str(cache), "--hf-token", "hf_secret_secret"],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"},
    )


def test_a_model_comes_from_a_mirror_with_progress_and_goes_on_where_it_broke_off(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    hub = FakeHub(tiny_folder("smollm", 4, 64))
    # Larger than what the Hub's client takes at a time; what breaks off within a piece is fetched whole.
    size = 3 * constants.DOWNLOAD_CHUNK_SIZE
    hub.files["model.safetensors"] = random.Random(0).randbytes(size)
    hub.cuts = 100
    with serving(hub):
        broken = fetch(hub, tmp_path)
        assert broken.returncode == 1 and broken.stdout == ""
        assert "error: org/tiny: the download broke off" in broken.stderr and "fetches what is missing" in broken.stderr
        hub.cuts, hub.ranges, hub.sent = 1, [], []
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    # Only the missing file came, and after the lost connection only its rest.
    assert set(hub.sent) == {"model.safetensors"} and hub.ranges == [f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    assert done.stdout == f"org/tiny is at {snapshot}\n"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (snapshot / name).read_bytes() == hub.files[name]
    megabytes = sum(map(len, hub.files.values())) / 1e6  # those of the run before count as well
    assert f"fetch org/tiny: {megabytes:.0f}/{megabytes:.0f}" in done.stderr and "MB" in done.stderr
    # Nothing but the console speaks, and it does not tell the token.
    assert (
        "Fetching" not in done.stderr and "it/s" not in done.stderr and "hf_secret" not in broken.stderr + done.stderr
    )
    with serving(hub):
        hub.sent = []
        assert fetch(hub, tmp_path).returncode == 0 and hub.sent == []
