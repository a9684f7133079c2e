"""Loops' stages are as many as the device's shared memory holds."""

import pytest
import torch

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool

pytest.importorskip("triton")

from workers.kernels import launch
from workers.kernels.attention import chunks, decode_config
from workers.kernels.attention.spans import span_bytes
from workers.kernels.launch import INTERPRETED_BYTES, RESERVED_BYTES, fitting_stages
from workers.kernels.products.tilings import choose

CPU = torch.device("cpu")
ADA = 99 << 10  # of an L4, an L40S, and what is sold for games
SHAPES = [
    shape
    for width, inner in ((1024, 3072), (4096, 12288), (8192, 28672))
    for shape in ((width * 3 // 2, width, False), (width, width, False), (inner, width, True), (width, inner, False))
]


@pytest.mark.parametrize("room", [ADA, INTERPRETED_BYTES])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_products(bits: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_bytes", lambda _: room)
    for n, k, swiglu in SHAPES:
        for tokens in (3, 8, 32, 64, 256):
            config = choose(n, k, tokens, torch.bfloat16, swiglu, bits)
            if config is None or not config.parts:
                continue
            stage = config.stage_bytes(min(config.tokens, max(8, tokens)), bits, swiglu)
            stages = fitting_stages(config.stages, stage, CPU)
            assert 2 <= stages <= config.stages
            assert (stages - 1) * stage + RESERVED_BYTES <= room
            assert stages == config.stages or room == ADA, "an H200 has what was measured there"


@pytest.mark.parametrize("room", [ADA, INTERPRETED_BYTES])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
def test_attention(head_dim: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_bytes", lambda _: room)
    for early in (False, True):
        monkeypatch.setattr(decode_config, "may_start_early", lambda _, early=early: early)
        for dtype, query in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            pool = KVPool(BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=head_dim, dtype=dtype), 1, CPU)
            for rows in (1, 64, 256):
                decode = decode_config.choose_config(pool, rows, query, head_dim)
                assert (decode.stages - 1) * span_bytes(pool, decode.keys, head_dim) + RESERVED_BYTES <= room
            chunk = chunks.choose_config(pool, query, head_dim)
            beside = chunk.rows * head_dim * query.itemsize
            assert (chunk.stages - 1) * span_bytes(pool, chunk.keys, head_dim) + beside + RESERVED_BYTES <= room
