"""How much of a GPU a rank's pool may take: the largest steps, interpreted where there is no GPU, and the sum of its parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.layout import BlockLayout, PoolSizes
from tests.shared.checkpoints import make_checkpoint
from workers.config import ResolvedWorker, WorkerConfig
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending
from workers.model.config.architectures import read_config
from workers.parallel.in_process import Solo
from workers.sampling.constraints import Constraints
from workers.sampling.grammar import load_tokenizer

pytest.importorskip("triton")

from workers.execution.gpu import parts as gpu
from workers.execution.gpu.graphs import chunk_ladder, ladder
from workers.execution.spec import RunnerSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = WorkerConfig(
    model="", dtype="float32", block_size=16, max_num_seqs=3, max_num_batched_tokens=40, attention="triton", cuda_graphs=False
)
MIB = 1 << 20


def parts(config: WorkerConfig, max_model_len: int = 64, host_ranks: int = 1) -> tuple[gpu.GpuParts, BlockLayout]:
    model = read_config(Path(config.model))
    shape = model.shard(0, 1)
    layout = BlockLayout(config.block_size, shape.layers, shape.kv_heads, shape.head_dim, config.dtype)
    constraints = Constraints(partial(load_tokenizer, Path(config.model), shape.vocab, model.eos_ids), shape.vocab, 1)
    resolved = ResolvedWorker(max_model_len=max_model_len, device=DEVICE.type, host_ranks=host_ranks)
    return gpu.GpuParts(RunnerSpec(config, resolved, model, layout, Solo(), torch.float32, constraints)), layout


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    return replace(CONFIG, model=str(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **sizes)))


@pytest.mark.few(1)
@pytest.mark.parametrize(("max_model_len", "written"), [(64, [16, 16, 8]), (25, [16, 8, 16])])
def test_the_largest_step_fills_the_budget(
    config: WorkerConfig, max_model_len: int, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak decides the pool: it has as many tokens as a step may have, of several prompts where one cannot be so long, and
    touches no block but those of the step and the one for padding."""
    made, layout = parts(config, max_model_len)
    made.load(lambda *_: None)
    blocks = layout.blocks_for(config.max_num_batched_tokens)
    runner = made._make(PoolSizes(blocks + 2))
    launched = []
    execute = runner.execute

    def note(batch: ResidentBatch, step: Launched) -> Pending:
        launched.append(int(step.plan.counts.sum()))
        return execute(batch, step)

    monkeypatch.setattr(runner, "execute", note)
    runner.pool.data.fill_(float("nan"))
    made._run_largest_step(runner)
    assert launched == [config.max_num_batched_tokens]
    has = ~torch.isnan(runner.pool.data).flatten(-2).any(-1)  # [block, layer, k|v, slot]
    assert bool((has == has[:, :1, :1]).all()), "all layers, keys and values alike"
    assert has[:, 0, 0].sum(-1).tolist() == [*written, 0, 0, 1]


def test_a_small_pool_is_not_written_beyond(config: WorkerConfig) -> None:
    """Kernels are compiled by prompts of up to 100 tokens, though there may be a single block."""
    made, _ = parts(config)
    made.load(lambda *_: None)
    runner = made._make(PoolSizes(1))
    runner.pool.data.fill_(float("nan"))
    made._run_prefill(runner, 20)
    assert not torch.isnan(runner.pool.data[0]).any()
    assert torch.isnan(runner.pool.data[1]).all(), "the block for padding"


def test_the_cores_are_shared_with_the_ranks_of_this_host_alone(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other hosts have their own to compile with."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert parts(replace(config, groups=6))[0]._compilers.size == 8
    assert parts(replace(config, groups=6), host_ranks=3)[0]._compilers.size == 4


def test_a_model_of_two_tokens_is_measured_as_well(config: WorkerConfig) -> None:
    """Its prompts are of one, which were a decode: a little more than any step has, rather than nothing."""
    made, _ = parts(config, max_model_len=2)
    made.load(lambda *_: None)
    runner = made._make(PoolSizes(4))
    runner.pool.data.fill_(float("nan"))
    made._run_largest_step(runner)
    assert not torch.isnan(runner.pool.data[:3, :, :, :2]).any(), "a prompt in each row"


@dataclass
class Device:
    """A GPU as torch tells of it, while `graphs` are captured."""

    total: int = 1000 * MIB
    free: int = 700 * MIB
    reserved: int = 200 * MIB
    peak: int = 150 * MIB
    graphs: int = 0

    def cuda(self) -> SimpleNamespace:
        return SimpleNamespace(
            reset_peak_memory_stats=lambda: None, synchronize=lambda: None, empty_cache=lambda: None,
            mem_get_info=lambda: (self.free - self.graphs, self.total), memory_reserved=lambda: self.reserved,
            max_memory_allocated=lambda: self.peak,
        )  # fmt: skip


class FakeRunner:
    """Captures graphs: the first of a kind takes 30 MiB, each other one 2."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def capture(self, decodes: Sequence[int], tokens: Sequence[int]) -> None:
        self._device.graphs = (28 + 2 * max(len(decodes), len(tokens))) * MIB

    def __del__(self) -> None:
        self._device.graphs = 0


@pytest.mark.few(1)
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_keeps_what_steps_graphs_and_others_need(
    config: WorkerConfig, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """total * fraction - what others hold - the peak without the probing pool - all graphs - a margin."""
    made, layout = parts(replace(config, cuda_graphs=graphs))
    device = Device()
    monkeypatch.setattr(made, "_make", lambda blocks: FakeRunner(device))  # noqa: ARG005
    monkeypatch.setattr(made, "_compile", lambda runner: None)  # noqa: ARG005
    monkeypatch.setattr(made, "_run_largest_step", lambda runner: None)  # noqa: ARG005
    monkeypatch.setattr(torch, "cuda", device.cuda())
    probe = (layout.blocks_for(config.max_num_batched_tokens) + 1) * layout.block_bytes
    kinds = max(len(ladder(config.max_num_seqs)), len(chunk_ladder(config.max_num_batched_tokens)))
    captured = (30 + 2 * kinds) * MIB if graphs else 0
    others = device.total - device.free - device.reserved
    assert made.measure() == int(device.total * 0.9) - others - (device.peak - probe) - captured - gpu.MARGIN_BYTES
