"""A decode layer's products beside LoRA adapters: alone, with what adapters add, and as one chain; and those of its experts.

May import `workers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import (
    COUNTERS,
    DEVICE,
    EPS,
    OURS,
    SHAPES,
    Case,
    Operands,
    Problem,
    Product,
    RopeInputs,
    Shape,
    frobenius,
    normal,
)
from benchmarks.kernels.experts import SHAPES as MIXTURES
from benchmarks.kernels.experts import MixtureProblem, MixtureShape
from workers.kernels.experts.grouped import add_up, down, gate_up
from workers.kernels.experts.route import route
from workers.kernels.experts.stacked import Weight
from workers.kernels.lora.experts import low_rank
from workers.kernels.lora.products import add_low_rank
from workers.kernels.lora.rows import GroupedRows, group
from workers.kernels.lora.weights import LoraWeights
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS, choose
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.norm import add_rms_norm, rms_norm

SLOTS, NONE = 8, "none asked for"


@dataclass(frozen=True, slots=True)
class Mix:
    """tokens of a step, which have so many adapters in turn, each of this rank."""

    tokens: int
    adapters: int
    rank: int = 16

    @property
    def slots(self) -> Tensor:
        return torch.arange(self.tokens, dtype=torch.int32, device=DEVICE) % self.adapters

    @property
    def name(self) -> str:
        return f"{self.tokens} of {self.adapters} rank {self.rank}"


def parts_of(shape: Shape, product: Product) -> tuple[int, ...]:
    if product.name == "qkv":
        kv = shape.kv_heads * shape.head_dim
        return shape.heads * shape.head_dim, kv, kv
    return (product.n,) * (2 if product.swiglu else 1)


@dataclass(slots=True)
class Adapted:
    """A product, and adapters beside it. `without`: as a step without adapters computes it, with what stands around it; `ours`:
    by the library and two launches behind it, where a norm belongs to the residual's sum before it."""

    shape: Shape
    product: Product
    mix: Mix
    plain: Operands = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    grouped: GroupedRows = field(init=False)

    def __post_init__(self) -> None:
        p, rank = self.product, self.mix.rank
        self.plain = Operands(p, self.mix.tokens)
        self.a = normal(SLOTS, len(self.parts) * rank, p.k, scale=p.k**-0.5)
        self.b = normal(SLOTS, p.rows, rank, scale=rank**-0.5)
        self.grouped = group(self.mix.slots, SLOTS)

    @property
    def parts(self) -> tuple[int, ...]:
        return parts_of(self.shape, self.product)

    def without(self, x: Tensor | None = None) -> Tensor:
        p, ops = self.product, self.plain
        x = ops.x if x is None else x
        config = choose(p.n, p.k, len(x), x.dtype, p.swiglu)
        if config is not None:
            return matvec(
                x, ops.weight, norm_weight=ops.norm if p.norm else None, eps=EPS, residual=ops.out if p.residual else None,
                swiglu=p.swiglu, out=None if p.residual else ops.out, counters=COUNTERS, config=config,
            )  # fmt: skip
        y = F.linear(rms_norm(x, ops.norm, EPS) if p.norm else x, ops.weight)
        return silu_mul(y, ops.out) if p.swiglu else ops.out.add_(y) if p.residual else y

    def ours(self, x: Tensor | None = None, hidden: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
        """norm: that follows the residual's sum, into `hidden`."""
        p, ops, y = self.product, self.plain, self._sum(x)
        if p.swiglu:
            return silu_mul(y, ops.out)
        if not p.residual:
            return y
        return add_rms_norm(ops.out if hidden is None else hidden, y, ops.norm[: p.n] if norm is None else norm, EPS)

    def _sum(self, x: Tensor | None = None) -> Tensor:
        """The product, and what adapters add to it."""
        x = self.plain.x if x is None else x
        y = F.linear(x, self.plain.weight)
        add_low_rank(y, x, self.a, self.b, self.parts, self.grouped)
        return y

    def error(self) -> float:
        """Of the sum."""
        x = self.plain.x.double()
        exact = x @ self.plain.weight.double().T
        for row, slot in enumerate(self.mix.slots.tolist()):
            low = (self.a[slot].double() @ x[row]).view(len(self.parts), -1)
            of_parts = self.b[slot].double().split_with_sizes(self.parts)
            exact[row] += torch.cat([b @ v for b, v in zip(of_parts, low, strict=True)])
        return frobenius(self._sum(), exact)


class AdaptedLayer:
    """The kernels of one decode layer without its attention, as one chain."""

    def __init__(self, shape: Shape, mix: Mix) -> None:
        self.parts = [Adapted(shape, product, mix) for product in shape.products()[:4]]
        self.hidden, self.rope = normal(mix.tokens, shape.hidden), RopeInputs(shape, mix.tokens)
        for part in self.parts:
            if part.product.residual:
                part.plain.out = self.hidden

    def without(self) -> None:
        qkv, o, gate_up, down = self.parts
        self.rope.run(qkv.without(self.hidden))
        o.without(self.rope.out.flatten(1))
        down.without(gate_up.without(self.hidden))

    def ours(self) -> None:
        qkv, o, gate_up, down = self.parts
        self.rope.run(qkv.ours())
        normed = o.ours(self.rope.out.flatten(1), norm=gate_up.plain.norm)
        down.ours(gate_up.ours(normed), norm=qkv.plain.norm)


class AdaptedMixture(MixtureProblem):
    """A layer's experts from scores to sum, all of them adapted. `ours` of its base: as a step without adapters has them."""

    def __init__(self, shape: MixtureShape, mix: Mix) -> None:
        super().__init__(shape, mix.tokens)
        self.slots = mix.slots
        self.ups = _beside(shape, mix, shape.hidden, (shape.intermediate, shape.intermediate))
        self.downs = _beside(shape, mix, shape.intermediate, (shape.hidden,))

    def adapted(self) -> Tensor:
        assert isinstance(self.gate_up, Tensor)
        routing = route(self.scores, self.load, self.rule, held=self.shape.experts, size=self.size)
        added = low_rank(self.x, self.ups, routing, self.slots, by_token=True)
        act = gate_up(self.x, self.gate_up, routing, added=added)
        added = low_rank(act, self.downs, routing, self.slots, by_token=False)
        return add_up(down(act, self.down, routing, added=added), routing, held=self.shape.experts)

    def error_of_adapted(self) -> float:
        """Of up to eight tokens, of which each is one with its adapter in the weights."""
        got, exact, (weights, chosen) = self.adapted()[:8], [], self.chosen()
        for token, (slot, x) in enumerate(zip(self.slots.tolist()[:8], self.x.double(), strict=False)):
            parts = []
            for expert, weight in zip(chosen[token].tolist(), weights[token].double(), strict=True):
                gate, up = (_numbers_of(self.gate_up, self.ups, slot, expert) @ x).chunk(2)
                parts.append(weight * (_numbers_of(self.down, self.downs, slot, expert) @ (F.silu(gate) * up)))
            exact.append(torch.stack(parts).sum(0))
        return frobenius(got, torch.stack(exact))


def _beside(shape: MixtureShape, mix: Mix, columns: int, rows: tuple[int, ...]) -> LoraWeights:
    lora = LoraWeights.empty(SLOTS, mix.rank, columns, rows, torch.bfloat16, torch.device(DEVICE), shape.experts)
    for weight in (lora.a, lora.b):
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return lora


def _numbers_of(weight: Weight, lora: LoraWeights, slot: int, expert: int) -> Tensor:
    """An expert's matrix with one adapter in it."""
    assert isinstance(weight, Tensor)
    parts = [lora.of(expert).part(number, slot) for number in range(len(lora.rows))]
    return weight[expert].double() + torch.cat([b.double() @ a.double() for a, b in parts])


def mixture_case(shape: MixtureShape, mix: Mix) -> Case:
    """Bytes: of the experts that have tokens, and of as many adapters of each as it has on average."""

    def make() -> Problem:
        problem = AdaptedMixture(shape, mix)
        return Problem({OURS: problem.adapted, NONE: problem.ours}, problem.error_of_adapted)

    each = min(mix.adapters, mix.tokens)
    there = each * shape.chosen(mix.tokens // each)
    low = mix.rank * (3 * shape.hidden + 3 * shape.intermediate)
    numbers = shape.chosen(mix.tokens) * 3 * shape.hidden * shape.intermediate + there * low
    return Case(f"lora experts {shape.name} {mix.name}", make, 2 * numbers)


def product_case(shape: Shape, product: Product, mix: Mix) -> Case:
    def make() -> Problem:
        adapted = Adapted(shape, product, mix)
        return Problem({OURS: adapted.ours, NONE: adapted.without}, adapted.error)

    there = min(mix.adapters, mix.tokens) * mix.rank * (len(parts_of(shape, product)) * product.k + product.rows)
    return Case(f"lora {product.name} {shape.name} {mix.name}", make, product.bytes(mix.tokens) + 2 * there)


def layer_case(shape: Shape, mix: Mix) -> Case:
    def make() -> Problem:
        layer = AdaptedLayer(shape, mix)
        return Problem({OURS: layer.ours, NONE: layer.without}, lambda: max(part.error() for part in layer.parts))

    products = [product_case(shape, product, mix) for product in shape.products()[:4]]
    return Case(f"lora layer {shape.name} {mix.name}", make, sum(case.bytes for case in products))


def lora_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for mix in (Mix(1, 1), Mix(8, 8), Mix(16, 8), Mix(32, 1, 64), Mix(32, 8), Mix(64, 8), Mix(256, 8)):
            for product in shape.products()[:4]:
                yield product_case(shape, product, mix)
            if mix.tokens <= MAX_TOKENS:
                yield layer_case(shape, mix)
    for mixture in MIXTURES[:2]:
        for mix in (Mix(1, 1), Mix(8, 8), Mix(32, 1, 64), Mix(32, 8), Mix(256, 8), Mix(4096, 2)):
            yield mixture_case(mixture, mix)
