"""Mixtures of experts in float64, token by token: what the kernels are held against. Imports torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.experts.gating import Clamp


def exact_route(scores: Tensor, per_token: int, of_all: bool, normalized: bool) -> tuple[Tensor, Tensor]:
    """scores [tokens, experts] -> experts, the best first and of equal ones the first, and weights, [tokens, per_token]."""
    wide = scores.double()
    best, chosen = wide.sort(dim=-1, descending=True, stable=True)
    best, chosen = best[:, :per_token], chosen[:, :per_token]
    if not of_all:
        return chosen, best.softmax(-1)
    weights = wide.softmax(-1).gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) if normalized else weights


@dataclass(frozen=True)
class Weights:
    """Of all experts: gate_up [experts, 2 * width, hidden], down [experts, hidden, width], and biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    in_turns: bool = False
    clamp: Clamp | None = None

    @classmethod
    def random(
        cls, experts: int, width: int, hidden: int, dtype: torch.dtype, device: str, bias: bool = False, clamped: bool = False
    ) -> "Weights":
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, device=device)).to(dtype)

        return cls(
            normal(experts, 2 * width, hidden, scale=2 * hidden**-0.5), normal(experts, hidden, width, scale=width**-0.5),
            normal(experts, 2 * width) if bias else None, normal(experts, hidden) if bias else None, clamped,
            Clamp(1.702, 1.5) if clamped else None,
        )  # fmt: skip

    def exact(self, x: Tensor, expert: int) -> Tensor:
        """One expert of one token x [hidden], in float64."""
        product = self.gate_up[expert].double() @ x.double()
        if self.gate_up_bias is not None:
            product = product + self.gate_up_bias[expert].double()
        gate, up = (product[::2], product[1::2]) if self.in_turns else product.chunk(2)
        if self.clamp is None:
            act = gate * gate.sigmoid() * up
        else:
            gate, up = gate.clamp(max=self.clamp.limit), up.clamp(-self.clamp.limit, self.clamp.limit)
            act = (up + 1) * gate * (self.clamp.alpha * gate).sigmoid()
        out = self.down[expert].double() @ act
        return out if self.down_bias is None else out + self.down_bias[expert].double()

    def exact_mixture(self, x: Tensor, chosen: Tensor, weights: Tensor, held: range) -> Tensor:
        """[tokens, hidden], of the experts that are held."""
        out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for token in range(len(x)):
            for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
                if expert in held:
                    out[token] += weight * self.exact(x[token], expert)
        return out
