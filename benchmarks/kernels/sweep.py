"""Which tilings are the fastest: products of few tokens in 16 and in four bits, and experts in fewer bits.

    python -m benchmarks.kernels.sweep [--only REGEX] [--tokens 1 32] [--json FILE]

Each is compiled in a process of its own, checked against float64, and timed as a CUDA graph of many runs that go around among
enough sets of inputs to exceed the L2 cache; the best are timed with programmatic dependent launch, too. What the code chooses
is marked. Needs a CUDA device. May import `kvcache` and `workers`.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import (
    DTYPE,
    EPS,
    SHAPES,
    Operands,
    Product,
    exact_norm,
    finished,
    frobenius,
    multiply,
    normal,
    poisoned,
)
from benchmarks.kernels.experts import FEWER, MixtureProblem, MixtureShape
from benchmarks.kernels.experts import SHAPES as MIXTURES
from benchmarks.kernels.measuring import BEYOND_L2_BYTES, COMPILERS, MAX_SETS, ceilings, graph_us
from benchmarks.kernels.reduced import random_weight
from benchmarks.shared.report import table
from workers.kernels.experts.grouped import GroupedTiling, choose_tiling, down, gate_up
from workers.kernels.experts.route import route
from workers.kernels.experts.stacked import operand
from workers.kernels.experts.stream import StreamTiling, choose_streaming, few_down, few_up
from workers.kernels.products.tilings import LEAST_TILE_TOKENS, MAX_TOKENS, STREAM_TOKENS, Tiling, choose

Config: TypeAlias = Tiling | GroupedTiling | StreamTiling
BEST = 4
RUNS, ROUNDS = 32, 5
TOKENS = (1, 4, 8, 16, 32, 64)
FEWEST = 2  # tokens of experts that may stream


class Trial(Protocol):
    """One set of inputs. nbytes: that a run must read."""

    nbytes: int

    def run(self, config: Config, pdl: bool) -> Tensor: ...

    def error(self, config: Config) -> float:
        """Relative, against float64."""
        ...

    def chosen(self) -> Config | None:
        """What stands in the code."""
        ...


@dataclass(frozen=True)
class Product16:
    product: Product
    tokens: int

    def make(self) -> Trial:
        return _Product16(self.product, self.tokens)

    def configs(self) -> list[Config]:
        product, tokens = self.product, self.tokens
        if tokens <= STREAM_TOKENS:
            return [config for config in STREAMS if product.k % config.columns == 0]
        every = (Tiling(*each) for each in itertools.product(ROWS, COLUMNS, WARPS, STAGES, PARTS))
        return [tile for tile in every if _fits(product, tokens, tile)]


class _Product16:
    def __init__(self, product: Product, tokens: int) -> None:
        self._operands = Operands(product, tokens)
        self.nbytes = product.bytes(tokens)

    def run(self, config: Config, pdl: bool) -> Tensor:
        assert isinstance(config, Tiling)
        return self._operands.run(pdl, config)

    def error(self, config: Config) -> float:
        assert isinstance(config, Tiling)
        return self._operands.error(config=config)

    def chosen(self) -> Config | None:
        product = self._operands.product
        return choose(product.n, product.k, self._operands.tokens, DTYPE, product.swiglu)


STREAMS = (
    Tiling(1, 1024, 4), Tiling(2, 512, 2), Tiling(2, 1024, 4), Tiling(4, 512, 2), Tiling(4, 512, 4), Tiling(4, 1024, 4),
    Tiling(8, 256, 1), Tiling(8, 512, 2), Tiling(8, 512, 4), Tiling(8, 1024, 4), Tiling(8, 1024, 8), Tiling(16, 512, 8),
    Tiling(4, 2048, 8), Tiling(2, 2048, 8), Tiling(4, 1024, 4, 3), Tiling(8, 1024, 4, 3), Tiling(8, 512, 4, 4),
    Tiling(16, 512, 4, 4),
)  # fmt: skip
ROWS, COLUMNS, WARPS, STAGES, PARTS = (16, 32, 64), (64, 128, 256, 512), (4, 8), (2, 3, 4, 6, 8), (1, 2, 4, 8)
SHARED_BYTES = 224 << 10  # of a multiprocessor's memory, for what its program keeps there
AHEAD_BYTES = 40 << 10  # of W that a program asks for at once, at least
PROGRAMS = range(96, 400)  # wanted of a product: enough to fill the device, and not too short


def _fits(product: Product, tokens: int, tile: Tiling) -> bool:
    """Whether it divides the product, fills the device, and has enough of W in flight in the memory that there is."""
    if product.k % (tile.columns * tile.parts) or -(-product.n // tile.rows) * tile.parts not in PROGRAMS:
        return False
    turns = product.k // tile.columns // tile.parts
    shared = tile.stages * tile.stage_bytes(min(tile.tokens, max(LEAST_TILE_TOKENS, tokens)), 16, product.swiglu)
    ahead = min(tile.stages - 1, turns) * tile.stage_bytes(0, 16, product.swiglu)
    wide = tile.rows * tile.columns >= 8192  # enough for eight warps
    return tile.stages <= turns + 1 and shared <= SHARED_BYTES and (
        ahead >= AHEAD_BYTES or tile.stages == turns + 1) and (tile.warps == 4 or wide)  # fmt: skip


@dataclass(frozen=True)
class FourBits:
    """In groups of 128 with zero points, scales in 16 bits."""

    product: Product
    tokens: int

    def make(self) -> Trial:
        return _FourBits(self.product, self.tokens)

    def configs(self) -> list[Config]:
        """For few tokens such of at most two warps, too: many programs."""
        shapes = ((16, 1), (32, 2), (64, 2), (64, 4)) if self.tokens <= LEAST_TILE_TOKENS else ((32, 2), (64, 4), (128, 8))
        every = (Tiling(rows, columns, warps, stages, parts) for (rows, warps), columns, stages, parts
                 in itertools.product(shapes, (128, 256, 512), (3, 4), PARTS))  # fmt: skip
        return [tile for tile in every if self.product.k % (tile.columns * tile.parts) == 0
                and -(-self.product.n // tile.rows) * tile.parts in FOUR_BIT_PROGRAMS]  # fmt: skip


FOUR_BIT_PROGRAMS = range(120, 1600)


class _FourBits:
    def __init__(self, product: Product, tokens: int) -> None:
        p = self._product = product
        self._x, self._norm = normal(tokens, p.k), normal(p.k)
        self._weight = random_weight(p.rows, p.k, "int4")
        self._out = normal(tokens, p.n) if p.residual else poisoned(tokens, p.n)
        self.nbytes = self._weight.nbytes + p.bytes(tokens) - 2 * p.rows * p.k

    def run(self, config: Config, pdl: bool) -> Tensor:
        assert isinstance(config, Tiling)
        return multiply(self._product, self._x, self._weight, self._norm, self._out, pdl, config)

    def error(self, config: Config) -> float:
        p = self._product
        x = exact_norm(self._x, self._norm) if p.norm else self._x.double()
        expected = finished(p, x @ self._weight.numbers(torch.float64).T, self._out)
        return frobenius(self.run(config, False), expected)

    def chosen(self) -> Config | None:
        p = self._product
        return choose(p.n, p.k, len(self._x), DTYPE, p.swiglu, 4)


@dataclass(frozen=True)
class Experts:
    """gated: gate and up; else down."""

    shape: MixtureShape
    form: str
    tokens: int
    gated: bool

    def make(self) -> Trial:
        return _Experts(self.shape, self.form, self.tokens, self.gated)

    def configs(self) -> list[Config]:
        k = self.shape.hidden if self.gated else self.shape.intermediate
        if self.tokens > FEWEST:
            most = 256 if self.form == "int4" and k % 256 == 0 else 128
            return [GroupedTiling(rows, columns, warps, stages) for rows, columns, (warps, stages)
                    in itertools.product((16, 32, 64, 128), (64, 128, 256), ((1, 4), (2, 3), (2, 5), (4, 3), (4, 5), (8, 3)))
                    if columns <= most and 16 <= rows // warps <= 32]  # fmt: skip
        at_once = 2 if self.gated else self.shape.per_token  # rows of it
        return [StreamTiling(rows, columns, warps, stages) for rows, columns, (warps, stages)
                in itertools.product((2, 4), (256, 512, 1024, 2048), ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (4, 1)))
                if rows * columns * at_once <= 16384 * warps and 3 * (-k % columns) <= k
                and (columns >= 512 or self.form != "int4" or k % 512)]  # fmt: skip


class _Experts:
    def __init__(self, shape: MixtureShape, form: str, tokens: int, gated: bool) -> None:
        p = self._problem = MixtureProblem(shape, tokens, form)
        self._gated, self._weight = gated, p.gate_up if gated else p.down
        self._routing = route(p.scores, p.load, p.rule, held=shape.experts, size=p.size)
        self._act = normal(tokens * shape.per_token, shape.intermediate)
        self._choice = None
        if tokens <= FEWEST:
            _, self._choice = few_up(p.hidden, p.norm, EPS, p.gate_up, p.scores, p.load, p.rule)
        self.nbytes = operand(self._weight).values.nbytes // shape.experts * shape.chosen(tokens)

    def run(self, config: Config, pdl: bool) -> Tensor:
        p = self._problem
        if isinstance(config, StreamTiling):
            assert self._choice is not None, "experts of more tokens are not streamed"
            if self._gated:
                return few_up(p.hidden, p.norm, EPS, p.gate_up, p.scores, p.load, p.rule, tiling=config, pdl=pdl)[0]
            few_down(self._act, p.down, self._choice, p.scores, p.hidden, tiling=config, pdl=pdl)
            return p.hidden
        assert isinstance(config, GroupedTiling)
        if self._gated:
            return gate_up(p.x, p.gate_up, self._routing, tiling=config, pdl=pdl)
        return down(self._act, p.down, self._routing, tiling=config, pdl=pdl)

    def error(self, config: Config) -> float:
        p, streamed = self._problem, isinstance(config, StreamTiling)
        p.hidden.copy_(p.x)
        weights, chosen = p.chosen()
        tokens, top = chosen.shape
        x = exact_norm(p.x, p.norm) if streamed else p.x.double()
        # tiles of pairs take and give them in the order of their experts, but that down gives them in their own
        place = torch.arange(tokens * top, device=x.device)
        if not streamed:
            place[self._routing.pairs.long()] = place.clone()
        source = x.repeat_interleave(top, 0) if self._gated else self._act.double()[place]
        exact = torch.stack([self._exact(row, int(expert)) for row, expert in zip(source, chosen.flatten(), strict=True)])
        got = self.run(config, False)
        if self._gated:
            return frobenius(got[place], exact)
        exact *= weights.flatten()[:, None].double()
        return frobenius(got, p.x.double() + exact.view(tokens, top, -1).sum(1) if streamed else exact)

    def _exact(self, row: Tensor, expert: int) -> Tensor:
        assert not isinstance(self._weight, Tensor)
        y = self._weight.numbers(expert, torch.float64) @ row
        if not self._gated:
            return y
        gate, up = y.chunk(2)
        return F.silu(gate) * up

    def chosen(self) -> Config | None:
        w = operand(self._weight)
        if self._choice is not None:
            return choose_streaming(self._weight.shape[2], self._gated, w)
        return choose_tiling(self._routing.size, DTYPE, self._gated, w)


Sweep: TypeAlias = Product16 | FourBits | Experts


def sweeps(only: str, tokens: Sequence[int]) -> Iterator[tuple[str, Sweep]]:
    every: list[tuple[str, Sweep]] = []
    for shape in SHAPES:
        for product in shape.products():
            every += [(f"16 bits {product.name} {shape.name} {n}", Product16(product, n)) for n in tokens if n <= MAX_TOKENS]
        for product in shape.products()[:-1]:  # the head stays plain
            every += [(f"4 bits {product.name} {shape.name} {n}", FourBits(product, n)) for n in tokens if n <= MAX_TOKENS]
    for name, form in FEWER:
        mixture = next(shape for shape in MIXTURES if shape.name == name)
        for n, gated in itertools.product(tokens, (True, False)):
            every.append((f"experts {form} {name} {'up' if gated else 'down'} {n}", Experts(mixture, form, n, gated)))
    return ((name, sweep) for name, sweep in every if re.search(only, name))


@lru_cache(maxsize=2)
def _trial(sweep: Sweep) -> Trial:
    return sweep.make()


def _compile(task: tuple[str, Sweep, Config, bool]) -> str:
    """Runs once, in a process of its own, what this process will run: it finds the compiled kernel on disk."""
    name, sweep, config, pdl = task
    try:
        _trial(sweep).run(config, pdl)
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{name}, {config}: {type(failure).__name__} {failure}"[:200]
    return ""


def compile_all(tasks: Iterable[tuple[str, Sweep, Config, bool]]) -> None:
    listed, start = list(tasks), time.perf_counter()
    processes = max(1, min(COMPILERS, (os.cpu_count() or 2) - 1, len(listed)))
    with get_context("spawn").Pool(processes) as pool:
        for problem in filter(None, pool.imap_unordered(_compile, listed, chunksize=2)):
            print("cannot compile", problem)
    print(f"{len(listed)} kernels compiled in {time.perf_counter() - start:.1f} s", flush=True)


def measure(sweep: Sweep, configs: Sequence[Config], pdl: bool) -> list[tuple[float, float, Config]]:
    """Microseconds, error and configuration, the fastest first; without what does not run."""
    first = sweep.make()
    trials = [first, *(sweep.make() for _ in range(min(MAX_SETS, -(-BEYOND_L2_BYTES // first.nbytes)) - 1))]
    found = []
    for config in configs:
        try:
            error = first.error(config)
            found.append((graph_us([partial(trial.run, config, pdl) for trial in trials], RUNS, ROUNDS), error, config))
        except Exception as failure:  # what does not fit into shared memory
            print(f"{config}: {type(failure).__name__} {failure}"[:200].splitlines()[0])
    return sorted(found, key=lambda each: each[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="sweeps in whose name this is found")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as a list of objects")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels.sweep needs a CUDA device")
    bytes_us, _ = ceilings()
    every = list(sweeps(asked.only, asked.tokens))
    compile_all((name, sweep, config, False) for name, sweep in every for config in sweep.configs())
    rows: list[list[str]] = []
    with torch.inference_mode():
        found = {name: measure(sweep, sweep.configs(), False) for name, sweep in every}
        best = {name: [config for _, _, config in times[:BEST]] for name, times in found.items()}
        compile_all((name, sweep, config, True) for name, sweep in every for config in best[name])
        for name, sweep in every:
            early = {config: us for us, _, config in measure(sweep, best[name], True)}
            trial = sweep.make()
            limit, now = trial.nbytes / bytes_us, trial.chosen()
            for at, (us, error, config) in enumerate(found[name]):
                if at < BEST or config == now:
                    mark = " (now)" if config == now else ""
                    with_pdl = f"{early[config]:.2f}" if config in early else ""
                    rows.append([name, f"{config}{mark}", f"{us:.2f}", with_pdl, f"{limit:.2f}", f"{error:.1e}"])
    print(table(["sweep", "tiling", "us", "with PDL", "limit", "error"], rows))
    if asked.json:
        listed = [{"sweep": name, "us": us, "error": error, "tiling": str(config)}
                  for name, times in found.items() for us, error, config in times]  # fmt: skip
        asked.json.write_text(json.dumps(listed, indent=1))


if __name__ == "__main__":
    main()
