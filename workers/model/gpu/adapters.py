"""The rows of a step by adapter where a GPU computes them: device tensors alone, so that a graph may hold it. Imports Triton's
kernels.
"""

from torch import Tensor

from workers.kernels.experts.route import Added, Routing
from workers.kernels.launch import may_start_early
from workers.kernels.lora.experts import low_rank
from workers.kernels.lora.products import add_low_rank
from workers.kernels.lora.rows import GroupedRows, group
from workers.kernels.lora.weights import Awaited, LoraWeights


class DeviceRows:
    """`StepAdapters` of a GPU. slots: [rows] int32 on the device, each row's slot; negative: none. count: of slots that there
    are."""

    def __init__(self, slots: Tensor, count: int) -> None:
        self._slots, self._count = slots, count
        self._grouped: GroupedRows | None = None
        self._pdl = may_start_early(slots.device)

    def add(self, weights: LoraWeights, product: Tensor, x: Tensor) -> None:
        if self._grouped is None:
            self._grouped = group(self._slots, self._count)
        add_low_rank(product, x, weights.a, weights.b, weights.rows, self._grouped, pdl=self._pdl)

    def awaited(self, weights: LoraWeights, low: Tensor) -> Awaited:
        """What a product gets added by whoever reads it. low: [rows, slots * parts * rank], of every slot."""
        return Awaited(low, weights.b, self._slots)

    def of_pairs(
        self, weights: LoraWeights, x: Tensor, routing: Routing, *, by_token: bool, in_turns: bool = False
    ) -> Added:  # fmt: skip
        """What the products of experts get added, as in `low_rank`."""
        return low_rank(x, weights, routing, self._slots, by_token=by_token, in_turns=in_turns)

    def at(self, rows: Tensor) -> "DeviceRows":
        return DeviceRows(self._slots.index_select(0, rows), self._count)
