"""A mixture of experts as a GPU runs it: router's product, choice and sort, gate/up, down, and the sum of a token's experts.

Six launches a layer, and those of a shared expert; driven by device tensors alone, so steps with experts are captured as all
others are. Imports torch, the kernels, and the weights' holders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.activation import silu_mul
from workers.kernels.experts.grouped import Clamp, add_up, down, gate_up, tile_size
from workers.kernels.experts.route import route
from workers.kernels.products.matvec import MAX_TOKENS, choose, matvec
from workers.model.experts import Mixture
from workers.model.layers import SwiGLU


class FusedMixture:
    """One layer's. counters: zeros for products that are split among programs, as `matvec` wants them."""

    def __init__(self, mixture: Mixture, counters: Tensor) -> None:
        self._mixture = mixture
        self._counters = counters
        gating = mixture.config.gating
        self._clamp = None if gating.limit is None else Clamp(gating.alpha, gating.limit)

    def __call__(self, normed: Tensor, live: Tensor | None, residual: Tensor | None = None, *, pdl: bool = False) -> Tensor:
        """normed [tokens, hidden] -> this rank's share of the same, to be summed over the ranks.

        live [tokens] bool: those that are no padding, which alone go through experts; None: all. residual [tokens, hidden], of
        a single rank: the result is added to it in place, and it is what is returned.
        """
        mixture, shape, config = self._mixture, self._mixture.shape, self._mixture.config
        experts = mixture.experts
        routing = route(
            self._scores(normed, pdl), mixture.load, per_token=config.per_token, of_all=config.family.scoring == "all",
            normalized=config.normalized, held=shape.experts, first_held=shape.expert_start,
            size=tile_size(len(normed), config.per_token, config.experts), live=live, pdl=pdl,
        )  # fmt: skip
        act = gate_up(
            normed, experts.gate_up, routing, bias=experts.gate_up_bias, in_turns=experts.in_turns, clamp=self._clamp, pdl=pdl
        )
        parts = down(act, experts.down, routing, bias=experts.down_bias, pdl=pdl)
        shared = None if mixture.shared is None else self._shared(mixture.shared, normed)
        return add_up(
            parts, routing, held=shape.experts, first_held=shape.expert_start, shared=shared, residual=residual, pdl=pdl
        )

    def _scores(self, normed: Tensor, pdl: bool) -> Tensor:
        """[tokens, the router's rows] in float32, which 16-bit products are added up in."""
        router, tokens = self._mixture.router, len(normed)
        rows, width = router.weight.shape
        tiling = choose(rows, width, tokens, normed.dtype) if tokens <= MAX_TOKENS else None
        if tiling is not None:
            out = torch.empty(tokens, rows, dtype=torch.float32, device=normed.device)
            return matvec(normed, router.weight, bias=router.bias, out=out, counters=self._counters, config=tiling, pdl=pdl)
        if normed.device.type == "cuda" and normed.dtype != torch.float32:
            scores = torch.mm(normed, router.weight.T, out_dtype=torch.float32)
            return scores if router.bias is None else scores.add_(router.bias)
        return F.linear(normed.to(router.weight.dtype), router.weight, router.bias)

    def _shared(self, shared: SwiGLU, normed: Tensor) -> Tensor:
        """This rank's share of the shared expert."""
        return shared.down(silu_mul(shared.gate_up(normed)))
