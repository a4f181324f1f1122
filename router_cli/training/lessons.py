"""Examples to lessons: the tokens that are trained on, looked at one by one before the first step.

What is checked here goes wrong in silence otherwise: an answer without its end, a doubled beginning of text, a think
block that stays open, a decision that serving can never give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router_cli import prompts
from router_cli.backends.tree import DecisionTree
from router_cli.errors import ModelError, TrainingError
from router_cli.progress import Progress
from router_cli.schema import Example
from router_cli.space import DecisionSpace

_PROBE = "Sort the list 7391."


def encode(
    examples: Sequence[Example],
    space: DecisionSpace,
    tokenizer: Any,
    max_length: int,
    progress: Progress,
    augment: int = 0,
    seed: int = 0,
) -> list[prompts.Encoded]:
    """The examples as tokens, at most `max_length` each, then `augment` more of each, asked in other words.

    Raises TrainingError naming the first example that cannot be learnt as it should be, and what to do.
    """
    tree = DecisionTree(space, tokenizer)
    encoded = []
    asked: list[tuple[Example, prompts.Wording | None]] = [(example, None) for example in examples]
    for example in examples if augment else ():
        asked += [(example, one) for one in prompts.other_wordings(space, augment, f"{seed}:{example.task_id}")]
    for example, wording in asked:
        try:
            row = prompts.encode_example(example.text, example.decision, space, tokenizer, max_length, wording)
        except ValueError as error:
            raise TrainingError(f"example {example.task_id}: {error}; raise --max-length") from None
        if problem := _problem(row, example, tree, tokenizer):
            raise TrainingError(f"example {example.task_id}: {problem}")
        encoded.append(row)
    if cut := sum(one.cut_tokens > 0 for one in encoded[: len(examples)]):
        progress.warn(
            f"{cut} of {len(examples)} tasks are longer than --max-length {max_length}: "
            "shortened in the middle of the task, never in the answer"
        )
    return encoded


def verdicts(
    examples: Sequence[Example], rows: Sequence[prompts.Encoded], space: DecisionSpace, tokenizer: Any
) -> list[prompts.Encoded]:
    """A lesson for every recorded run of the examples, whose prompts are those of `rows`: solved, or not.

    So many runs of a topology on a task, so many lessons: cross-entropy over them is least where the router gives the
    probability that a run solves the task.
    """
    ways = {name: prompts.encode_verdict(name, tokenizer) for name in space.topologies}
    found = []
    for example, row in zip(examples, rows, strict=True):
        asked = row.input_ids[: row.prompt_length]
        for name, (solved, runs) in example.solved.items():
            if name in ways:
                way = ways[name]
                for token in [way.solved] * solved + [way.unsolved] * (runs - solved):
                    start = [*asked, *way.start]
                    found.append(prompts.Encoded([*start, token], len(start), verdict=True))
    return found


def check_verdicts(space: DecisionSpace, tokenizer: Any, name: str) -> None:
    """Raises ModelError for a model that cannot be asked for verdicts: their tokens must go on as a decision begins."""
    ways = [prompts.encode_verdict(topology, tokenizer) for topology in space.topologies]
    start = DecisionTree(space, tokenizer).root.run
    if len({(way.solved, way.unsolved) for way in ways}) > 1 or any(
        tuple(way.start[: len(start)]) != start for way in ways
    ):
        raise ModelError(
            f"{name}: its tokenizer joins topologies with what follows: take another for --objective solve"
        )


def _problem(row: prompts.Encoded, example: Example, tree: DecisionTree, tokenizer: Any) -> str:
    """What is wrong with a lesson, and what to do; empty where nothing is."""
    answer, end, begin = row.input_ids[row.prompt_length :], prompts.end_token(tokenizer), tokenizer.bos_token_id
    written = prompts.render(example.decision)
    if answer.count(end) != 1 or answer[-1] != end:
        return "its answer does not end with the end token, and only there; take a role name without special tokens"
    if (read := tokenizer.decode(answer[:-1], clean_up_tokenization_spaces=False).strip()) != written:
        return f"the tokenizer makes {read} of its answer {written}; take another base model, or other role names"
    if begin is not None and row.input_ids[:2] == [begin, begin]:
        return "its prompt begins with the beginning-of-text token twice; mend the base model's chat template"
    if not _reachable(answer, tree):
        return f"the router could never answer {written}: it is not in the decision space's own order; label it again"
    return ""


def _reachable(answer: list[int], tree: DecisionTree) -> bool:
    """Whether decoding can come to these tokens."""
    node, at = tree.root, 0
    while True:
        if tuple(answer[at : at + len(node.run)]) != node.run:
            return False
        at += len(node.run)
        if node.decision is not None:
            return at == len(answer)
        if at >= len(answer) or answer[at] not in node.groups:
            return False
        node = tree.child(node, answer[at])


def check_model(model: Any, tokenizer: Any, space: DecisionSpace, name: str, progress: Progress) -> None:
    """Look at how the base model's chat template asks and ends, once for all examples.

    Raises ModelError where a router cannot be asked in it; warns of what other servers would do otherwise.
    """
    from jinja2 import TemplateError

    question = prompts.router_messages(_PROBE, space)
    try:
        asked = tokenizer.decode(prompts.encode_prompt(_PROBE, space, tokenizer))
    except TemplateError as error:
        raise ModelError(
            f"{name}: its chat template refuses the router's prompt: {error}; take another model"
        ) from None
    if any(message.content.splitlines()[0] not in asked for message in question):
        raise ModelError(f"{name}: its chat template leaves a part of the router's prompt out; take another model")
    if asked.rfind("<think>") > asked.rfind("</think>"):
        raise ModelError(
            f"{name}: its chat template opens a think block whatever it is told; take the instruct variant of the model"
        )
    if "strftime_now" in tokenizer.chat_template and "date_string" not in tokenizer.chat_template:
        progress.warn(f"{name}: its chat template prints the date: the router will be asked otherwise tomorrow")
    end = prompts.end_token(tokenizer)
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if stops is not None and end not in (stops if isinstance(stops, list) else [stops]):
        progress.warn(
            f"{name}: answers are taught to end with {tokenizer.decode([end])}, but its generation_config.json stops "
            "elsewhere: other servers will not see the end; mend eos_token_id there or eos_token of the tokenizer"
        )
