"""A decoder of transformers' own class as a GPU's runner calls it. Imports torch, the interface of `fused`, and the decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from workers.attention.forms import Form, HeadShape
from workers.attention.write import TorchWriter
from workers.model.decoders.transformers.decoder import TransformersDecoder
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused import Attend


class PagedTransformers:
    """One rank's decoder over one pool, behind the interface of `workers.model.gpu.fused.FusedDecoder`. Everything is driven by
    device tensors, so a step of decodes can be captured in a CUDA graph: then the class's Python costs nothing. The kernels can
    attend for its layers (`Survey.kernels_lack`).
    """

    def __init__(self, decoder: TransformersDecoder, pool: KVPool) -> None:
        self.pool = pool
        self.shape = decoder.shape
        self._decoder = decoder
        self._writer = TorchWriter(pool)

    def logits(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend, rows: Tensor | None = None,
        adapters: DeviceRows | None = None,
    ) -> Tensor:  # fmt: skip
        """As `FusedDecoder.logits`, without adapters."""
        assert adapters is None, "refused before anything is started"
        targets = self._writer.targets(slots.long())
        wanted = torch.arange(len(tokens), device=tokens.device) if rows is None else rows.long()
        attends = _Paged(attend, self._writer, targets, self.pool.layout, self._decoder.heads)
        return self._decoder.logits(tokens.long(), positions.long(), wanted, attends)


class _Paged:
    """A step's attention by kernels that know each layer's form, and its heads, whose keys and values have one size."""

    def __init__(
        self, attend: Attend, writer: TorchWriter, targets: Tensor, layout: BlockLayout, heads: Sequence[HeadShape]
    ) -> None:
        self._attend, self._writer, self._targets, self._layout, self._heads = attend, writer, targets, layout, heads

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None  # noqa: ARG002
    ) -> Tensor:
        size, value_dim = self._heads[layer].even.key_dim, value.shape[-1]
        query, key, value = (F.pad(states, (0, size - states.shape[-1])) for states in (query, key, value))
        self._writer.write(layer, self._row(key), self._row(value), self._targets)
        return self._attend(layer, query.contiguous(), sinks=sinks)[..., :value_dim]

    def _row(self, states: Tensor) -> Tensor:
        """[tokens, heads, dim] of a layer as the pool's, of which they fill the beginning: [tokens, kv_heads, head_dim]."""
        layout = self._layout
        if states.shape[1:] == (layout.kv_heads, layout.head_dim):
            return states
        row = states.flatten(1)
        return F.pad(row, (0, layout.kv_heads * layout.head_dim - row.shape[1])).view(-1, layout.kv_heads, layout.head_dim)
