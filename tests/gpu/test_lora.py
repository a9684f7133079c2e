"""Rows of several LoRA adapters and of none: graphs say what single launches say, and each what transformers says of weights
into which its adapter was merged."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler.protocol.messages import Adapter
from scheduler.protocol.sampling import SamplingParams
from tests.adapters import make_adapter, merge
from tests.end_to_end.prompts import OUTPUTS, PROMPTS, draw
from tests.gpu.judge import Judge
from tests.gpu.works import GPU, checkpoint, constrained, loop
from tests.workers.stepping import Lease, Work
from workers.execution.gpu.runner import GpuRunner
from workers.kernels.products.matvec import Tiling, choose_adapted
from workers.model.config.architectures import read_config
from workers.model.gpu import fused
from workers.model.lora.files import read_adapter

pytestmark = GPU

RANKS = {"low": 4, "high": 64, "odd": 23}


Judges = dict[str | None, tuple[Judge, Adapter | None]]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return make_judges(tmp_path_factory.mktemp("lora"))


def make_judges(root: Path, **fields: Any) -> Judges:
    """Of the checkpoint alone (None), and of each adapter."""
    base = checkpoint(root / "base", **fields)
    found: Judges = {None: (Judge(base), None)}
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        folder = make_adapter(root / name, base, rank=rank, seed=seed)
        adapter = read_adapter(name, folder, read_config(base), 64).adapter
        found[name] = Judge(merge(root / f"{name}-merged", base, folder)), adapter
    return found


@pytest.mark.parametrize("slots", [3, 1])
def test_float32_equals_transformers_with_graphs_and_without(slots: int, judges: Judges) -> None:
    path: Path = judges[None][0].path
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 512, "max_model_len": 512}
    names = [*judges] * len(PROMPTS)
    works = [
        Work(prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), adapter=judges[name][1])
        for prompt, count, name in zip(PROMPTS, OUTPUTS, names, strict=False)
    ]
    grammars = [replace(constrained(12, seed), adapter=judges[name][1]) for seed, name in enumerate(judges)]
    with contextlib.closing(loop(path, **options, max_loras=slots, max_lora_rank=64)) as rank:
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
    for judge, _ in judges.values():
        judge.require_rare()


@pytest.mark.skipif(not fused.ADAPTERS_BESIDE, reason="its first step reads where it may not, and takes the device with it")
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 12), ("bfloat16", 48), ("float16", 12)])
def test_in_16_bits_tokens_are_as_likely_as_in_transformers(
    dtype: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products of few tokens add the part of their adapters themselves, which float32 has no kernel for."""
    judges = make_judges(tmp_path, sharp=False, intermediate_size=256)  # of 96, down's would be left to the library
    chosen: list[Tiling | None] = []

    def noted(*how: Any) -> Tiling | None:
        chosen.append(choose_adapted(*how))
        return chosen[-1]

    monkeypatch.setattr(fused, "choose_adapted", noted)
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0)
    names = [name for name, _ in zip([*judges] * rows, range(rows), strict=False)]
    works = [Work(draw(7 + number, seed=number), greedy, adapter=judges[name][1]) for number, name in enumerate(names)]
    options = {"max_num_seqs": rows, "max_num_batched_tokens": 2048, "max_model_len": 256, "max_loras": 3, "max_lora_rank": 64}
    with contextlib.closing(loop(judges[None][0].path, dtype=dtype, **options)) as rank:
        graphs = rank.generate(works)
        captured = len(chosen)
        with rank.eager():
            eager = rank.generate(works)
    assert len(chosen) > captured > 0, "both reach it"
    assert None not in chosen
    for leases in (graphs, eager):
        off = torch.cat([_off(judges[name][0], lease) for lease, name in zip(leases, names, strict=True)])
        adapted = [lease for lease, name in zip(leases, names, strict=True) if name is not None]
        others = torch.cat([_off(judges[None][0], lease) for lease in adapted])
        assert float(off.mean()) < 0.02 < 0.1 < float(others.mean()), "adapters that change nothing would show nothing"


def _off(judge: Judge, lease: Lease) -> torch.Tensor:
    """[output]: how far the log-probability of each token is from the reference's."""
    expected = judge.scores(lease).log_softmax(-1)[range(len(lease.tokens)), lease.tokens]
    return (torch.tensor([each.logprob for each in lease.logprobs]) - expected).abs()
