"""Attention over the paged KV cache: one interface (`base`), several backends, one place that chooses (`select_backend`).

Imports torch; a backend's own dependencies (triton, flash-attn, a compiler) only when that backend is considered.
"""

import logging

from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend
from workers.attention.cpu import CpuAttention

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "flash", "triton", "cpu")


def select_backend(name: str, *, pool: KVPool, heads: int) -> AttentionBackend:
    """Bind the named backend, or the best one that works here, to this rank's pool."""
    return CpuAttention(pool, heads)
