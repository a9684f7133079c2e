"""What heads go through between a projection and attention, as the kernels are told. Imports torch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadTurn:
    """What a layer's heads of queries and keys go through: a norm with these weights [head_dim] (both or neither) and `eps`,
    and the rotation of their position. table [max_position, cos | signed sin, head_dim] as `Rotary` makes it, contiguous."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    table: Tensor
