"""The reference that attention backends and the model are tested with: gathers each sequence's KV, one plain softmax.

Any float dtype; computes in float64 for float64 and in float32 otherwise.
"""

import torch
from torch import Tensor

from workers.execution.step import StepInput
from workers.model.architectures import RankShape


class DenseAttention:
    """Keeps KV in a plain tensor [layers, k|v, slots, kv_heads, head_dim]."""

    name = "dense"

    def __init__(
        self,
        shape: RankShape,
        dtype: torch.dtype,
        blocks: int = 32,
        block_size: int = 16,
        device: torch.device | None = None,
    ) -> None:
        self._block_size = block_size
        self._group = shape.heads // shape.kv_heads
        sizes = (shape.layers, 2, blocks * block_size, shape.kv_heads, shape.head_dim)
        self.cache = torch.zeros(sizes, dtype=dtype, device=device)

    def plan(self, step: StepInput) -> list[Tensor]:
        """The slots of each sequence's context, in order."""
        slots = []
        for table, context in zip(step.host_block_tables, step.host_context_lens.tolist(), strict=True):
            rows = torch.from_numpy(table).long()[:, None] * self._block_size + torch.arange(self._block_size)
            slots.append(rows.flatten()[:context].to(self.cache.device))
        return slots

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: list[Tensor],
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert sinks is None
        self.cache[layer, 0, step.slots] = key
        self.cache[layer, 1, step.slots] = value
        outputs, start = [], 0
        for slots, length in zip(plan, step.host_query_lens.tolist(), strict=True):
            keys, values = (self.cache[layer, which, slots] for which in (0, 1))
            outputs.append(self._attend_one(query[start : start + length], keys, values))
            start += length
        return torch.cat(outputs)

    def _attend_one(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [queries, heads, dim]; keys, values [context, kv_heads, dim] -> [queries, heads, dim]"""
        exact = torch.promote_types(query.dtype, torch.float32)
        q = query.to(exact).transpose(0, 1)
        k, v = (x.to(exact).repeat_interleave(self._group, 1).transpose(0, 1) for x in (keys, values))
        scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(scores.shape[2] - scores.shape[1])
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out: Tensor = (weights @ v).transpose(0, 1).to(query.dtype)
        return out
