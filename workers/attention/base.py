"""The one interface of the attention backends: write this step's KV into the pool, attend over pages.

Imports torch and `workers.execution.step`.
"""

from typing import Any, Protocol

from torch import Tensor

from workers.execution.step import StepInput


class AttentionBackend(Protocol):
    """Paged attention over one rank's shard of the pool, to which it was bound when it was made.

    Safety: the caller guarantees that every slot of the step lies in a page that its sequence holds, and that no page is
    written by two sequences. Order: all calls of a group run on one stream, so a page may be reused by the next step.
    """

    name: str

    def plan(self, step: StepInput) -> Any:
        """Work shared by all layers of one step (split sizes, index tensors). Called once a step."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: Any) -> Tensor:
        """Write key and value to `step.slots` of `layer`, then attend causally.

        query [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim]; returns [tokens, heads, head_dim].
        Scale is 1/sqrt(head_dim). Token i of a sequence's query sees its first context_len - query_len + i + 1 tokens.
        """
        ...
