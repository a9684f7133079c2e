"""Rows of several LoRA adapters, also of experts, and of none: graphs say what single launches say, and each what transformers
says of weights into which its adapter was merged."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.models.zoo import make
from scheduler.protocol.messages import Adapter
from scheduler.protocol.sampling import SamplingParams
from tests.end_to_end.prompts import OUTPUTS, PROMPTS
from tests.gpu.judge import Judge
from tests.gpu.works import GPU, SHAPE, VOCAB, checkpoint, constrained, loop
from tests.shared.adapters import make_adapter, make_stacked, merge
from tests.shared.tokenizers import EOS, byte_level, save
from tests.workers.stepping import Work
from workers.config import LoraRoom
from workers.execution.gpu.runner import GpuRunner
from workers.model.config.architectures import read_config
from workers.model.lora.files import read_adapter

pytestmark = GPU

RANKS = {"low": 4, "high": 64, "odd": 23}


Judges = dict[str | None, tuple[Judge, Adapter | None]]


@pytest.fixture(scope="module", params=["qwen3", "qwen2_moe", "gpt_oss"])
def judges(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judges:
    """Of the checkpoint alone (None), and of each adapter."""
    root, made = tmp_path_factory.mktemp("lora"), make_stacked if request.param == "gpt_oss" else make_adapter
    if request.param == "qwen3":
        base = checkpoint(root / "base")
    else:
        base = save(byte_level(), make(request.param, root / "base", vocab_size=VOCAB, eos_token_id=EOS, **SHAPE))
    found: Judges = {None: (Judge(base), None)}
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        folder = made(root / name, base, rank=rank, seed=seed)
        adapter = read_adapter(name, folder, read_config(base), LoraRoom(1, 64, experts=True)).adapter
        found[name] = Judge(merge(root / f"{name}-merged", base, folder)), adapter
    return found


@pytest.mark.parametrize(("slots", "largest"), [(3, 64), (1, 64), (2, 32)])
def test_float32_equals_transformers_with_graphs_and_without(slots: int, largest: int, judges: Judges) -> None:
    """Up to 32 a rank's own launches are none in steps of few rows (`docs/lora.md`)."""
    path: Path = judges[None][0].path
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 512, "max_model_len": 512}
    names = [name for name in judges if RANKS.get(name or "", 0) <= largest] * len(PROMPTS)
    works = [
        Work(prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), adapter=judges[name][1])
        for prompt, count, name in zip(PROMPTS, OUTPUTS, names, strict=False)
    ]
    grammars = [replace(constrained(12, seed), adapter=judges[name][1]) for seed, name in enumerate(dict.fromkeys(names))]
    with contextlib.closing(loop(path, **options, max_loras=slots, max_lora_rank=largest, lora_experts=True)) as rank:
        runner = rank.rank.executor
        assert isinstance(runner, GpuRunner)
        assert runner._adapted is not None
        graphs, ruled = rank.generate(works), rank.generate(grammars)
        with rank.eager():
            eager, eager_ruled = rank.generate(works), rank.generate(grammars)
    for lease, other, name in zip(graphs, eager, names, strict=False):
        judges[name][0].require_best(lease, f"{name}, graphs")
        judges[name][0].require_same(lease, other, f"{name}, graphs and single launches")
    assert [lease.tokens for lease in ruled] == [lease.tokens for lease in eager_ruled]
    for name in dict.fromkeys(names):
        judges[name][0].require_rare()
