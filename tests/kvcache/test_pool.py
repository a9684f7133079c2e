"""One rank's blocks: the views that attention gets, copies of part of a block, blocks as bytes."""

import resource

import pytest
import torch

from kvcache.layout import DTYPE_BYTES, BlockLayout
from kvcache.pool import KVPool

LAYOUT = BlockLayout(block_size=16, layers=3, kv_heads=2, head_dim=8, dtype="float32")


def filled(blocks: int = 4, layout: BlockLayout = LAYOUT) -> KVPool:
    pool = KVPool(layout, blocks, "cpu")
    pool.data.copy_(torch.arange(pool.data.numel()).view(pool.data.shape))
    return pool


def test_views_are_strided_and_share_the_memory() -> None:
    pool = filled()
    for layer in range(LAYOUT.layers):
        for which, view in enumerate((pool.keys(layer), pool.values(layer))):
            assert view.shape == (4, 16, 2, 8)
            assert view.stride() == (LAYOUT.block_bytes // 4, 16, 8, 1)
            view[3, 5, 1] = -1
            assert (pool.data[3, layer, which, 5, 1] == -1).all()


@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_a_block_is_one_run_of_bytes(dtype: str) -> None:
    layout = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=8, dtype=dtype)
    pool, other = filled(layout=layout), KVPool(layout, 2, "cpu")
    content = pool.raw[3]
    assert content.shape == (layout.block_bytes,)
    assert content.data_ptr() == pool.data.data_ptr() + 3 * layout.block_bytes
    other.raw[1] = content
    assert torch.equal(other.data[1], pool.data[3])


def test_copy_takes_the_first_tokens_of_every_layer_and_nothing_else() -> None:
    for tokens in (0, 1, 7, 16):
        pool = filled()
        expected = pool.data.clone()
        expected[2, :, :, :tokens] = expected[0, :, :, :tokens]
        pool.copy(0, 2, tokens)
        assert torch.equal(pool.data, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 100, 256])
def test_a_copy_is_one_launch_and_no_wait_cuda(tokens: int) -> None:
    layout = BlockLayout(block_size=256, layers=28, kv_heads=8, head_dim=128, dtype="bfloat16")
    pool = KVPool(layout, 4, "cuda")
    pool.data[0].normal_()
    pool.copy(0, 1, tokens)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        pool.copy(0, 2, tokens)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    done = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
    assert len(done) == 1, done
    assert torch.equal(pool.data[2, :, :, :tokens], pool.data[0, :, :, :tokens])
    assert not pool.data[2, :, :, tokens:].any()


def test_memory_is_committed_only_where_it_is_written() -> None:
    layout = BlockLayout(block_size=256, layers=28, kv_heads=8, head_dim=128, dtype="bfloat16")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = KVPool(layout, layout.blocks_in(4 << 30), "cpu")
    pool.data[0].zero_()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < (1 << 20)
