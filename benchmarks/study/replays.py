"""What a larger pool buys: the production core replayed with pools of several sizes, and a second tier as a model of two pools.

Imports the replay and the models beside it.
"""

from dataclasses import asdict
from typing import Any

from benchmarks.study.options import Options
from benchmarks.study.page_cache import tell
from benchmarks.study.streams import Workload, chat, from_trace
from cluster.replay.engines import ClusterShape
from cluster.replay.run import Scenario, replay
from cluster.replay.time_model import TimeModel
from scheduler.limits import pages_for

PAGE = 256
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.2)
QUICK_SHARES = (0.1, 1.2)
SATURATING = 4.0
"""Load at which all pools of the sweep are overloaded, so that the time until the last request ends is throughput."""

KV_BYTES = 80 * 2 * 8 * 128 * 2
"""A token of KV of the model that the default time model stands for: 80 layers, 8 KV heads of 128, two bytes a number."""

TIERS = (1, 4)
BANDWIDTH = 50e9
"""Bytes per second between a group's GPUs and host memory, assumed: four GPUs at 12.5 GB/s each."""


def subject(options: Options) -> tuple[Workload, int]:
    """What is replayed, and on how many groups."""
    if options.trace is None:
        return chat(150 if options.quick else 3000, options.seed), 2
    return from_trace(options.trace, options.seed, 150 if options.quick else None), 2 if options.quick else 8


def pool_sweep(options: Options) -> dict[str, Any]:
    """By pages of each group: hit rate and latency at the workload's own speed, throughput where it is overloaded."""
    workload, groups = subject(options)
    trace = [request.asked for request in workload.requests]
    distinct = len(tell(workload, PAGE, None).reuses)
    fewest = pages_for(workload.longest, PAGE) + 1
    rows = []
    for pages in dict.fromkeys(max(fewest, round(s * distinct / groups)) for s in (QUICK_SHARES if options.quick else SHARES)):
        shape = ClusterShape(groups=groups, pages=pages, page_size=PAGE)
        own = replay(trace, "manta", Scenario(shape, seed=options.seed))
        full = replay(trace, "manta", Scenario(shape, SATURATING, options.seed))
        rows.append({
            "pages": pages, "tokens": pages * groups * PAGE, "hit_rate": own.token_hit_rate, "ttft_mean_s": own.ttft_s.mean,
            "ttft_p50_s": own.ttft_s.p50, "ttft_p99_s": own.ttft_s.p99, "tpot_p50_s": own.tpot_s.p50,
            "full_hit_rate": full.token_hit_rate, "requests_per_s": round(full.requests / full.virtual_s, 4),
            "preemptions": own.preemptions,
        })  # fmt: skip
    return {
        "workload": workload.name, "requests": len(trace), "prompt_tokens": workload.prompt_tokens, "groups": groups,
        "speed_up": SATURATING, "rows": rows, "time_model": asdict(TimeModel()),
    }  # fmt: skip


def second_tier(options: Options) -> dict[str, Any]:
    """Tokens that host memory beside the pool would give back, the time to fetch them and the time to compute them again.

    A model: one pool that holds a twentieth of the workload's pages; the tier holds what a pool so much larger would.
    Fetching ahead saves at most the time to fetch.
    """
    workload, _ = subject(options)
    distinct = len(tell(workload, PAGE, None).reuses)
    pool = max(1, distinct // 20)
    base = tell(workload, PAGE, pool)
    model = TimeModel()
    rows = []
    for tier in TIERS:
        more = tell(workload, PAGE, pool * (1 + tier))
        tokens = more.hit_tokens - base.hit_tokens
        requests = len(workload.requests)
        rows.append({
            "tier": tier, "hit_rate": round(more.hit_rate, 5), "tokens": tokens,
            "recompute_ms_a_request": round(tokens / model.prefill_tokens_per_s / requests * 1e3, 3),
            "fetch_ms_a_request": round(tokens * KV_BYTES / BANDWIDTH / requests * 1e3, 3),
        })  # fmt: skip
    return {
        "workload": workload.name, "pool_pages": pool, "hit_rate": round(base.hit_rate, 5), "token_bytes": KV_BYTES,
        "bandwidth": BANDWIDTH, "break_even_bandwidth": KV_BYTES * model.prefill_tokens_per_s, "rows": rows,
    }  # fmt: skip
