"""Decoding on a CPU with fewer passes over memory: the same products, the operands laid out as they are wanted.

A plain linear layer in bfloat16 brings its weights into the blocked layout of oneDNN on every call: for a prompt that
is a tenth of the time, for the few tokens of a later pass half of it. Here they are brought there once, and the plain
copy goes. Short prompts are also attended to in plain products, which cost less than torch's fused attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from router_cli.backends.lean import attend_plainly


def packed(model: Any) -> Any:
    """`model`, which only answers from now on: its linear layers (not the head) are replaced, its attention is changed.

    Nothing is done off the CPU, in other types than bfloat16, or where torch's products differ in any bit.
    """
    import torch

    beside = hasattr(model, "peft_config")  # an adapter beside the weights computes with them itself
    if beside or model.device.type != "cpu" or model.dtype != torch.bfloat16 or not _exact():
        return model
    head = model.get_output_embeddings()
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            # Others than the very class have reasons of their own: quantised, adapted, shared.
            if type(child) is torch.nn.Linear and child is not head and child.weight.dtype == torch.bfloat16:
                setattr(part, name, _layer()(child))
    attend_plainly(model)
    return model


@cache
def _layer() -> Any:
    import torch

    class Packed(torch.nn.Module):
        """A linear layer whose weights are in oneDNN's own layout; it takes no gradients and keeps no parameters."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.weights = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
            self.bias = None if layer.bias is None else layer.bias.detach()

        def forward(self, x: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, self.weights, self.bias, "none", [], "")

    return Packed


_ROWS = 128
"""The rows of the products that the layout is chosen for; others take it too."""


@cache
def _exact() -> bool:
    """Whether this torch has such products, and they are those of its linear layers to the last bit."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    try:
        for rows, width, height in ((1, 64, 96), (5, 96, 64), (70, 64, 64)):
            layer = torch.nn.Linear(width, height, dtype=torch.bfloat16)
            layer.weight.data = torch.randn(height, width, generator=drawn).bfloat16()
            x = torch.randn(1, rows, width, generator=drawn).bfloat16()
            with torch.inference_mode():
                if not torch.equal(_layer()(layer)(x), layer(x)):
                    return False
    except (RuntimeError, AttributeError):  # a processor or a build without oneDNN's bfloat16
        return False
    return True
