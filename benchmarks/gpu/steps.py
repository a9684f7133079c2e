"""Whole decode steps of a model, as CUDA graphs: as they are, with no launch that starts early, and with other tilings.

    python -m benchmarks.gpu.steps --models 0.6B,8B-9 --rows 1,16,32,64,128,256 --tilings [--weights int4] [--json]

A product by itself says little about what it takes in a step, where it begins while the one before still runs and waits for
its results. So with `--tilings` each of a layer's products is tried with many tilings while all else stays, and keeps the best
before the next one is tried. Every variant's logits are compared with those of the first. us a step, the best of three times
twenty replays; prompts of 64 to 236 tokens. `8B-9` is the 8B shape with a quarter of its layers. Needs a CUDA device.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.bare_loop import BareLoop
from benchmarks.gpu.compare import OPTIONS, WEIGHTS
from benchmarks.gpu.works import VOCABULARY, Work
from benchmarks.models.rounded import ensure_four_bits
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import names_of, positive
from workers.attention.triton import TritonAttention
from workers.execution.gpu.runner import GpuRunner
from workers.kernels.compiling.ahead import compiling_ahead
from workers.kernels.products import tilings
from workers.kernels.products.tilings import FEW, MAX_TOKENS, Tiling
from workers.model.gpu.fused import FusedDecoder
from workers.model.layers.linear import Linear
from workers.model.layers.mlp import SwiGLU

CHOOSE = "workers.model.gpu.fused.choose"
OUTPUT_TOKENS = 80  # more than the replays, which go on from where the host believes a row to be
REPLAYS, ROUNDS, SHOWN = 20, 3, 5
LARGEST_DIFFERENCE = 0.2  # of bfloat16 logits of random weights
LEAST_GAIN = 0.0015
LEAST_PROGRAMS, MOST_PROGRAMS, MOST_OF_FOUR_BITS = 60, 400, 800

Key = tuple[int, int, bool]
"""Outputs, inputs, through SwiGLU."""

SIXTEEN_BITS = (
    Tiling(64, 64, 4, 4), Tiling(64, 64, 4, 6), Tiling(64, 64, 4, 8), Tiling(64, 128, 4, 3), Tiling(64, 128, 4, 4),
    Tiling(64, 128, 4, 6), Tiling(128, 64, 4, 4), Tiling(128, 64, 8, 4), Tiling(128, 128, 8, 3), Tiling(32, 128, 4, 4),
    Tiling(32, 128, 4, 6), Tiling(64, 64, 4, 4, tokens=32), Tiling(64, 128, 4, 4, tokens=32), Tiling(64, 64, 8, 4, tokens=128),
    Tiling(64, 64, 4, 4, tokens=128), Tiling(64, 128, 4, 3, tokens=128), Tiling(128, 64, 8, 4, tokens=128),
)  # fmt: skip
DESCRIBED = tuple(
    Tiling(rows, columns, warps, stages, tokens=tokens, described=True)
    for rows, columns, warps, stages, tokens in (
        (64, 64, 4, 4, 64), (64, 64, 4, 6, 64), (64, 64, 4, 8, 64), (64, 128, 4, 4, 64), (64, 128, 4, 6, 64),
        (128, 64, 4, 4, 64), (128, 64, 4, 6, 64), (128, 64, 8, 6, 64), (128, 128, 8, 3, 64), (128, 128, 4, 4, 64),
        (64, 64, 4, 4, 128), (64, 64, 4, 6, 128), (64, 128, 4, 4, 128), (64, 64, 8, 4, 128), (64, 64, 8, 6, 128),
        (128, 64, 8, 4, 128), (64, 64, 4, 6, 32), (64, 128, 4, 4, 32), (128, 64, 4, 6, 32), (128, 64, 8, 6, 32),
        (32, 128, 4, 6, 32),
    )
)  # fmt: skip
FP8 = tuple(
    Tiling(rows, columns, warps, stages, rounded=True)
    for rows, columns, warps, stages in (
        (32, 128, 4, 6), (32, 256, 4, 4), (64, 128, 4, 3), (64, 128, 4, 5), (64, 128, 4, 7), (64, 256, 4, 3), (64, 256, 4, 4),
        (128, 128, 4, 4), (128, 128, 8, 4), (128, 128, 8, 6),
    )
)  # fmt: skip
STREAMED_FP8 = tuple(Tiling(rows, 512 * warps, warps) for rows in (2, 4, 8, 16) for warps in (1, 2, 4))
FOUR_BITS = (
    Tiling(32, 512, 2, 3), Tiling(32, 512, 2, 4), Tiling(32, 256, 2, 3), Tiling(32, 256, 2, 4), Tiling(64, 256, 4, 3),
    Tiling(64, 512, 4, 3), Tiling(16, 512, 2, 3), Tiling(32, 512, 4, 3), Tiling(128, 256, 8, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    us: float
    tiling: Tiling | None  # None: the library's product
    difference: float

    def says(self, best: float) -> str:
        tile = self.tiling
        of = (tile.rows, tile.columns, tile.warps, tile.stages, tile.parts, tile.tokens) if tile else "the library"
        by = " by descriptors" if tile and tile.described else ""
        other = f", differs by {self.difference:.2g}" if self.difference > LARGEST_DIFFERENCE else ""
        return f"{self.us - best:+.0f} {of}{by}{other}"


class Steps:
    """Decode steps of one engine, all of whose rows are under way."""

    def __init__(self, loop: BareLoop, rows: int) -> None:
        chance = random.Random(rows)
        prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(64, 236))] for _ in range(rows)]
        self.runner: GpuRunner = loop.decoding(Work(prompts, [OUTPUT_TOKENS] * rows))
        assert isinstance(self.runner._model, FusedDecoder), "a native decoder"
        self.model = self.runner._model
        self._state = self.runner._state._state
        self._begun = self._state.clone()
        self.chosen: dict[Key, Tiling | None] = {}

    def choose(self, n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool = False, bits: int = 16) -> Tiling | None:
        key = n, k, swiglu
        return self.chosen[key] if key in self.chosen else tilings.choose(n, k, tokens, dtype, swiglu, bits)

    @torch.inference_mode()
    def compile(self, rows: int, key: Key | None = None, variants: Sequence[Tiling | None] = (None,)) -> None:
        """What a step launches, all at once; of one product in each of its variants. What the compiler does not take, or what
        does not fit, is left out when it is timed."""
        with compiling_ahead():
            for tile in variants:
                if key is not None:
                    self.chosen[key] = tile
                try:
                    self.runner._decode_and_sample(rows)
                except Exception as error:  # whatever the compiler says of shapes that it cannot take
                    print(f"  left out: {error!r}"[:160], file=sys.stderr)
        self._state.copy_(self._begun)

    @torch.inference_mode()
    def time(self, rows: int) -> tuple[float, Tensor]:
        """us a step, and the logits of the first."""
        self._state.copy_(self._begun)
        self.runner._decode_and_sample(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = self.runner._decode_and_sample(rows)
            finally:
                graph.capture_end()
        self._state.copy_(self._begun)
        graph.replay()
        first = logits[:rows].float()
        times = []
        for _ in range(ROUNDS):
            self._state.copy_(self._begun)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / REPLAYS * 1e3)
        self._state.copy_(self._begun)
        return min(times), first

    @contextmanager
    def none_early(self) -> Iterator[None]:
        attention = self.runner._attention
        backends = [each for each in (attention, *vars(attention).values()) if isinstance(each, TritonAttention)]
        decodes = [decode for backend in backends for decode in backend._decode]
        before = self.model._pdl, [decode.config for decode in decodes]
        self.model._pdl = False
        for decode in decodes:
            decode.config = replace(decode.config, dependent=False)
        yield
        self.model._pdl = before[0]
        for decode, config in zip(decodes, before[1], strict=True):
            decode.config = config

    def products(self) -> dict[Key, int]:
        """Those of a dense layer, and the bits of their weights."""
        layer = self.model._layers[0]
        linears: list[tuple[Linear, bool]] = [(layer.qkv, False), (layer.o, False)]
        if isinstance(layer.mlp, SwiGLU):
            linears += [(layer.mlp.gate_up, True), (layer.mlp.down, False)]
        return {
            (each.out_features // (2 if gated else 1), each.in_features, gated): each.reduced.bits if each.reduced else 16
            for each, gated in linears
        }

    def tune(self, rows: int, best: float, expected: Tensor) -> float:
        """Tries tilings, product by product. Returns what a step takes with the best of all."""
        for key, bits in self.products().items():
            candidates = list(_candidates(key, bits, rows))
            self.compile(rows, key, candidates)
            found = []
            for tile in candidates:
                self.chosen[key] = tile
                try:
                    us, logits = self.time(rows)
                except Exception:  # it was said when it was compiled
                    torch.cuda.synchronize()
                else:
                    found.append(Found(us, tile, float((logits - expected).abs().max())))
            gc.collect()  # a graph whose capture has failed keeps its memory in a circle
            torch.cuda.empty_cache()
            found.sort(key=lambda each: each.us)
            print(f"  {key}: " + " | ".join(each.says(best) for each in found[:SHOWN]), file=sys.stderr, flush=True)
            if found and found[0].us < best * (1 - LEAST_GAIN):
                self.chosen[key], best = found[0].tiling, found[0].us
            else:
                self.chosen.pop(key)
        return best


def _candidates(key: Key, bits: int, rows: int) -> Iterator[Tiling | None]:
    n, k, _ = key
    if bits == 8 and rows <= FEW:
        yield from (tile for tile in STREAMED_FP8 if k % tile.columns == 0)
        return
    if bits == 16:
        yield None
    for tile in FOUR_BITS if bits == 4 else FP8 if bits == 8 else SIXTEEN_BITS + DESCRIBED:
        for parts in (1, 2, 4, 8):
            programs = tile.blocks(n) * -(-rows // tile.tokens) * parts
            fits = LEAST_PROGRAMS <= programs <= (MOST_OF_FOUR_BITS if bits == 4 else MOST_PROGRAMS)
            if fits and k % (tile.columns * parts) == 0 and (rows > tile.tokens // 2 or tile.tokens <= MAX_TOKENS):
                yield replace(tile, parts=parts)


def measure(steps: Steps, rows: int, tune: bool) -> dict[str, float]:
    steps.chosen.clear()
    steps.compile(rows)
    us, logits = steps.time(rows)
    with steps.none_early():
        steps.compile(rows)
        alone, again = steps.time(rows)
    if not torch.equal(logits, again):
        print(f"  {rows} rows: what starts early changes logits by {float((logits - again).abs().max()):.2g}", file=sys.stderr)
    figures = {"us": us, "none_early_us": alone}
    print(f"{rows} rows: {us:.0f} us, {alone:.0f} where nothing starts early", file=sys.stderr, flush=True)
    if tune:
        figures["tuned_us"] = steps.tune(rows, us, logits)
        print(f"{rows} rows: {figures['tuned_us']:.0f} us with the best tilings", file=sys.stderr, flush=True)
    return figures


def _sizes(text: str) -> list[int]:
    return [positive(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of(SHAPES), default=["0.6B"], help=", ".join(SHAPES))
    parser.add_argument("--rows", type=_sizes, default=[1, 16, 32, 64, 128, 256], help="of a step, with commas between")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--tilings", action="store_true", help="try others, product by product")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    asked = parser.parse_args()
    options = {**OPTIONS, "attention": "triton", "cuda_graphs": False}
    if asked.weights == "fp8":
        options["quantization"] = "fp8"
    result: dict[str, dict[int, dict[str, float]]] = {}
    for model in asked.models:
        checkpoint = ensure_checkpoint(model, asked.cache)
        loop = BareLoop(ensure_four_bits(checkpoint) if asked.weights == "int4" else checkpoint, **options)
        print(model, file=sys.stderr, flush=True)
        steps = Steps(loop, max(asked.rows))
        with patch(CHOOSE, steps.choose):
            result[model] = {rows: measure(steps, rows, asked.tilings) for rows in asked.rows}
        loop.close()
    if asked.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
