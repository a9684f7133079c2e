"""The reference that attention backends and the model are tested with: gathers each sequence's KV, one plain softmax.

Any float dtype; computes in float64 for float64 and in float32 otherwise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.workers.attention.attention_reference import dense
from workers.attention.forms import Form, plain_forms
from workers.model.config.architectures import RankShape
from workers.step import StepInput


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
        forms: Sequence[Form] | None = None,
    ) -> None:
        self._block_size = block_size
        self._forms = forms or plain_forms(shape.layers, shape.head_dim)
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
        self.cache[layer, 0, step.slots] = key
        self.cache[layer, 1, step.slots] = value
        exact = torch.promote_types(query.dtype, torch.float32)
        outputs, start = [], 0
        for slots, length in zip(plan, step.host_query_lens.tolist(), strict=True):
            keys, values = (self.cache[layer, which, slots].to(exact) for which in (0, 1))
            outputs.append(dense(query[start : start + length].to(exact), keys, values, self._forms[layer], sinks))
            start += length
        return torch.cat(outputs).to(query.dtype)
