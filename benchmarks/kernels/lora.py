"""A decode layer's products beside LoRA adapters: alone, with what adapters add, and as one chain.

May import `workers`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

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
    Runs,
    Shape,
    exact_norm,
    frobenius,
    normal,
)
from workers.kernels.lora.few import FewRows, LowRank, ShrinkTiling, list_slots
from workers.kernels.lora.products import add_low_rank
from workers.kernels.lora.rows import GroupedRows, group
from workers.kernels.products.matvec import MAX_TOKENS, Tiling, choose, choose_adapted, matvec
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.norm import add_rms_norm, rms_norm

SLOTS = 8


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
    """A product, and adapters beside it. `fused`: with what stands around it; `separate`: by the library between kernels of our
    own, where a norm belongs to the residual's sum before it."""

    shape: Shape
    product: Product
    mix: Mix
    plain: Operands = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    few: FewRows | None = field(init=False)
    grouped: GroupedRows = field(init=False)

    def __post_init__(self) -> None:
        p, rank = self.product, self.mix.rank
        self.plain = Operands(p, self.mix.tokens)
        self.a = normal(SLOTS, len(self.parts) * rank, p.k, scale=p.k**-0.5)
        self.b = normal(SLOTS, p.rows, rank, scale=rank**-0.5)
        slots = self.mix.slots
        self.few = list_slots(slots, SLOTS) if len(slots) <= MAX_TOKENS else None
        self.grouped = group(slots, SLOTS)

    @property
    def parts(self) -> tuple[int, ...]:
        return parts_of(self.shape, self.product)

    @property
    def bytes(self) -> int:
        there = min(self.mix.adapters, self.mix.tokens)
        return self.product.bytes(self.mix.tokens) + there * (self.a[0].nbytes + self.b[0].nbytes)

    def config(self) -> Tiling | None:
        p, x = self.product, self.plain.x
        return choose_adapted(p.n, p.k, len(x), x.dtype, self.parts, p.swiglu)

    def ours(self, x: Tensor | None = None) -> Tensor:
        return self.fused(self.low_rank(), self.config(), pdl=True, x=x)

    def low_rank(self, tiling: ShrinkTiling | None = None) -> LowRank:
        assert self.few is not None, "of few tokens"
        return LowRank(self.a, self.b, self.parts, self.few, tiling)

    def fused(self, low_rank: LowRank | None, config: Tiling | None, pdl: bool = False, x: Tensor | None = None) -> Tensor:
        p, ops = self.product, self.plain
        return matvec(
            ops.x if x is None else x, ops.weight, norm_weight=ops.norm if p.norm else None, eps=EPS,
            residual=ops.out if p.residual else None, swiglu=p.swiglu, out=None if p.residual else ops.out, pdl=pdl,
            counters=COUNTERS, config=config, low_rank=low_rank,
        )  # fmt: skip

    def without(self, x: Tensor | None = None) -> Tensor:
        """As a step without adapters computes it."""
        p, ops = self.product, self.plain
        x = ops.x if x is None else x
        config = choose(p.n, p.k, len(x), x.dtype, p.swiglu)
        if config is not None:
            return self.fused(None, config, x=x)
        y = F.linear(rms_norm(x, ops.norm, EPS) if p.norm else x, ops.weight)
        return silu_mul(y, ops.out) if p.swiglu else ops.out.add_(y) if p.residual else y

    def separate(self, x: Tensor | None = None, hidden: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
        """norm: that follows the residual's sum, into `hidden`."""
        p, ops = self.product, self.plain
        x = ops.x if x is None else x
        y = F.linear(x, ops.weight)
        add_low_rank(y, x, self.a, self.b, self.parts, self.grouped)
        if p.swiglu:
            return silu_mul(y, ops.out)
        if not p.residual:
            return y
        return add_rms_norm(ops.out if hidden is None else hidden, y, ops.norm[: p.n] if norm is None else norm, EPS)

    def exact(self) -> Tensor:
        """Of what `ours` gives."""
        p, ops = self.product, self.plain
        x = exact_norm(ops.x, ops.norm) if p.norm else ops.x.double()
        y = x @ ops.weight.double().T
        for row, slot in enumerate(self.mix.slots.tolist()):
            low = (self.a[slot].double() @ x[row]).view(len(self.parts), -1)
            y[row] += torch.cat([b @ v for b, v in zip(self.b[slot].double().split_with_sizes(self.parts), low, strict=True)])
        if p.swiglu:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y + ops.out.double() if p.residual else y

    def error(self) -> float:
        exact = self.exact()
        return frobenius(self.ours(), exact)


class AdaptedLayer:
    """The kernels of one decode layer without its attention, as one chain."""

    def __init__(self, shape: Shape, mix: Mix) -> None:
        self.parts = [Adapted(shape, product, mix) for product in shape.products()[:4]]
        self.hidden, self.rope = normal(mix.tokens, shape.hidden), RopeInputs(shape, mix.tokens)
        for part in self.parts:
            if part.product.residual:
                part.plain.out = self.hidden

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def fused(self, how: Callable[[Adapted, Tensor], Tensor]) -> None:
        """how: computes one of the products."""
        qkv, o, gate_up, down = self.parts
        self.rope.run(how(qkv, self.hidden))
        how(o, self.rope.out.flatten(1))
        how(down, how(gate_up, self.hidden))

    def separate(self) -> None:
        qkv, o, gate_up, down = self.parts
        self.rope.run(qkv.separate())
        normed = o.separate(self.rope.out.flatten(1), norm=gate_up.plain.norm)
        down.separate(gate_up.separate(normed), norm=qkv.plain.norm)


def product_case(shape: Shape, product: Product, mix: Mix) -> Case:
    def make() -> Problem:
        adapted = Adapted(shape, product, mix)
        runs: Runs = {"none asked for": adapted.without, "cuBLAS, two launches": adapted.separate}
        if mix.tokens > MAX_TOKENS or adapted.config() is None:
            return Problem(runs, lambda: 0.0)
        return Problem({OURS: adapted.ours} | runs, adapted.error)

    there = min(mix.adapters, mix.tokens) * mix.rank * (len(parts_of(shape, product)) * product.k + product.rows)
    return Case(f"lora {product.name} {shape.name} {mix.name}", make, product.bytes(mix.tokens) + 2 * there)


def layer_case(shape: Shape, mix: Mix) -> Case:
    def make() -> Problem:
        layer = AdaptedLayer(shape, mix)
        runs: Runs = {
            OURS: partial(layer.fused, Adapted.ours), "none asked for": partial(layer.fused, Adapted.without),
            "cuBLAS, two launches": layer.separate,
        }  # fmt: skip
        return Problem(runs, lambda: max(part.error() for part in layer.parts))

    products = [product_case(shape, product, mix) for product in shape.products()[:4]]
    return Case(f"lora layer {shape.name} {mix.name}", make, sum(case.bytes for case in products))


def lora_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for mix in (Mix(1, 1), Mix(8, 8), Mix(16, 8), Mix(32, 1, 64), Mix(32, 8), Mix(64, 8), Mix(256, 8)):
            for product in shape.products()[:4]:
                yield product_case(shape, product, mix)
            if mix.tokens <= MAX_TOKENS:
                yield layer_case(shape, mix)
