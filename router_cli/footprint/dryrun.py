"""A training step without data, weights or memory: what it would hold and how much it would compute.

The model is built from its configuration on torch's meta device, where tensors have a shape and a type but no content.
PEFT puts the adapters in, forward and backward run as in training, and what is alive is counted after every operation:
no formula has to know what an architecture, PEFT or autograd keeps. Two and three layers are run and the rest is drawn
out in a straight line, which is exact for layers that are alike. Floating-point operations are counted by torch's own
counter on the way.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256
"""bitsandbytes' block sizes: weights to one 8-bit constant, constants to one fp32 constant (Dettmers et al. 2023)."""

TILE = 32768
"""Vocabulary entries that TRL's loss on a GPU scores together (trl.trainer.utils)."""


@dataclass(frozen=True)
class Setup:
    """How a model is held and trained. `dtype` is the base's (`float32`, ...), `adapted` counts layers from the top.

    With `four_bit` the linear parts are NF4 and everything else is of the type `rest`.
    `kept` says that the layers below the adapted ones stand aside, their output being kept (training/frozen.py);
    `autocast` that products are computed in `dtype` whatever type the adapter has; `fused_head` that TRL computes the
    loss in tiles of the vocabulary (its kernel on a GPU), so that the logits never stand whole.
    """

    dtype: str
    device: str
    adapted: int
    targets: tuple[str, ...]
    rank: int
    dropout: float = 0.0
    four_bit: bool = False
    rest: str = ""
    autocast: bool = False
    fused_head: bool = False
    kept: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Weights:
    """Bytes of the frozen base by kind, and the number of an adapter's weights. `stored` is the model file's bytes."""

    layers: int
    embeddings: int
    rest: int
    stored: int
    adapter: int

    @property
    def base(self) -> int:
        """All bytes of the base."""
        return self.layers + self.embeddings + self.rest


@dataclass(frozen=True)
class Held:
    """What a pass holds at its peaks, in bytes beside weights and gradients, and what it computes.

    `states` is alive when the logits begin, `head` at the most while they live, `body` in the backward pass behind.
    """

    states: float
    head: float
    body: float
    flops: float

    @property
    def peak(self) -> float:
        """The most at any moment."""
        return max(self.states, self.head, self.body)


def weights(config: Any, setup: Setup) -> Weights:
    """What the whole model weighs, counted on the meta device: exact, whatever the architecture."""
    import torch

    model = _on_meta(config, "float32")
    linear = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    inside = {id(part.weight) for part in linear.values()}
    outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    size = getattr(torch, setup.dtype).itemsize
    outside = getattr(torch, setup.rest).itemsize if setup.four_bit else size
    kinds = dict.fromkeys(("layers", "embeddings", "rest"), 0)
    for weight in model.parameters():  # tied ones come once
        if any(weight is one for one in outer):
            kinds["embeddings"] += weight.numel() * outside
        elif id(weight) in inside:
            kinds["layers"] += nf4_bytes(weight.numel()) if setup.four_bit else weight.numel() * size
        else:
            kinds["rest"] += weight.numel() * outside
    layers = model.get_decoder().layers
    first = len(layers) - setup.adapted
    adapted = [part for layer in layers[first:] for name, part in _targets(layer, setup.targets)]
    stored = getattr(config, "dtype", None) or torch.float32
    return Weights(
        **kinds,
        stored=sum(one.numel() for one in model.parameters()) * stored.itemsize,
        adapter=sum(setup.rank * (part.in_features + part.out_features) for part in adapted),
    )


def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in NF4 with double quantisation: half a byte each, and both kinds of constants."""
    blocks = -(-count // NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_SECOND_BLOCK)


def train_step(config: Any, setup: Setup, rows: int, length: int, scored: int, shared: int) -> Held:
    """Forward and backward of a micro-batch of `rows` rows of `length` tokens, `scored` labelled positions in each.

    The first `shared` tokens are encoded once for all rows, as training on a CPU does.
    """
    return _drawn_out(
        setup.adapted, lambda depth: _step(config, replace(setup, adapted=depth), rows, length, scored, shared)
    )


def prefill(config: Any, setup: Setup, rows: int, length: int) -> Held:
    """The forward pass of `rows` prompts that leaves keys and values, without gradients.

    `states` is what stays (keys and values), `body` the most at any moment.
    """
    return _drawn_out(config.num_hidden_layers, lambda depth: _prefill(config, setup, depth, rows, length))


def _drawn_out(layers: int, run: Any) -> Held:
    if layers <= 3:
        found: Held = run(layers)
        return found
    two, three = run(2), run(3)
    values = (
        getattr(three, name) + (layers - 3) * (getattr(three, name) - getattr(two, name))
        for name in ("states", "head", "body", "flops")
    )
    return Held(*values)


def _step(config: Any, setup: Setup, rows: int, length: int, scored: int, shared: int) -> Held:
    import torch
    from peft import LoraConfig, get_peft_model

    from router_cli.backends.lean import lean
    from router_cli.backends.library import quiet
    from router_cli.training.frozen import hidden_states

    model = _on_meta(config, setup.dtype, setup.adapted)
    if setup.device != "cpu":  # there, training has an attention of its own (router_cli/backends/lean.py)
        _fuse_attention(model, setup.device)
    if setup.four_bit:
        _quantise(model, setup)
    names = sorted({name for name, _ in _targets(model.get_decoder().layers[0], setup.targets)})
    config = LoraConfig(r=setup.rank, lora_dropout=setup.dropout, target_modules=names, task_type="CAUSAL_LM")
    with quiet():
        model = get_peft_model(model, config)
        if setup.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    for weight in model.parameters():
        if weight.requires_grad:
            if setup.autocast:
                # Autocast knows no meta tensors: what it computes with and keeps are copies in its own type.
                weight.data = weight.data.to(getattr(torch, setup.dtype))
            weight.grad = torch.zeros_like(weight)  # after the first micro-batch they are there
    model.train()
    base, shared = model.get_base_model(), 0 if setup.checkpointing else shared
    with torch.device("meta"):
        ids = torch.zeros(rows, length, dtype=torch.long)
        # A batch of one row has no padding, and then fused attention takes no mask. What backends/lean.py has added to
        # the scores on a CPU is there always, and of their type.
        masked = shared or rows > 1 or setup.device == "cpu"
        kind = getattr(torch, setup.dtype) if setup.device == "cpu" else torch.bool
        mask = torch.ones(rows, 1, length - shared, length, dtype=kind) if masked else None
        places, answers = (torch.zeros(rows * min(scored, length - shared), dtype=torch.long) for _ in range(2))
    with lean(_Elsewhere(model, setup.device)), _Alive(model.parameters()) as alive:
        states = hidden_states(base.get_decoder(), ids, mask, shared, 0)
        begun = alive.now
        if setup.fused_head:
            head, gradient = begun + _tiles(base, len(places), setup.dtype), torch.zeros_like(states)
        else:
            kept = states.detach().requires_grad_()
            logits = base.get_output_embeddings()(kept.flatten(0, 1)[places].to(_head_type(base))).float()
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, answers))
            del logits
            head, gradient = alive.peak, kept.grad
        alive.peak = alive.now
        torch.autograd.backward(states, gradient)
    return Held(begun, head, alive.peak, alive.flops)


def _prefill(config: Any, setup: Setup, depth: int, rows: int, length: int) -> Held:
    import torch
    from transformers import DynamicCache

    from router_cli.backends.library import filling

    model = _on_meta(config, setup.dtype, depth)
    _fuse_attention(model, setup.device)
    if setup.four_bit:
        _quantise(model, setup)
    with torch.device("meta"):
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
    with torch.no_grad(), _Alive(model.parameters()) as alive:
        cache = DynamicCache(config=model.config)
        decoder = model.get_decoder()
        found = decoder(input_ids=ids, attention_mask=mask, **filling(decoder, cache))
        del found
    return Held(alive.now, 0.0, alive.peak, alive.flops)


class _Elsewhere:
    """A model that says it were on another device than it is."""

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self._model, self.device = model, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Alive:
    """Counts the bytes of tensors' storages that are alive, the given weights aside, and operations, while open."""

    def __init__(self, weights: Any) -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils.flop_counter import flop_registry

        self.now, self.peak, self.flops = 0, 0, 0
        known: weakref.WeakSet[Any] = weakref.WeakSet()
        for weight in weights:
            known.add(weight.untyped_storage())
            if weight.grad is not None:
                known.add(weight.grad.untyped_storage())

        def look(result: Any) -> None:
            for one in result if isinstance(result, tuple | list) else (result,):
                if isinstance(one, torch.Tensor):
                    storage = one.untyped_storage()
                    if storage not in known:
                        known.add(storage)
                        self.now += storage.nbytes()
                        weakref.finalize(storage, self._gone, storage.nbytes())
            self.peak = max(self.peak, self.now)

        def count(flops: int) -> None:
            self.flops += flops

        untyped: Any = TorchDispatchMode

        class Mode(untyped):  # type: ignore[misc]
            def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = call(*args, **(kwargs or {}))
                # The registry alone: torch's own counter keeps recomputed activations alive.
                if (flops := flop_registry.get(call._overloadpacket)) is not None:
                    count(flops(*args, **(kwargs or {}), out_val=result))
                look(result)
                return result

        self._mode: Any = Mode()

    def _gone(self, size: int) -> None:
        self.now -= size

    def __enter__(self) -> _Alive:
        self._mode.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._mode.__exit__(*why)


def _on_meta(config: Any, dtype: str, layers: int | None = None) -> Any:
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from router_cli.backends.library import quiet

    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-layers:]
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def _fuse_attention(model: Any, device: str) -> None:
    """Let the layers' fused attention keep what its kernels on `device` keep; on meta torch takes the plain one.

    It has no mask of its own among those of transformers: where none is given, none is made.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"router_dry_{device}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, device == "cuda"))
    model.set_attn_implementation(name)


def _attention(cuda: bool, module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> tuple[Any, None]:
    import torch

    if mask is not None:  # kept a layer, as what is added to the scores
        mask = torch.empty(mask.shape, dtype=query.dtype, device="meta")
    # Without a mask, CUDA's kernels take fewer heads of keys than of queries as they are.
    if key.shape[1] != query.shape[1] and not (cuda and mask is None):
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    # All fused kernels keep the same: queries, keys, values, mask, output and a number a row.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = kernel(query, key, value, 0.0, mask is None, attn_mask=mask)[0]
    return found.transpose(1, 2).contiguous(), None


def _targets(layer: Any, targets: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Names (the last part) and modules of a layer's linear parts that get an adapter."""
    import torch

    found = [(name, part) for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)]
    return [
        (name.rpartition(".")[2], part)
        for name, part in found
        if targets == ("all-linear",) or any(name.endswith(one) for one in targets)
    ]


def _tiles(model: Any, scored: int, dtype: str) -> int:
    """Bytes of TRL's loss in tiles: a tile of logits, its part of the head, the labelled states and their gradient."""
    import torch

    size, hidden = getattr(torch, dtype).itemsize, int(model.config.hidden_size)
    tile = min(TILE, int(model.config.vocab_size))
    cast = 0 if _head_type(model).itemsize == size else tile * hidden * size
    size_: int = scored * tile * size + cast + scored * hidden * (2 * size + 4)
    return size_


def _head_type(model: Any) -> Any:
    return model.get_output_embeddings().weight.dtype


def _quantise(model: Any, setup: Setup) -> None:
    """What a 4-bit base does to a step: its products take a dequantised copy of a weight, and keep no input."""
    import torch

    compute, outside = getattr(torch, setup.dtype), getattr(torch, setup.rest)

    untyped: Any = torch.autograd.Function

    class Product(untyped):  # type: ignore[misc]
        @staticmethod
        def forward(context: Any, given: Any, weight: Any) -> Any:
            context.weight = weight
            return given @ torch.empty_like(weight, dtype=compute).t()

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return gradient @ torch.empty_like(context.weight, dtype=compute), None

    class Quantised(torch.nn.Linear):
        def forward(self, given: Any) -> Any:
            return Product.apply(given.to(compute), self.weight).to(given.dtype).clone()

    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    inside = {id(part.weight) for part in linear}
    for weight in model.parameters():
        weight.requires_grad = False
        if id(weight) not in inside:
            weight.data = weight.data.to(outside)
    for part in linear:
        part.__class__ = Quantised
