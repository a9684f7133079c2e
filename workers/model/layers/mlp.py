"""A dense MLP over two linears. Imports torch."""

import torch.nn.functional as F
from torch import Tensor

from workers.kernels.lora.weights import StepAdapters
from workers.model.layers.linear import Linear


class SwiGLU:
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate's rows first."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """down: of several ranks a `RowParallelLinear`, unless their partial products are added up elsewhere."""
        self.gate_up = gate_up
        self.down = down

    def pack(self) -> None:
        self.gate_up.pack()
        self.down.pack()

    def __call__(self, x: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]"""
        gate, up = self.gate_up(x, adapters).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up), adapters)
