"""What `benchmarks/kernels/compare.py` measures. A case makes problems: a kernel's inputs, and what runs on them.

A case states the bytes and operations that its work cannot do without. May import `kvcache` and `workers`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS, Tiling
from workers.kernels.reduced import Reduced
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.embed import embed_norm
from workers.kernels.rows.norm import add_rms_norm, rms_norm
from workers.model.config.rope import Rope
from workers.model.layers.rotary import Rotary

EPS = 1e-6
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTERS = torch.zeros(1 << 14, dtype=torch.int32, device=DEVICE)
OURS, OURS_PDL = "manta", "manta pdl"
Runs = dict[str, Callable[[], object]]


@dataclass(slots=True)
class Problem:
    """One set of inputs. runs: by implementation, each computes the whole result from inputs that stay as they are, or
    that may be changed without making it meaningless. error: the relative Frobenius error of OURS against float64."""

    runs: Runs
    error: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    """name: "family what shape tokens". make: a problem with fresh random inputs on the device."""

    name: str
    make: Callable[[], Problem]
    bytes: int
    flops: int = 0
    calls: int = 1  # launches or layers that one run stands for, which its time is divided by


def frobenius(out: Tensor, exact: Tensor) -> float:
    difference = (out.double() - exact).norm() / exact.norm()
    return float(difference)


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).mul_(scale).to(dtype)


@lru_cache
def vocabulary(width: int) -> Tensor:
    return normal(151936, width)


@lru_cache
def rotation(head_dim: int) -> Tensor:
    return Rotary(Rope(theta=1e6), head_dim, 8192, DTYPE, DEVICE).table


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()


def poisoned(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Product:
    """A decode layer's product y = f(x) @ W.T, W [n, k] (twice as many rows with SwiGLU), and what is fused with it."""

    name: str
    n: int
    k: int
    norm: bool = False
    residual: bool = False
    swiglu: bool = False

    @property
    def rows(self) -> int:
        return 2 * self.n if self.swiglu else self.n

    def bytes(self, tokens: int) -> int:
        return 2 * (self.rows * self.k + tokens * (self.k + self.n * (2 if self.residual else 1)))


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides the kernels' work."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    def products(self) -> tuple[Product, ...]:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return (
            Product("qkv", qkv, self.hidden, norm=True),
            Product("o", self.hidden, self.heads * self.head_dim, residual=True),
            Product("gate_up", self.intermediate, self.hidden, norm=True, swiglu=True),
            Product("down", self.hidden, self.intermediate, residual=True),
            Product("head", self.vocab, self.hidden, norm=True),
        )

    def shards(self, size: int) -> tuple[Product, ...]:
        """One rank's: the row-parallel products end in a sum over ranks, not in the residual."""
        shards = []
        for p in self.products():
            n, k = (p.n, p.k // size) if p.residual else (p.n // size, p.k)
            shards.append(Product(f"{p.name}/{size}", n, k, norm=p.norm, swiglu=p.swiglu))
        return tuple(shards)


SHAPES = (
    Shape("0.6B", 1024, 3072, 16, 8, 128, 151936, 28),
    Shape("8B", 4096, 12288, 32, 8, 128, 151936, 36),
)


def multiply(
    product: Product, x: Tensor, weight: Tensor | Reduced, norm: Tensor, out: Tensor, pdl: bool = False,
    config: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Our own, as a step launches it. out: the residual, or where the result goes."""
    return matvec(
        x, weight, norm_weight=norm if product.norm else None, eps=EPS, residual=out if product.residual else None,
        swiglu=product.swiglu, out=None if product.residual else out, pdl=pdl, counters=COUNTERS, config=config,
    )  # fmt: skip


def finished(product: Product, y: Tensor, out: Tensor) -> Tensor:
    """What becomes of the plain product y in float64; `out` as it was before."""
    if product.swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y + out.double() if product.residual else y


@dataclass(slots=True)
class Operands:
    """Random operands of a product. `run` is ours, `torch` what PyTorch takes for the same."""

    product: Product
    tokens: int
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        p = self.product
        self.x = normal(self.tokens, p.k, scale=2.0)
        self.weight = normal(p.rows, p.k, scale=p.k**-0.5)
        self.norm = normal(p.k)
        self.out = normal(self.tokens, p.n) if p.residual else poisoned(self.tokens, p.n)

    def run(self, pdl: bool = False, config: Tiling | None = None) -> Tensor:
        return multiply(self.product, self.x, self.weight, self.norm, self.out, pdl, config)

    def torch(self) -> Tensor:
        p = self.product
        x = torch.rms_norm(self.x, (p.k,), self.norm, EPS) if p.norm else self.x
        y = F.linear(x, self.weight)
        if p.swiglu:
            gate, up = y.chunk(2, -1)
            return F.silu(gate).mul_(up)
        return self.out.add_(y) if p.residual else y

    def linear(self) -> Tensor:
        return F.linear(self.x, self.weight)

    def separate(self) -> Tensor:
        """cuBLAS between our own kernels."""
        p = self.product
        y = F.linear(rms_norm(self.x, self.norm, EPS) if p.norm else self.x, self.weight)
        return silu_mul(y, self.out) if p.swiglu else self.out.add_(y) if p.residual else y

    def exact(self) -> Tensor:
        p = self.product
        x = exact_norm(self.x, self.norm) if p.norm else self.x.double()
        return finished(p, torch.cat([x @ part.double().T for part in self.weight.chunk(-(-p.rows // 16384))], 1), self.out)

    def error(self, pdl: bool = False, config: Tiling | None = None) -> float:
        exact = self.exact()
        return frobenius(self.run(pdl, config), exact)


def product_case(shape: str, product: Product, tokens: int) -> Case:
    def make() -> Problem:
        operands = Operands(product, tokens)
        runs: Runs = {"torch": operands.torch, "linear alone": operands.linear}
        runs["cuBLAS, our norms"] = operands.separate
        if tokens <= MAX_TOKENS:
            ours: Runs = {OURS: operands.run, OURS_PDL: partial(operands.run, True)}
            runs = ours | runs
        return Problem(runs, operands.error if tokens <= MAX_TOKENS else lambda: 0.0)

    return Case(f"matvec {product.name} {shape} {tokens}", make, product.bytes(tokens), 2 * tokens * product.rows * product.k)


class LayerProblem:
    """The kernels of one decode layer without its attention, as one chain: what launches between kernels cost."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        qkv, o, gate_up, down, _ = shape.products()
        self.shape, self.tokens = shape, tokens
        self.parts = [Operands(p, tokens) for p in (qkv, o, gate_up, down)]
        self.hidden = normal(tokens, shape.hidden)
        self.rope = RopeInputs(shape, tokens)

    def ours(self, pdl: bool) -> None:
        qkv, o, gate_up, down = self.parts
        hidden, rope = self.hidden, self.rope
        run = partial(matvec, eps=EPS, pdl=pdl, counters=COUNTERS)
        run(hidden, qkv.weight, norm_weight=qkv.norm, out=qkv.out)
        rope.run(qkv.out, pdl)
        run(rope.out.view(self.tokens, -1), o.weight, residual=hidden)
        run(hidden, gate_up.weight, norm_weight=gate_up.norm, swiglu=True, out=gate_up.out)
        run(gate_up.out, down.weight, residual=hidden)

    def separate(self, pdl: bool) -> None:
        """cuBLAS, and our kernels between its products."""
        qkv, o, gate_up, down = self.parts
        rope = self.rope
        self.rope.run(F.linear(qkv.x, qkv.weight), pdl)
        delta = F.linear(rope.out.view(self.tokens, -1), o.weight)
        normed = add_rms_norm(self.hidden, delta, gate_up.norm, EPS, pdl=pdl)
        product = silu_mul(F.linear(normed, gate_up.weight), pdl=pdl)
        add_rms_norm(self.hidden, F.linear(product, down.weight), qkv.norm, EPS, qkv.x, pdl=pdl)

    def error(self) -> float:
        """Of the chain that has the most that can go wrong: our kernels, each launched before the last has ended."""
        qkv, o, gate_up, down = self.parts
        hidden, rope = self.hidden.double(), self.rope
        queries = exact_norm(self.hidden, qkv.norm) @ qkv.weight[: o.product.k].double().T
        queries = rope.turned(queries.view(self.tokens, self.shape.heads, -1), rope.q_weight)
        hidden += queries.flatten(1) @ o.weight.double().T
        gate, up = (exact_norm(hidden, gate_up.norm) @ gate_up.weight.double().T).chunk(2, -1)
        hidden += (F.silu(gate) * up) @ down.weight.double().T
        run = partial(self.ours, True) if self.tokens <= MAX_TOKENS else partial(self.separate_from_hidden, True)
        run()
        return frobenius(self.hidden, hidden)

    def separate_from_hidden(self, pdl: bool) -> None:
        rms_norm(self.hidden, self.parts[0].norm, EPS, self.parts[0].x, pdl=pdl)
        self.separate(pdl)


def layer_case(shape: Shape, tokens: int) -> Case:
    def make() -> Problem:
        problem = LayerProblem(shape, tokens)
        runs: Runs = {
            "cuBLAS, our norms": partial(problem.separate, False),
            "cuBLAS, our norms pdl": partial(problem.separate, True),
        }
        if tokens <= MAX_TOKENS:
            runs = {OURS: partial(problem.ours, False), OURS_PDL: partial(problem.ours, True)} | runs
        return Problem(runs, problem.error)

    products = shape.products()[:4]
    return Case(f"layer {shape.name} {tokens}", make, sum(p.bytes(tokens) for p in products))


class RopeInputs:
    """Queries, keys and values of one layer, and a pool for them."""

    def __init__(self, shape: Shape, tokens: int, block_size: int = 256) -> None:
        self.shape, self.tokens = shape, tokens
        layout = BlockLayout(block_size, 2, shape.kv_heads, shape.head_dim, "bfloat16")
        self.pool = KVPool(layout, -(-tokens // block_size) + 2, DEVICE)
        self.qkv = normal(tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.q_weight, self.k_weight = normal(shape.head_dim), normal(shape.head_dim)
        self.table = rotation(shape.head_dim)
        self.turn = HeadTurn(self.q_weight, self.k_weight, EPS, self.table)
        self.positions = torch.randint(8192, (tokens,), device=DEVICE)
        self.slots = torch.randperm(self.pool.blocks * block_size, device=DEVICE)[:tokens]
        self.out = poisoned(tokens, shape.heads, shape.head_dim)

    def run(self, qkv: Tensor | None = None, pdl: bool = False) -> None:
        qk_norm_rope_write(
            self.qkv if qkv is None else qkv, self.turn, self.positions, self.slots, self.pool.keys(1), self.pool.values(1),
            self.shape.heads, self.shape.kv_heads, self.out, pdl=pdl,
        )  # fmt: skip

    def turned(self, heads: Tensor, weight: Tensor) -> Tensor:
        """In float64: [tokens, heads, head_dim], normed and rotated."""
        cos, sin = self.table[self.positions].double().split_with_sizes((1, 1), 1)
        normed = exact_norm(heads, weight)
        half = self.shape.head_dim // 2
        return normed * cos + normed.roll(half, -1) * sin

    def error(self) -> float:
        self.run()
        shape, size = self.shape, self.pool.layout.block_size
        q, k, v = self.qkv.view(self.tokens, -1, shape.head_dim).split_with_sizes(
            (shape.heads, shape.kv_heads, shape.kv_heads), 1
        )
        block, slot = self.slots // size, self.slots % size
        pairs = (
            (self.out, self.turned(q, self.q_weight)),
            (self.pool.keys(1)[block, slot], self.turned(k, self.k_weight)),
            (self.pool.values(1)[block, slot], v.double()),
        )
        return max(frobenius(out, exact) for out, exact in pairs)


def rope_case(shape: Shape, tokens: int) -> Case:
    def make() -> Problem:
        inputs = RopeInputs(shape, tokens)
        return Problem({OURS: inputs.run, OURS_PDL: partial(inputs.run, None, True)}, inputs.error)

    row = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return Case(f"rope {shape.name} {tokens}", make, 2 * tokens * (2 * row + 2 * shape.head_dim))


def norm_case(width: int, tokens: int) -> Case:
    def make() -> Problem:
        hidden, delta, weight, out = normal(tokens, width), normal(tokens, width), normal(width), poisoned(tokens, width)

        def ours(pdl: bool = False) -> Tensor:
            return add_rms_norm(hidden, delta, weight, EPS, out, pdl=pdl)

        def rival() -> Tensor:
            return torch.rms_norm(hidden.add_(delta), (width,), weight, EPS)

        def error() -> float:
            exact = (hidden.float() + delta.float()).to(DTYPE)
            return max(frobenius(ours(), exact_norm(exact, weight)), frobenius(hidden, exact.double()))

        return Problem({OURS: ours, OURS_PDL: partial(ours, True), "torch": rival}, error)

    return Case(f"add_rms_norm {width} {tokens}", make, 8 * tokens * width)


def activation_case(width: int, tokens: int) -> Case:
    def make() -> Problem:
        gate_up, out = normal(tokens, 2 * width), poisoned(tokens, width)

        def rival() -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate).mul_(up)

        def error() -> float:
            gate, up = gate_up.double().chunk(2, -1)
            return frobenius(silu_mul(gate_up, out), F.silu(gate) * up)

        runs: Runs = {
            OURS: partial(silu_mul, gate_up, out), OURS_PDL: partial(silu_mul, gate_up, out, pdl=True), "torch": rival,
        }  # fmt: skip
        return Problem(runs, error)

    return Case(f"silu_mul {width} {tokens}", make, 6 * tokens * width)


def embed_case(width: int, tokens: int) -> Case:
    def make() -> Problem:
        table, weight = vocabulary(width), normal(width)
        ids = torch.randint(151936, (tokens,), device=DEVICE)
        hidden, normed = poisoned(tokens, width), poisoned(tokens, width)

        def ours(pdl: bool = False) -> None:
            embed_norm(ids, table, weight, EPS, hidden, normed, pdl=pdl)

        def rival() -> Tensor:
            return torch.rms_norm(F.embedding(ids, table), (width,), weight, EPS)

        def error() -> float:
            ours()
            return max(frobenius(hidden, table[ids].double()), frobenius(normed, exact_norm(table[ids], weight)))

        return Problem({OURS: ours, OURS_PDL: partial(ours, True), "torch": rival}, error)

    return Case(f"embed_norm {width} {tokens}", make, 6 * tokens * width)


def all_cases() -> Iterator[Case]:
    for tokens in (1, 32, 256, 8192):
        for shape in SHAPES:
            yield norm_case(shape.hidden, tokens)
            yield activation_case(shape.intermediate, tokens)
            yield rope_case(shape, tokens)
        yield embed_case(1024, tokens)
    for shape in SHAPES:
        for product in shape.products():
            for tokens in (1, 2, 4, 8, 16, 32, 64):
                yield product_case(shape.name, product, tokens)
        for product in shape.shards(2):
            for tokens in (1, 8):
                yield product_case(shape.name, product, tokens)
        for tokens in (1, 2, 4, 8, 16, 32):
            yield layer_case(shape, tokens)
