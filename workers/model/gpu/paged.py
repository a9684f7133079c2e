"""A decoder of transformers' own class as a GPU's runner calls it. Imports torch, the interface of `fused`, and the decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool, KVPools
from workers.attention.forms import Form, HeadShape
from workers.attention.write import TorchWriter
from workers.model.decoders.transformers.decoder import TransformersDecoder
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused import Attend, Slots


class PagedTransformers:
    """One rank's decoder over one pool, or one for each kind of layer, behind the interface of
    `workers.model.gpu.fused.FusedDecoder`. Everything is driven by device tensors, so a step of decodes can be captured in a
    CUDA graph: then the class's Python costs nothing. The kernels can attend for its layers (`Survey.kernels_lack`).
    """

    def __init__(self, decoder: TransformersDecoder, pool: KVPool | KVPools) -> None:
        self.shape = decoder.shape
        self._decoder = decoder
        self._writers = [TorchWriter(each) for each in ([pool] if isinstance(pool, KVPool) else [pool.full, pool.narrow])]
        self._layout = (pool if isinstance(pool, KVPool) else pool.full).layout
        layers = len(decoder.heads)
        self._layers = [(False, layer) for layer in range(layers)]
        if isinstance(pool, KVPools):
            self._layers = list(zip(pool.kinds.narrow, pool.kinds.places, strict=True))

    def logits(
        self, tokens: Tensor, positions: Tensor, slots: Slots, attend: Attend, rows: Tensor | None = None,
        adapters: DeviceRows | None = None,
    ) -> Tensor:  # fmt: skip
        """As `FusedDecoder.logits`, without adapters."""
        assert adapters is None, "refused before anything is started"
        each = slots if isinstance(slots, tuple) else (slots,)
        targets = [writer.targets(of_kind.long()) for writer, of_kind in zip(self._writers, each, strict=True)]
        writes = [(self._writers[narrow], targets[narrow], place) for narrow, place in self._layers]
        wanted = torch.arange(len(tokens), device=tokens.device) if rows is None else rows.long()
        attends = _Paged(attend, writes, self._layout, self._decoder.heads)
        return self._decoder.logits(tokens.long(), positions.long(), wanted, attends)


class _Paged:
    """A step's attention by kernels that know each layer's form, and its heads, whose keys and values have one size. writes: of
    each layer what writes its KV, where to, and as which layer of its pool."""

    def __init__(
        self, attend: Attend, writes: Sequence[tuple[TorchWriter, Tensor, int]], layout: BlockLayout, heads: Sequence[HeadShape]
    ) -> None:
        self._attend, self._writes, self._layout, self._heads = attend, writes, layout, heads

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None  # noqa: ARG002
    ) -> Tensor:
        size, value_dim = self._heads[layer].even.key_dim, value.shape[-1]
        query, key, value = (F.pad(states, (0, size - states.shape[-1])) for states in (query, key, value))
        writer, targets, place = self._writes[layer]
        writer.write(place, self._row(key), self._row(value).nan_to_num(0.0), targets)  # why: `kernels.heads.finite`
        return self._attend(layer, query.contiguous(), sinks=sinks)[..., :value_dim]

    def _row(self, states: Tensor) -> Tensor:
        """[tokens, heads, dim] of a layer as the pool's, of which they fill the beginning: [tokens, kv_heads, head_dim]."""
        layout = self._layout
        if states.shape[1:] == (layout.kv_heads, layout.head_dim):
            return states
        row = states.flatten(1)
        return F.pad(row, (0, layout.kv_heads * layout.head_dim - row.shape[1])).view(-1, layout.kv_heads, layout.head_dim)
