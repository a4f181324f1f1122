"""The decision tree: its leaves are exactly the canonical answers, in any tokenizer, and it is walked lazily."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_cli import prompts
from router_cli.backends.tree import DecisionTree, Node
from router_cli.space import TOPOLOGIES, DecisionSpace
from tests.tiny import STYLES, Style, tiny_tokenizer


@cache
def tokenizer(style: Style) -> prompts.Tokenizer:
    made: prompts.Tokenizer = tiny_tokenizer(style)
    return made


# Names that are prefixes of each other, that share their first bytes, that JSON escapes, and any others.
NAMES = st.one_of(
    st.sampled_from(
        ["a", "ab", "abc", "builder", "build", "builder-2", "tester", "test", "规划", "规划者", "é", "e\u0301"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters=","), min_size=1, max_size=6),
    st.sampled_from(['say "hi"', "back\\slash", "null", "🙂", "🙃"]),
)
SPACES = st.builds(
    DecisionSpace,
    st.lists(NAMES, min_size=1, max_size=3, unique=True).map(tuple),
    st.lists(st.sampled_from(TOPOLOGIES), min_size=1, max_size=4, unique=True).map(tuple),
    st.integers(2, 25),
).filter(lambda space: "single" in space.topologies or len(space.roles) > 1)


def leaves(tree: DecisionTree) -> dict[tuple[int, ...], object]:
    """Path of tokens -> decision for every leaf; every inner node is checked on the way."""
    found: dict[tuple[int, ...], object] = {}
    waiting: list[tuple[Node, tuple[int, ...]]] = [(tree.root, tree.root.run)]
    while waiting:
        node, path = waiting.pop()
        assert node.depth == len(path)
        if node.decision is not None:
            assert not node.groups and path not in found
            found[path] = node.decision
            continue
        assert len(node.groups) >= 2
        below = set()
        for token in node.groups:
            child = tree.child(node, token)
            assert child.run[0] == token
            assert tree.topologies(node.groups[token]) == child.topologies
            below |= child.topologies
            waiting.append((child, (*path, *child.run)))
        assert node.topologies == below
    return found


@given(space=SPACES, style=st.sampled_from(STYLES))
def test_leaves_are_the_canonical_answers(space: DecisionSpace, style: Style) -> None:
    names = tokenizer(style)
    expected = {tuple(prompts.encode_answer(decision, names)): decision for decision in space.enumerate()}
    assert len(expected) == space.size()
    assert leaves(DecisionTree(space, names)) == expected


@pytest.mark.parametrize("style", STYLES)
def test_four_roles_make_88_and_more_leaves(style: Style) -> None:
    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    assert len(leaves(DecisionTree(space, tokenizer(style)))) == space.size() > 88


def test_a_space_of_one_decision_is_a_leaf() -> None:
    root = DecisionTree(DecisionSpace(("builder",)), tokenizer("smollm")).root
    assert root.decision is not None and root.decision.topology == "single" and not root.groups
    assert list(root.run) == prompts.encode_answer(root.decision, tokenizer("smollm"))


def test_ten_roles_are_walked_without_enumerating_them() -> None:
    space = DecisionSpace(tuple(f"role-{i}" for i in range(10)))
    assert space.size() > 9_000_000
    names, choices = tokenizer("smollm"), random.Random(0)
    started = time.process_time()
    tree = DecisionTree(space, names)
    for _ in range(20):
        node, path = tree.root, list(tree.root.run)
        while node.decision is None:
            node = tree.child(node, choices.choice(sorted(node.groups)))
            path += node.run
        assert not space.violations(node.decision)
        assert path == prompts.encode_answer(node.decision, names)
    assert len(tree._settled) < 20_000
    assert time.process_time() - started < 20


@pytest.mark.parametrize("names", [("test", "规划"), ("abc", "b", "builder"), ("规划", "ab", "a")])
def test_tokens_that_reach_across_choices(names: tuple[str, ...]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    space = DecisionSpace(names, step_bound=4)
    # Nothing keeps merges inside words, as in tokenizers that part text at spaces alone.
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    answers = [prompts.render(decision) for decision in space.enumerate()]
    for size in (280, 330, 400):
        kinds = trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
        )
        whole.train_from_iterator(answers[::3], kinds)
        reader = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<e>")
        expected = {tuple(prompts.encode_answer(decision, reader)): decision for decision in space.enumerate()}
        assert leaves(DecisionTree(space, reader)) == expected
