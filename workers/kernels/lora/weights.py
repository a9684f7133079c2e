"""The low-rank weights of all resident adapters beside one linear layer or one layer's experts, and what a step adds with
them. Imports torch.

    x ──▶ weight ─────────────▶ + ──▶      A is whole where the layer is divided by rows, B where it is divided by columns: then
    └──▶ A[slot] ──▶ B[slot] ───┘          the ranks' sums meet behind it, as those of the weight do
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LEAST_RANK = 16
"""What ranks are padded to, at least: tensor cores multiply no less."""

FEW_ROWS = 64
WIDEST_BEHIND, MOST_BEHIND = 32, 512
"""The rank, and the ranks of all slots together, up to which A is read behind its weight whoever has which adapter: 512 are 8%
more of an 8B model's weights."""


class LoraWeights:
    """Every slot's A [parts * rank, in] and B [out, rank], the scaling in it; zeros where an adapter has less, or nothing. Of
    experts every slot has as many of both.

    a: [slots, parts * rank, in] or [slots, experts, parts * rank, in], b likewise. rows: of each part: a merged product has a
    part for each of its projections, with an A of its own.
    """

    __slots__ = ("a", "b", "rank", "rows")

    def __init__(self, a: Tensor, b: Tensor, rows: tuple[int, ...]) -> None:
        self.a, self.b, self.rows = a, b, rows
        self.rank = b.shape[-1]

    @classmethod
    def empty(
        cls, slots: int, rank: int, in_features: int, rows: tuple[int, ...], dtype: torch.dtype, device: torch.device,
        experts: int | None = None,
    ) -> "LoraWeights":  # fmt: skip
        """rank: of the largest adapter. experts: None beside a linear layer."""
        rank, each = padded_rank(rank), (slots,) if experts is None else (slots, experts)
        a = torch.zeros(*each, len(rows) * rank, in_features, dtype=dtype, device=device)
        return cls(a, torch.zeros(*each, sum(rows), rank, dtype=dtype, device=device), rows)

    def rises_in_rows(self, rows: int) -> bool:
        """Whether kernels that read so many rows of the product add the adapters' part themselves: by shape alone, so that a
        graph keeps it."""
        return rows <= FEW_ROWS and stands_behind(len(self.b), self.rank)

    def of(self, expert: int) -> "LoraWeights":
        """One expert's, in the same memory."""
        return LoraWeights(self.a[:, expert], self.b[:, expert], self.rows)

    def part(self, number: int, slot: int) -> tuple[Tensor, Tensor]:
        """Where one projection's A [rank, in] and B [its rows, rank] stand, or [experts, ...] of each."""
        first = sum(self.rows[:number])
        return self.a[slot].narrow(-2, number * self.rank, self.rank), self.b[slot].narrow(-2, first, self.rows[number])

    def clear(self, slot: int) -> None:
        self.a[slot].zero_()
        self.b[slot].zero_()


def padded_rank(rank: int) -> int:
    """A power of two."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


def stands_behind(slots: int, rank: int) -> bool:
    """Whether A of so many slots is short enough that one product reads it behind the weight. rank: padded."""
    return rank <= WIDEST_BEHIND and slots * rank <= MOST_BEHIND


class Awaited(NamedTuple):
    """The adapters' part of a product, B[slot of row] low[row, slot of row], which the kernel that reads the product adds.

    low: [rows, slots * parts * rank], what the A of every slot makes of each row; rows may lie apart. b: [slots, out, rank],
    contiguous. slots: [rows] int32, each row's; negative: it has no adapter.
    """

    low: Tensor
    b: Tensor
    slots: Tensor


class StepAdapters(Protocol):
    """Which rows of a step's matrices have which adapter."""

    def add(self, weights: LoraWeights, product: Tensor, x: Tensor) -> None:
        """Adds each row's adapter's part, B(A(x)), to product [rows, out], in place. x: [rows, in], of the weights' dtype. Rows
        beyond the step's are padding."""
        ...

    def at(self, rows: Tensor) -> "StepAdapters":
        """Of these rows alone, in their order."""
        ...


class Segments:
    """The plain way: for each adapter its rows are taken out, multiplied, and added back.

    slots: [rows] int64 on the CPU, each row's slot; negative: none.
    """

    def __init__(self, slots: Tensor) -> None:
        self._slots = slots
        found = [slot for slot in torch.unique(slots).tolist() if slot >= 0]
        self._parts = [(slot, (slots == slot).nonzero()[:, 0]) for slot in found]

    def add(self, weights: LoraWeights, product: Tensor, x: Tensor) -> None:
        rank = weights.rank
        for slot, index in self._parts:
            low = torch.mm(x.index_select(0, index), weights.a[slot].T)
            high = [
                torch.mm(low[:, part * rank : (part + 1) * rank], weights.part(part, slot)[1].T)
                for part in range(len(weights.rows))
            ]
            added = torch.cat(high, 1) if len(high) > 1 else high[0]
            product.index_add_(0, index, added.to(product.dtype))

    def at(self, rows: Tensor) -> "Segments":
        return Segments(self._slots.index_select(0, rows))
