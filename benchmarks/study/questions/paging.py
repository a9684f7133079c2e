"""Question 4: against PagedAttention as vLLM has it. What blocks save against contiguous memory, and what their bookkeeping
costs as pools and batches grow, beside vLLM's own classes where an interpreter that has them is given.

A simulated full server (`allocators`), and timings of `BlockTable` and of the core. Pure Python and NumPy.
"""

import json
import os
import random
import statistics
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scheduler.events import FEWEST_STEPS, time_steps
from benchmarks.study.models.allocators import Contiguous, FullServer, Memory, Paged, power_of_two
from benchmarks.study.models.streams import Workload, workloads
from benchmarks.study.options import Options, Result, machine, run_alone
from kvcache.hashing import hash_blocks
from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.config.core import CoreConfig

LONGEST_THAT_FIT, QUICK_LONGEST_THAT_FIT = 16, 2
"""The simulated pool holds so many sequences of the model's maximal length."""

ROWS = 1 << 20
PROMPT, LAPS, ROUNDS = 4096, 200, 5
POOLS, BATCHES, BLOCKS = (1024, 8192, 65536), (64, 256, 1024), (256, 16)
QUICK_POOLS, QUICK_BATCHES = (1024, 4096), (64,)
PEER = Path(__file__).parents[1] / "measured" / "peer_vllm.py"
PEER_PATIENCE_S = 900

NANO_VLLM = {
    "source": "measured earlier on a machine of another kind (2 Zen 5 cores), not in this run: it is on no package index",
    "step_us": {"64": 47, "256": 188, "1024": 809},
    "hit_us": {"8192": 2000, "65536": 17000},
}
"""nano-vLLM's schedule and postprocess of a decode step, and a hit of 32 blocks of 256 by free blocks of the pool."""


def memories(total: int, workload: Workload) -> dict[str, Memory]:
    return {
        "contiguous, longest": Contiguous(total, "max", workload.longest),
        "contiguous, power of two": Contiguous(total, "power of two", workload.longest),
        "contiguous, exact": Contiguous(total, "exact", workload.longest),
        "blocks of 16": Paged(total, 16),
        "blocks of 256": Paged(total, 256),
        "blocks of 256, shared": Paged(total, 256, workload.unit),
    }


def full_server(workload: Workload, longest_that_fit: int) -> dict[str, Any]:
    """Memory -> what a full server makes of the same number of bytes; None where the whole workload fits at once."""
    total = longest_that_fit * power_of_two(workload.longest)
    result: dict[str, Any] = {"total_tokens": total}
    for name, memory in memories(total, workload).items():
        found = FullServer(memory, workload, ROWS).run(total)
        result[name] = None if not found.steps else {
            "running": round(found.running, 1), "used": round(found.held / total, 4),
            "used_of_allocated": round(found.held / found.allocated, 4), "preemptions": found.preemptions,
        }  # fmt: skip
    return result


def table_laps(block: int, blocks: int, laps: int, seed: int = 0) -> dict[str, float]:
    """Microseconds of CPU time, medians: hashing 4,096 tokens; then match, reserve, publish and release of a prompt that is
    new, in a pool full of cached blocks, and of one that is all cached."""
    draw, table, group = np.random.default_rng(seed), BlockTable(block, CoreConfig(block_size=block).stride), GroupId(0)
    pick = random.Random(seed)
    table.add_group(group, blocks)
    holds = blocks * block // PROMPT
    prompts = [draw.integers(0, 1 << 17, PROMPT).astype(np.int32) for _ in range(holds + 1)]
    for prompt in prompts:
        _admit(table, group, prompt, hash_blocks(prompt, block))
    times: dict[str, list[float]] = {"hash": [], "cold": [], "hit": []}
    for _ in range(laps):
        fresh = draw.integers(0, 1 << 17, PROMPT).astype(np.int32)
        for name, prompt in (("hit", prompts[-1 - pick.randrange(max(1, holds // 2))]), ("cold", fresh)):
            began_s = time.thread_time()
            hashes = hash_blocks(prompt, block)
            hashed_s = time.thread_time()
            found = _admit(table, group, prompt, hashes)
            ended_s = time.thread_time()
            assert (found > 0) == (name == "hit")
            times["hash"].append((hashed_s - began_s) * 1e6)
            times[name].append((ended_s - hashed_s) * 1e6)
        prompts.append(fresh)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def _admit(table: BlockTable, group: GroupId, prompt: np.ndarray[Any, np.dtype[np.int32]], hashes: list[int]) -> int:
    """One sequence comes, computes what it has not found, and goes. Returns the blocks that it found."""
    block = table.block_size
    match = table.index.match(prompt, hashes, "", (len(prompt) - 1) // block)
    depth = match.depth(group)
    part = table.index.parts(match, prompt, "", len(prompt) - 1).get(group)
    held = table.reserve(group, match, depth, len(hashes) - depth, "", part)
    assert held is not None
    for at in range(depth, len(hashes)):
        table.publish(held, prompt[at * block : (at + 1) * block].tobytes(), hashes[at])
    table.release(held)
    return depth


def decode_steps(block: int, batches: tuple[int, ...]) -> dict[str, float]:
    """Running sequences -> microseconds of CPU time of the core's report of one decode step, the mean of the quietest round."""
    result = {}
    for batch in batches:
        rounds = time_steps(batch, block, FEWEST_STEPS, ROUNDS, time.thread_time_ns)
        result[str(batch)] = round(min(statistics.fmean(each) for each in rounds) / 1e3, 1)
    return result


def vllm(options: Options, block: int, pools: tuple[int, ...], batches: tuple[int, ...]) -> dict[str, Any] | None:
    """The same laps by vLLM's classes, in its own interpreter; None without one. Raises RuntimeError where it fails."""
    if options.vllm_python is None:
        return None
    task = {"block": block, "pools": pools, "tokens": PROMPT, "laps": LAPS, "batches": batches, "steps": 128}
    done = subprocess.run(
        [str(options.vllm_python), str(PEER), json.dumps(task)], capture_output=True, text=True, timeout=PEER_PATIENCE_S,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{options.vllm_python} {PEER.name} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def bookkeeping(options: Options) -> dict[str, Any]:
    """By block size: Manta's laps and steps, and vLLM's."""
    pools, batches = (QUICK_POOLS, QUICK_BATCHES) if options.quick else (POOLS, BATCHES)
    laps = 20 if options.quick else LAPS
    result: dict[str, Any] = {"prompt": PROMPT, "nano_vllm": NANO_VLLM}
    for block in BLOCKS:
        result[str(block)] = {
            "manta": {str(pool): table_laps(block, pool, laps) for pool in pools},
            "manta_steps": decode_steps(block, batches),
            "vllm": vllm(options, block, pools, batches),
        }
    return result


def memory_per_block(blocks: int = 8192, block: int = 256) -> dict[str, float]:
    """Bytes, as Python's allocator counts them, that a block of Manta's pool takes, and a published block more."""
    draw, group = np.random.default_rng(0), GroupId(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        table = BlockTable(block, CoreConfig(block_size=block).stride)
        table.add_group(group, blocks)
        empty = tracemalloc.get_traced_memory()[0] - before
        for _ in range(blocks * block // PROMPT):
            prompt = draw.integers(0, 1 << 17, PROMPT).astype(np.int32)
            _admit(table, group, prompt, hash_blocks(prompt, block))
        del prompt
        full = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return {"pool_bytes": round(empty / blocks, 1), "published_bytes": round((full - empty) / blocks, 1)}


def run(options: Options) -> Result:
    made = workloads(options.trace, options.seed, quick=options.quick)
    fit = QUICK_LONGEST_THAT_FIT if options.quick else LONGEST_THAT_FIT
    return {
        "command": options.command(4), "machine": machine(options), "longest_that_fit": fit,
        "full_server": {workload.name: full_server(workload, fit) for workload in made}, "bookkeeping": bookkeeping(options),
        "memory": memory_per_block(1024 if options.quick else 8192),
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(run, 4, __doc__)
