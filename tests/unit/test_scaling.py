"""What docs/scaling.md gives to be run elsewhere: the batch script, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
# A step that saves when it is told to end, and one that breaks by itself where the file `broken` is.
SRUN = """#!/bin/bash
echo "started with head $HEAD" >> log
trap 'echo saved >> log; exit 130' TERM
echo $$ > step
while [ ! -e broken ]; do sleep 0.02; done
exit 3
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> log
kill -TERM "$(cat step)"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'n1\\nn2\\n'; else echo "scontrol $*" >> log; fi
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SLURM is Unix's")


def batch_script() -> str:
    [block] = re.findall(r"^    #!/bin/bash\n(?:(?:    .*)?\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return re.sub("^    ", "", block, flags=re.MULTILINE)


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The script as it runs, its step under way."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
    running = subprocess.Popen(["bash", "-c", batch_script()], cwd=tmp_path, env=env)
    while not (tmp_path / "step").is_file():
        assert running.poll() is None
        time.sleep(0.01)
    return running


def told(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_before_its_time_is_up_the_step_saves_and_the_job_is_queued_again(
    job: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    asked = re.search(r"#SBATCH .*--signal=B:(\w+)@\d+", batch_script())
    assert asked is not None
    job.send_signal(signal.Signals[f"SIG{asked[1]}"])
    job.wait(20)
    assert told(tmp_path) == ["started with head n1", "scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_a_step_that_breaks_ends_the_job_with_its_code(job: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    assert job.wait(20) == 3
    assert told(tmp_path) == ["started with head n1"]


def test_a_cancelled_job_does_not_come_back(job: subprocess.Popen[bytes], tmp_path: Path) -> None:
    job.terminate()
    assert job.wait(20) != 0
    (tmp_path / "broken").touch()  # the step is cancelled beside it, by SLURM
    assert told(tmp_path) == ["started with head n1"]
