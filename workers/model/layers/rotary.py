"""Rotary position embedding: the rotation of query and key heads. Imports torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.config.rope import Rope


@dataclass(frozen=True, slots=True)
class Turns:
    """The rotation of one step's tokens, shared by all layers. cos, sin: [tokens, 1, head_dim], the sine signed."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """A table of cosines and sines for `positions` positions, in the model's dtype.

    The first half of each sine row is negated, so a rotation is `x * cos + swap_halves(x) * sin`: three operations.
    """

    __slots__ = ("_half", "table")

    def __init__(self, rope: Rope, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        angles = torch.arange(positions, dtype=exact)[:, None] * rope.frequencies(head_dim, exact)
        cos, sin = angles.cos() * rope.magnitude(), angles.sin() * rope.magnitude()
        rows = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        self.table = rows.to(device=device, dtype=dtype)
        """[positions, cos | signed sin, head_dim]"""
        self._half = head_dim // 2

    def at(self, positions: Tensor) -> Turns:
        """positions [tokens] -> their rotation. Once a step."""
        cos, sin = self.table.index_select(0, positions).split_with_sizes((1, 1), 1)
        return Turns(cos, sin)

    def turn(self, heads: Tensor, turns: Turns) -> Tensor:
        """Rotate heads [tokens, heads, head_dim] (a new tensor)."""
        return (heads * turns.cos).addcmul_(heads.roll(self._half, -1), turns.sin)
