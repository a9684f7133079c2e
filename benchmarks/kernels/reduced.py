"""Cases of `benchmarks/kernels/compare.py`: products with weights in fewer bits, beside the same with plain weights.

Up to `MAX_TOKENS` what a step of few tokens launches, above it what a linear layer does. Where x is rounded to FP8, errors are
against the rounded x: kernels answer for what they add up, rounding for itself. Imports the other cases.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import (
    DEVICE,
    DTYPE,
    EPS,
    OURS,
    OURS_PDL,
    SHAPES,
    Case,
    Problem,
    Product,
    Runs,
    Shape,
    exact_norm,
    finished,
    frobenius,
    multiply,
    normal,
    poisoned,
)
from workers.kernels.products.many import product as many_tokens
from workers.kernels.products.many import rounds
from workers.kernels.products.tilings import MAX_TOKENS, choose
from workers.kernels.reduced import BLOCK, Reduced, Rounded
from workers.kernels.rows.norm import rms_norm, rounded_norm
from workers.kernels.rows.rounding import rounded

FORMS = {"FP8": (8, 0), "FP8-blocks": (8, 128), "int4": (4, 128)}
"""bits, and columns that share a scale; 0 for a row. Of blocks 128 rows share it too."""

TOKENS = (1, 4, 8, 16, 32, 64, 512, 4096)


def reduced_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for form in FORMS:
            for product in shape.products()[:-1]:  # the head stays plain
                for tokens in TOKENS:
                    yield reduced_case(shape, product, form, tokens)


def reduced_case(shape: Shape, product: Product, form: str, tokens: int) -> Case:
    bits, group = FORMS[form]
    groups = product.k // (group or product.k)
    weight = product.rows * (product.k * bits // 8 + groups * (4 if bits == 8 else 3))
    beside = product.bytes(tokens) - 2 * product.rows * product.k
    name = f"fewer {form} {product.name} {shape.name} {tokens}"
    return Case(name, partial(_problem, product, form, tokens), weight + beside, 2 * tokens * product.rows * product.k)


def random_weight(rows: int, columns: int, form: str) -> Reduced:
    bits, group = FORMS[form]
    scale = torch.float32 if bits == 8 else torch.float16
    weight = Reduced.empty(rows, columns, bits, group or columns, scale, DEVICE)
    scales = torch.rand(weight.scales.shape, device=DEVICE).add_(0.5).mul_(columns**-0.5)
    if bits == 8:
        scales = scales[::BLOCK].repeat_interleave(BLOCK, 0)[:rows] if group else scales
        weight.fill(torch.randn(rows, columns, device=DEVICE).to(torch.float8_e4m3fn), scales)
    else:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=DEVICE)
        weight.fill(codes, scales / 4, torch.full(scales.shape, 8, device=DEVICE))
    return weight.filled()


def of_rounded(x: Rounded, weight: Reduced) -> Tensor:
    return x.numbers(torch.float64) @ weight.numbers(torch.float64).T


def _problem(p: Product, form: str, tokens: int) -> Problem:
    x, norm, weight = normal(tokens, p.k), normal(p.k), random_weight(p.rows, p.k, form)
    plain = weight.numbers(DTYPE)
    config = choose(p.n, p.k, tokens, DTYPE, p.swiglu, weight.bits) if tokens <= MAX_TOKENS else None
    if config is None:
        many: Runs = {OURS: partial(many_tokens, x, weight), "plain": partial(F.linear, x, plain)}
        if not rounds(weight, tokens, DTYPE):
            return Problem(many, lambda: frobenius(many_tokens(x, weight), x.double() @ plain.double().T))
        near = rounded(x, weight.group)
        many["rounded before"] = partial(many_tokens, near, weight)
        return Problem(many, lambda: frobenius(many_tokens(x, weight), of_rounded(near, weight)))
    out = normal(tokens, p.n) if p.residual else poisoned(tokens, p.n)

    def ours(operand: Reduced | Tensor = weight, pdl: bool = False) -> Tensor:
        return multiply(p, x, operand, norm, out, pdl)

    def library() -> Tensor:
        return many_tokens(rms_norm(x, norm, EPS) if p.norm else x, weight)

    def exact() -> Tensor:
        if config.rounded:
            near = rounded_norm(x, norm, EPS, weight.group) if p.norm else rounded(x, weight.group)
            return of_rounded(near, weight)
        return (exact_norm(x, norm) if p.norm else x.double()) @ plain.double().T

    def error() -> float:
        expected = finished(p, exact(), out)  # of the residual as it was
        return frobenius(ours(), expected)

    runs: Runs = {OURS: ours, OURS_PDL: partial(ours, pdl=True), "plain": partial(ours, plain), "as of many tokens": library}
    return Problem(runs, error)
