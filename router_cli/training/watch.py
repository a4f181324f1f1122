"""What watches a training run: reports, marks checkpoints, keeps the best adapter, stops on bad news and on Ctrl-C."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

from router_cli import ranks
from router_cli.backends.decoding import Decoder
from router_cli.jsonl import read_json, write_json
from router_cli.progress import Bar, Progress
from router_cli.schema import Example
from router_cli.scoring import metrics
from router_cli.sections import TrainSettings
from router_cli.space import DecisionSpace
from router_cli.training.checkpoints import Run, saving
from router_cli.training.figures import Figures
from router_cli.training.frozen import FrozenLayers

SCORE = "validation_macro_f1"
"""The log's name for what a look at the validation tasks gave."""
FOR_NUMBERS = "lower --lr, or drop --fp16 for --bf16, with another --output-dir; the checkpoints before it are kept"
"""Advice where loss or weights are no numbers."""
RISING_STEPS = 20
"""Steps that a mean of the loss is taken over before it is said to rise, and at least five logs."""


def stale(log: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` looks at the validation tasks gave nothing better than those before them."""
    scores = [entry[SCORE] for entry in log if SCORE in entry]
    return bool(patience and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience]))


def rising(log: Sequence[dict[str, Any]]) -> str:
    """In words, that the training loss rises; empty while it does not.

    It rises where the mean over the newest window is above the best window's by more than half of the first one's, and
    by more than five standard errors of the two means' difference. A window is `RISING_STEPS` steps and five logs, at
    least.
    """
    import numpy as np

    steps = [int(entry["step"]) for entry in log if "loss" in entry]
    losses = np.array([float(entry["loss"]) for entry in log if "loss" in entry])
    spacing = max(1, steps[-1] - steps[-2]) if len(steps) > 1 else 1
    size = max(5, -(-RISING_STEPS // spacing))
    if len(losses) < 2 * size:
        return ""
    windows = np.lib.stride_tricks.sliding_window_view(losses, size)
    means, variances = windows.mean(1), windows.var(1, ddof=1)
    best = int(means[:-size].argmin())
    risen, noise = means[-1] - means[best], math.sqrt((variances[-1] + variances[best]) / size)
    if risen <= means[0] / 2 or risen <= 5 * noise:
        return ""
    return f"the loss rises: {means[best]:.3f} in the mean over {size * spacing} steps at its best, {means[-1]:.3f} now"


class HeldOut:
    """The validation tasks, decided by the decoder that serves, asked in at most `max_length` tokens."""

    def __init__(self, tokenizer: Any, space: DecisionSpace, examples: Sequence[Example], max_length: int) -> None:
        self._tokenizer, self._space, self._examples = tokenizer, space, examples
        self._max_length = max_length

    def score(self, model: Any) -> float | None:
        """Macro-F1 of the topology over the validation tasks; None where there are none."""
        import numpy as np

        if not self._examples:
            return None
        decoder = Decoder(model, self._tokenizer, self._space, max_length=self._max_length)
        names = self._space.topologies
        # Each of several processes decides its share.
        mine = self._examples[ranks.rank() :: ranks.count()]
        shares = ranks.gathered(decoder.topologies([decoder.prompt(example.text) for example in mine]))
        found = [shares[i % len(shares)][i // len(shares)] for i in range(len(self._examples))]
        gold = np.array([names.index(example.decision.topology) for example in self._examples])
        predicted = np.array([names.index(name) for name in found])
        return float(metrics.macro_f1(gold, predicted, len(names)))


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what runs as Ctrl-C does: with everything put away, and exit code 130."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible(watch: Any) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into `watch.interrupted`, so that the running step ends and is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    got: list[float] = []
    # A launcher of several processes hands on what the terminal sent to all of them: that is no second wish.
    patience = 2.0 if ranks.count() > 1 else 0.0

    def stop(number: int, frame: Any) -> None:
        got.append(time.monotonic())
        if len(got) > 1 and got[-1] - got[0] >= patience:
            raise KeyboardInterrupt
        watch.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finite(part: Any) -> bool:
    """Whether a parameter, if it is trained, holds numbers: of one that is dealt out, this process's share."""
    mine = part.to_local() if hasattr(part, "to_local") else part
    return not part.requires_grad or bool(mine.isfinite().all())


def make_watch(held_out: HeldOut, run: Run, options: TrainSettings, progress: Progress) -> Any:
    """The callback that reports, marks checkpoints, keeps the best adapter and stops on bad news."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.frozen: FrozenLayers | None = None
            self.interrupted, self.failure = False, ""
            self._place: Any = nullcontext()
            self._bar: Bar | None = None
            self._open_bar: Any = None
            self.figures: Figures | None = None
            self._said = ""

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
            if self.figures:
                self.figures.begin(state.epoch or 0.0)
            self._open_bar = progress.bar("train", state.max_steps, state.global_step)
            self._bar = self._open_bar.__enter__()
            # A kill between an epoch's last checkpoint and its validation: the epoch is validated now.
            whole = state.global_step == state.max_steps or float(state.epoch or 0).is_integer()
            if state.global_step and whole:
                self.on_epoch_end(args, state, control, **kwargs)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._bar:
                self._bar.advance(status=self._said)
            self.interrupted = ranks.anywhere(self.interrupted)
            if self.interrupted and not self.failure:
                control.should_save = control.should_training_stop = True
            elif options.eval_steps and state.global_step % options.eval_steps == 0:
                self._look(state, control, kwargs["model"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            # The mean over all steps comes at the end, and shows what no step's log did.
            if logs and (found := logs.get("loss", logs.get("train_loss"))) is not None:
                self._said = self.figures.words(logs, state.epoch or 0.0) if self.figures else ""
                if self.failure:
                    pass  # the last log comes after what stopped the training
                elif not math.isfinite(found):
                    self.failure = f"the loss is {found} at step {state.global_step}: {FOR_NUMBERS}"
                elif risen := rising(state.log_history):
                    self.failure = (
                        f"{risen}, at step {state.global_step}: lower --lr ({args.learning_rate:g}) or raise "
                        "--warmup-ratio, with another --output-dir"
                    )
                if self.failure:
                    control.should_training_stop, control.should_save = True, False

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Between two logs of the loss weights can be lost to NaN: no run must ever go on from them.
            if ranks.anywhere(not all(map(_finite, kwargs["model"].parameters()))):
                self.failure = self.failure or (
                    f"the adapter's weights are no numbers any more at step {state.global_step}: {FOR_NUMBERS}"
                )
                control.should_training_stop = True
                return
            ranks.wait()  # every process has put its own state of chance into the checkpoint
            if ranks.first():
                run.mark(state.global_step, options.save_total_limit, self.figures.seconds if self.figures else 0.0)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if options.eval_steps and state.global_step < state.max_steps:
                return
            # The first half of several epochs never holds the best one, and on a CPU a look costs a tenth of an epoch.
            # Only who waits for it to get no better needs all of them.
            if options.patience or options.eval_steps or state.epoch >= args.num_train_epochs / 2:
                self._look(state, control, model)

        def _look(self, state: Any, control: Any, model: Any) -> None:
            """Decide the validation tasks, keep the best adapter, stop where patience is at its end."""
            scored = any(entry["step"] == state.global_step for entry in state.log_history if SCORE in entry)
            if self.interrupted or self.failure or scored:
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
            when = f"step {state.global_step}" if options.eval_steps else f"epoch {state.epoch:.0f}"
            learnt = [entry["topology_accuracy"] for entry in state.log_history if "topology_accuracy" in entry]
            # The newest half of the lessons: a log alone is a handful of them.
            beside = f" (in training {fmean(learnt[-(len(learnt) // 2) :]):.0%} right)" if len(learnt) > 1 else ""
            progress.notice(f"{when}: topology macro-F1 {score:.3f} on the validation tasks{beside}")
            if score > self._best().get("score", -1.0):
                self._keep(model, {"score": score, "epoch": state.epoch, "step": state.global_step})
            if stale(state.log_history, options.patience) and state.global_step < state.max_steps:
                progress.notice(
                    f"stopping early: no better macro-F1 in {options.patience} looks at the validation tasks"
                )
                # The checkpoint remembers it: a run that is killed from here on does not train any further.
                control.should_save = control.should_training_stop = True

        def _best(self) -> dict[str, Any]:
            file = run.checkpoints / "best" / "best.json"
            found: dict[str, Any] = ranks.shared(read_json(file) if ranks.first() and file.is_file() else {})
            return found

        def _keep(self, model: Any, facts: dict[str, Any]) -> None:
            if not ranks.first():
                return
            beside = run.checkpoints / "best.part"
            shutil.rmtree(beside, ignore_errors=True)
            with saving(beside):
                model.save_pretrained(beside)
            write_json(beside / "best.json", facts)
            shutil.rmtree(run.checkpoints / "best", ignore_errors=True)
            beside.rename(run.checkpoints / "best")

        def load_best(self, model: Any) -> dict[str, Any]:
            """Put the best adapter's weights into the model, and say how good it was; without one leave the last."""
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            best = self._best()
            if best and ranks.first():
                weights = load_file(str(run.checkpoints / "best" / "adapter_model.safetensors"))
                set_peft_model_state_dict(model, weights)
            return best

    return Watch()
