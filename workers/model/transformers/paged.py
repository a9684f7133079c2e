"""A decoder of transformers' own class as a GPU's runner calls it. Imports torch, the interface of `fused`, and this room."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.forms import Form
from workers.attention.write import TorchWriter
from workers.model.fields import CheckpointError
from workers.model.fused import Attend
from workers.model.transformers.decoder import TransformersDecoder


class PagedTransformers:
    """One rank's decoder over one pool, behind the interface of `workers.model.fused.FusedDecoder`. Everything is driven by
    device tensors, so a step of decodes can be captured in a CUDA graph: then the class's Python costs nothing.

    Errors: CheckpointError where a layer's attention is one that the kernels do not compute.
    """

    def __init__(self, decoder: TransformersDecoder, pool: KVPool) -> None:
        self.pool = pool
        self.shape = decoder.shape
        self._decoder = decoder
        self._writer = TorchWriter(pool)
        for layer, (form, heads) in enumerate(zip(decoder.forms, decoder.heads, strict=True)):
            asked = form.says()
            if (heads.heads, heads.kv_heads) != (self.shape.heads, self.shape.kv_heads):
                asked.append("heads of its own")
            if asked:
                shorter = f", or max_model_len up to {form.window or form.chunk}" if form.window or form.chunk else ""
                raise CheckpointError(
                    f"layer {layer} attends with {', '.join(asked)}, which the kernels for GPUs do not compute: choose device "
                    f"cpu{shorter}"
                )

    def logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """As `FusedDecoder.logits`."""
        targets = self._writer.targets(slots.long())
        wanted = torch.arange(len(tokens), device=tokens.device) if rows is None else rows.long()
        attends = _Paged(attend, self._writer, targets, self.shape.head_dim)
        return self._decoder.logits(tokens.long(), positions.long(), wanted, attends)


class _Paged:
    """A step's attention by kernels over heads of the pool's size, whose scale is 1 / sqrt(head_dim)."""

    def __init__(self, attend: Attend, writer: TorchWriter, targets: Tensor, head_dim: int) -> None:
        self._attend, self._writer, self._targets, self._head_dim = attend, writer, targets, head_dim

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        tokens, value_dim = len(self._targets), value.shape[-1]
        query, key, value = (F.pad(states, (0, self._head_dim - states.shape[-1])) for states in (query, key, value))
        self._writer.write(layer, key[:tokens], value[:tokens], self._targets)
        turned = query * (form.scale * self._head_dim**0.5)
        return self._attend(layer, turned.contiguous())[..., :value_dim]
