"""Question 2: pooling and reuse. What is found again, how often, after how long and by whom, for a trace and four workloads.

A model of one pool (`block_cache`), and the production core in a replay beside it, as a check. Pure Python and NumPy.
"""

from typing import Any

import numpy as np

from benchmarks.study.models.block_cache import BlockStory, tell
from benchmarks.study.models.streams import Workload, workloads
from benchmarks.study.options import Options, Result, machine, run_alone
from simulator.engines import ClusterShape
from simulator.run import Scenario, replay

BLOCK = 256
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
POOL_SHARE = 0.1
COUNTS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 1 << 62))
"""The ranges of reuse counts that are shown."""

TOP = 0.01
MACHINES = 8
"""The replayed group has the compute of so many, so that it keeps up with the trace."""


def reuse_histogram(reuses: list[int]) -> dict[str, float]:
    """Share of blocks by how often each was reused, in the ranges of COUNTS."""
    total = max(1, len(reuses))
    names = [str(low) if low == high else f"{low}+" if high > 1 << 32 else f"{low}-{high}" for low, high in COUNTS]
    counts = [sum(low <= count <= high for count in reuses) for low, high in COUNTS]
    return {name: round(count / total, 4) for name, count in zip(names, counts, strict=True)}


def top_share(reuses: list[int], top: float = TOP) -> float:
    """Share of all reuses that falls on the `top` most reused share of the blocks, one block at least."""
    ordered = sorted(reuses, reverse=True)
    return round(sum(ordered[: max(1, round(top * len(ordered)))]) / max(1, sum(ordered)), 4)


def quantiles(values: list[float]) -> dict[str, float] | None:
    """Seconds, None where nothing happened."""
    if not values:
        return None
    points = (10, 25, 50, 75, 90, 99)
    return {f"p{point}": round(value, 2) for point, value in zip(points, np.percentile(values, points), strict=True)}


def relations(story: BlockStory) -> dict[str, float]:
    """Share of the blocks hit, by who hit them."""
    total = max(1, sum(story.relations.values()))
    return {name: round(count / total, 4) for name, count in sorted(story.relations.items())}


def study(workload: Workload) -> dict[str, Any]:
    endless = tell(workload, BLOCK, None)
    distinct = len(endless.reuses)
    sizes = [max(1, round(share * distinct)) for share in SHARES]
    curve = [
        {"share": share, "blocks": blocks, "hit_rate": round(tell(workload, BLOCK, blocks).hit_rate, 5)}
        for share, blocks in zip(SHARES, sizes, strict=True)
    ]
    pool = max(1, round(POOL_SHARE * distinct))
    story = tell(workload, BLOCK, pool)
    return {
        "about": workload.about, "requests": len(workload.requests), "prompt_tokens": workload.prompt_tokens,
        "cached_tokens": endless.hit_tokens, "hit_rate": round(endless.hit_rate, 5), "distinct_blocks": distinct,
        "curve": curve, "reuses": reuse_histogram(endless.reuses), "top_share": top_share(endless.reuses),
        "most_reused": max(endless.reuses), "relations": relations(endless), "gaps_s": quantiles(endless.gaps_s),
        "pool": {
            "blocks": pool, "hit_rate": round(story.hit_rate, 5), "evicted": len(story.lives_s),
            "lives_s": quantiles(story.lives_s), "idles_s": quantiles(story.idles_s), "reuses": reuse_histogram(story.reuses),
        },
        "minutes": round(workload.requests[-1].asked.arrived_s / 60, 1),
    }  # fmt: skip


def production(workload: Workload, blocks: int, stride: int) -> float:
    """The production core's hit rate on one group with a pool of so many blocks, in virtual time. It makes its own answers.

    stride: of reuse inside a block, 0 for whole blocks alone.
    """
    shape = ClusterShape(groups=MACHINES, hash_stride=stride).pooled(blocks)
    return replay([request.asked for request in workload.requests], "manta", Scenario(shape)).token_hit_rate


def run(options: Options) -> Result:
    made = workloads(options.trace, options.seed, quick=options.quick)
    found = {workload.name: study(workload) for workload in made}
    check = {
        workload.name: {
            "blocks": blocks, "model": tell(workload, BLOCK, blocks).hit_rate, "core": production(workload, blocks, 0),
        }
        for workload in made
        if workload.name in ("trace", "shared prompt")
        and (blocks := max(found[workload.name]["pool"]["blocks"], workload.longest // BLOCK + 2))
    }
    return {
        "command": options.command(2), "machine": machine(options), "block": BLOCK, "pool_share": POOL_SHARE, "top": TOP,
        "workloads": found, "check": check,
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(run, 2, __doc__)
