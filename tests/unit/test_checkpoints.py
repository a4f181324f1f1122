"""A run's folder: which checkpoints count, what a full disk costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.local import META
from router_cli.errors import OutputError
from router_cli.train import train
from router_cli.training.checkpoints import Run
from tests.training import Recorder, adapter_weights, equal, label_rows, train_settings, write_rows

Tiny = Callable[..., Path]
# What the trainer writes, with sizes of the order that it has.
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def saved(run: Run, step: int, keep: int = 2) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with run.saving(step):
        for name in FILES:
            (folder / name).write_bytes(b"x" * 100)
    run.mark(step, keep)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "a", {"data": ["1"]})
    made.begin()
    return made


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"x" * 50)], ids=["missing", "cut"])
def test_a_checkpoint_that_lost_something_counts_no_more(run: Run, name: str, harm: Callable[[Path], Any]) -> None:
    first, second = saved(run, 2), saved(run, 4)
    assert run.newest() == second
    harm(second / name)
    said = Recorder()
    assert run.newest(said) == first and not second.exists()
    assert said.warnings == [f"{second}: {name} is missing or cut: the checkpoint before it is taken"]


def test_a_checkpoint_without_its_mark_or_with_half_of_it_is_removed(run: Run) -> None:
    first, second, third, fourth = (saved(run, step, keep=4) for step in (2, 4, 6, 8))
    (fourth / "complete.json").unlink()
    (third / "complete.json").write_text('{"step"')
    (second / "complete.json").write_text('{"step": 4}')
    said = Recorder()
    assert run.newest(said) == first and not said.warnings
    assert not any(folder.exists() for folder in (second, third, fourth))


def test_older_checkpoints_go_only_when_the_new_one_is_complete(run: Run) -> None:
    first = saved(run, 2, keep=1)
    with run.saving(4):
        assert first.exists()
    assert run.newest() == first
    assert saved(run, 4, keep=1).exists() and not first.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 32")])
def test_a_checkpoint_that_cannot_be_written_takes_no_room_and_costs_no_other(run: Run, error: Exception) -> None:
    first = saved(run, 2)
    with pytest.raises(OutputError, match=r"checkpoint-4: cannot be written: .*; make room"), run.saving(4):
        (run.checkpoints / "checkpoint-4").mkdir()
        raise error
    assert run.newest() == first and not (run.checkpoints / "checkpoint-4").exists()


def test_a_step_that_is_saved_again_counts_only_when_it_is_done(run: Run) -> None:
    first, again = saved(run, 2), saved(run, 4)
    with pytest.raises(ZeroDivisionError), run.saving(4):
        raise ZeroDivisionError  # stands for a kill
    assert again.exists() and run.newest() == first


def test_what_a_run_found_out_when_it_began_stays(run: Run) -> None:
    assert run.pinned("dtype", lambda: "bfloat16") == "bfloat16"
    assert Run(run.folder, run.fingerprint).pinned("dtype", lambda: "float32") == "bfloat16"


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """`disk(size)`: from then on the system refuses to write behind `size` bytes of any file, as a full disk does."""
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("step", "refused"), [(3, "best.part"), (4, "checkpoint-4"), (4, "checkpoint-4 behind the adapter")]
)
def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(
    step: int, refused: str, disk: Callable[[int], None], tiny_folder: Tiny, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows(12, 4))
    settings = train_settings(data, tiny_folder("smollm"), tmp_path / "a", epochs=2, save_steps=2)
    whole = train(settings.with_values(train__output_dir=tmp_path / "whole"))
    first = tmp_path / "a" / "checkpoints" / "checkpoint-2"

    def fill(now: int) -> None:
        if now == step:
            adapter = (first / "adapter_model.safetensors").stat().st_size
            disk(adapter + 1 if "behind" in refused else adapter // 2)

    with pytest.raises(OutputError, match=rf"{refused.split()[0]}: cannot be written: .*; make room") as caught:
        train(settings, Recorder(fill))
    disk(0)
    assert "\n" not in str(caught.value) and not (tmp_path / "a" / META).exists()
    assert {folder.name for folder in first.parent.glob("checkpoint-*")} == {"checkpoint-2"}
    said = Recorder()
    train(settings, said)
    assert "continuing from step 2" in said.notices
    assert whole.adapter and equal(adapter_weights(tmp_path / "a"), adapter_weights(whole.adapter))
