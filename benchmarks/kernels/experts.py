"""The products of a layer's experts, from scores to the sum of a token's, as steps of so many tokens do them: streamed pair by
pair, tiles of pairs, or many pairs by the copy engine; and with the matrices in fewer bits. `cases` measures them.

A case's bytes are those of the experts that have tokens, its operations those of all pairs. May import `workers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import DEVICE, EPS, OURS, OURS_PDL, Case, Problem, Runs, frobenius, normal
from benchmarks.kernels.reduced import random_weight
from workers.kernels.experts.grouped import add_up, choose_tiling, down, gate_up, tile_size
from workers.kernels.experts.route import Rule, route
from workers.kernels.experts.stacked import Stacked, Weight, operand
from workers.kernels.experts.stream import FEW_TOKENS, few_down, few_up, most_tokens
from workers.kernels.reduced import E8M0_BIAS, FP4_BLOCK, Microscaled


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """What of a layer with experts decides the kernels' work."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    per_token: int

    def chosen(self, tokens: int) -> int:
        """Experts that so many tokens of random scores choose, on average."""
        return round(self.experts * (1 - (1 - self.per_token / self.experts) ** tokens))


SHAPES = (
    MixtureShape("30B-A3B", 2048, 768, 128, 8), MixtureShape("8x7B", 4096, 14336, 8, 2),
    MixtureShape("20B-A4B", 2880, 2880, 32, 4),
)  # fmt: skip


FEWER = (("30B-A3B", "FP8-blocks"), ("30B-A3B", "int4"), ("20B-A4B", "MXFP4"))
"""Of `reduced.FORMS`, and that of gpt-oss."""

LEAST_OF_MANY = 256  # tokens

BITS = {"FP8-blocks": 8 + 32 / 128, "int4": 4 + 24 / 128, "MXFP4": 4 + 8 / 32}
"""A number, scales and zero points included."""


class MixtureProblem:
    def __init__(self, shape: MixtureShape, tokens: int, form: str | None = None) -> None:
        """form: of `FEWER`; None: plain."""
        self.shape, hidden, width = shape, shape.hidden, shape.intermediate
        self.x, self.scores = normal(tokens, hidden), normal(tokens, shape.experts, dtype=torch.float32)
        self.gate_up = _weight(shape.experts, 2 * width, hidden, form)
        self.down = _weight(shape.experts, hidden, width, form)
        self.hidden, self.norm = self.x.clone(), normal(hidden)
        self.load = torch.zeros(shape.experts, dtype=torch.int64, device=DEVICE)
        self.size = tile_size(tokens, shape.per_token, shape.experts)
        self.rule, self.few = Rule(shape.per_token, True, True), tokens <= most_tokens(self.gate_up, self.down)

    def ours(self, pdl: bool = False) -> Tensor:
        return self.streamed(pdl) if self.few else self.grouped(pdl)

    def grouped(self, pdl: bool = False, widened: bool = True) -> Tensor:
        """widened: matrices in fewer bits may be, before their products."""
        shape = self.shape
        tilings = [
            None if widened else choose_tiling(self.size, self.x.dtype, gated, operand(weight))
            for weight, gated in ((self.gate_up, True), (self.down, False))
        ]
        routing = route(self.scores, self.load, self.rule, held=shape.experts, size=self.size, pdl=pdl)
        act = gate_up(self.x, self.gate_up, routing, pdl=pdl, tiling=tilings[0])
        parts = down(act, self.down, routing, pdl=pdl, tiling=tilings[1])
        return add_up(parts, routing, held=shape.experts, pdl=pdl)

    def streamed(self, pdl: bool = False) -> Tensor:
        """Of the norm of `hidden`, to which the result is added."""
        act, choice = few_up(self.hidden, self.norm, EPS, self.gate_up, self.scores, self.load, self.rule, pdl=pdl)
        few_down(act, self.down, choice, self.scores, self.hidden, pdl=pdl)
        return self.hidden

    def chosen(self) -> tuple[Tensor, Tensor]:
        weights, chosen = self.scores.softmax(-1).topk(self.shape.per_token, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def library(self) -> Tensor:
        """torch's grouped product between gathers and sums of torch's."""
        assert isinstance(self.gate_up, Tensor), "it has none of fewer bits"
        assert isinstance(self.down, Tensor)
        weights, chosen = self.chosen()
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        ends = (flat[:, None] <= torch.arange(self.shape.experts, device=DEVICE)).sum(0).int()
        product = torch._grouped_mm(self.x[order // self.shape.per_token], self.gate_up.transpose(1, 2), ends)
        gate, up = product.chunk(2, -1)
        parts = torch._grouped_mm(F.silu(gate).mul_(up), self.down.transpose(1, 2), ends)
        parts = torch.empty_like(parts).index_copy_(0, order, parts * weights.flatten()[order, None].to(parts.dtype))
        return parts.view(*chosen.shape, -1).sum(1)

    def exact(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] float64."""
        weights, chosen = self.chosen()
        exact = torch.zeros_like(x)
        for expert in range(self.shape.experts):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (x[tokens] @ _numbers(self.gate_up, expert).T).chunk(2, -1)
            part = (F.silu(gate) * up) @ _numbers(self.down, expert).T
            exact.index_add_(0, tokens, part * weights[tokens, places, None].double())
        return exact

    def error(self) -> float:
        x = self.x.double()
        if not self.few:
            return frobenius(self.ours(), self.exact(x))
        self.hidden.copy_(self.x)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm.double()
        return frobenius(self.ours(), x + self.exact(normed))


def _weight(experts: int, rows: int, columns: int, form: str | None) -> Weight:
    if form is None:
        return normal(experts, rows, columns, scale=columns**-0.5)
    if form != "MXFP4":
        return Stacked(random_weight(experts * rows, columns, form), experts)
    weight = Microscaled.empty(experts * rows, columns, DEVICE)
    scales = torch.randint(E8M0_BIAS - 9, E8M0_BIAS - 6, (experts * rows, columns // FP4_BLOCK), device=DEVICE)
    part = 1 << 14  # rows; all of their codes, a byte each, would be as much as the weight in 16 bits
    for start in range(0, experts * rows, part):
        some = weight.rows(start, start + part)
        codes = torch.randint(0, 16, some.shape, dtype=torch.uint8, device=DEVICE)
        some.fill(codes, scales[start : start + part].to(torch.uint8))
    return Stacked(weight, experts)


def _numbers(weight: Weight, expert: int) -> Tensor:
    return weight[expert].double() if isinstance(weight, Tensor) else weight.numbers(expert, torch.float64)


def experts_case(shape: MixtureShape, tokens: int, form: str | None = None) -> Case:
    def make() -> Problem:
        problem = MixtureProblem(shape, tokens, form)
        runs: Runs = {OURS: problem.ours, OURS_PDL: lambda: problem.ours(True)}
        if form is None:
            runs["torch._grouped_mm"] = problem.library
        if form is not None and tokens > LEAST_OF_MANY:
            runs["never widened"] = lambda: problem.grouped(widened=False)
        if tokens <= FEW_TOKENS:
            other = ("grouped pdl", problem.grouped) if problem.few else ("streamed pdl", problem.streamed)
            runs[other[0]] = lambda: other[1](True)
        return Problem(runs, problem.error)

    numbers = 3 * shape.hidden * shape.intermediate
    work = 2 * tokens * shape.per_token * numbers
    bits = BITS[form] if form is not None else 16
    name = f"experts {shape.name} {tokens}" if form is None else f"experts {form} {shape.name} {tokens}"
    return Case(name, make, int(bits / 8 * shape.chosen(tokens) * numbers), work)


def expert_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 2048, 8192):
            yield experts_case(shape, tokens)
    for name, form in FEWER:
        for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 2048, 8192):
            yield experts_case(next(shape for shape in SHAPES if shape.name == name), tokens, form)
