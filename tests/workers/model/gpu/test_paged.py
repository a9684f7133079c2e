"""As a GPU's runner calls it, a class of transformers says the same: queries padded for kernels of one head size, which know
the layers' forms, keys and values written first. What the kernels do not compute is refused before anything starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.zoo import make
from cluster.config import EngineConfig
from cluster.resolve import resolve
from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.decoding import BLOCK_SIZE, BLOCKS_EACH, SEQUENCES, make_step
from tests.workers.model.transformers.ranks import Ranks
from workers.attention.cpu.varied import VariedAttention
from workers.model.config.fields import CheckpointError
from workers.model.decoders.transformers.decoder import load_transformers
from workers.model.transformers.config import read_transformers
from workers.parallel.in_process import Solo
from workers.step import StepInput

pytest.importorskip("triton")  # the interface comes from a room that has its kernels

LENGTH = 100
STEPS = [
    [(0, 0, [7, 8, 9]), (1, 0, list(range(20, 57)))],
    [(0, 3, [4]), (1, 37, [5]), (2, 0, [111, 112]), (3, 0, [5] * 3)],
    [(0, 4, [9]), (1, 38, [3]), (2, 2, [1]), (3, 3, [2])],
]


@dataclass(frozen=True)
class Attends:
    """What a kernel does: the step's keys and values stand in the pool, and it knows each layer's form."""

    attend: Callable[[int, Tensor, Tensor | None], Tensor]
    turns: bool = True  # offered, and not taken

    def __call__(self, layer: int, query: Tensor, turn: object = None, sinks: Tensor | None = None) -> Tensor:
        assert turn is None
        return self.attend(layer, query, sinks)


@pytest.mark.parametrize("kind", ["llama", "granite", "deepseek_v3", "llama4_text", "gemma2", "gpt_oss", "gemma4_text"])
def test_it_equals_the_plain_path(kind: str, tmp_path: Path) -> None:
    """A scale of its own (granite), values narrower than keys (deepseek_v3), positions counted from the cache and chunks
    (llama4_text), windows and caps (gemma2), sinks (gpt_oss), layers whose heads differ (gemma4_text)."""
    from workers.model.gpu.paged import PagedTransformers

    path = make(kind, tmp_path / kind)
    config = read_transformers(path)
    shape = config.shard(0, 1)
    layout = BlockLayout(BLOCK_SIZE, shape.layers, shape.kv_heads, shape.head_dim, "float32")
    pool, scratch = (KVPool(layout, SEQUENCES * BLOCKS_EACH, "cpu") for _ in range(2))
    decoder = load_transformers(path, config, Solo(), torch.float32, torch.device("cpu"), None, LENGTH)
    shapes = [heads.even for heads in decoder.heads]
    scratch_attention = VariedAttention(scratch, shapes, decoder.forms)
    paged = PagedTransformers(decoder, pool)

    def run(step: StepInput, *, all_tokens: bool) -> Tensor:
        plan = scratch_attention.plan(step)

        def attend(layer: int, query: Tensor, sinks: Tensor | None) -> Tensor:
            own = shapes[layer]
            assert query.shape[1:] == (own.heads, own.key_dim)
            rows = (view.flatten(0, 1)[step.slots].flatten(1) for view in (pool.keys(layer), pool.values(layer)))
            key, value = (row[:, : own.width].view(-1, own.kv_heads, own.key_dim) for row in rows)
            return scratch_attention.attend(layer, query, key, value, step, plan, sinks)

        tokens, positions, slots, rows = (getattr(step, name).int() for name in ("tokens", "positions", "slots", "sample_at"))
        return paged.logits(tokens, positions, slots, Attends(attend), None if all_tokens else rows)

    with Ranks(path, positions=LENGTH) as plain:
        for chunks in STEPS:
            step = make_step(chunks)
            expected = plain.logits(step)
            decodes = len(chunks) == len(step.tokens)
            got = run(step, all_tokens=decodes)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_no_value_stays_that_is_not_finite(tmp_path: Path) -> None:
    """As the kernels of Manta's own layers have it: `workers.kernels.heads.finite`."""
    from workers.model.gpu.paged import PagedTransformers

    path = make("llama", tmp_path / "llama")
    config = read_transformers(path)
    shape = config.shard(0, 1)
    pool = KVPool(BlockLayout(BLOCK_SIZE, shape.layers, shape.kv_heads, shape.head_dim, "float32"), 1, "cpu")
    pool.data.zero_()
    decoder = load_transformers(path, config, Solo(), torch.float32, torch.device("cpu"), None, LENGTH)
    attend = Attends(lambda layer, query, sinks: torch.full_like(query, torch.nan))  # noqa: ARG005
    tokens = torch.tensor([7, 8], dtype=torch.int32)
    PagedTransformers(decoder, pool).logits(tokens, tokens - 7, tokens - 7, attend)
    assert pool.keys(0).isfinite().all()
    assert pool.keys(shape.layers - 1)[0, :2].isnan().all()
    assert pool.values(shape.layers - 1).isfinite().all()


def test_what_kernels_do_not_compute(tmp_path: Path) -> None:
    path = make("gemma", tmp_path / "gemma", head_dim=520)
    config = EngineConfig(model=str(path))
    resolve(config, "cpu")
    with pytest.raises(CheckpointError, match=r"GemmaForCausalLM: layer 0 has heads of 520 numbers, .* up to 512: .* cpu$"):
        resolve(config, "cuda")


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text", "gpt_oss", "llama4_text"])
def test_layers_of_every_form_are_served_on_a_gpu(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / kind)
    assert resolve(EngineConfig(model=str(path)), "cuda").max_model_len >= 512
