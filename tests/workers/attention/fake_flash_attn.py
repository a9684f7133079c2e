"""The paged calls of flash-attn 2, 3 and 4 as their documentation has them, in torch, with every argument checked.

For machines without a GPU: `install` puts one generation into `sys.modules` for the length of a test.
"""

import sys
from collections.abc import Mapping
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.workers.attention.attention_reference import dense, lowest_seen
from workers.attention.forms import Form

Told = tuple[float | None, tuple[int, int], float, Tensor | None]
"""Scale, window, soft cap, sinks."""


def install(monkeypatch: pytest.MonkeyPatch, generation: str) -> None:
    """generation: "2", "2+fa3" (generation 3 behind the names of 2), "3" or "4"; the others cannot be imported."""
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    if generation.startswith("2"):
        fake = Paged(1 if "fa3" in generation else 256)
        attributes: dict[str, object] = {
            "__version__": "2.8.3+fa3" if "fa3" in generation else "2.8.3",
            "flash_attn_varlen_func": fake.varlen_2,
            "flash_attn_with_kvcache": fake.kvcache_2,
        }
        _add(monkeypatch, "flash_attn", attributes)
    elif generation == "3":
        fake = Paged(1)
        calls: dict[str, object] = {"flash_attn_with_kvcache": fake.kvcache_3, "get_scheduler_metadata": fake.metadata_3}
        _add(monkeypatch, "flash_attn_interface", calls)
    else:
        _add(monkeypatch, "flash_attn", {})
        _add(monkeypatch, "flash_attn.cute", {"flash_attn_varlen_func": Paged(1).varlen_4})


def _add(monkeypatch: pytest.MonkeyPatch, name: str, attributes: Mapping[str, object]) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class Paged:
    def __init__(self, block_multiple: int) -> None:
        self._block_multiple = block_multiple

    def varlen_2(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        *, causal: bool = False, block_table: Tensor, softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_k[0] == 0
        lens = cu_seqlens_k.diff()
        assert lens.max() == max_seqlen_k
        told = softmax_scale, window_size, softcap, None
        return self._attend(q, k, v, cu_seqlens_q, max_seqlen_q, lens.int(), block_table, causal, told)

    def kvcache_2(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool = False,
        softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        told = softmax_scale, window_size, softcap, None
        return self._batched(q, k_cache, v_cache, cache_seqlens, block_table, causal, told)

    def kvcache_3(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor, causal: bool = False,
        cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None, scheduler_metadata: Tensor | None = None,
        softmax_scale: float | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        told = softmax_scale, window_size, softcap, None
        if cu_seqlens_q is None:
            if scheduler_metadata is not None:  # it must have been made for this very batch and this width of the table
                assert (window_size, softcap) == ((-1, -1), 0.0), "it was made for other attention"
                facts = [*cache_seqlens.tolist(), page_table.shape[1] * k_cache.shape[1], q.shape[2], *k_cache.shape[1:]]
                assert scheduler_metadata.tolist() == facts
            return self._batched(q, k_cache, v_cache, cache_seqlens, page_table, causal, told)
        assert max_seqlen_q is not None
        return self._attend(q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, cache_seqlens, page_table, causal, told)

    def metadata_3(
        self, *, batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
        cache_seqlens: Tensor, qkv_dtype: torch.dtype, block_size: int, causal: bool,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert max_seqlen_q == 1
        assert len(cache_seqlens) == batch_size
        assert qkv_dtype in (torch.float16, torch.bfloat16)
        facts = [*cache_seqlens.tolist(), max_seqlen_k, num_heads_q, block_size, num_heads_kv, headdim]
        return torch.tensor(facts, dtype=torch.int32)

    def varlen_4(
        self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor,
        page_table: Tensor, causal: bool = False, softmax_scale: float | None = None,
        window_size: tuple[int | None, int | None] = (None, None), softcap: float = 0.0, learnable_sink: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        told = softmax_scale, (-1 if window_size[0] is None else window_size[0], 0), softcap, learnable_sink
        return self._attend(q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, page_table, causal, told), None

    def _batched(self, q: Tensor, k: Tensor, v: Tensor, lens: Tensor, table: Tensor, causal: bool, told: Told) -> Tensor:
        batch, queries, heads, dim = q.shape
        starts = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32)
        return self._attend(q.reshape(-1, heads, dim), k, v, starts, queries, lens, table, causal, told).view(q.shape)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_query: int, lens: Tensor, table: Tensor, causal: bool,
        told: Told,
    ) -> Tensor:  # fmt: skip
        scale, (left, right), softcap, sinks = told
        form = Form(scale or q.shape[2] ** -0.5, left + 1 if left >= 0 else None, None, softcap or None, sinks is not None)
        assert right <= 0
        blocks, block_size, kv_heads, dim = k.shape
        assert v.shape == k.shape
        assert q.dim() == 3
        assert q.shape[2] == dim
        assert q.shape[1] % kv_heads == 0
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == table.stride(-1) == 1
        assert block_size % self._block_multiple == 0
        assert starts.dtype == lens.dtype == table.dtype == torch.int32
        assert len(starts) - 1 == len(lens) == len(table)
        assert starts[0] == 0
        assert starts[-1] == len(q)
        assert starts.diff().max() == max_query
        assert causal
        out = torch.empty_like(q)
        for row, (start, stop) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
            context = int(lens[row])
            lowest = lowest_seen(form, context - (stop - start))
            first = lowest // block_size  # what lies before it is not read
            used = table[row, first : -(-context // block_size)].long()
            assert used.max() < blocks
            skipped = first * block_size
            key, value = (cache[used].flatten(0, 1)[: context - skipped].double() for cache in (k, v))
            before = key.new_zeros(skipped, kv_heads, dim)
            key, value = torch.cat((before, key)), torch.cat((before, value))
            key[:lowest], value[:lowest] = 0, 0
            out[start:stop] = dense(q[start:stop].double(), key, value, form, sinks).to(q.dtype)
        return out
