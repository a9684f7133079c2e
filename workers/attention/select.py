"""Which attention backend a rank uses: one interface (`base`), several backends, one place that chooses.

Imports torch. What a backend alone needs (triton, flash-attn, a compiler) is touched only when it is considered.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend, PagedAttention
from workers.attention.cpu.native import NativeAttention, NativeUnavailable
from workers.attention.cpu.plain import CpuAttention
from workers.attention.cpu.varied import VariedAttention
from workers.attention.flash import FlashAttention, load_kernels
from workers.attention.forms import Form, HeadShape, plain_forms
from workers.attention.mixed import MixedAttention

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
    forms: Sequence[Form] | None = None,
    dtype: torch.dtype | None = None,
    native: bool | None = None,
    cache_folder: Path = CACHE_FOLDER,
) -> AttentionBackend:
    """Bind a backend to this rank's pool; the log says which one and why.

    name: "auto" takes flash-attn, else Triton, on a CUDA device and the CPU backend on a CPU. heads: query heads of this
    rank. forms: of each layer, None: plain. dtype: of queries, None: the pool's. native: True forces the CPU backend's compiled
    kernels, False plain torch, None
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
        return _cpu(pool, heads, forms, dtype or pool.dtype, native, cache_folder.expanduser())
    if device != "cuda":
        raise ValueError(f"attention backend {name!r} needs a CUDA device, the pool is on {device}: choose auto or cpu")
    if name == "triton":
        return _triton(pool, heads, forms, dtype)
    return _flash_for_all(pool, heads, forms) if name == "flash" else _cuda(pool, heads, forms, dtype)


def select_device_backends(
    name: str, *, pool: KVPool, heads: int, most: int, forms: Sequence[Form] | None = None,
    shapes: Sequence[HeadShape] | None = None, dtype: torch.dtype | None = None,
) -> tuple[PagedAttention, PagedAttention]:  # fmt: skip
    """What a GPU's runner attends with, and what it attends with in captured prefill steps of few tokens.

    name: "auto" decodes by our Triton kernel, which is as fast as flash-attn's at every shape that was measured and whose cost
    does not know the width of the block table, and prefills by flash-attn where that is installed, but for small steps. most:
    decodes in one step. forms: of each layer, None: plain; those that flash-attn does not take are ours. shapes: of each
    layer's heads, keys and values alike; None: all as the pool's. Where they differ all layers are ours. dtype: as in
    `select_backend`.

    Raises ValueError saying what to change where the choice cannot work.
    """
    if heads % pool.layout.kv_heads:
        raise ValueError(f"{heads} query heads cannot share {pool.layout.kv_heads} KV heads evenly: check the model and tp")
    if name not in ("auto", "flash", "triton"):
        raise ValueError(f"attention backend {name!r} does not run on a CUDA device: choose auto, flash or triton")
    told = forms or plain_forms(pool.layout.layers, pool.layout.head_dim)
    if shapes is not None and any(shape != _whole(pool, heads) for shape in shapes):
        if name == "flash":
            raise ValueError("layers whose heads differ are not for flash-attn: choose attention backend auto or triton")
        by_shape = _by_shape(pool, told, shapes, most, dtype)
        return by_shape, by_shape
    ours = _triton(pool, heads, forms, dtype)
    ours.reserve(most)
    if name == "triton":
        return ours, ours
    try:
        flash = _flash(pool, heads, forms)
    except ValueError as error:
        if name == "flash":
            raise
        logger.info("attention: prefill not by flash: %s", error)
        return ours, ours
    taken: list[PagedAttention] = [flash if flash.takes(form) else ours for form in told]
    for words in dict.fromkeys(", ".join(form.says()) for form in told if not flash.takes(form)):
        logger.info("attention: triton for layers with %s, which this flash-attn does not take", words)
    if name == "flash":
        return flash if ours not in taken else MixedAttention(taken, taken), ours
    return MixedAttention([ours] * len(taken), taken), ours


def _by_shape(
    pool: KVPool, forms: Sequence[Form], shapes: Sequence[HeadShape], most: int, dtype: torch.dtype | None
) -> PagedAttention:
    """One of ours for each shape of heads, which plans for its own layers' forms alone."""
    backends: dict[HeadShape, TritonAttention] = {}
    for shape in dict.fromkeys(shapes):
        own = [form for form, other in zip(forms, shapes, strict=True) if other == shape]
        told = [form if other == shape else own[0] for form, other in zip(forms, shapes, strict=True)]
        backends[shape] = _triton(pool, shape.heads, told, dtype, shape)
        backends[shape].reserve(most)
    layers = [backends[shape] for shape in shapes]
    return MixedAttention(layers, layers)


def _whole(pool: KVPool, heads: int) -> HeadShape:
    layout = pool.layout
    return HeadShape(heads, layout.kv_heads, layout.head_dim, layout.head_dim)


def _cpu(
    pool: KVPool, heads: int, forms: Sequence[Form] | None, dtype: torch.dtype, native: bool | None, cache_folder: Path
) -> AttentionBackend:
    if native is False:
        logger.info("attention: cpu, plain torch, as asked")
        return _torch(pool, heads, forms)
    try:
        backend = NativeAttention(pool, heads, cache_folder, forms, dtype)
    except NativeUnavailable as error:
        if native:
            raise ValueError(f"the compiled CPU kernels cannot be used: {error}; or do not force them") from error
        logger.warning("attention: cpu, plain torch, since the compiled kernels cannot be used: %s", error)
        return _torch(pool, heads, forms)
    logger.info("attention: cpu, compiled kernels in %s", cache_folder)
    return backend


def _torch(pool: KVPool, heads: int, forms: Sequence[Form] | None) -> AttentionBackend:
    layout = pool.layout
    if forms is None or all(form == Form(layout.head_dim**-0.5) for form in forms):
        return CpuAttention(pool, heads)
    return VariedAttention(pool, [_whole(pool, heads)] * layout.layers, forms)


def _cuda(pool: KVPool, heads: int, forms: Sequence[Form] | None, dtype: torch.dtype | None) -> AttentionBackend:
    try:
        return _flash_for_all(pool, heads, forms)
    except ValueError as error:
        logger.info("attention: not flash: %s", error)
    return _triton(pool, heads, forms, dtype)


def _flash_for_all(pool: KVPool, heads: int, forms: Sequence[Form] | None) -> FlashAttention:
    backend = _flash(pool, heads, forms)
    left = [form for form in forms or () if not backend.takes(form)]
    if left:
        raise ValueError(
            f"this flash-attn does not compute attention with {', '.join(left[0].says())}: choose attention backend triton"
        )
    return backend


def _flash(pool: KVPool, heads: int, forms: Sequence[Form] | None) -> FlashAttention:
    try:
        kernels = load_kernels()
    except ImportError as error:
        raise ValueError(f"{error}: install flash-attn or choose attention backend triton") from error
    backend = FlashAttention(pool, kernels, heads, forms)
    logger.info("attention: flash, flash-attn %s with blocks of %d tokens", kernels.version, pool.layout.block_size)
    return backend


def _triton(
    pool: KVPool, heads: int, forms: Sequence[Form] | None, dtype: torch.dtype | None, shape: HeadShape | None = None
) -> "TritonAttention":
    if pool.layout.scaled and pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(pool.device)
        raise ValueError(f"{name} does not know {pool.layout.dtype}, which came with Ada and Hopper: leave kv_dtype out")
    try:
        from workers.attention.triton import TritonAttention
    except ImportError as error:
        raise ValueError(f"attention backend triton cannot be imported ({error}): install triton or flash-attn") from error
    backend = TritonAttention(pool, heads, forms=forms, shape=shape, dtype=dtype)
    logger.info("attention: triton, paged split-KV kernels with blocks of %d tokens", pool.layout.block_size)
    return backend
