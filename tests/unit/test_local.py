"""A router on this machine: what is said where it does not fit, and what a row says of the decision itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.heuristic import HeuristicBackend
from router_cli.backends.local import META, LocalBackend
from router_cli.errors import ModelError
from router_cli.prompts import PROMPT_VERSION
from router_cli.schema import Prediction
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from tests.training import Recorder

Tiny = Callable[..., Path]
SPACE = DecisionSpace(("planner", "builder", "tester"))


def settings(base: Path, **values: Any) -> Settings:
    chosen = {"infer.base": str(base), "models.dtype": "float32"}
    chosen |= {key.replace("__", ".") if "__" in key else f"infer.{key}": str(value) for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def configured(folder: Path, **values: Any) -> Path:
    """The model folder with other values in its configuration."""
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **values}))
    return folder


def untrained(base: Path, folder: Path) -> Path:
    """An adapter that changes nothing yet, as `router train` describes its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    space = {"roles": list(SPACE.roles), "topologies": list(SPACE.topologies), "step_bound": SPACE.step_bound}
    described = {"base_model": {"folder_or_id": str(base)}, "prompt_version": PROMPT_VERSION, **space}
    (folder / META).write_text(json.dumps(described))
    return folder


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    said = str(error.value)
    assert "\n" not in said and "--backend remote" in said and "what helps: a smaller base" in said
    return said


def test_a_base_that_no_memory_takes_is_one_line_with_what_helps(tiny_folder: Tiny, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    # No address space holds such embeddings, and no weights stand there for them: they are to be made.
    base = configured(shutil.copytree(tiny_folder("smollm"), tmp_path / "base"), vocab_size=10**15)
    save_file({}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        LocalBackend(settings(base))
    assert one_line(error).startswith(f"{base}: out of memory on the ")


def roomless() -> None:
    """Make known models of the type `roomless`: Llamas for which there is no memory at the step `short_at`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class RoomlessConfig(LlamaConfig):
        model_type = "roomless"

    class Roomless(LlamaForCausalLM):
        config_class = RoomlessConfig

        def short(self, step: str) -> None:
            if self.config.short_at == step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")

        def to(self, *args: Any, **given: Any) -> Any:
            self.short("moving")
            return super().to(*args, **given)

        def get_submodule(self, target: str) -> Any:
            if not self.training:  # or it is still being loaded
                self.short("merging")
            return super().get_submodule(target)

    AutoConfig.register("roomless", RoomlessConfig, exist_ok=True)
    AutoModelForCausalLM.register(RoomlessConfig, Roomless, exist_ok=True)


@pytest.mark.parametrize(("dtype", "takes"), [("float32", "32.0 GB in float32"), ("bfloat16", "16.0 GB in bfloat16")])
def test_a_base_that_does_not_fit_where_it_is_moved_to_says_what_it_takes(
    dtype: str, takes: str, tiny_folder: Tiny, tmp_path: Path
) -> None:
    roomless()
    short = {"model_type": "roomless", "short_at": "moving"}
    base = configured(shutil.copytree(tiny_folder("smollm"), tmp_path / "base"), **short)
    with (base / "more.safetensors").open("wb") as file:
        file.truncate(32 * 10**9)  # a hole, which takes no disk
    with pytest.raises(ModelError, match=f"its weights alone take {takes}") as error:
        LocalBackend(settings(base, models__dtype=dtype))
    # Half the bytes are advice only for those that take all of them.
    assert ("--dtype bfloat16" in one_line(error)) == (dtype == "float32")


def test_an_adapter_that_there_is_no_memory_to_merge_is_one_line_too(tiny_folder: Tiny, tmp_path: Path) -> None:
    roomless()
    adapter = untrained(tiny_folder("smollm"), tmp_path / "adapter")
    base = configured(shutil.copytree(tiny_folder("smollm"), tmp_path / "base"), model_type="roomless", short_at="")
    assert LocalBackend(settings(base, adapter=adapter)).decide(["Sort"])
    with pytest.raises(ModelError, match="out of memory") as error:
        LocalBackend(settings(configured(base, short_at="merging"), adapter=adapter))
    one_line(error)


def test_other_failures_of_loading_stay_what_they_are(tiny_folder: Tiny, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder("smollm"), tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        LocalBackend(settings(base))


def test_a_choice_says_how_likely_the_whole_decision_is(tiny_folder: Tiny) -> None:
    router = LocalBackend(
        settings(tiny_folder("smollm"), decision__roles="a,b", decision__step_bound=3, alternatives=99)
    )
    for choice in router.decide(["Sort a list", "Migrate the service and test it"]):
        assert choice.alternatives is not None and len(choice.alternatives) == router.space.size()
        [own] = [one.probability for one in choice.alternatives if one.decision == choice.decision]
        assert choice.decision_probability == pytest.approx(own) and choice.probability is not None
        # Every topology but `single` of one role has several decisions, which share its probability.
        assert 0 < choice.decision_probability < choice.probability
    only = LocalBackend(settings(tiny_folder("smollm"), decision__roles="a")).decide(["Sort"])
    assert [choice.decision_probability for choice in only] == [1.0]


def test_a_row_has_the_decisions_probability_only_where_it_is_known() -> None:
    heuristic = HeuristicBackend(settings(Path("none"))).decide(["Sort a list"])[0]
    assert heuristic.decision_probability is None
    row = Prediction(task_id="t", decision=heuristic.decision, backend="b", model="m", milliseconds=1)
    assert "decision_probability" not in row.model_dump()
    assert row.model_copy(update={"decision_probability": 0.5}).model_dump()["decision_probability"] == 0.5


def test_what_tasks_are_shortened_to_is_what_holds_here(tiny_folder: Tiny, tmp_path: Path) -> None:
    long = "Sort it and merge it " * 500
    for context, words in ((8192, "2048 tokens, as in training"), (600, "600 tokens, all that the model sees at once")):
        base = configured(
            shutil.copytree(tiny_folder("smollm"), tmp_path / str(context)), max_position_embeddings=context
        )
        said = Recorder()
        [choice] = LocalBackend(settings(base), said).decide([long])
        assert choice.usage is not None and choice.usage.prompt_tokens <= int(words.split()[0])
        assert said.warnings == [f"tasks that take more than {words}, are shortened in their middle"]


def test_tasks_that_memory_does_not_hold_together_are_decided_in_turn(tiny_folder: Tiny) -> None:
    from tests.training import Recorder
    from tests.unit.test_decoding import holding

    base, said = tiny_folder("smollm"), Recorder()
    backend = LocalBackend(settings(base), said)
    texts = [f"Sort list {i}." for i in range(6)]
    expected = [choice.decision for choice in backend.decide(texts)]
    with holding(backend.model, 1):
        assert [choice.decision for choice in backend.decide(texts)] == expected
        backend.decide(texts)
    assert said.warnings == ["memory holds 1 tasks at once, not --batch-size 32"]
    with holding(backend.model, 0), pytest.raises(ModelError) as error:
        backend.decide(texts)
    assert one_line(error).startswith(f"{base}: out of memory on the ")
