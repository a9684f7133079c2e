"""The decoder as a GPU runs it: the weights of `decoder`, fused kernels between the matrix products, nothing else in a step.

    many tokens, nine launches a layer:   QKV product · norm of heads, rotation and KV write · attention · O product ·
        residual add and norm · gate/up product · SwiGLU · down product · residual add and norm (the next layer's)
    few tokens, five, products by our own kernels, which read the weights as fast as the memory gives them:   norm and QKV
        product · norm of heads, rotation and KV write · attention · O product and residual add · norm, gate/up product and
        SwiGLU · down product and residual add

Everything is driven by device tensors, so a step of decodes can be captured in a CUDA graph. Imports torch, the kernels, and
the weights' holders.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.kernels.activation import silu_mul
from workers.kernels.embed import embed_norm
from workers.kernels.matvec import matvec
from workers.kernels.norm import add_rms_norm, rms_norm
from workers.kernels.rope import qk_norm_rope_write
from workers.model.decoder import Decoder, Layer
from workers.model.layers import Linear

Attend = Callable[[int, Tensor], Tensor]
"""(layer, query [tokens, heads, head_dim]) -> [tokens, heads, head_dim]; the step's KV of that layer has been written."""

FEW_TOKENS, FEW_TOKENS_LARGE = 4, 2
"""Tokens up to which our own products beat the library's with the launches that they save, and the same where a layer has more
than `LARGE_LAYER_BYTES` of weights: the four of a layer at 4 tokens 28 us against 38 (0.6B), 173 against 119 (8B)."""

LARGE_LAYER_BYTES = 64 << 20
SMALL_WEIGHT_BYTES = 16 << 20
"""Products of so little begin while the one before still runs (programmatic dependent launch): 14.5 us a layer instead of
18.4 at 0.6B. Larger ones fill the device by themselves, and are disturbed: 116 instead of 103 us at 8B."""


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
        self._next_norms = [layer.input_norm.weight for layer in self._layers[1:]] + [self._outer.norm.weight]
        # partial sums of several ranks must meet before the residual; packed weights (on a CPU) are not ours to read
        self._pdl = decoder.device.type == "cuda" and torch.cuda.get_device_capability(decoder.device)[0] >= 9
        few_tokens = FEW_TOKENS if _layer_bytes(self._layers[0]) <= LARGE_LAYER_BYTES else FEW_TOKENS_LARGE
        self._few_tokens = few_tokens if decoder.shape.size == 1 and decoder.device.type == "cuda" else 0

    def logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """This rank's logits of every token, or of `rows` alone, which the last layer then computes: [wanted, shape.vocab] in
        the model's dtype; padding is -inf.

        tokens, positions [tokens] int32; slots [tokens], block * block_size + offset; rows [wanted] int32.
        """
        if len(tokens) <= self._few_tokens and rows is None:
            return self._few(tokens, positions, slots, attend)
        hidden, normed = self._embed(tokens)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            query = self._query(number, layer, layer.qkv(normed), positions, slots)
            if rows is not None and number == last and not len(rows):
                return self._outer.head(normed[:0])  # the last layer's KV is all that was wanted
            attended = attend(number, query).flatten(1)
            if rows is not None and number == last:
                attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
            normed = add_rms_norm(hidden, layer.o(attended), layer.mlp_norm.weight, self._eps)
            down = layer.mlp.down(silu_mul(layer.mlp.gate_up(normed)))
            normed = add_rms_norm(hidden, down, self._next_norms[number], self._eps)
        return self._outer.head(normed)

    def _few(self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend) -> Tensor:
        eps = self._eps
        hidden, _ = self._embed(tokens)
        for number, layer in enumerate(self._layers):
            qkv, o, gate_up, down = layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down
            projected = self._product(hidden, qkv, norm_weight=layer.input_norm.weight, eps=eps)
            attended = attend(number, self._query(number, layer, projected, positions, slots, self._pdl)).flatten(1)
            self._product(attended, o, residual=hidden)
            gated = self._product(hidden, gate_up, norm_weight=layer.mlp_norm.weight, eps=eps, swiglu=True)
            self._product(gated, down, residual=hidden)
        head = self._outer.head
        return head.mask(self._product(hidden, head.linear, norm_weight=self._outer.norm.weight, eps=eps))

    def _product(self, x: Tensor, linear: Linear, **parts: Any) -> Tensor:
        """parts: what of `matvec` is fused with it."""
        weight = linear.plain
        return matvec(x, weight, bias=linear.bias, pdl=self._pdl and weight.nbytes <= SMALL_WEIGHT_BYTES, **parts)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and its norm for the first layer."""
        weight, norm = self._outer.embedding.weight, self._layers[0].input_norm.weight
        if self.shape.size > 1:
            hidden = self._outer.embedding(tokens.long())
            return hidden, rms_norm(hidden, norm, self._eps)
        hidden, normed = (torch.empty(len(tokens), weight.shape[1], dtype=weight.dtype, device=weight.device) for _ in range(2))
        embed_norm(tokens, weight, norm, self._eps, hidden, normed)
        return hidden, normed

    def _query(
        self, number: int, layer: Layer, projected: Tensor, positions: Tensor, slots: Tensor, pdl: bool = False
    ) -> Tensor:
        """The layer's query, ready to attend; its keys and values are written."""
        shape = self.shape
        query = torch.empty(len(projected), shape.heads, shape.head_dim, dtype=projected.dtype, device=projected.device)
        q_norm, k_norm = layer.head_norms()
        qk_norm_rope_write(
            projected, q_norm, k_norm, self._eps, self._table, positions, slots, self.pool.keys(number),
            self.pool.values(number), shape.heads, shape.kv_heads, query, pdl=pdl,
        )  # fmt: skip
        return query


def _layer_bytes(layer: Layer) -> int:
    """Of the weights of its four products; 0 where they are packed for a CPU."""
    linears = (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down)
    return sum(linear.weight.nbytes for linear in linears if linear.weight is not None)
