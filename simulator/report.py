"""What came of a replay, by policy: reuse, balance, latency, goodput, and what the core cost. Imports NumPy and msgspec."""

import sys
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from kvcache.index import PrefixIndex
from simulator.engines import SimulatedEngine
from simulator.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """What a request must meet to count as good."""

    ttft_s: float = 10.0
    tpot_s: float = 0.5


class ReplayRecord:
    """What the clients saw, by request: virtual seconds, NaN for what did not happen. marks: when half of the requests have
    come, and all: the virtual time, the time inside the cores so far, and the sequences that live. core_s: that time in all."""

    def __init__(self, requests: int) -> None:
        self.arrived_s = np.full(requests, np.nan)
        self.first_s = np.full(requests, np.nan)
        self.ended_s = np.full(requests, np.nan)
        self.refused = np.zeros(requests, np.bool_)
        self.preemptions = 0
        self.ended = 0
        self.core_s = 0.0
        self.marks: list[tuple[float, float, int]] = []


class Latency(msgspec.Struct, frozen=True):
    """Seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> "Latency":
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        p50, p99 = np.percentile(values, (50, 99)).tolist()
        return cls(round(float(values.mean()), 4), round(p50, 4), round(p99, 4))


class Outcome(msgspec.Struct, frozen=True):
    """One policy on one trace.

    token_hit_rate: prompt tokens found in the cache at the first start / all prompt tokens. busiest_over_mean: prompt tokens
    that the busiest group computed / the mean over groups. ttft_s: from arrival to the first token. tpot_s: seconds a token
    after it, of requests with more than one. goodput: requests per second that met the target.
    fetched_tokens, loaded_tokens: that came from other groups, and from host memory. migrations: sequences that went to another
    group with their blocks. core_cpu_s: inside the cores;
    by request and by second of each group below it. core_share: of one core, and live_per_group: sequences that had not
    ended, while the second half of the requests came, that is under full load. virtual_s: until the last request ended.
    index_bytes: of the block tables and prefix indexes at the end, the blocks' tokens included.
    """

    policy: str
    requests: int
    refused: int
    token_hit_rate: float
    busiest_over_mean: float
    ttft_s: Latency
    tpot_s: Latency
    goodput: float
    preemptions: int
    fetched_tokens: int
    loaded_tokens: int
    migrations: int
    core_cpu_s: float
    core_us_per_request: float
    core_us_per_group_s: float
    core_share: float
    live_per_group: float
    virtual_s: float
    index_bytes: int


def outcome(
    policy: str, trace: Listing[TraceRequest], engines: Listing[SimulatedEngine], record: ReplayRecord, target: LatencyTarget
) -> Outcome:
    output = np.array([request.output_tokens for request in trace])
    served = ~np.isnan(record.ended_s) & ~record.refused
    ttft_s = (record.first_s - record.arrived_s)[served]
    several = served & (output > 1)
    tpot_s = (record.ended_s - record.first_s)[several] / (output[several] - 1)
    slow = np.zeros(len(trace))
    slow[several] = tpot_s
    good = (ttft_s <= target.ttft_s) & (slow[served] <= target.tpot_s)
    counters = [engine.core.counters for engine in engines]
    uncached = [tokens for engine in engines for tokens in engine.uncached()]
    core_s = record.core_s
    (half_s, half_core_s, half_live), (all_s, all_core_s, all_live) = record.marks[0], record.marks[-1]
    virtual_s = float(np.nanmax(record.ended_s)) if served.any() else 0.0
    return Outcome(
        policy=policy,
        requests=int(served.sum()),
        refused=int(record.refused.sum()),
        token_hit_rate=round(sum(c.cached_tokens for c in counters) / max(1, sum(c.started_tokens for c in counters)), 5),
        busiest_over_mean=round(max(uncached) * len(uncached) / max(1, sum(uncached)), 4),
        ttft_s=Latency.of(ttft_s),
        tpot_s=Latency.of(tpot_s),
        goodput=round(int(good.sum()) / virtual_s, 4) if virtual_s else 0.0,
        preemptions=record.preemptions,
        fetched_tokens=sum(c.fetched_tokens for c in counters),
        loaded_tokens=sum(c.loaded_tokens for c in counters),
        migrations=sum(c.migrations for c in counters),
        core_cpu_s=round(core_s, 3),
        core_us_per_request=round(core_s * 1e6 / max(1, len(trace)), 1),
        core_us_per_group_s=round(core_s * 1e6 / (virtual_s * len(uncached)), 2) if virtual_s else 0.0,
        core_share=round((all_core_s - half_core_s) / (all_s - half_s), 4) if all_s > half_s else 0.0,
        live_per_group=round((half_live + all_live) / 2 / len(uncached), 1),
        virtual_s=round(virtual_s, 3),
        index_bytes=sum(table_bytes(engine) for engine in engines),
    )


def table_bytes(engine: SimulatedEngine) -> int:
    """Memory of an engine's pools and index: the columns, and the integers and blocks that they refer to, about."""
    table = engine.core.table
    pools = sum(
        sys.getsizeof(column) + 32 * len(column)
        for pool in table.pools.values()
        for column in (pool.refs, pool.nodes, pool.before, pool.after)
    )
    index: PrefixIndex = table.index
    columns = (index.parents, index.hashes, index.holders, index.children, index.namesakes)
    nodes = sum(sys.getsizeof(column) for column in columns) + 32 * 2 * len(index.hashes)
    maps = sys.getsizeof(index.by_hash) + sum(sys.getsizeof(blocks) for blocks in index.blocks.values())
    return pools + nodes + maps + sum(sys.getsizeof(block) for block in index.contents)
