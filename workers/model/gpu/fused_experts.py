"""A mixture of experts as a GPU runs it: router's product, choice and sort, gate/up, down, and the sum of a token's experts.

Six launches a layer, three at few tokens, and those of a shared expert; in steps with adapters two more for each product.
Driven by device tensors alone, so steps with experts are captured as all others are. Imports torch, the kernels, and the
weights' holders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.experts.gating import Clamp
from workers.kernels.experts.grouped import add_up, down, gate_up, tile_size
from workers.kernels.experts.route import Added, Routing, Rule, route
from workers.kernels.experts.stream import few_down, few_up, most_tokens
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS
from workers.kernels.products.tilings import choose as choose_tiling
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.norm import rms_norm
from workers.model.gpu.adapters import DeviceRows
from workers.model.layers.experts import Mixture


class FusedMixture:
    """One layer's. counters: zeros for products that are split among programs, as `matvec` wants them."""

    def __init__(self, mixture: Mixture, counters: Tensor) -> None:
        self._mixture = mixture
        self._counters = counters
        config = mixture.config
        self._rule = Rule(config.per_token, config.family.scoring == "all", config.normalized)
        self._few_tokens = most_tokens(mixture.experts.gate_up, mixture.experts.down)
        self._clamp = None if config.gating.limit is None else Clamp(config.gating.alpha, config.gating.limit)

    def add_to(self, hidden: Tensor, norm_weight: Tensor, eps: float, live: Tensor | None, *, pdl: bool = False) -> None:
        """Adds the experts of the norm of hidden [tokens, hidden] to it, in place, of a single rank. live: as below."""
        if len(hidden) <= self._few_tokens:
            self._add_few(hidden, norm_weight, eps, live, pdl)
        else:
            self(rms_norm(hidden, norm_weight, eps), live, hidden, pdl=pdl)

    def __call__(
        self, normed: Tensor, live: Tensor | None, residual: Tensor | None = None, adapters: DeviceRows | None = None, *,
        pdl: bool = False,
    ) -> Tensor:  # fmt: skip
        """normed [tokens, hidden] -> this rank's part of the same, which the ranks sum.

        live [tokens] bool: those that are no padding, which alone go through experts; None: all. residual [tokens, hidden], of
        a single rank: the result is added to it in place, and it is what is returned. adapters: of the tokens; None: no token
        has one.
        """
        mixture, shape, config = self._mixture, self._mixture.shape, self._mixture.config
        experts = mixture.experts
        size = tile_size(len(normed), config.per_token, config.experts)
        scores = self._scores(normed, pdl)
        if adapters is not None and mixture.router.lora is not None:
            adapters.add(mixture.router.lora, scores, normed)
        routing = route(
            scores, mixture.load, self._rule, held=shape.experts, first_held=shape.expert_start, size=size, live=live, pdl=pdl
        )
        act = gate_up(
            normed, experts.gate_up, routing, bias=experts.gate_up_bias, in_turns=experts.in_turns, clamp=self._clamp,
            added=self._added(normed, routing, adapters), pdl=pdl,
        )  # fmt: skip
        added = self._added(act, routing, adapters, down=True)
        parts = down(act, experts.down, routing, bias=experts.down_bias, added=added, pdl=pdl)
        shared = None
        if mixture.shared is not None:
            shared = mixture.shared.down(silu_mul(mixture.shared.gate_up(normed, adapters)), adapters)
        return add_up(
            parts, routing, held=shape.experts, first_held=shape.expert_start, shared=shared, residual=residual, pdl=pdl
        )

    def _added(self, x: Tensor, routing: Routing, adapters: DeviceRows | None, down: bool = False) -> Added | None:
        """What adapters add to the experts' first product, of tokens, or to their second, of pairs."""
        experts = self._mixture.experts
        if adapters is None or experts.lora is None:
            return None
        in_turns = experts.in_turns and not down
        return adapters.of_pairs(experts.lora[down], x, routing, by_token=not down, in_turns=in_turns)

    def _add_few(self, hidden: Tensor, norm_weight: Tensor, eps: float, live: Tensor | None, pdl: bool) -> None:
        mixture, experts = self._mixture, self._mixture.experts
        router = mixture.router
        scores = torch.empty(len(hidden), len(router.weight), dtype=torch.float32, device=hidden.device)
        matvec(hidden, router.weight, norm_weight=norm_weight, eps=eps, bias=router.bias, out=scores, pdl=pdl)
        act, choice = few_up(
            hidden, norm_weight, eps, experts.gate_up, scores, mixture.load, self._rule, live=live, bias=experts.gate_up_bias,
            in_turns=experts.in_turns, clamp=self._clamp, pdl=pdl,
        )  # fmt: skip
        shared = None
        if mixture.shared is not None:
            wide = matvec(hidden, mixture.shared.gate_up.operand, norm_weight=norm_weight, eps=eps, swiglu=True, pdl=pdl)
            shared = matvec(wide, mixture.shared.down.operand, pdl=pdl)
        few_down(act, experts.down, choice, scores, hidden, bias=experts.down_bias, shared=shared, pdl=pdl)

    def _scores(self, normed: Tensor, pdl: bool) -> Tensor:
        """[tokens, the router's rows] in float32, which 16-bit products are added up in."""
        router, tokens = self._mixture.router, len(normed)
        rows, width = router.weight.shape
        tiling = choose_tiling(rows, width, tokens, normed.dtype) if tokens <= MAX_TOKENS else None
        if tiling is not None:
            out = torch.empty(tokens, rows, dtype=torch.float32, device=normed.device)
            return matvec(normed, router.weight, bias=router.bias, out=out, counters=self._counters, config=tiling, pdl=pdl)
        if normed.device.type == "cuda" and normed.dtype != torch.float32:
            scores = torch.mm(normed, router.weight.T, out_dtype=torch.float32)
            return scores if router.bias is None else scores.add_(router.bias)
        return F.linear(normed.to(router.weight.dtype), router.weight, router.bias)
