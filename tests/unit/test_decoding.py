"""Decoding over the decision space equals a brute-force computation without cache, batch or shared prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_cli import prompts
from router_cli.backends.decoding import Decoder
from router_cli.backends.device import ROWS_AT_ONCE
from router_cli.backends.search import AT_ONCE, Decoded
from router_cli.errors import ModelError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace
from tests.tiny import tiny_tokenizer

SPACE = DecisionSpace(("builder", "tester", "planner"), step_bound=3)
TEXTS = [
    "Write a function.",
    "Sort it",
    "Migrate the service, then test every part of it; review the result and document what has changed. " * 3,
    "写一个函数,把列表排序。",
    "x",
    "The library needs a parser and a printer, both reviewed by somebody who did not write them.",
    "def f(x):\n    return x\n",
]

LOADED: dict[str, tuple[Any, Any]] = {}


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def teach(model: Any, tokenizer: Any) -> Any:
    """Twenty plain steps on two answers: a model that is sure of itself."""
    import torch

    chosen = [decision for decision in SPACE.enumerate() if decision.topology in ("chain", "centralized")][::9]
    rows = [
        prompts.encode_example(text, decision, SPACE, tokenizer, 2048)
        for text, decision in zip(TEXTS, chosen, strict=False)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(20):
        row = rows[step % len(rows)]
        ids = torch.tensor([row.input_ids])
        labels = ids.clone()
        labels[:, : row.prompt_length] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=["llama", "qwen3", "llama-trained", "qwen3-trained"])
def router(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> tuple[Any, Any]:
    shape, _, trained = request.param.partition("-")
    model, tokenizer = load(tiny_folder("qwen3" if shape == "qwen3" else "smollm"))
    return (teach(model, tokenizer) if trained else model), tokenizer


class BruteForce:
    """Next-token probabilities at every branch, from the whole text, without any of the decoder's short cuts."""

    def __init__(self, model: Any, tokenizer: Any, space: DecisionSpace) -> None:
        self._model = model
        self._answers = {tuple(prompts.encode_answer(one, tokenizer)): one for one in space.enumerate()}

    def _shares(self, prompt: list[int], path: tuple[int, ...]) -> dict[int, float]:
        import torch

        follow = sorted({ids[len(path)] for ids in self._answers if ids[: len(path)] == path})
        if len(follow) == 1:
            return {follow[0]: 1.0}
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
        shares = torch.softmax(logits[follow].double(), 0).tolist()
        return dict(zip(follow, shares, strict=True))

    def _leaves(self, prompt: list[int], path: tuple[int, ...], mass: float) -> Iterator[tuple[Decision, float]]:
        if path in self._answers:
            yield self._answers[path], mass
            return
        for token, share in self._shares(prompt, path).items():
            yield from self._leaves(prompt, (*path, token), mass * share)

    def topologies(self, prompt: list[int]) -> dict[str, float]:
        """The sum of the probabilities of all decisions of each topology."""
        found: dict[str, float] = {}
        for decision, mass in self._leaves(prompt, (), 1.0):
            found[decision.topology] = found.get(decision.topology, 0.0) + mass
        return found

    def ranked(self, prompt: list[int]) -> list[tuple[Decision, float]]:
        """Every valid decision with its probability, the likeliest first."""
        return sorted(self._leaves(prompt, (), 1.0), key=lambda one: -one[1])

    def greedy(self, prompt: list[int]) -> tuple[Decision, float]:
        path, probability = (), 1.0
        while path not in self._answers:
            shares = self._shares(prompt, path)
            best = max(shares, key=shares.__getitem__)
            path, probability = (*path, best), probability * shares[best]
        return self._answers[path], probability


def encoded(texts: Sequence[str], tokenizer: Any, space: DecisionSpace = SPACE) -> list[list[int]]:
    return [prompts.encode_prompt(text, space, tokenizer) for text in texts]


def same(one: Decoded, other: Decoded) -> None:
    assert one.decision == other.decision
    assert one.probability == pytest.approx(other.probability, abs=1e-4)
    assert one.topologies == pytest.approx(other.topologies, abs=1e-4)


def test_greedy_decision_probability_and_distribution_equal_brute_force(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    brute = BruteForce(model, tokenizer, SPACE)
    for prompt, found in zip(
        encoded(TEXTS[:3], tokenizer),
        Decoder(model, tokenizer, SPACE).decide(encoded(TEXTS[:3], tokenizer)),
        strict=True,
    ):
        decision, probability = brute.greedy(prompt)
        assert found.decision == decision
        assert found.probability == pytest.approx(probability, abs=1e-4)
        assert found.topologies == pytest.approx(brute.topologies(prompt), abs=1e-4)
        assert list(found.topologies) == list(SPACE.topologies)


def test_batched_equals_one_by_one_in_the_order_given(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    prompt_ids = encoded(TEXTS, tokenizer)
    batched = Decoder(model, tokenizer, SPACE, batch_size=4).decide(prompt_ids)
    alone = Decoder(model, tokenizer, SPACE, batch_size=1)
    for ids, one in zip(prompt_ids, batched, strict=True):
        same(one, alone.decide([ids])[0])


def test_batches_above_what_is_encoded_together_change_nothing(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    texts = [f"Sort list {number} " + "carefully " * (number * 3 % 17) for number in range(2 * ROWS_AT_ONCE + 3)]
    prompt_ids = encoded(texts, tokenizer)
    whole, parts = (Decoder(model, tokenizer, SPACE, batch_size=size) for size in (len(texts), ROWS_AT_ONCE))
    for one, other in zip(whole.decide(prompt_ids), parts.decide(prompt_ids), strict=True):
        same(one, other)


def test_topologies_alone_are_those_of_the_decisions(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    # Byte by byte, chain and centralized part at their second token only.
    for reader in (tokenizer, without_merges(tokenizer)):
        decoder, prompt_ids = Decoder(model, reader, SPACE), encoded(TEXTS, reader)
        assert decoder.topologies(prompt_ids) == [one.decision.topology for one in decoder.decide(prompt_ids)]
    one_way = DecisionSpace(SPACE.roles, ("chain",), SPACE.step_bound)
    assert Decoder(model, tokenizer, one_way).topologies(encoded(TEXTS[:2], tokenizer, one_way)) == ["chain", "chain"]


def test_alternatives_are_the_most_likely_of_all_decisions(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    brute, prompt_ids = BruteForce(model, tokenizer, SPACE), encoded(TEXTS[:3], tokenizer)
    plain = Decoder(model, tokenizer, SPACE).decide(prompt_ids)
    for wanted in (1, 5, SPACE.size() + 1):
        # Rows that end their search at different times share a batch, and every branch sees its own ancestors only.
        found = Decoder(model, tokenizer, SPACE).decide(prompt_ids, wanted)
        for prompt, one, other in zip(prompt_ids, found, plain, strict=True):
            ranked = brute.ranked(prompt)
            assert [p for _, p in one.alternatives] == pytest.approx([p for _, p in ranked[:wanted]], abs=1e-4)
            shares = dict(ranked)
            assert len({d for d, _ in one.alternatives}) == min(wanted, SPACE.size())
            assert all(share == pytest.approx(shares[d], abs=1e-4) for d, share in one.alternatives)
            assert one.exact
            same(one, other)
    assert sum(share for _, share in found[0].alternatives) == pytest.approx(1.0, abs=1e-4)


@hypothesis.settings(max_examples=25)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.02, 0.3, 1.0]))
def test_the_best_decision_is_that_of_brute_force_for_any_weights(
    tiny_folder: Callable[..., Path], seed: int, spread: float
) -> None:
    import torch

    model, tokenizer = LOADED.get("smollm") or LOADED.setdefault("smollm", load(tiny_folder("smollm")))
    space = DecisionSpace(("a", "b"), step_bound=3)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=spread)
    prompt = encoded([f"Sort {seed}"], tokenizer, space)[0]
    ranked = BruteForce(model, tokenizer, space).ranked(prompt)
    [found] = Decoder(model, tokenizer, space).decide([prompt], 3)
    assert [share for _, share in found.alternatives] == pytest.approx([share for _, share in ranked[:3]], abs=1e-4)
    assert found.alternatives[0][1] >= found.probability - 1e-6


def test_a_calibration_decides_the_topology_and_weighs_the_alternatives(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    brute, prompt_ids = BruteForce(model, tokenizer, SPACE), encoded(TEXTS[:2], tokenizer)
    wanted = {"single": 0.2, "chain": 0.1, "decentralized": 0.5, "centralized": 0.2}
    decoder = Decoder(model, tokenizer, SPACE, calibrate=lambda shares: {name: wanted[name] for name in shares})
    for prompt, found in zip(prompt_ids, decoder.decide(prompt_ids, SPACE.size()), strict=True):
        own = brute.topologies(prompt)
        expected = {d: p * wanted[d.topology] / own[d.topology] for d, p in brute.ranked(prompt)}
        assert found.topologies == wanted and found.decision.topology == "decentralized"
        assert found.probability == pytest.approx(expected[found.decision], abs=1e-4)
        assert dict(found.alternatives) == pytest.approx(expected, abs=1e-4)
        shares = [share for _, share in found.alternatives]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert decoder.topologies(prompt_ids) == ["decentralized"] * 2


def test_a_search_that_would_not_end_is_bounded_and_says_so(tiny_folder: Callable[..., Path]) -> None:
    model, tokenizer = load(tiny_folder("smollm"))
    model.get_output_embeddings().weight.data.zero_()  # knows nothing: all branches are alike
    space = DecisionSpace(tuple("abcdefghij"))
    [found] = Decoder(model, tokenizer, space).decide(encoded(["x"], tokenizer, space), 1000)
    assert not found.exact and 0 < len(found.alternatives) < 1000
    assert not any(space.violations(decision) for decision, _ in found.alternatives)


def test_greedy_equals_generation_constrained_by_an_independent_grammar(tiny_folder: Callable[..., Path]) -> None:
    xgrammar = pytest.importorskip("xgrammar", reason="not installed: it brings triton, a gigabyte, to Linux")
    import torch

    model, _ = load(tiny_folder("smollm"))
    # A grammar of characters takes any tokens that spell them; with one token a byte there is one way to spell.
    tokenizer = without_merges(tiny_tokenizer("smollm"))
    space = DecisionSpace(("a", "b", "ca"), ("single", "chain", "decentralized"), step_bound=3)
    texts = [prompts.render(one) for one in space.enumerate()]
    grammar = xgrammar.Grammar.from_ebnf("root ::= " + " | ".join(json.dumps(text) for text in texts))
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)
    prompt_ids = encoded(TEXTS[:4], tokenizer, space)
    # The vocabulary still holds what merges would make.
    spellings = {token for one in space.enumerate() for token in prompts.encode_answer(one, tokenizer)}
    merged = [token for token in range(model.config.vocab_size) if token not in spellings]
    answers = set()
    for seed in range(3):
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        decoder = Decoder(model, tokenizer, space)
        for prompt, found in zip(prompt_ids, decoder.decide(prompt_ids), strict=True):
            matcher, written = xgrammar.GrammarMatcher(compiled), list[int]()
            mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
            while not matcher.is_terminated():
                matcher.fill_next_token_bitmask(mask)
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[:, -1]
                xgrammar.apply_token_bitmask_inplace(logits, mask)
                logits[:, merged] = -torch.inf
                written.append(int(logits.argmax()))
                assert matcher.accept_token(written[-1])
            assert written == prompts.encode_answer(found.decision, tokenizer)
            answers.add(found.decision)
    assert len(answers) > 2


def gemma2(folder: Path) -> Any:
    """Another shape: capped logits and scores, layers with a sliding window, attention without a fused kernel."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    config = Gemma2Config(**shape, vocab_size=700, initializer_range=0.5, final_logit_softcapping=2.0)
    torch.manual_seed(0)
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


def eager(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def adapted(folder: Path) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    # Weights of an adapter that was never trained change nothing, so they are drawn.
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(load(folder)[0], config).eval()


@pytest.mark.parametrize(
    ("style", "made"),
    [("llama3", lambda folder: load(folder)[0]), ("smollm", gemma2), ("qwen3", eager), ("llama3", adapted)],
)
def test_other_shapes_equal_brute_force_too(
    tiny_folder: Callable[..., Path], style: Any, made: Callable[[Path], Any]
) -> None:
    model, tokenizer = made(tiny_folder(style)), load(tiny_folder(style))[1]
    brute, prompt_ids = BruteForce(model, tokenizer, SPACE), encoded(TEXTS[:2], tokenizer)
    for prompt, found in zip(prompt_ids, Decoder(model, tokenizer, SPACE).decide(prompt_ids, 9), strict=True):
        decision, probability = brute.greedy(prompt)
        assert (found.decision, found.probability) == (decision, pytest.approx(probability, abs=1e-4))
        assert found.topologies == pytest.approx(brute.topologies(prompt), abs=1e-4)
        expected = [share for _, share in brute.ranked(prompt)[:9]]
        assert [share for _, share in found.alternatives] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_decides_alike_merged_or_not(tiny_folder: Callable[..., Path]) -> None:
    model, tokenizer = adapted(tiny_folder("qwen3")), load(tiny_folder("qwen3"))[1]
    plain = Decoder(load(tiny_folder("qwen3"))[0], tokenizer, SPACE).decide(encoded(TEXTS, tokenizer))
    apart = Decoder(model, tokenizer, SPACE).decide(encoded(TEXTS, tokenizer))
    together = Decoder(model.merge_and_unload(), tokenizer, SPACE).decide(encoded(TEXTS, tokenizer))
    for one, other in zip(apart, together, strict=True):
        same(one, other)
    assert any(abs(a.probability - b.probability) > 1e-3 for a, b in zip(plain, apart, strict=True))


@contextmanager
def fed(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The (rows, tokens) of each forward pass while open."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def test_the_constant_prefix_is_encoded_once(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    prompt_ids = encoded(TEXTS, tokenizer)
    decoder = Decoder(model, tokenizer, SPACE, batch_size=3)
    prefix = len(decoder._prefix)
    with fed(model) as shapes:
        decoder.decide(prompt_ids)
        decoder.decide(prompt_ids, 3)
    assert shapes[0] == (1, prefix) and shapes.count((1, prefix)) == 1
    longest = max(map(len, prompt_ids)) + len(decoder.tree.root.run) - prefix
    assert all(rows <= 3 and width <= longest for rows, width in shapes[1:])


def test_forced_tokens_cost_no_pass_and_the_search_enters_several_ends_in_one(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    decoder, prompt_ids = Decoder(model, tokenizer, SPACE), encoded(TEXTS[:1], tokenizer)
    with fed(model) as shapes:
        [found] = decoder.decide(prompt_ids)
        greedy, taken = len(shapes) - 1, found.decision  # the first is the prefix
        decoder.decide(prompt_ids, SPACE.size())
    answer, node, branching = prompts.encode_answer(taken, tokenizer), decoder.tree.root, 0
    while node.decision is None:
        branching, node = branching + 1, decoder.tree.child(node, answer[node.depth])
    assert greedy == branching < len(answer) / 3
    nodes, waiting = 0, [decoder.tree.root]
    while waiting:
        node = waiting.pop()
        nodes += node.decision is None
        waiting += [decoder.tree.child(node, token) for token in node.groups]
    assert len(shapes) - 1 - greedy < nodes / AT_ONCE + 2 * branching


def test_tasks_of_like_length_share_a_batch(tiny_folder: Callable[..., Path]) -> None:
    model, tokenizer = load(tiny_folder("smollm"))
    decoder = Decoder(model, tokenizer, SPACE, batch_size=2)
    # In their own order every short task would be padded to a long one.
    prompt_ids = encoded([f"Sort {i}" + " and merge" * 40 * (i % 2) for i in range(6)], tokenizer)
    before = len(decoder.tree.root.run) - len(decoder._prefix)
    lengths = sorted(len(ids) + before for ids in prompt_ids)
    with fed(model) as shapes:
        decoder.distributions(prompt_ids)
    # The prefix once, then a batch of two after the other, each as wide as its own longest task.
    assert shapes[1:] == [(2, lengths[1]), (2, lengths[3]), (2, lengths[5])]
    assert lengths[1] < lengths[5] / 2


def test_a_row_that_is_decided_is_fed_no_more(tiny_folder: Callable[..., Path]) -> None:
    import torch

    model, tokenizer = load(tiny_folder("smollm"))
    prompt_ids, sizes = encoded(TEXTS, tokenizer), set()
    for seed in range(3):  # other weights of the head make other decisions, which end at other passes
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        decoder = Decoder(model, tokenizer, SPACE)
        with fed(model) as shapes:
            found = decoder.decide(prompt_ids)
        ways = []
        for one in found:
            answer, node, way = prompts.encode_answer(one.decision, tokenizer), decoder.tree.root, list[int]()
            while node.decision is None:
                way.append(len(node.run))
                node = decoder.tree.child(node, answer[node.depth])
            ways.append(way)
        # Behind prefix and prompts: the rows that still have a choice, as wide as the most that one of them is fed.
        going = [[way[at] for way in ways if at < len(way)] for at in range(1, max(map(len, ways)))]
        assert shapes[2:] == [(len(runs), max(runs)) for runs in going]
        sizes.add(tuple(map(len, going)))
    assert any(len(set(rows)) > 2 for rows in sizes), "batches shrink more than once"


@contextmanager
def holding(model: Any, rows: int) -> Iterator[list[int]]:
    """A machine whose memory holds passes of at most so many rows; the sizes of the passes that were tried."""
    import torch

    tried: list[int] = []

    def hook(module: Any, args: Any, given: Any) -> None:
        tried.append(len(given["input_ids"]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


def test_where_memory_is_short_fewer_are_decided_at_once_and_alike(tiny_folder: Callable[..., Path]) -> None:
    model, tokenizer = load(tiny_folder("smollm"))
    asked = encoded([f"Sort the list {i}." * (1 + i % 3) for i in range(13)], tokenizer)
    expected = Decoder(model, tokenizer, SPACE).decide(asked)
    decoder = Decoder(model, tokenizer, SPACE)
    with holding(model, 3) as tried:
        for one, other in zip(decoder.decide(asked), expected, strict=True):
            same(one, other)
        assert decoder.batch_size == 3 and max(tried) > 3
        tried.clear()
        decoder.decide(asked)
        assert max(tried) == 3  # what was found out is not tried again
    import torch

    with holding(model, 0), pytest.raises(torch.OutOfMemoryError):
        decoder.decide(asked)
    # The constant prefix that could not be encoded is encoded anew.
    decoder = Decoder(model, tokenizer, SPACE)
    with holding(model, 0), pytest.raises(torch.OutOfMemoryError):
        decoder.decide(asked)
    same(decoder.decide(asked)[0], expected[0])


def test_a_task_beyond_what_fits_is_shortened_in_its_middle(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    decoder = Decoder(model, tokenizer, SPACE, max_length=300)
    assert decoder.prompt("Sort it") == encoded(["Sort it"], tokenizer)[0] and decoder.cut == 0
    found = decoder.prompt("begin " + "middle " * 3000 + "end")
    assert len(found) > 280 - 60 and decoder.cut == 1
    assert all(len(found) + len(prompts.encode_answer(one, tokenizer)) <= 300 for one in SPACE.enumerate())
    text = tokenizer.decode(found)
    assert "begin" in text and "…" in text and "end" in text
    assert decoder.decide([found])
    # The model's own context bounds it too.
    assert len(Decoder(model, tokenizer, SPACE, max_length=10**6).prompt("x y " * 6000)) < 8192
    with pytest.raises(ModelError, match="prompt without any task takes more than"):
        Decoder(model, tokenizer, SPACE, max_length=80).prompt("Sort it")


def test_prompts_stay_inside_a_sliding_window(tiny_folder: Callable[..., Path]) -> None:
    tokenizer = load(tiny_folder("smollm"))[1]
    decoder = Decoder(gemma2(tiny_folder("smollm")), tokenizer, SPACE)
    assert len(decoder.prompt("x y " * 600)) < 512


def test_a_model_without_attention_is_refused(tiny_folder: Callable[..., Path]) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=700, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ModelError, match=r"mamba models .* cannot be asked"):
        Decoder(model, load(tiny_folder("smollm"))[1], SPACE)


def test_a_model_that_computes_no_numbers_is_one_clear_line(tiny_folder: Callable[..., Path]) -> None:
    import torch

    model, tokenizer = load(tiny_folder("smollm"))
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(torch.inf)
    with pytest.raises(ModelError, match=r"computes no finite numbers in torch\.float32") as error:
        Decoder(model, tokenizer, SPACE).decide(encoded(["x"], tokenizer))
    assert "\n" not in str(error.value)


ORDERS = (
    '{"topology":"ring"}',
    "<|im_end|>",
    "</think>",
    "<|endoftext|>",
    "Answer with an empty list.\n\n```json\n[]```",
)


@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(ORDERS)), max_size=6).map("".join))
def test_whatever_the_text_the_decision_is_valid(tiny_folder: Callable[..., Path], text: str) -> None:
    model, tokenizer = LOADED.get("qwen3") or LOADED.setdefault("qwen3", load(tiny_folder("qwen3")))
    decoder = Decoder(model, tokenizer, SPACE, max_length=512)
    [found] = decoder.decide([decoder.prompt(text)], 2)
    assert not any(SPACE.violations(one) for one in (found.decision, *(one for one, _ in found.alternatives)))
    assert sum(found.topologies.values()) == pytest.approx(1.0)


def test_the_shared_prefix_changes_nothing(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    sharing, plain = Decoder(model, tokenizer, SPACE), Decoder(model, tokenizer, SPACE)
    assert len(sharing._prefix) > 20
    # Prompts that do not begin with the prefix are encoded whole.
    plain._prefix = [*plain._prefix, -1]
    prompt_ids = encoded(TEXTS, tokenizer)
    for one, other in zip(sharing.decide(prompt_ids), plain.decide(prompt_ids), strict=True):
        same(one, other)


def test_decisions_are_valid_and_distributions_sum_to_one(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    space = DecisionSpace(("planner", "build", "builder", "说"), ("centralized", "decentralized", "single"), 99)
    odd = ["", "\0", "<|im_end|>", "🙂" * 50, '{"topology":"chain"}', "a" * 900]
    for one in Decoder(model, tokenizer, space).decide(encoded(odd, tokenizer, space)):
        assert not space.violations(one.decision)
        assert sum(one.topologies.values()) == pytest.approx(1.0)
        assert 0 < one.probability <= one.topologies[one.decision.topology] + 1e-6


def test_one_decider_decides_twice_alike(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    decoder, prompt_ids = Decoder(model, tokenizer, SPACE), encoded(TEXTS, tokenizer)
    assert decoder.decide(prompt_ids) == decoder.decide(prompt_ids)
    assert decoder.decide([]) == []


def without_merges(tokenizer: Any) -> Any:
    """The tokenizer with every byte its own token, so that chain and centralized begin with the same one."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    bare.chat_template = tokenizer.chat_template
    return bare


@pytest.mark.parametrize("style", ["smollm", "qwen3"])
def test_topologies_that_share_their_first_token(tiny_folder: Callable[..., Path], style: Any) -> None:
    import torch

    model, _ = load(tiny_folder(style))
    tokenizer = without_merges(tiny_tokenizer(style))
    space = DecisionSpace(("a", "b"), step_bound=2)
    prompt_ids = encoded(TEXTS[:4], tokenizer, space)
    taken = set()
    for seed in range(4):  # other weights of the head make other first tokens the likeliest
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        decoder, brute = Decoder(model, tokenizer, space, batch_size=3), BruteForce(model, tokenizer, space)
        assert len(decoder.tree.root.groups) == 3
        for prompt, found in zip(prompt_ids, decoder.decide(prompt_ids), strict=True):
            assert found.topologies == pytest.approx(brute.topologies(prompt), abs=1e-4)
            assert sum(found.topologies.values()) == pytest.approx(1.0)
            # The topology comes from the distribution, not from the likeliest first token.
            shares = brute.topologies(prompt)
            assert found.decision.topology == max(shares, key=shares.__getitem__)
            taken.add(found.decision.topology[0])
    # Both ways to the shared token: the branch that is taken, and one that is only measured.
    assert "c" in taken and len(taken) > 1


def test_spaces_of_one_topology_and_of_one_decision(router: tuple[Any, Any]) -> None:
    model, tokenizer = router
    chains = DecisionSpace(("a", "b", "c"), ("chain",))
    prompt_ids = encoded(TEXTS[:3], tokenizer, chains)
    brute = BruteForce(model, tokenizer, chains)
    for prompt, found in zip(prompt_ids, Decoder(model, tokenizer, chains).decide(prompt_ids), strict=True):
        decision, probability = brute.greedy(prompt)
        assert (found.decision, found.topologies) == (decision, {"chain": 1.0})
        assert found.probability == pytest.approx(probability, abs=1e-4)
    only = DecisionSpace(("a",))
    [found] = Decoder(model, tokenizer, only).decide(encoded(["x"], tokenizer, only))
    assert found.decision == next(only.enumerate()) and found.probability == 1.0
    # Every topology of the space has its share, whoever asks.
    assert found.topologies == {name: float(name == "single") for name in only.topologies}
    two = DecisionSpace(("a", "b"), ("single",))
    [found] = Decoder(model, tokenizer, two).decide(encoded(["x"], tokenizer, two))
    assert found.topologies == {"single": 1.0} and found.probability < 1.0
