"""What a larger pool buys: the production core replayed with pools of several sizes, and a second tier as a model of two pools.

Imports the replay and the models beside it.
"""

from dataclasses import asdict
from typing import Any

from benchmarks.study.models.block_cache import tell
from benchmarks.study.models.streams import Workload, chat, from_trace
from benchmarks.study.options import Options
from scheduler.placement.limits import blocks_for
from simulator.engines import ClusterShape
from simulator.run import POLICIES, Scenario, replay
from simulator.time_model import TimeModel
from simulator.transfers import LinkModel

BLOCK = 256
CHATS, QUICK_REQUESTS = 3000, 100
SHARES = (0.1, 0.2, 0.5, 1.2)
QUICK_SHARES = (0.1, 1.2)
SATURATING = 2.0
"""Load at which the pools of the sweep are overloaded, so that the time until the last request ends is throughput."""

TIERS = (1, 4)
MOVES = ("manta", "manta-fetch", "manta-host")
"""Policies of the replay that move blocks instead of computing them, beside the one that does not; those that there are."""


def subject(options: Options) -> tuple[Workload, int]:
    """What is replayed, and on how many groups."""
    limit = QUICK_REQUESTS if options.quick else options.limit
    if options.trace is None:
        return chat(limit or CHATS, options.seed), 2
    return from_trace(options.trace, options.seed, limit), 2 if options.quick else 8


def pool_sweep(options: Options) -> dict[str, Any]:
    """By blocks of each group: hit rate and latency at the workload's own speed, throughput where it is overloaded."""
    workload, groups = subject(options)
    trace = [request.asked for request in workload.requests]
    distinct = len(tell(workload, BLOCK, None).reuses)
    fewest = blocks_for(workload.longest, BLOCK) + 1
    rows = []
    for blocks in dict.fromkeys(max(fewest, round(s * distinct / groups)) for s in (QUICK_SHARES if options.quick else SHARES)):
        shape = ClusterShape(groups=groups, blocks=blocks, block_size=BLOCK)
        own = replay(trace, "manta", Scenario(shape, seed=options.seed))
        full = replay(trace, "manta", Scenario(shape, SATURATING, options.seed))
        rows.append({
            "blocks": blocks, "tokens": blocks * groups * BLOCK, "hit_rate": own.token_hit_rate, "ttft_mean_s": own.ttft_s.mean,
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

    A model: one pool that holds a twentieth of the workload's blocks; the tier holds what a pool so much larger would, at the
    replay's own pace of transfers. Fetching ahead saves at most the time to fetch.
    """
    workload, _ = subject(options)
    distinct = len(tell(workload, BLOCK, None).reuses)
    pool = max(1, distinct // 20)
    base = tell(workload, BLOCK, pool)
    model, links = TimeModel(), LinkModel()
    rows = []
    for tier in TIERS:
        more = tell(workload, BLOCK, pool * (1 + tier))
        tokens = more.hit_tokens - base.hit_tokens
        requests = len(workload.requests)
        rows.append({
            "tier": tier, "hit_rate": round(more.hit_rate, 5), "tokens": tokens,
            "recompute_ms_a_request": round(tokens / model.prefill_tokens_per_s / requests * 1e3, 3),
            "fetch_ms_a_request": round(tokens / links.host_tokens_per_s / requests * 1e3, 3),
        })  # fmt: skip
    return {
        "workload": workload.name, "pool_blocks": pool, "hit_rate": round(base.hit_rate, 5), "token_bytes": links.token_bytes,
        "bandwidth": links.host_tokens_per_s * links.token_bytes, "rows": rows,
        "break_even_bandwidth": links.token_bytes * model.prefill_tokens_per_s,
    }  # fmt: skip


def moves(options: Options) -> dict[str, Any]:
    """The production core with pools that hold a tenth of the blocks, all groups together: with and without moving blocks."""
    workload, groups = subject(options)
    trace = [request.asked for request in workload.requests]
    blocks = max(blocks_for(workload.longest, BLOCK) + 1, len(tell(workload, BLOCK, None).reuses) // 10 // groups)
    scenario = Scenario(ClusterShape(groups=groups, blocks=blocks, block_size=BLOCK), seed=options.seed)
    rows = {}
    for policy in (each for each in MOVES if each in POLICIES):
        found = replay(trace, policy, scenario)
        rows[policy] = {
            "hit_rate": found.token_hit_rate, "ttft_mean_s": found.ttft_s.mean, "ttft_p99_s": found.ttft_s.p99,
            "fetched_tokens": found.fetched_tokens,
        }  # fmt: skip
    return {"workload": workload.name, "groups": groups, "blocks": blocks, "rows": rows}
