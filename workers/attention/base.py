"""The interfaces of the attention backends: write this step's KV into the pool, attend over blocks.

A backend is made for the layers of one model, whose forms (`workers.attention.forms.Form`) it is told; None: all are plain.
Imports torch, `workers.step` and `workers.kernels.attention.prefixes`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from workers.kernels.attention.prefixes import PrefixLimits, SharedPrefixes
from workers.kernels.heads.turn import HeadTurn
from workers.step import StepInput


class AttentionBackend(Protocol):
    """Paged attention over one rank's shard of the pool, to which it was bound when it was made.

    Safety: the caller guarantees that every slot of the step lies in a block that its sequence holds, and that no block is
    written by two sequences. Order: all calls of a group run on one stream, so a block may be reused by the next step.
    """

    name: str

    def plan(self, step: StepInput) -> Any:
        """Work shared by all layers of one step (split sizes, index tensors). Called once a step, before its layers."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        """Write key and value to `step.slots` of `layer`, then attend causally, by the layer's form.

        query [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim]; sinks [heads], where the form has them;
        returns [tokens, heads, head_dim]. Token i of a sequence's query sees its first context_len - query_len + i + 1 tokens,
        or as many of the last of them as the form says. What blocks before those hold says nothing, though flash-attn may
        look at it: their ids are of the pool, and their numbers finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class Chunks:
    """Ragged prefill chunks, concatenated without padding. The tensors may lie on the device and change between replays."""

    query_starts: Tensor  # [chunks + 1] int32, prefix sums of the query lengths, from 0
    context_lens: Tensor  # [chunks] int32, tokens in the cache, the chunk's own counted
    block_tables: Tensor  # [chunks, any width] int32; rows may lie apart
    tokens: int  # at least the sum of the query lengths
    max_query: int  # at least the longest query
    max_context: int  # at least the longest context


class PagedAttention(Protocol):
    """Attends without writing, driven by tensors on the device: the step's KV stands in the pool already.

    `decode` may be captured in a CUDA graph with its `plan_decode` and follows lengths and tables as they are at a replay.
    One plan of each kind is live at a time: a step's layers are launched before the next step is planned.
    """

    name: str
    prefixes: PrefixLimits
    bounds: bool
    """`chunks` may be captured with upper bounds for what `Chunks` says on the host."""

    def plan_decode(
        self, context_lens: Tensor, batch: int, blocks: int | None = None, shared: SharedPrefixes | None = None
    ) -> Any:
        """Work shared by all layers of `batch` rows of one query token each. context_lens [>= batch] int32.

        blocks: the width of the block tables, for backends that plan ahead only where they know it. shared: prefixes that may
        be read once for several rows, within `prefixes`.
        """
        ...

    def turns(self, batch: int) -> bool:
        """Whether `decode` takes the projection of so many rows as it is, and does better with it."""
        ...

    def decode(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, plan: Any, out: Tensor | None = None,
        turn: HeadTurn | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query [batch, heads, head_dim] -> the same, in `out` where it is given. sinks: as in `attend`. With `turn` query is
        the projection [batch, (heads + 2 * kv_heads) * head_dim], whose queries are turned, and whose keys, turned, and values
        are written first.

        block_tables [batch, any width] int32: its width costs nothing. context_lens [batch] int32, as planned; a row that
        only pads has context 1 and a block of its own.
        """
        ...

    def plan_chunks(self, chunks: Chunks) -> Any:
        """Work shared by all layers of a step's chunks."""
        ...

    def chunks(
        self, layer: int, query: Tensor, plan: Any, out: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """All chunks of a step at once: query [tokens, heads, head_dim] -> the same, in `out` where it is given."""
        ...
