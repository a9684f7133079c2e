"""Attention of any `Form`, over heads of any shape, in plain torch on a CPU: layers of one model may differ in both.

Imports torch, the pool, the step and the other backends' interface. A layer that fills the pool's heads goes to a backend of
the usual kind where there is one, which is faster.

    a slot of the pool   ├──────── kv_heads * head_dim numbers ────────┤   as wide as the widest layer's
    a narrower layer     ├── kv_heads * key_dim ──┤ never read          │   and so for values
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend
from workers.attention.forms import Form, HeadShape
from workers.attention.write import stored
from workers.step import StepInput


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of the step: where its queries lie in the batch and its keys in the pool."""

    start: int
    stop: int
    context: int
    blocks: Tensor  # [blocks] int64

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.context - (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class VariedPlan:
    """usual: the other backend's. slots: [tokens] int64, block and slot in it, for writing. masks: by form and sequence."""

    usual: Any
    blocks: Tensor
    slots: Tensor
    spans: list[Span]
    masks: dict[tuple[int | None, int | None, int], tuple[int, Tensor]] = field(default_factory=dict)


class VariedAttention:
    """shapes, forms: of each layer. usual: the backend, if any, for layers of `usual_shape`, which is the pool's; made for the
    same forms."""

    def __init__(
        self, pool: KVPool, shapes: Sequence[HeadShape], forms: Sequence[Form], usual: AttentionBackend | None = None,
        usual_shape: HeadShape | None = None,
    ) -> None:  # fmt: skip
        layout = pool.layout
        assert max(shape.width for shape in shapes) <= layout.kv_heads * layout.head_dim, "a layer is wider than the pool"
        self.name = "cpu"
        self._pool = pool
        self._forms = forms
        self._usual = usual
        self._block_size = layout.block_size
        self._flat = pool.data.flatten(4)
        """[block, layer, k|v, slot, numbers]"""
        self._full = [usual is not None and shape == usual_shape for shape in shapes]

    def plan(self, step: StepInput) -> VariedPlan:
        spans, start = [], 0
        tables = torch.from_numpy(step.host_block_tables).long()
        lengths = zip(step.host_query_lens.tolist(), step.host_context_lens.tolist(), strict=True)
        for table, (queries, context) in zip(tables, lengths, strict=True):
            spans.append(Span(start, start + queries, context, table))
            start += queries
        blocks = step.slots.div(self._block_size, rounding_mode="floor")
        usual = self._usual.plan(step) if self._usual is not None and any(self._full) else None
        return VariedPlan(usual, blocks, step.slots - blocks * self._block_size, spans)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: VariedPlan,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As in `AttentionBackend`, but query [tokens, heads, key_dim], key [tokens, kv_heads, key_dim], value [tokens,
        kv_heads, value_dim]; returns [tokens, heads, value_dim]."""
        if self._full[layer]:
            assert self._usual is not None
            return self._usual.attend(layer, query, key, value, step, plan.usual, sinks)
        form, scales = self._forms[layer], self._pool.scales(layer)
        if scales is not None:
            form = replace(form, scale=form.scale * scales[0])
        for half, states in enumerate((key, value)):
            place = self._flat[:, layer, half, :, : states.shape[1] * states.shape[2]]
            place[plan.blocks, plan.slots] = (states if scales is None else stored(states, scales[half])).flatten(1)
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for number, span in enumerate(plan.spans):
            first, mask = self._mask(plan, number, form)
            keys, values = (self._context(layer, half, span, first, states) for half, states in enumerate((key, value)))
            out[span.start : span.stop] = _attend(query[span.start : span.stop], keys, values, mask, form, sinks)
        return out if scales is None else out.mul_(scales[1])

    def _mask(self, plan: VariedPlan, number: int, form: Form) -> tuple[int, Tensor]:
        """The first position that a query of the sequence sees, at a block's border, and [queries, keys from there] bool."""
        kind = form.window, form.chunk, number
        if kind not in plan.masks:
            span = plan.spans[number]
            queries = torch.arange(span.first, span.context)[:, None]
            lowest = torch.zeros_like(queries)
            if form.window is not None:
                lowest = torch.maximum(lowest, queries - form.window + 1)
            if form.chunk is not None:
                lowest = torch.maximum(lowest, queries // form.chunk * form.chunk)
            first = int(lowest[0]) // self._block_size * self._block_size
            keys = torch.arange(first, span.context)
            plan.masks[kind] = first, (keys >= lowest) & (keys <= queries)
        return plan.masks[kind]

    def _context(self, layer: int, half: int, span: Span, first: int, like: Tensor) -> Tensor:
        """[kv_heads, keys from `first`, dim], as they are stored but for the dtype. like: the step's own, [tokens, kv_heads,
        dim]."""
        _, heads, dim = like.shape
        blocks = span.blocks[first // self._block_size : -(-span.context // self._block_size)]
        numbers = self._flat[:, layer, half, :, : heads * dim][blocks].flatten(0, 1)[: span.context - first]
        return numbers.to(like.dtype).view(-1, heads, dim).transpose(0, 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, form: Form, sinks: Tensor | None) -> Tensor:
    """query [queries, heads, dim], keys and values [kv_heads, context, dim], mask [queries, context] -> [queries, heads, dim].

    bf16 and fp16 accumulate in float32.
    """
    queries, heads, _ = query.shape
    if form.softcap is None and sinks is None:
        turned = query.transpose(0, 1)[None]
        grouped = heads > keys.shape[0]
        out = F.scaled_dot_product_attention(turned, keys[None], values[None], mask, scale=form.scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped_query = query.to(exact).view(queries, keys.shape[0], -1, query.shape[-1]).permute(1, 2, 0, 3)
    scores = grouped_query @ keys.to(exact)[:, None].transpose(-1, -2) * form.scale  # [kv_heads, group, queries, context]
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        beside = sinks.to(exact).view(keys.shape[0], -1, 1, 1).expand(-1, -1, queries, 1)
        weights = torch.cat((scores, beside), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights @ values.to(exact)[:, None]
    return out.permute(2, 0, 1, 3).reshape(queries, heads, -1).to(query.dtype)
