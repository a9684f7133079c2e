"""Runs of the real engine on a CPU: reuse against time to first token and throughput, memory against recompute, padding.

One process, random weights of a small shape. Times are CPU times of the process: with one thread that is what an idle machine
would take, but for what others leave of its caches. Imports `deploy.LLM` and the checkpoints when it runs.
"""

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.study.options import Options, in_turns, spread
from kvcache.layout import BlockLayout

BLOCK, SMALL_BLOCK = 256, 32
PROMPT, OUTPUT, BATCH = 1025, 16, 4
SHARED = (0, 512, 896, 1024)
"""Cached tokens of a prompt; 896 ends inside a block of 256."""
SHORT_PROMPTS, LONGEST_SHORT, BUCKETS = 32, 128, 4
PRESSED, PRESSED_TOKENS = 16, 64
PRESSURES = (1.0, 0.5, 0.25)
ROUNDS = 3

Prompts = list[list[int]]


class Bench:
    """One engine and a source of prompts that it has not seen."""

    def __init__(self, options: Options, block: int, blocks: int) -> None:
        from deploy import LLM, SamplingParams

        shape = SHAPES[options.model]
        layout = BlockLayout(block, shape.layers, shape.kv_heads, shape.head_dim, "bfloat16")
        checkpoint = ensure_checkpoint(options.model, options.cache)
        self._random = random.Random(options.seed)
        self._vocabulary = shape.vocabulary
        self._params = SamplingParams
        self.llm = LLM(
            model=str(checkpoint), groups=1, dtype="bfloat16", kv_memory=layout.block_bytes * blocks, block_size=block,
            local=True, threads=options.threads,
        )  # fmt: skip

    def draw(self, tokens: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(tokens)]

    def generate(self, prompts: Prompts, output: int) -> int:
        """Returns the prompt tokens that were found in the cache."""
        params = self._params(max_tokens=output, temperature=0.0, ignore_eos=True)
        return sum(each.num_cached_tokens or 0 for each in self.llm.generate(prompts, params, progress=False))

    def timed_s(self, prompts: Prompts, output: int) -> tuple[float, int]:
        """Seconds of CPU time, and prompt tokens that were found in the cache."""
        began_s = time.process_time()
        found = self.generate(prompts, output)
        return time.process_time() - began_s, found


def reuse(bench: Bench) -> list[dict[str, Any]]:
    """By tokens of the prompt that are cached: seconds to the first token of one request, and output tokens/s of a batch."""
    first: dict[int, list[float]] = {shared: [] for shared in SHARED}
    batch: dict[int, list[float]] = {shared: [] for shared in SHARED}
    for number in range(ROUNDS + 1):
        for shared in SHARED:
            prefix = bench.draw(shared)
            bench.generate([[*prefix, 0]], 1)
            prompts = [prefix + bench.draw(PROMPT - shared) for _ in range(BATCH + 1)]
            one_s, found = bench.timed_s(prompts[:1], 1)
            all_s, _ = bench.timed_s(prompts[1:], OUTPUT)
            assert found == shared, f"{found} of {shared} tokens were cached"
            if number:
                first[shared].append(one_s)
                batch[shared].append(BATCH * OUTPUT / all_s)
    return [
        {"cached": shared, "prompt": PROMPT, "ttft_ms": spread(first[shared], 1e3), "tokens_per_s": spread(batch[shared])}
        for shared in SHARED
    ]


def padding(bench: Bench) -> dict[str, Any]:
    """Short prompts of mixed length, one token out: packed as they are, padded to the longest, in groups of equal length, and
    one at a time."""
    lengths = [max(4, LONGEST_SHORT * (at + 1) // SHORT_PROMPTS) for at in range(SHORT_PROMPTS)]
    size = SHORT_PROMPTS // BUCKETS
    tops = [max(lengths[at : at + size]) for at in range(0, SHORT_PROMPTS, size) for _ in range(size)]

    def packed(wanted: list[int]) -> None:
        bench.generate([bench.draw(length) for length in wanted], 1)

    def grouped(wanted: list[int]) -> None:
        for at in range(0, SHORT_PROMPTS, size):
            packed(wanted[at : at + size])

    def one_by_one() -> None:
        for length in lengths:
            packed([length])

    work: dict[str, Callable[[], object]] = {
        "packed": partial(packed, lengths),
        "padded to the longest": partial(packed, [LONGEST_SHORT] * SHORT_PROMPTS),
        f"padded in {BUCKETS} groups": partial(grouped, tops),
        "one at a time": one_by_one,
    }
    tokens = {
        "packed": sum(lengths), "padded to the longest": LONGEST_SHORT * SHORT_PROMPTS,
        f"padded in {BUCKETS} groups": sum(tops), "one at a time": sum(lengths),
    }  # fmt: skip
    times = in_turns(work, ROUNDS)
    return {name: {"tokens": tokens[name], "ms": spread(values, 1e3)} for name, values in times.items()}


def pressure(options: Options) -> list[dict[str, Any]]:
    """One batch in pools that hold all of it, half, a quarter: output tokens/s, and what preemption made it compute again."""
    needed = PRESSED * (2 * PRESSED_TOKENS // SMALL_BLOCK)
    benches = {share: Bench(options, SMALL_BLOCK, round(share * needed) + 1) for share in PRESSURES}
    try:
        rates: dict[float, list[float]] = {share: [] for share in PRESSURES}
        for number in range(ROUNDS + 1):
            for share, bench in benches.items():
                prompts = [bench.draw(PRESSED_TOKENS) for _ in range(PRESSED)]
                seconds, _ = bench.timed_s(prompts, PRESSED_TOKENS)
                if number:
                    rates[share].append(PRESSED * PRESSED_TOKENS / seconds)
        return [
            {
                "pool": share, "tokens_per_s": spread(rates[share]), "tokens": 2 * PRESSED * PRESSED_TOKENS,
                "preemptions": bench.llm.stats().preemptions / (ROUNDS + 1),
                "recomputed": bench.llm.stats().recomputed_tokens / (ROUNDS + 1),
            }
            for share, bench in benches.items()
        ]  # fmt: skip
    finally:
        for bench in benches.values():
            bench.llm.shutdown()


def engine_runs(options: Options) -> dict[str, Any]:
    bench = Bench(options, BLOCK, 512)
    try:
        shape = SHAPES[options.model]
        layout = BlockLayout(BLOCK, shape.layers, shape.kv_heads, shape.head_dim, "bfloat16")
        found = {"reuse": reuse(bench), "padding": padding(bench)}
    finally:
        bench.llm.shutdown()
    return {"model": options.model, "token_bytes": layout.token_bytes, "batch": BATCH, "output": OUTPUT, **found,
            "pressure": pressure(options)}  # fmt: skip
