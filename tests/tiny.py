"""A real tokenizer and a real causal language model, small enough to be made by a test in a blink.

Three styles copy what differs between the families that a router is trained on:

    smollm   ChatML; the BOS token is the start of a turn, written by the template alone
    qwen3    ChatML without BOS; `enable_thinking=False` ends the generation prompt in an empty think block
    llama3   the template writes a BOS, and so does the tokenizer when asked for special tokens
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tests import templates

Style = Literal["smollm", "qwen3", "llama3"]
STYLES: tuple[Style, ...] = ("smollm", "qwen3", "llama3")

_SPECIAL: dict[str, dict[str, str]] = {
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
}
_MORE_SPECIAL: dict[str, list[str]] = {
    "smollm": ["<|endoftext|>"],
    "qwen3": ["<|im_start|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
}
_TEMPLATES: dict[str, str] = {"smollm": templates.SMOLLM2, "qwen3": templates.QWEN3, "llama3": templates.LLAMA3}

# What the merges are learnt from: the words of prompts and answers, so that a prompt takes hundreds of tokens and
# not thousands. Everything else falls back to bytes.
_CORPUS = [
    "You are a meta-router. Choose how agents work on the task.\nRoles: planner, builder, tester, refractor\n",
    "one artefact, one role; stages in a fixed order; parts that do not need each other; under a manager",
    "Answer in JSON, max_steps up to 12.\nTask: Write a Python function that sorts a list of integers.",
    *(
        json.dumps(
            {"topology": topology, "roles": ["planner", "builder", "tester", "refractor"], "manager_role": None}
            | {"entry_role": role, "max_steps": 4},
            separators=(",", ":"),
        )
        for topology in ("single", "chain", "decentralized", "centralized")
        for role in ("planner", "builder", "tester", "refractor")
    ),
    "The service, the library and the tests of the module are refactored, migrated, reviewed and documented.",
]


def tiny_tokenizer(style: Style = "smollm") -> Any:
    """A byte-level BPE tokenizer of about 500 tokens with the chat template of `style`; the same one every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[style]
    tokens = list(dict.fromkeys([*special.values(), *_MORE_SPECIAL[style]]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS * 4, trainer)
    if style == "llama3":
        bos = special["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    more: dict[str, Any] = dict(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=8192, **more)
    tokenizer.add_special_tokens({"additional_special_tokens": _MORE_SPECIAL[style]})
    tokenizer.chat_template = _TEMPLATES[style]
    return tokenizer


def tiny_model(folder: Path, style: Style = "smollm", layers: int = 4, hidden: int = 64) -> Path:
    """Save a seeded, untrained causal LM with its tokenizer as an ordinary model folder; returns the folder.

    Llama-shaped for smollm (tied embeddings) and llama3, Qwen3-shaped for qwen3; float32, about 0.2 million weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer(style)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": style == "smollm",
        # At the usual .02 so narrow a model gives every token the same score, and nothing depends on the prompt.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**shape)) if style == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
