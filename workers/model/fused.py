"""The decoder as a GPU runs it: the weights of `decoder`, fused kernels between the matrix products, nothing else in a step.

A layer is nine launches: QKV product · norm of heads, rotation and KV write · attention · O product · residual add and norm ·
gate/up product · SwiGLU · down product · residual add and norm (the next layer's). Everything is driven by device tensors, so a
step of decodes can be captured in a CUDA graph. Imports torch, the kernels, and the weights' holders.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.kernels.activation import silu_mul
from workers.kernels.embed import embed_norm
from workers.kernels.norm import add_rms_norm, rms_norm
from workers.kernels.rope import qk_norm_rope_write
from workers.model.decoder import Decoder, Layer

Attend = Callable[[int, Tensor], Tensor]
"""(layer, query [tokens, heads, head_dim]) -> [tokens, heads, head_dim]; the step's KV of that layer has been written."""


class FusedDecoder:
    """One rank's decoder over one pool. Every rank of a group makes the same calls: they meet in the collectives.

    decoder: filled. pool: where the step's keys and values are written.
    """

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self.pool = pool
        self.shape = decoder.shape
        self._layers = decoder.layers
        self._outer = decoder.outer
        self._table = decoder.rotary.table
        self._eps = decoder.config.rms_eps
        self._norms = [layer.input_norm.weight for layer in self._layers[1:]] + [self._outer.norm.weight]

    def hidden(self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """What the head reads: the final norm of every token, or of `rows` alone, which the last layer then computes.

        tokens, positions [tokens] int32; slots [tokens], page * page_size + offset; rows [wanted] int32 -> [wanted, hidden].
        """
        hidden, normed = self._embed(tokens)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            query = self._attention_inputs(number, layer, normed, positions, slots)
            if rows is not None and number == last and not len(rows):
                return normed[:0]  # the last layer's KV is all that was wanted
            attended = attend(number, query).flatten(1)
            if rows is not None and number == last:
                attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
            normed = add_rms_norm(hidden, layer.o(attended), layer.mlp_norm.weight, self._eps)
            normed = add_rms_norm(hidden, layer.mlp.down(silu_mul(layer.mlp.gate_up(normed))), self._norms[number], self._eps)
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        """normed [samples, hidden] -> this rank's [samples, shape.vocab] in the model's dtype; padding is -inf."""
        return self._outer.head(normed)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weight, norm = self._outer.embedding.weight, self._layers[0].input_norm.weight
        if self.shape.size > 1:
            hidden = self._outer.embedding(tokens.long())
            return hidden, rms_norm(hidden, norm, self._eps)
        hidden, normed = (torch.empty(len(tokens), weight.shape[1], dtype=weight.dtype, device=weight.device) for _ in range(2))
        embed_norm(tokens, weight, norm, self._eps, hidden, normed)
        return hidden, normed

    def _attention_inputs(self, number: int, layer: Layer, normed: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The layer's query; its keys and values are written."""
        shape = self.shape
        query = torch.empty(len(normed), shape.heads, shape.head_dim, dtype=normed.dtype, device=normed.device)
        q_norm, k_norm = layer.head_norms()
        qk_norm_rope_write(
            layer.qkv(normed), q_norm, k_norm, self._eps, self._table, positions, slots, self.pool.keys(number),
            self.pool.values(number), shape.heads, shape.kv_heads, query,
        )  # fmt: skip
        return query
