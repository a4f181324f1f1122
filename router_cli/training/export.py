"""A trained router as a model of its own: `router train --export merged,gguf`.

merged    OUTPUT_DIR/merged/: the base with the adapter in its weights, as transformers and vLLM load it
gguf      OUTPUT_DIR/gguf/router.gguf: the same as one file for llama.cpp and what is built on it

Both folders hold the router's description too: `router infer --adapter FOLDER` serves them as it serves the adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_cli import models
from router_cli.backends.adapters import merged
from router_cli.backends.library import quiet
from router_cli.backends.local import META, load, read_meta
from router_cli.errors import TrainingError
from router_cli.jsonl import read_json, write_json, writing
from router_cli.models import file_sha256
from router_cli.progress import SILENT, Progress
from router_cli.settings import Settings

GGUF_FILE = "router.gguf"

ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3"}
"""What GGUF files are written of: transformers' model type, and the name in llama.cpp's table of tensors."""


def check(base: models.BaseModel, kinds: Sequence[str]) -> None:
    """Raise TrainingError where the base cannot be written as asked: known before anything is trained."""
    config = read_json(base.folder / "config.json")
    kind, scaling = config.get("model_type"), config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "gguf" not in kinds:
        return
    elsewhere = "pass --export merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    if kind not in ARCHITECTURES:
        raise TrainingError(f"--export gguf: writes {' and '.join(ARCHITECTURES)} models, not {kind}; {elsewhere}")
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise TrainingError(f"--export gguf: the base scales its rotary positions ({scaling}); {elsewhere}")
    _pre_tokenizer(base)


def export(adapter: Path, kinds: Sequence[str], settings: Settings, progress: Progress = SILENT) -> list[Path]:
    """Write the trained `adapter` in each of `kinds` (`merged`, `gguf`); the paths to load.

    Weights are kept in the base's own number type. What stands there already is made of the same adapter or made anew.
    Raises TrainingError for a base or adapter that cannot be written so, OutputError where there is no room.
    """
    meta, done, loaded = read_meta(adapter), [], None
    if read_json(adapter / "adapter_config.json").get("alora_invocation_tokens"):
        raise TrainingError(
            f"{adapter}: an activated LoRA cannot be merged into its base: serve it with `router`, or train without it"
        )
    base = models.resolve(meta["base_model"]["folder_or_id"], settings, progress)
    check(base, kinds)
    source = file_sha256(adapter / "adapter_model.safetensors")
    for kind in kinds:
        folder, member = adapter / kind, {"merged": ".", "gguf": GGUF_FILE}[kind]
        done.append(folder / member)
        if (folder / META).is_file() and read_json(folder / META).get("adapter_sha256") == source:
            progress.notice(f"{folder / member} is made of this very adapter; nothing to do")
            continue
        with progress.bar(f"export {kind}", 2) as bar:
            if loaded is None:
                model, tokenizer = load(base, settings, dtype="auto")
                loaded = merged(model, adapter), tokenizer
            bar.advance()
            # The description says where the whole model stands in its own folder, and what it is made of.
            facts = {**meta, "merged": member, "adapter_sha256": source}
            with _replacing(folder) as beside:
                _write(beside, kind, *loaded, facts)
            bar.advance()
    return done


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the place of `folder` once it is whole."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(folder):
            beside.mkdir()
            yield beside
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(folder: Path, kind: str, model: Any, tokenizer: Any, meta: dict[str, Any]) -> None:
    with quiet():
        tokenizer.save_pretrained(folder)
        if kind == "merged":
            model.save_pretrained(folder)
        else:
            model.config.save_pretrained(folder)
            write_gguf(folder / GGUF_FILE, folder, model, tokenizer, f"router of {meta['base_model']['name']}")
            for file in list(folder.iterdir()):
                if file.name != GGUF_FILE:  # all of it is inside the file
                    file.unlink()
    write_json(folder / META, meta)


# What a byte-level BPE splits texts into, as its tokenizer.json says it, and the name that llama.cpp knows it by.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}


def _pre_tokenizer(base: models.BaseModel) -> str:
    """llama.cpp's name of how a base's tokenizer splits texts. Raises TrainingError for one that it would misread."""
    file = base.folder / "tokenizer.json"
    described = read_json(file) if file.is_file() else {}
    if described.get("model", {}).get("type") == "BPE":
        rule = described.get("pre_tokenizer") or {}
        rules = rule.get("pretokenizers", [rule])
        match [one.get("type") for one in rules]:
            case ["ByteLevel"] if rules[0].get("use_regex", True):
                return "gpt-2"
            case ["Digits", "ByteLevel"] if rules[0].get("individual_digits"):
                return "smollm"
            case ["Split", "ByteLevel"] if rules[0]["pattern"].get("Regex") in _SPLITS:
                return _SPLITS[rules[0]["pattern"]["Regex"]]
    raise TrainingError(
        "--export gguf: llama.cpp's name for the base's tokenizer is not known; pass --export merged and convert that "
        "folder with llama.cpp's convert_hf_to_gguf.py"
    )


def write_gguf(file: Path, folder: Path, model: Any, tokenizer: Any, name: str) -> None:
    """Write a Llama- or Qwen3-shaped `model` with its `tokenizer`, saved in `folder`, as llama.cpp reads it.

    Keys and tensor names are those of the gguf package, the order of rotary halves that of llama.cpp's converter:
    Llama's are interleaved, Qwen3's are not. Weights keep their number type, norms are float32.
    """
    import gguf
    import torch

    config = model.config
    llama = config.model_type == "llama"
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[arch])
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[f"{'ALL' if model.dtype == torch.float32 else 'MOSTLY'}_"
                                                f"{kinds[model.dtype]}"]))  # fmt: skip
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope: dict[str, float] = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"] if "rope_theta" in rope else getattr(config, "rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, tokenizer, config.vocab_size)
    names, heads = gguf.get_tensor_name_map(arch, config.num_hidden_layers), config.num_attention_heads
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise TrainingError(f"--export gguf: llama.cpp has no tensor for {key}")
        weight = weight.detach().cpu()
        if llama and key.endswith(("q_proj.weight", "k_proj.weight")):
            parts = heads if "q_proj" in key else config.num_key_value_heads
            weight = weight.view(parts, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType[kinds[torch.float32 if weight.dim() == 1 else weight.dtype]]
        # numpy has no bfloat16: widened, and narrowed again to the same bits by the writer's package.
        values = weight.float().numpy()
        writer.add_tensor(found, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    """The vocabulary, padded to the model's `size`, with its merges, special tokens and chat template."""
    import gguf

    kinds, special = gguf.TokenType, set(tokenizer.all_special_ids)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens, types = [], []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kind = kinds.NORMAL if number in by_id else kinds.UNUSED
        if number in special | added:
            kind = kinds.CONTROL
        elif number in tokenizer.added_tokens_decoder:
            kind = kinds.USER_DEFINED
        types.append(int(kind))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(models.BaseModel("", folder, "folder")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with quiet():
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer)
