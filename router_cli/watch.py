"""What watches a training run: reports, marks checkpoints, keeps the best adapter, stops on bad news and on Ctrl-C."""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from router_cli.backends.decoding import Decoder
from router_cli.checkpoints import Run
from router_cli.frozen import FrozenLayers
from router_cli.jsonl import read_json, write_json
from router_cli.progress import Bar, Progress
from router_cli.schema import Example
from router_cli.scoring import metrics
from router_cli.space import DecisionSpace

SCORE = "validation_macro_f1"
"""The log's name for what an epoch's validation gave."""


class HeldOut:
    """The validation tasks, decided by the decoder that serves."""

    def __init__(self, tokenizer: Any, space: DecisionSpace, examples: Sequence[Example]) -> None:
        self._tokenizer, self._space, self._examples = tokenizer, space, examples

    def score(self, model: Any) -> float | None:
        """Macro-F1 of the topology over the validation tasks; None where there are none."""
        import numpy as np

        if not self._examples:
            return None
        decoder = Decoder(model, self._tokenizer, self._space)
        found = decoder.topologies([decoder.prompt(example.text) for example in self._examples])
        names = self._space.topologies
        gold = np.array([names.index(example.decision.topology) for example in self._examples])
        predicted = np.array([names.index(name) for name in found])
        return float(metrics.macro_f1(gold, predicted, len(names)))


@contextmanager
def interruptible(watch: Any) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into `watch.interrupted`, so that the running step ends and is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_watch(held_out: HeldOut, run: Run, keep: int, progress: Progress) -> Any:
    """The callback that reports, marks checkpoints, keeps the best adapter and stops on bad news."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.frozen: FrozenLayers | None = None
            self.interrupted, self.failure = False, ""
            self._place: Any = nullcontext()
            self._bar: Bar | None = None
            self._open_bar: Any = None
            self._loss = math.nan

        @contextmanager
        def training(self) -> Iterator[None]:
            """Open while the trainer runs: the frozen layers stand aside."""
            self._enter()
            try:
                yield
            finally:
                self._place.__exit__(None, None, None)
                if self._open_bar is not None:
                    self._open_bar.__exit__(None, None, None)

        def _enter(self) -> None:
            self._place = self.frozen.in_place() if self.frozen else nullcontext()
            self._place.__enter__()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._open_bar = progress.bar("train", state.max_steps, state.global_step)
            self._bar = self._open_bar.__enter__()
            # A kill between an epoch's last checkpoint and its validation: the epoch is validated now.
            whole = state.global_step == state.max_steps or float(state.epoch or 0).is_integer()
            scored = any(entry["step"] == state.global_step for entry in state.log_history if SCORE in entry)
            if state.global_step and whole and not scored:
                self.on_epoch_end(args, state, control, **kwargs)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._bar:
                self._bar.advance(status=f"loss {self._loss:.3f}" if math.isfinite(self._loss) else "")
            if self.interrupted and not self.failure:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            # The mean over all steps comes at the end, and shows what no step's log did.
            if logs and (found := logs.get("loss", logs.get("train_loss"))) is not None:
                self._loss = float(found)
                if not math.isfinite(self._loss):
                    self.failure = (
                        f"the loss is {self._loss} at step {state.global_step}: lower --lr, or drop --fp16 for --bf16; "
                        "the checkpoints before it are kept"
                    )
                    control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.mark(state.global_step, keep)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            # The first half of several epochs never holds the best one, and on a CPU a look costs a tenth of an epoch.
            if self.interrupted or self.failure or state.epoch < args.num_train_epochs / 2:
                return
            self._place.__exit__(None, None, None)
            model.eval()
            try:
                score = held_out.score(model)
            finally:
                model.train()
                self._enter()
            if score is None:
                return
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, SCORE: score})
            progress.notice(f"epoch {state.epoch:.0f}: topology macro-F1 {score:.3f} on the validation tasks")
            if score > self._best().get("score", -1.0):
                self._keep(model, {"score": score, "epoch": state.epoch, "step": state.global_step})

        def _best(self) -> dict[str, Any]:
            file = run.checkpoints / "best" / "best.json"
            return read_json(file) if file.is_file() else {}

        def _keep(self, model: Any, facts: dict[str, Any]) -> None:
            beside = run.checkpoints / "best.part"
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            write_json(beside / "best.json", facts)
            shutil.rmtree(run.checkpoints / "best", ignore_errors=True)
            beside.rename(run.checkpoints / "best")

        def load_best(self, model: Any) -> dict[str, Any]:
            """Put the best adapter's weights into the model, and say how good it was; without one leave the last."""
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            best = self._best()
            if best:
                weights = load_file(str(run.checkpoints / "best" / "adapter_model.safetensors"))
                set_peft_model_state_dict(model, weights)
            return best

    return Watch()
