"""As a GPU's runner calls it, a class of transformers says the same: queries scaled and padded for kernels of one head size,
keys and values written first. What the kernels do not compute is refused before anything starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.zoo import ZOO, make
from cluster.config import EngineConfig
from cluster.resolve import resolve
from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.decoding import BLOCK_SIZE, BLOCKS_EACH, SEQUENCES, make_step
from tests.workers.model.transformers.ranks import Ranks
from workers.cpu.attention import CpuAttention
from workers.execution.step import StepInput
from workers.model.fields import CheckpointError
from workers.model.transformers.config import read_transformers
from workers.model.transformers.decoder import load_transformers
from workers.parallel.in_process import Solo

pytest.importorskip("triton")  # the interface comes from a room that has its kernels

STEPS = [
    [(0, 0, [7, 8, 9]), (1, 0, list(range(20, 37)))],
    [(0, 3, [4]), (1, 17, [5]), (2, 0, [111, 112]), (3, 0, [5] * 3)],
    [(0, 4, [9]), (1, 18, [3]), (2, 2, [1]), (3, 3, [2])],
]


@dataclass(frozen=True)
class Attends:
    """What a kernel does: the step's keys and values stand in the pool, the scale is 1 / sqrt(head_dim)."""

    attend: Callable[[int, Tensor], Tensor]
    turns: bool = True  # offered, and not taken

    def __call__(self, layer: int, query: Tensor, turn: object = None) -> Tensor:
        assert turn is None
        return self.attend(layer, query)


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen3_moe", "deepseek_v3", "llama4_text"])
def test_it_equals_the_plain_path(kind: str, tmp_path: Path) -> None:
    """A scale of its own (granite), values narrower than keys (deepseek_v3), positions counted from the cache (llama4_text)."""
    from workers.model.transformers.paged import PagedTransformers

    path = make(kind, tmp_path / kind)
    config = read_transformers(path)
    shape = config.shard(0, 1)
    layout = BlockLayout(BLOCK_SIZE, shape.layers, shape.kv_heads, shape.head_dim, "float32")
    pool, scratch = (KVPool(layout, SEQUENCES * BLOCKS_EACH, "cpu") for _ in range(2))
    scratch_attention = CpuAttention(scratch, shape.heads)
    decoder = load_transformers(path, config, Solo(), torch.float32, torch.device("cpu"), None, 24)
    paged = PagedTransformers(decoder, pool)

    def run(step: StepInput, *, all_tokens: bool) -> Tensor:
        plan = scratch_attention.plan(step)

        def attend(layer: int, query: Tensor) -> Tensor:
            assert query.shape[1:] == (shape.heads, shape.head_dim)
            key, value = (view.flatten(0, 1)[step.slots] for view in (pool.keys(layer), pool.values(layer)))
            return scratch_attention.attend(layer, query, key, value, step, plan)

        tokens, positions, slots, rows = (getattr(step, name).int() for name in ("tokens", "positions", "slots", "sample_at"))
        return paged.logits(tokens, positions, slots, Attends(attend), None if all_tokens else rows)

    with Ranks(path) as plain:
        for chunks in STEPS:
            step = make_step(chunks)
            expected = plain.logits(step)
            decodes = len(chunks) == len(step.tokens)
            got = run(step, all_tokens=decodes)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("kind", "max_model_len", "reason"),
    [
        ("gemma3_text", 100, "Gemma3ForCausalLM: layer 0 attends with a sliding window, .* cpu, or max_model_len up to 24"),
        ("gemma2", 24, "Gemma2ForCausalLM: layer 0 attends with a soft cap, .* choose device cpu$"),
        ("gpt_oss", 24, "GptOssForCausalLM: layer 0 attends with attention sinks, .* choose device cpu$"),
        ("gemma4_text", 24, "Gemma4ForCausalLM: layer 0 attends with heads of its own"),
        ("llama4_text", 100, "Llama4ForCausalLM: layer 0 attends with chunks, .* or max_model_len up to 32"),
    ],
)
def test_what_kernels_do_not_compute(kind: str, max_model_len: int, reason: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / kind)
    config = EngineConfig(model=str(path), max_model_len=max_model_len)
    resolve(config, "cpu")
    with pytest.raises(CheckpointError, match=reason):
        resolve(config, "cuda")


def test_windows_that_nobody_reaches_are_none(tmp_path: Path) -> None:
    assert "sliding_window" in ZOO["gemma3_text"]
    path = make("gemma3_text", tmp_path / "gemma3")
    assert resolve(EngineConfig(model=str(path), max_model_len=24), "cuda").max_model_len == 24
