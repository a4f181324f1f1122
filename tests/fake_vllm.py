"""What vLLM makes of a chat completion, as a `behave` of `FakeTeacher`: a real model, decoded greedily.

Structured output is xgrammar's, which is vLLM's own; log probabilities are those before its mask, as vLLM's are. Each
can be missing: ignored, as by servers that do not know the field, or refused with 400.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

from router_cli.backends.library import filling
from tests.fake_teacher import Call, Reply

How = Literal["kept", "ignored", "refused"]


class FakeVllm:
    """Answers for one model folder. `answer_tokens` is the server's own limit."""

    def __init__(
        self, folder: Path, structured: How = "kept", logprobs: How = "kept", answer_tokens: int = 120
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._structured, self._logprobs, self._limit = structured, logprobs, answer_tokens
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Reply:
        body = call.body
        for name, how in (("response_format", self._structured), ("logprobs", self._logprobs)):
            if how == "refused" and name in body:
                return _refused(f"{name} is not supported by this model")
        ids = self._tokenizer.apply_chat_template(
            call.messages, add_generation_prompt=True, return_dict=True, **body.get("chat_template_kwargs", {})
        )["input_ids"]
        limit, room = min(self._limit, body.get("max_tokens", self._limit)), self._model.config.max_position_embeddings
        if len(ids) + limit > room:
            return _refused(f"This model's maximum context length is {room} tokens. Your prompt has {len(ids)}.")
        shape = body.get("response_format", {}).get("json_schema", {}).get("schema")
        with self._lock:
            tokens, entries = self._generate(ids, shape if self._structured == "kept" else None, limit)
        ended = bool(tokens) and tokens[-1] == self._tokenizer.eos_token_id
        message = {"role": "assistant", "content": self._tokenizer.decode(tokens[: len(tokens) - ended])}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
        if self._logprobs == "kept" and body.get("logprobs"):
            choice["logprobs"] = {"content": [self._entry(*entry, body["top_logprobs"]) for entry in entries]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        whole = {"id": f"chatcmpl-{call.number}", "object": "chat.completion", "model": body["model"]}
        return Reply(body=json.dumps({**whole, "choices": [choice], "usage": usage}).encode())

    def _generate(self, ids: list[int], shape: dict[str, Any] | None, limit: int) -> tuple[list[int], list[Any]]:
        """Tokens, and for each its id with the log probabilities of all at its place."""
        import torch
        from transformers import DynamicCache

        matcher, bits = self._grammar(shape) if shape is not None else (None, None)
        tokens, entries, cache = list[int](), [], DynamicCache(config=self._model.config)
        fed = ids
        with torch.inference_mode():
            while len(tokens) < limit and (not tokens or tokens[-1] != self._tokenizer.eos_token_id):
                scores = self._model(torch.tensor([fed]), **filling(self._model, cache)).logits[0, -1:].float()
                raw = scores.log_softmax(-1)[0]
                if matcher is not None:
                    import xgrammar

                    matcher.fill_next_token_bitmask(bits)
                    xgrammar.apply_token_bitmask_inplace(scores, bits)
                fed = [int(scores.argmax())]
                if matcher is not None:
                    matcher.accept_token(fed[0])
                tokens += fed
                entries.append((fed[0], raw))
        return tokens, entries

    def _grammar(self, shape: dict[str, Any]) -> tuple[Any, Any]:
        import xgrammar

        size = self._model.config.vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=size)
        compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(json.dumps(shape))
        return xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, size)

    def _entry(self, token: int, raw: Any, top: int) -> dict[str, Any]:
        def one(which: int) -> dict[str, Any]:
            # vLLM's stand-in for minus infinity, which JSON lacks.
            return {"token": self._tokenizer.decode([which]), "logprob": max(float(raw[which]), -9999.0)}

        likeliest = [int(which) for which in raw.topk(top).indices]
        # The chosen token comes first, and does not stand there twice.
        listed = [token, *(which for which in likeliest if which != token)]
        return {**one(token), "bytes": None, "top_logprobs": [{**one(which), "bytes": None} for which in listed]}


def _refused(words: str) -> Reply:
    return Reply(status=400, error={"message": words, "type": "BadRequestError", "param": None, "code": 400})
