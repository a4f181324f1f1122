"""An adapter that is active on the answer alone: PEFT's activated LoRA (Greenewald et al. 2025, arXiv:2504.12397).

It acts from the invocation on, here the constant end of every prompt (the end of the user's turn and the header of the
answer). All before it is encoded by the frozen base, so that its keys and values depend on no adapter: training
computes them once instead of in every epoch, forward and backward. Such an adapter cannot be merged into the weights.

PEFT finds the invocation in whole rows of tokens. Here prompt and answer are fed apart: the prompt with the adapter at
rest, and what follows with the adapter active on every token that it is fed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from router_cli import prompts
from router_cli.space import DecisionSpace


class Everywhere(list[int]):
    """Offsets as PEFT wants them, one a row, that take in every token of the pass."""


class Activated:
    """A PEFT model with such an adapter: `base` runs with the adapter active, and inside `resting()` without it.

    `invocation` are the tokens from which on the adapter is active.
    """

    def __init__(self, model: Any) -> None:
        self._model, self.base = model, model.get_base_model()
        self.invocation: list[int] = list(model.peft_config[model.active_adapter].alora_invocation_tokens)
        _awaken(model)

    def resting(self) -> AbstractContextManager[None]:
        """While open, the adapter does nothing."""
        context: AbstractContextManager[None] = self._model.disable_adapter()
        return context


def activated(model: Any) -> Activated | None:
    """`model` as `Activated`; None where it is no PEFT model with an activated adapter."""
    if not hasattr(model, "get_base_model"):  # the base alone: PEFT leaves its configuration there too
        return None
    config = model.peft_config[model.active_adapter]
    return None if getattr(config, "alora_invocation_tokens", None) is None else Activated(model)


def invocation(space: DecisionSpace, tokenizer: prompts.Tokenizer) -> list[int]:
    """The tokens that every prompt ends with: it is special tokens that part them from the task's text."""
    one, two = (prompts.encode_prompt(text, space, tokenizer) for text in ("a", "1"))
    pairs = zip(reversed(one), reversed(two), strict=False)
    return one[len(one) - next(i for i, (a, b) in enumerate(pairs) if a != b) :]


def _awaken(model: Any) -> None:
    from peft.tuners.lora import LoraLayer

    def everywhere(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # PEFT's own hooks come after this one: rows that are fed whole, through its model, keep its offsets.
        batch, length = args[0].shape[:2]
        return args, {**kwargs, "alora_offsets": Everywhere([length] * batch)}

    for part in model.modules():
        if isinstance(part, LoraLayer) and not getattr(part, "router_awake", False):
            part.router_awake = True
            part.register_forward_pre_hook(everywhere, with_kwargs=True)
