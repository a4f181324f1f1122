"""SFTTrainer with the loss of a router, where TRL's own gets wrong what matters here.

- On a CPU the loss is computed at the answer's positions only (TRL scores every position there), and the constant
  start of the prompts is encoded once a micro-batch.
- A lesson that ends at whether a topology solves the task is cross-entropy between the two words that may stand there.
- The topology is measured, and can be weighed, apart: its cross-entropy among the tokens that may stand there, which is
  what serving renormalises over. A falling total loss hides a router that learned nothing but JSON.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from router_cli import ranks
from router_cli.backends.library import below
from router_cli.training.checkpoints import Run
from router_cli.training.frozen import hidden_states
from router_cli.training.kept import Prompts

IGNORED = -100
"""The label of positions without loss, torch's own."""


WINDOW = 8
"""Batches of rows that are sorted by length together: enough to pad little, few enough to mix well."""


class ByLength:
    """The rows of an epoch in random order, those of a batch of like length.

    Drawn from seed and epoch alone: the trainer's own sampler draws from torch's global generator, so that a run
    continued in the middle of a later epoch would see some rows twice and others never. It also sorts fifty batches at
    a time: a small set would run from its longest task to its shortest in every epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}:{self._epoch()}")
        rows = list(range(len(self)))
        draw.shuffle(rows)
        size, window = self._batch_size, self._batch_size * WINDOW
        near = [sorted(rows[i : i + window], key=self._lengths.__getitem__) for i in range(0, len(rows), window)]
        rows = [row for part in near for row in part]
        whole, rest = len(rows) // size * size, len(rows) % size
        batches = [rows[i : i + size] for i in range(0, whole, size)]
        draw.shuffle(batches)
        # The batch that is not full comes last, or it would shift the others.
        return iter([row for batch in batches for row in batch] + rows[len(rows) - rest :])


def trainer_class() -> Any:
    """SFTTrainer with the loss at labelled positions, made here because trl is imported only when training."""
    import torch
    from trl import SFTTrainer
    from trl.models.utils import _ForwardRedirection

    class RouterTrainer(SFTTrainer):  # type: ignore[misc]  # trl's class is untyped
        def __init__(
            self,
            *args: Any,
            choice: tuple[int, list[int]] | None,
            topology_weight: float,
            lengths: list[int],
            class_weights: list[float] | None,
            verdict: list[int],
            run: Run,
            own_loss: bool,
            shared: int,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self._choice, self._topology_weight = choice, topology_weight
            self._own_loss = own_loss or self.args.device.type == "cpu"
            self._lengths, self._class_weights, self._run = lengths, class_weights, run
            self._verdict = verdict
            self.prompts: Prompts | None = None
            self.shared, self.first_layer = shared, 0

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            # Micro-batches are dealt to the processes in turn: a step's rows are those of one process that makes all.
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.count()
            return ByLength(self._lengths, size, self.args.seed, lambda: int(self.state.epoch or 0))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # TRL's own loss is the fast one on a GPU, but it knows no choices.
            if return_outputs or not self._own_loss:
                with self._choices_measured(model, inputs):
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with self.accelerator.autocast():
                if ranks.count() == 1:
                    return self._loss(model, inputs, num_items_in_batch)
                # Several processes exchange weights and gradients around the wrapper's forward: nothing runs past it.
                inner = self.accelerator.unwrap_model(model)
                return _ForwardRedirection()(model, inner, self._loss, inner, inputs, num_items_in_batch)

        def _loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
            base = below(model)
            if self.prompts:
                states, labels = self.prompts.states(ids, mask, labels, IGNORED)
            else:
                states = hidden_states(base.get_decoder(), ids, mask, self.shared, self.first_layer)
                labels = labels[:, self.shared :]
            states, labels = states[:, :-1], labels[:, 1:]
            scored = labels != IGNORED
            logits = base.get_output_embeddings()(states[scored]).float()
            targets = labels[scored]
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            # The count is that of all processes, whose gradients are averaged.
            total = scored.sum() if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
            if self._choice is None or not self._choice[1]:
                return each.sum() / total
            offset, choices = self._choice
            counts = scored.sum(1)
            whole = counts > 1
            places = counts.cumsum(0) - counts + torch.where(whole, offset, 0)
            judging = torch.isin(targets[places], torch.tensor(self._verdict, device=logits.device)) & ~whole
            chosen, right = self._among(logits, targets, places[~judging], choices, "topology")
            if self._class_weights is not None:
                share = torch.tensor(self._class_weights, device=logits.device)[right]
                weighed = torch.ones_like(each).index_put((places[~judging],), share)
                chosen, each = chosen * share, each * weighed
            judged, _ = self._among(logits, targets, places[judging], self._verdict, "solved")
            # Rows that end at the choice teach it alone; in whole rows it weighs beside the other tokens.
            tokens = each[whole.repeat_interleave(counts)].sum() / total
            weights = torch.where(whole, self._topology_weight, 1.0)[~judging]
            chosen_mean = ((weights * chosen).sum() + judged.sum()) / len(places)
            return tokens + chosen_mean / self.current_gradient_accumulation_steps

        def _among(self, logits: Any, targets: Any, places: Any, choices: list[int], name: str) -> tuple[Any, Any]:
            """Cross-entropy at `places` among the tokens `choices`, logged by `name`, and which of them is right."""
            if not len(places):
                return logits.new_zeros(0), places
            among = torch.tensor(choices, device=logits.device)
            right = (targets[places][:, None] == among).int().argmax(1)
            each = torch.nn.functional.cross_entropy(logits[places][:, among], right, reduction="none")
            found = logits[places][:, among].argmax(1) == right
            # They stay on the device until they are logged: nothing waits for them.
            self._metrics["train"][f"{name}_loss"].append(each.detach().mean())
            self._metrics["train"][f"{name}_accuracy"].append(found.float().mean())
            return each, right

        @contextmanager
        def _choices_measured(self, model: Any, inputs: Any) -> Iterator[None]:
            """While a loss of TRL's is computed: log the topology's choice apart, from the states that it makes."""
            if self._choice is None or not self._choice[1] or ranks.sharded():
                yield
                return
            base, (offset, choices), caught = below(self.accelerator.unwrap_model(model)), self._choice, list[Any]()
            hook = base.get_decoder().register_forward_hook(lambda part, given, made: caught.append(made[0].detach()))
            try:
                yield
            finally:
                hook.remove()
            with torch.no_grad(), self.accelerator.autocast():
                rows = torch.arange(len(inputs["labels"]), device=inputs["labels"].device)
                places = (inputs["labels"] != IGNORED).int().argmax(1) + offset
                logits = base.get_output_embeddings()(caught[0][rows, places - 1]).float()
                self._among(logits, inputs["labels"][rows, places], rows, choices, "topology")

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            with self._run.saving(self.state.global_step):
                super()._save_checkpoint(model, trial)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            for name in ("topology_loss", "topology_accuracy", "solved_loss", "solved_accuracy"):
                if found := self._metrics["train"].get(name):
                    found[:] = ranks.gathered(float(sum(found) / len(found)))
            super().log(logs, start_time)

    return RouterTrainer
