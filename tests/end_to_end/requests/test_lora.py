"""LoRA adapters: each gives the greedy tokens of transformers on weights into which it has been merged, whatever else runs."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.zoo import make
from deploy import LLM
from deploy.config.load import ConfigError
from deploy.doors.python.sources import Source
from deploy.frontend.outputs import GenerationError, RequestOutput
from deploy.text.content import PromptError
from tests.end_to_end.engines import QWEN2, QWEN3, greedy, open_llm
from tests.end_to_end.reference import Reference
from tests.shared.adapters import OF_EXPERTS, make_adapter, make_stacked, merge
from tests.shared.checkpoints import make_checkpoint

TOKENS = 10
PROMPTS = [list(range(first, first + 20 + first)) for first in range(1, 9)]


@dataclass
class Adapted:
    """A checkpoint, adapters of it, and a reference for each; None: for the checkpoint alone."""

    base: Path
    folders: dict[str, Path]
    references: dict[str | None, Reference]

    def require(
        self, outputs: list[RequestOutput], names: list[str | None], prompts: list[list[int]], count: int = TOKENS
    ) -> None:  # fmt: skip
        for output, name, prompt in zip(outputs, names, prompts, strict=True):
            assert output.outputs[0].token_ids == self.references[name].greedy(prompt, count), name


@pytest.fixture(scope="module", params=[QWEN3, QWEN2])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("lora")
    base = make_checkpoint(root / "base", request.param)
    folders = {
        "all": make_adapter(root / "all", base, rank=4, seed=1),
        "large": make_adapter(root / "large", base, rank=30, seed=2, ranks={"up_proj": 3}, use_rslora=True),
        "some": make_adapter(root / "some", base, rank=8, seed=3, targets=("v_proj", "down_proj")),
    }
    references: dict[str | None, Reference] = {None: Reference(base)}
    for name, folder in folders.items():
        references[name] = Reference(merge(root / f"{name}-merged", base, folder))
    return Adapted(base, folders, references)


@pytest.fixture
def opened(adapted: Adapted) -> Iterator[LLM]:
    """With one place for three adapters."""
    with open_adapted(adapted, max_loras=1) as llm:
        yield llm


def open_adapted(adapted: Adapted, **options: object) -> LLM:
    named = {name: str(folder) for name, folder in adapted.folders.items()}
    usual = {"lora": named, "max_lora_rank": 32, "lora_experts": True, "max_num_batched_tokens": 32}
    return open_llm(adapted.base, **usual | options)  # type: ignore[arg-type]


def ask(llm: LLM, prompts: list[list[int]], names: list[str | None] | str | None, count: int = TOKENS) -> list[RequestOutput]:
    sources: list[Source] = list(prompts)
    return llm.generate(sources, greedy(count), lora=names, progress=False)


MIXED: list[str | None] = ["all", None, "large", "some", "all", "large", None, "some"]


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("slots", [3, 1])
def test_several_adapters_and_none_in_one_batch(adapted: Adapted, size: int, slots: int) -> None:
    with open_adapted(adapted, size=size, max_loras=slots) as llm:
        adapted.require(ask(llm, PROMPTS, MIXED), MIXED, PROMPTS)
        named: list[Source] = [{"prompt_token_ids": PROMPTS[0], "lora": "all"}, {"prompt_token_ids": PROMPTS[1], "lora": None}]
        outputs = llm.generate(named, greedy(TOKENS), lora="some", progress=False)
        adapted.require(outputs, ["all", "some"], PROMPTS[:2])
    told = {tuple(adapted.references[name].greedy(PROMPTS[0], TOKENS)) for name in (None, *adapted.folders)}
    assert len(told) == 4, "adapters that change nothing would show nothing"


ALONE, BY_WIDTH, BY_EXPERT = {"size": 1}, {"size": 2}, {"size": 2, "enable_expert_parallel": True}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", (BY_WIDTH, BY_EXPERT)), ("gpt_oss", (BY_WIDTH, BY_EXPERT)), ("qwen2_moe", (ALONE, BY_EXPERT)),
     ("mixtral", (ALONE, BY_WIDTH))],
)  # fmt: skip
def test_experts_one_by_one_and_in_stacks(family: str, settings: Iterable[dict[str, Any]], tmp_path: Path) -> None:
    """gpt-oss has experts in stacks alone, and biases."""
    options: dict[str, Any] = {"mlp_only_layers": [0], "num_hidden_layers": 3} if family == "qwen3_moe" else {}
    base = make(family, tmp_path / "base", **options)
    folders = {
        "one by one": make_adapter(tmp_path / "one", base, targets=OF_EXPERTS),
        "stacked": make_stacked(tmp_path / "stacked", base, rank=3, seed=2),
        "turned": make_stacked(tmp_path / "turned", base, rank=6, seed=3, turned=True),
    }
    references: dict[str | None, Reference] = {None: Reference(base)}
    for name, folder in folders.items():
        references[name] = Reference(merge(tmp_path / f"{name}-merged", base, folder))
    adapted, names = Adapted(base, folders, references), ["one by one", None, "stacked", "turned"]
    for setting in settings:
        with open_adapted(adapted, max_loras=3, **setting) as llm:
            adapted.require(ask(llm, PROMPTS[:4], names), names, PROMPTS[:4])
    assert len({tuple(reference.greedy(PROMPTS[0], TOKENS)) for reference in references.values()}) == 4, "all show"


def test_a_prefix_is_shared_with_the_same_adapter_alone(adapted: Adapted, opened: LLM) -> None:
    prompt = list(range(70))
    names: list[str | None] = [None, "all", "some", None, "all", "some"]
    hits = []
    for name in names:
        [output] = ask(opened, [prompt], name)
        adapted.require([output], [name], [prompt])
        hits.append(output.num_cached_tokens or 0)
    assert hits[:3] == [0, 0, 0]
    assert min(hits[3:]) >= 64


@pytest.mark.few(1)
@pytest.mark.parametrize("slots", [2, 1])
def test_who_is_preempted_goes_on_with_its_adapter(adapted: Adapted, slots: int) -> None:
    prompts = [prompt[:20] for prompt in PROMPTS]
    with open_adapted(adapted, blocks=10, max_loras=slots) as llm:
        adapted.require(ask(llm, prompts, MIXED, 30), MIXED, prompts, 30)
        assert llm.stats().preemptions > 0


@pytest.mark.few(1)
def test_nobody_waits_for_a_place_whose_holder_waits_for_its_blocks(adapted: Adapted) -> None:
    """The second goes first in the order of service, so the first gets none of its blocks; and the first has the only place."""
    first, second = list(range(20)), list(range(100))
    with open_adapted(adapted, blocks=10, max_loras=1) as llm:
        under_way = llm.iterate([first], greedy(100), lora="all", priority=5)
        next(under_way)
        sources: list[Source] = [second]
        outputs = llm.generate(sources, greedy(20), lora="some", priority=0, progress=False)
        adapted.require(outputs, ["some"], [second], 20)
        adapted.require([[output for _, output in under_way][-1]], ["all"], [first], 100)


@pytest.mark.few(1)
def test_one_is_loaded_replaced_and_unloaded_while_prompts_run(adapted: Adapted, opened: LLM) -> None:
    """Those under way have what had the name when they came; nothing of it is found by those who come afterwards."""
    prompt = list(range(40))
    for name in ("all", "some"):
        opened.load_lora("changing", adapted.folders[name], load_inplace=True)
        [output] = ask(opened, [prompt], "changing")
        assert output.num_cached_tokens == 0
        adapted.require([output], [name], [prompt])
    under_way = opened.iterate([prompt], greedy(100), lora="changing")
    next(under_way)
    for taken in ("changing", "all", adapted.base.name):
        with pytest.raises(ValueError, match=f"'{taken}' (is loaded )?already"):
            opened.load_lora(taken, adapted.folders["large"])
    with pytest.raises(ValueError, match="there is a model"):
        opened.load_lora(adapted.base.name, adapted.folders["large"], load_inplace=True)
    opened.load_lora("changing", adapted.folders["large"], load_inplace=True)
    adapted.require(ask(opened, [prompt], "changing"), ["large"], [prompt])
    opened.unload_lora("changing")
    with pytest.raises(PromptError, match="changing"):
        ask(opened, [prompt], "changing")
    last = [output for _, output in under_way][-1]
    adapted.require([last], ["some"], [prompt], 100)
    with pytest.raises(KeyError, match="changing"):
        opened.unload_lora("changing")


@pytest.mark.few
@pytest.mark.parametrize("size", [1, 2])
def test_one_whose_files_are_not_what_they_were_fails_its_requests_and_no_others(
    size: int, adapted: Adapted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_adapted(adapted, size=size, max_loras=1) as llm:
        llm.load_lora("gone", shutil.copytree(adapted.folders["all"], tmp_path / "gone"))
        llm.load_lora("changed", shutil.copytree(adapted.folders["all"], tmp_path / "changed"))
        shutil.rmtree(tmp_path / "gone")
        make_adapter(tmp_path / "changed", adapted.base, seed=9)
        names: list[str | None] = ["gone", "all", None, "changed", "some"]
        with pytest.raises(GenerationError, match=r"gone|changed") as failed:
            ask(llm, PROMPTS[:5], names)
        outputs = failed.value.outputs
        assert [output.error is None for output in outputs] == [False, True, True, False, True]
        assert "'gone' cannot be read" in str(outputs[0].error)
        assert "load it again" in str(outputs[3].error)
        said = [record for record in caplog.records if "cannot be read" in record.getMessage()]
        assert len(said) == 2 * size
        assert not any(record.exc_info for record in said), "what the user's files are is no fault of ours"
        fine = [1, 2, 4]
        adapted.require([outputs[at] for at in fine], [names[at] for at in fine], [PROMPTS[at] for at in fine])
        llm.load_lora("changed", shutil.copytree(adapted.folders["large"], tmp_path / "another"), load_inplace=True)
        adapted.require(ask(llm, PROMPTS[:1], "changed"), ["large"], PROMPTS[:1])


def test_what_cannot_be_served_is_refused_before_anything_starts(adapted: Adapted, tmp_path: Path) -> None:
    named = {"a": str(adapted.folders["large"])}
    with pytest.raises(ConfigError, match="max_lora_rank"):
        open_llm(adapted.base, lora=named)
    with pytest.raises(ConfigError, match="max_loras=0"):
        open_llm(adapted.base, lora=named, max_loras=0)
    with pytest.raises(ConfigError, match="Manta's own layers"):
        open_llm(adapted.base, max_loras=1, model_implementation="transformers")
    with pytest.raises(ConfigError, match="not a folder"):
        open_llm(adapted.base, lora={"a": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="there is a model 'base' already"):
        open_llm(adapted.base, lora={"base": str(adapted.folders["all"])})
    with open_llm(adapted.base) as llm:
        with pytest.raises(ValueError, match="max_loras"):
            llm.load_lora("a", adapted.folders["all"])
        with pytest.raises(PromptError, match="there is no LoRA adapter 'a': name it"):
            ask(llm, PROMPTS[:1], "a")
