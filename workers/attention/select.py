"""Which attention backend a rank uses: one interface (`base`), several backends, one place that chooses.

Imports torch. What a backend alone needs (triton, flash-attn, a compiler) is touched only when it is considered.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend, PagedAttention
from workers.attention.flash import FlashAttention, load_kernels
from workers.attention.mixed import MixedAttention
from workers.cpu.attention import CpuAttention
from workers.cpu.native import NativeAttention, NativeUnavailable

if TYPE_CHECKING:
    from workers.attention.triton import TritonAttention

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "flash", "triton", "cpu")
CACHE_FOLDER = Path("~/.cache/manta")
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which on Triton converts float8_e4m3fn."""


def select_backend(
    name: str,
    *,
    pool: KVPool,
    heads: int,
    dtype: torch.dtype | None = None,
    native: bool | None = None,
    cache_folder: Path = CACHE_FOLDER,
) -> AttentionBackend:
    """Bind a backend to this rank's pool; the log says which one and why.

    name: "auto" takes flash-attn, else Triton, on a CUDA device and the CPU backend on a CPU. heads: query heads of this
    rank. dtype: of queries, None: the pool's. native: True forces the CPU backend's compiled kernels, False plain torch, None
    takes what works. cache_folder: where compiled kernels are kept. Raises ValueError saying what to change where the choice
    cannot work.
    """
    layout, device = pool.layout, pool.device.type
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(BACKENDS)}")
    if heads % layout.kv_heads:
        raise ValueError(f"{heads} query heads cannot share {layout.kv_heads} KV heads: choose another tensor_parallel_size")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"there is no attention backend for device {device!r}: choose cpu or cuda")
    if name == "cpu" or (name == "auto" and device == "cpu"):
        if device != "cpu":
            raise ValueError("attention backend 'cpu' needs the pool on a CPU: choose device cpu, or backend auto")
        return _cpu(pool, heads, dtype or pool.dtype, native, cache_folder.expanduser())
    if device != "cuda":
        raise ValueError(f"attention backend {name!r} needs a CUDA device, the pool is on {device}: choose auto or cpu")
    if name == "flash":
        return _flash(pool, heads)
    return _cuda(pool, heads, dtype) if name == "auto" else _triton(pool, heads, dtype)


def select_device_backends(
    name: str, *, pool: KVPool, heads: int, most: int, dtype: torch.dtype | None = None
) -> tuple[PagedAttention, PagedAttention]:
    """What a GPU's runner attends with, and what it attends with in captured prefill steps of few tokens.

    name: "auto" decodes by our Triton kernel, which is as fast as flash-attn's at every shape that was measured and whose cost
    does not know the width of the block table, and prefills by flash-attn where that is installed, but for small steps. most:
    decodes in one step. dtype: as in `select_backend`.

    Raises ValueError saying what to change where the choice cannot work.
    """
    if heads % pool.layout.kv_heads:
        raise ValueError(f"{heads} query heads cannot share {pool.layout.kv_heads} KV heads evenly: check the model and tp")
    if name not in ("auto", "flash", "triton"):
        raise ValueError(f"attention backend {name!r} does not run on a CUDA device: choose auto, flash or triton")
    ours = _triton(pool, heads, dtype)
    ours.reserve(most)
    if name == "flash":
        return _flash(pool, heads), ours
    if name == "triton":
        return ours, ours
    try:
        return MixedAttention(ours, _flash(pool, heads)), ours
    except ValueError as error:
        logger.info("attention: prefill not by flash: %s", error)
        return ours, ours


def _cpu(pool: KVPool, heads: int, dtype: torch.dtype, native: bool | None, cache_folder: Path) -> AttentionBackend:
    if native is False:
        logger.info("attention: cpu, plain torch, as asked")
        return CpuAttention(pool, heads)
    try:
        backend = NativeAttention(pool, heads, cache_folder, dtype)
    except NativeUnavailable as error:
        if native:
            raise ValueError(f"the compiled CPU kernels cannot be used: {error}; or do not force them") from error
        logger.warning("attention: cpu, plain torch, since the compiled kernels cannot be used: %s", error)
        return CpuAttention(pool, heads)
    logger.info("attention: cpu, compiled kernels in %s", cache_folder)
    return backend


def _cuda(pool: KVPool, heads: int, dtype: torch.dtype | None) -> AttentionBackend:
    try:
        return _flash(pool, heads)
    except ValueError as error:
        logger.info("attention: not flash: %s", error)
    return _triton(pool, heads, dtype)


def _flash(pool: KVPool, heads: int) -> FlashAttention:
    try:
        kernels = load_kernels()
    except ImportError as error:
        raise ValueError(f"{error}: install flash-attn or choose attention backend triton") from error
    backend = FlashAttention(pool, kernels, heads)
    logger.info("attention: flash, flash-attn %s with blocks of %d tokens", kernels.version, pool.layout.block_size)
    return backend


def _triton(pool: KVPool, heads: int, dtype: torch.dtype | None) -> "TritonAttention":
    if pool.layout.scaled and pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(pool.device)
        raise ValueError(f"{name} does not know {pool.layout.dtype}, which came with Ada and Hopper: leave kv_dtype out")
    try:
        from workers.attention.triton import TritonAttention
    except ImportError as error:
        raise ValueError(f"attention backend triton cannot be imported ({error}): install triton or flash-attn") from error
    backend = TritonAttention(pool, heads, dtype=dtype)
    logger.info("attention: triton, paged split-KV kernels with blocks of %d tokens", pool.layout.block_size)
    return backend
