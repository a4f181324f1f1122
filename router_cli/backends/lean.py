"""Training steps on a CPU with fewer passes over memory: the same mathematics, nothing approximated.

Of a small model's step on a CPU, less than half goes into the products that have to be. The rest is what stands around
them: an adapted layer of PEFT takes eight operations and goes through float32 and back, and torch's fused attention has
a backward pass for CPUs that costs several times what short rows need. Both are put in place of the ordinary ones while
`lean` is open, for float types on a CPU only; a test holds losses and gradients against the ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

from router_cli.backends.activated import Everywhere
from router_cli.backends.library import below

ATTENTION = "router_lean"
"""The name that the attention below has among those of transformers."""


@contextmanager
def lean(model: Any) -> Iterator[None]:
    """While open, `model`'s adapted layers and its attention compute in fewer operations. Does nothing off the CPU."""
    undo = streamline(model)
    try:
        yield
    finally:
        undo()


def streamline(model: Any) -> Callable[[], None]:
    """Put the lean forms in place for good, or until the function that this returns is called."""
    if model.device.type != "cpu":
        return lambda: None
    base = below(model)
    changed = [part for part in model.modules() if _plain(part)]
    attention = base.config._attn_implementation
    attend_plainly(base)
    for part in changed:
        part.forward = MethodType(_adapted, part)

    def undo() -> None:
        for part in changed:
            del part.forward
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)

    return undo


def _plain(part: Any) -> bool:
    """Whether a module is an ordinary LoRA layer around an ordinary linear one, with a single adapter."""
    import torch
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import ALoraLinearVariant

    return (
        type(part) is Linear
        and type(part.base_layer) is torch.nn.Linear
        and list(part.lora_A) == part.active_adapters
        and len(part.active_adapters) == 1
        and all(isinstance(variant, ALoraLinearVariant) for variant in part.lora_variant.values())
        and not any(part.lora_bias.values())
        and not part.fan_in_fan_out
    )


def _adapted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a LoRA layer."""
    offsets = kwargs.get("alora_offsets")
    # An activated adapter acts on some tokens alone, unless it is told otherwise.
    partly = bool(self.lora_variant) and not isinstance(offsets, Everywhere)
    if self.disable_adapters or self.merged or args or kwargs.keys() - {"alora_offsets"} or partly:
        return type(self).forward(self, x, *args, **kwargs)
    name, base = self.active_adapters[0], self.base_layer
    dropped = self.lora_dropout[name](x)
    weights = self.lora_A[name].weight, self.lora_B[name].weight
    return _product()(x, dropped, base.weight, base.bias, *weights, self.scaling[name])


@cache
def _product() -> Any:
    import torch

    class Product(torch.autograd.Function):
        """x W^T + bias + scale * dropped A^T B^T, the adapter in the number type of x, as under torch's autocast.

        `dropped` is x after dropout, or x itself. No gradient goes to W and the bias, which are frozen.
        """

        @staticmethod
        def forward(ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
            rows, kept = x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1])
            down, up = a.to(x.dtype), b.to(x.dtype)
            narrow = kept @ down.t()
            out = torch.nn.functional.linear(rows, weight, bias).addmm_(narrow, up.t(), alpha=scale)
            ctx.save_for_backward(kept, narrow, weight, down, up)
            ctx.scale, ctx.same, ctx.type = scale, dropped is x, a.dtype
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            kept, narrow, weight, down, up = ctx.saved_tensors
            grad = grads[0]
            rows = grad.reshape(-1, grad.shape[-1])
            thin = (rows @ up).mul_(ctx.scale)
            shape = (*grad.shape[:-1], weight.shape[1])
            to_x = to_dropped = None
            if ctx.needs_input_grad[0]:
                to_x = rows @ weight
                if ctx.same:
                    to_x.addmm_(thin, down)
                to_x = to_x.view(shape)
            if ctx.needs_input_grad[1] and not ctx.same:
                to_dropped = (thin @ down).view(shape)
            to_a = (thin.t() @ kept).to(ctx.type)
            to_b = (rows.t() @ narrow).mul_(ctx.scale).to(ctx.type)
            return to_x, to_dropped, None, None, to_a, to_b, None

    return Product.apply


def attend_plainly(model: Any) -> None:
    """Let a model attend in plain products; one without torch's fused attention has reasons of its own, and stays."""
    if model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(ATTENTION)


@cache
def _register() -> None:
    """Make `attend` known to transformers as `ATTENTION`, with the masks that its own eager attention takes."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


_SCORES = 2**26
"""Attention scores that are held at once, at most (256 MB each time): for more, torch's fused attention holds none."""


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Attention in plain products; query heads of one key head are rows of one product, so that no key is copied.

    `query` is [batch, heads, length, size], `key` and `value` [batch, key heads, seen, size], `attention_mask` additive
    [batch or 1, 1, length, seen] or None; the result is [batch, length, heads, size].
    """
    import torch

    batch, heads, length, size = query.shape
    groups, seen = key.shape[1], key.shape[2]
    if batch * heads * length * seen > _SCORES:
        dropout = dropout if module.training else 0.0
        mask = None if attention_mask is None else attention_mask[:, :, :, :seen]
        long = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=True
        )
        return long.transpose(1, 2).contiguous(), None
    together = (batch, groups, heads // groups * length, size)
    scores = (query * scaling).reshape(together) @ key.transpose(2, 3)
    scores = scores.view(batch, groups, heads // groups, length, seen)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :seen]
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    shares = torch.nn.functional.dropout(shares, dropout, module.training)
    found = shares.view(batch, groups, heads // groups * length, seen) @ value
    return found.view(batch, heads, length, size).transpose(1, 2).contiguous(), None
