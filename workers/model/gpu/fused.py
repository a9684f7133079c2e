"""The decoder as a GPU runs it: the weights of `native`, fused kernels between the matrix products, nothing else in a step.

    many tokens, nine launches a layer:   QKV product · norm of heads, rotation and KV write · attention · O product ·
        residual add and norm · gate/up product · SwiGLU · down product · residual add and norm (the next layer's)
        (where a layer has experts, `fused_experts` stands in the place of its MLP; of FP8 that is multiplied with FP8, norm and
        SwiGLU give rounded numbers)
    few tokens, five to seven, products by our own kernels where these read the weights faster than the library's:   QKV
        product · norm of heads, rotation and KV write (or in the attention) · attention · O product, residual add and what the
        next norm needs · gate/up product and SwiGLU · down product, residual add and what the next norm needs
        (up to 2 tokens a product norms what it reads; where a neighbour cannot leave or take up a norm, it is a launch)
    few tokens with adapters, the nine: a product's launch also makes what every adapter's A gives, and the kernel that reads
        it adds B's part (`kernels.lora.up`)

Everything is driven by device tensors, so a step of decodes can be captured in a CUDA graph. Imports torch, the kernels, and
the weights' holders.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool, KVPools
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.launch import may_start_early
from workers.kernels.lora.weights import Awaited
from workers.kernels.products.many import rounds
from workers.kernels.products.matvec import matvec
from workers.kernels.products.prenormed import Prenormed
from workers.kernels.products.tilings import MAX_TILES, MAX_TOKENS, MOST_TOKENS, STREAM_TOKENS, Tiling, choose
from workers.kernels.reduced import Reduced, Rounded
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.embed import embed_norm
from workers.kernels.rows.norm import add_rms_norm, rms_norm, rounded_norm
from workers.kernels.rows.reduce import sum_add_rms_norm, takes
from workers.kernels.rows.rounding import silu_mul_rounded
from workers.model.decoders.native import Decoder, Layer
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused_experts import FusedMixture
from workers.model.layers.experts import Mixture
from workers.model.layers.linear import Linear
from workers.model.layers.mlp import SwiGLU


class Attend(Protocol):
    """One step's attention, layer by layer, over the pool of the model."""

    @property
    def turns(self) -> bool:
        """It takes the projection as it is: turns the queries and writes the step's keys and values itself."""
        ...

    def __call__(self, layer: int, query: Tensor, turn: HeadTurn | None = None, sinks: Tensor | None = None) -> Tensor:
        """query [tokens, heads, head_dim] -> the same; the step's KV of that layer has been written. sinks: [heads], of a layer
        whose form has them. Where it turns, with
        `turn`: query is the projection [tokens, (heads + 2 * kv_heads) * head_dim], and its KV has not."""
        ...


Slots = Tensor | tuple[Tensor, Tensor]
"""Where each token's KV goes, in the pool; where narrow layers have one of their own, in either."""


class PagedDecoder(Protocol):
    """What a GPU's runner computes logits with: a decoder over one pool, or one for each kind of layer."""

    def logits(
        self, tokens: Tensor, positions: Tensor, slots: Slots, attend: Attend, rows: Tensor | None = None,
        adapters: DeviceRows | None = None,
    ) -> Tensor:  # fmt: skip
        """As in `FusedDecoder`."""
        ...


Ready = Tensor | Prenormed
"""What the next product behind a norm takes as it is: normed, or all but its scale."""


class FusedDecoder:
    """One rank's decoder over one pool, or one for each kind of layer. Every rank of a group makes the same calls: they meet in
    the collectives.

    decoder: filled. pool: where the step's keys and values are written. scratch_slot: tokens from this slot on are padding,
    which goes through no experts; None: there is none.
    """

    def __init__(self, decoder: Decoder, pool: KVPool | KVPools, scratch_slot: int | None = None) -> None:
        self.pool = pool
        self._numbers: Sequence[int] = range(len(decoder.layers))
        self._narrow = pool.kinds.narrow if isinstance(pool, KVPools) else (False,) * len(decoder.layers)
        self.shape = decoder.shape
        self._layers, self._forms = decoder.layers, decoder.forms
        self._outer = decoder.outer
        self.expert_counts = decoder.expert_counts
        self.classifier = decoder.classifier.weight if decoder.classifier is not None else None
        self._table = decoder.rotary.table
        self._eps = decoder.config.rms_eps
        self._next_norms = [layer.input_norm.weight for layer in self._layers[1:]] + [self._outer.norm.weight]
        self._comm = decoder.comm
        self._pdl = may_start_early(decoder.device)
        # partial sums of several ranks must meet before the residual; packed weights (on a CPU) are not ours to read
        ours = decoder.shape.size == 1 and decoder.device.type == "cuda"
        self._few_tokens = self._most_of_ours(decoder.dtype) if ours else 0
        self._counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=decoder.device)
        self._scratch_slot = scratch_slot
        self._mixtures = {
            number: FusedMixture(layer.mlp, self._counters)
            for number, layer in enumerate(self._layers)
            if isinstance(layer.mlp, Mixture)
        }

    def _most_of_ours(self, dtype: torch.dtype) -> int:
        """Tokens up to which a layer's products may be our own."""
        if dtype == torch.float32:
            return STREAM_TOKENS
        dense = [(layer.qkv, layer.mlp) for layer in self._layers if isinstance(layer.mlp, SwiGLU)]
        plain = all(qkv.reduced is None and mlp.gate_up.reduced is None for qkv, mlp in dense)
        return MOST_TOKENS if plain and len(dense) == len(self._layers) else MAX_TOKENS

    def logits(
        self, tokens: Tensor, positions: Tensor, slots: Slots, attend: Attend, rows: Tensor | None = None,
        adapters: DeviceRows | None = None,
    ) -> Tensor:  # fmt: skip
        """This rank's logits of every token, or of `rows` alone, which the last layer then computes: [wanted, shape.vocab] in
        the model's dtype; padding is -inf.

        tokens, positions [tokens] int32; slots [tokens], block * block_size + offset, of each pool; rows [wanted] int32.
        adapters: of the tokens; None: no token has one.
        """
        if len(tokens) <= self._few_tokens and rows is None and adapters is None:
            return self._few(tokens, positions, slots, attend)
        return self.head(self.hidden(tokens, positions, slots, attend, rows, adapters))

    @contextmanager
    def representatives(self) -> Iterator[None]:
        """Inside, steps compute one layer of each kind alone: what a whole one launches, at a fraction of the host's time."""
        whole, self._numbers = self._numbers, self._one_of_each
        try:
            yield
        finally:
            self._numbers = whole

    @cached_property
    def _one_of_each(self) -> Sequence[int]:
        """The first layer of each kind before one of each kind, since a norm may be left to the next; and the last."""
        kinds = [self._kind(number) for number in range(len(self._layers))]
        first = {pair: number for number, pair in reversed([*enumerate(pairwise(kinds))])}
        return [*sorted(first.values()), len(kinds) - 1]

    def _kind(self, number: int) -> Hashable:
        """What a layer's kernels depend on."""
        layer = self._layers[number]
        return self._narrow[number], self._forms[number], *map(_described, layer.operands())

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden [wanted, hidden], as `logits` has them."""
        return self._outer.head(hidden)

    def hidden(
        self, tokens: Tensor, positions: Tensor, slots: Slots, attend: Attend, rows: Tensor | None = None,
        adapters: DeviceRows | None = None,
    ) -> Tensor:  # fmt: skip
        """As `logits`, but what the head is given: [wanted, hidden], behind the final norm, equal on all ranks."""
        normed: Tensor | Rounded
        hidden, normed = self._embed(tokens)
        live = self._live(slots)
        last = len(self._layers) - 1
        of_wanted = None if rows is None or adapters is None else adapters.at(rows)  # early: kernels ask before they wait
        for number in self._numbers:
            layer = self._layers[number]
            projected, awaited = self._part(layer.qkv, normed, adapters)
            if rows is not None and number == last and not len(rows):
                self._query(number, layer, projected, positions, slots, awaited=awaited)
                return hidden[:0]  # the last layer's KV is all that was wanted
            attended = self._attended(attend, number, layer, projected, positions, slots, self._pdl, awaited)
            if rows is not None and number == last:
                attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
                live = None if live is None else live.index_select(0, rows)
                adapters = of_wanted
            mlp = layer.mlp.gate_up if isinstance(layer.mlp, SwiGLU) else None
            normed = self._add_norm(
                hidden, *self._part(layer.o, attended, adapters), layer.mlp_norm.weight, self._rounding(mlp, hidden, adapters)
            )
            following = self._layers[number + 1].qkv if number < last else None
            normed = self._add_norm(
                hidden, *self._mlp(number, layer, normed, live, adapters), self._next_norms[number],
                self._rounding(following, hidden, adapters),
            )  # fmt: skip
        assert isinstance(normed, Tensor), "the head's is plain"
        return normed

    def _mlp(
        self, number: int, layer: Layer, normed: Tensor | Rounded, live: Tensor | None, adapters: DeviceRows | None
    ) -> tuple[Tensor, Awaited | None]:  # fmt: skip
        """This rank's part of the sum, and what is to be added to it yet."""
        if isinstance(layer.mlp, Mixture):
            assert isinstance(normed, Tensor), "experts' weights are plain"
            return self._mixtures[number](normed, live, adapters=adapters, pdl=self._pdl), None
        down, (gate_up, awaited) = layer.mlp.down, self._part(layer.mlp.gate_up, normed, adapters)
        weight = self._rounding(down, gate_up, adapters)
        if weight is not None:
            return self._part(down, silu_mul_rounded(gate_up, weight.group, pdl=self._pdl), adapters)
        return self._part(down, silu_mul(gate_up, awaited=awaited, pdl=self._pdl), adapters)

    def _part(
        self, linear: Linear, x: Tensor | Rounded, adapters: DeviceRows | None
    ) -> tuple[Tensor, Awaited | None]:  # fmt: skip
        """The product, or this rank's part of it, and what adapters add to it yet, where the kernel that reads it does that."""
        if adapters is None or linear.lora is None or self.shape.size > 1 or not linear.lora.rises_in_rows(len(x)):
            return linear.partial(x, adapters), None
        assert isinstance(x, Tensor), "adapters are multiplied by what has not been rounded"
        part, low = linear.lowered(x, partial(self._multiply, linear))
        return part, adapters.awaited(linear.lora, low)

    def _multiply(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By a weight of its own with more rows behind it, in the way that is the best without them."""
        config = self._choose(linear, len(x), x.dtype) if len(x) <= self._few_tokens else None
        if config is None or (config.parts > 1 and config.blocks(len(weight)) * -(-len(x) // config.tokens) > MAX_TILES):
            return F.linear(x, weight, bias)
        return matvec(x, weight, bias=bias, pdl=self._pdl, counters=self._counters, config=config)

    def _add_norm(
        self, hidden: Tensor, part: Tensor, awaited: Awaited | None, norm: Tensor, weight: Reduced | None
    ) -> Tensor | Rounded:  # fmt: skip
        """Adds part [tokens, hidden], summed over the ranks, to hidden, and what is awaited; the norm of that, rounded for
        `weight` if given."""
        peers = self._comm.peers
        if peers is not None and takes(peers, part):
            return sum_add_rms_norm(peers, part, hidden, norm, self._eps, pdl=self._pdl)
        part = self._comm.all_reduce(part)
        if weight is not None:
            return rounded_norm(hidden, norm, self._eps, weight.group, part, pdl=self._pdl)
        return add_rms_norm(hidden, part, norm, self._eps, awaited=awaited, pdl=self._pdl)

    def _rounding(self, linear: Linear | None, x: Tensor, adapters: DeviceRows | None) -> Reduced | None:
        """The weight by which as many tokens as x has are multiplied rounded; None: they are not, or adapters read them."""
        weight = None if linear is None or adapters is not None else linear.reduced
        return weight if weight is not None and rounds(weight, len(x), x.dtype) else None

    def _live(self, slots: Slots) -> Tensor | None:
        """Which tokens are no padding, where that matters."""
        if not self._mixtures or self._scratch_slot is None:
            return None
        return _of_kind(slots, False) < self._scratch_slot

    def _few(self, tokens: Tensor, positions: Tensor, slots: Slots, attend: Attend) -> Tensor:
        """As `logits`, of few tokens, none of which has an adapter."""
        hidden, normed = self._embed(tokens)
        ready: Ready | None = normed
        live = self._live(slots)
        last, head = len(self._layers) - 1, self._outer.head
        for number in self._numbers:
            layer = self._layers[number]
            projected = self._of_norm(hidden, ready, layer.input_norm.weight, layer.qkv)
            attended = self._attended(attend, number, layer, projected, positions, slots, self._pdl)
            mlp, norm = layer.mlp, layer.mlp_norm.weight
            if isinstance(mlp, Mixture):
                self._add(hidden, attended, layer.o)
                self._mixtures[number].add_to(hidden, norm, self._eps, live, pdl=self._pdl)
                ready = None
            else:
                ready = self._add(hidden, attended, layer.o, norm, mlp.gate_up, swiglu=True)
                gated = self._of_norm(hidden, ready, norm, mlp.gate_up, swiglu=True)
                following = self._layers[number + 1].qkv if number < last else head.linear
                ready = self._add(hidden, gated, mlp.down, self._next_norms[number], following)
        return head.mask(self._of_norm(hidden, ready, self._outer.norm.weight, head.linear))

    def _of_norm(self, hidden: Tensor, ready: Ready | None, norm: Tensor, linear: Linear, swiglu: bool = False) -> Tensor:
        """The product of the norm of hidden [tokens, hidden], through SwiGLU if asked for. ready: of that norm, if known."""
        config = self._choose(linear, len(hidden), hidden.dtype, swiglu)
        if config is None:
            product = linear(ready if isinstance(ready, Tensor) else rms_norm(hidden, norm, self._eps, pdl=self._pdl))
            return silu_mul(product, pdl=self._pdl) if swiglu else product
        if ready is not None:
            return self._product(ready, linear, config, swiglu=swiglu)
        return self._product(hidden, linear, config, norm_weight=norm, eps=self._eps, swiglu=swiglu)

    def _add(
        self, hidden: Tensor, x: Tensor, linear: Linear, norm: Tensor | None = None, following: Linear | None = None,
        swiglu: bool = False,
    ) -> Ready | None:  # fmt: skip
        """Adds the product of x [tokens, its width] to hidden [tokens, hidden]. norm, following: of the product behind it, and
        whether through SwiGLU: the norm is left to that one where both can do so, or comes with the sum, where that is a
        launch of its own."""
        config = self._choose(linear, len(x), x.dtype)
        if config is None:
            part = linear(x)
            if norm is not None:
                return add_rms_norm(hidden, part, norm, self._eps, pdl=self._pdl)
            hidden += part
            return None
        left = None
        if following is not None and config.tiled and x.dtype != torch.float16:  # which might overflow before it is scaled
            behind = self._choose(following, len(x), x.dtype, swiglu)
            if behind is not None and behind.tiled:
                left = Prenormed.empty(hidden, config.blocks(hidden.shape[1]), self._eps)
        self._product(x, linear, config, residual=hidden, next_norm=norm if left is not None else None, prenormed=left)
        return left

    def _choose(self, linear: Linear, tokens: int, dtype: torch.dtype, swiglu: bool = False) -> Tiling | None:
        rows = linear.out_features // 2 if swiglu else linear.out_features
        bits = 16 if linear.reduced is None else linear.reduced.bits
        return choose(rows, linear.in_features, tokens, dtype, swiglu, bits)

    def _product(self, x: Tensor | Prenormed, linear: Linear, config: Tiling, **parts: Any) -> Tensor:
        """parts: what else of `matvec` is fused with it."""
        return matvec(
            x, linear.operand, bias=linear.bias, pdl=self._pdl, counters=self._counters, config=config, **parts
        )  # fmt: skip

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and its norm for the first layer."""
        weight, norm = self._outer.embedding.weight, self._layers[0].input_norm.weight
        if self.shape.size > 1:
            hidden = self._outer.embedding(tokens.long())
            return hidden, rms_norm(hidden, norm, self._eps)
        hidden, normed = (torch.empty(len(tokens), weight.shape[1], dtype=weight.dtype, device=weight.device) for _ in range(2))
        embed_norm(tokens, weight, norm, self._eps, hidden, normed)
        return hidden, normed

    def _attended(
        self, attend: Attend, number: int, layer: Layer, projected: Tensor, positions: Tensor, slots: Slots, pdl: bool = False,
        awaited: Awaited | None = None,
    ) -> Tensor:  # fmt: skip
        """[tokens, heads * head_dim]. awaited: what adapters add to the projection yet."""
        if attend.turns and awaited is None:
            return attend(number, projected, self._turn(layer), layer.sinks).flatten(1)
        query = self._query(number, layer, projected, positions, slots, pdl, awaited)
        return attend(number, query, sinks=layer.sinks).flatten(1)

    def _turn(self, layer: Layer) -> HeadTurn:
        return HeadTurn(*layer.head_norms(), self._eps, self._table)

    def _query(
        self, number: int, layer: Layer, projected: Tensor, positions: Tensor, slots: Slots, pdl: bool = False,
        awaited: Awaited | None = None,
    ) -> Tensor:  # fmt: skip
        """The layer's query, ready to attend; its keys and values are written."""
        shape = self.shape
        query = torch.empty(len(projected), shape.heads, shape.head_dim, dtype=projected.dtype, device=projected.device)
        qk_norm_rope_write(
            projected, self._turn(layer), positions, _of_kind(slots, self._narrow[number]), self.pool.keys(number),
            self.pool.values(number), shape.heads, shape.kv_heads, query, scales=self.pool.scales(number),
            awaited=awaited, pdl=pdl,
        )  # fmt: skip
        return query


def _of_kind(slots: Slots, narrow: bool) -> Tensor:
    return slots[narrow] if isinstance(slots, tuple) else slots


def _described(operand: object) -> Hashable:
    """Shapes and dtypes of what a kernel reads."""
    if isinstance(operand, Tensor):
        return *operand.shape, operand.dtype
    return tuple(_described(getattr(operand, field.name)) for field in fields(operand)) if is_dataclass(operand) else operand
