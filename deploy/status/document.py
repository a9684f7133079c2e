"""What `/status.json` says: one document for the page and for `manta top`.

Wire types only; imports msgspec and other wire types.
"""

import msgspec

from scheduler.server.stats import GroupStart


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """The cluster at one second; None is "not known": no scheduler, or nothing happened to measure.

    t: seconds since 1970. epoch: of the scheduler; None while it cannot be reached. preempted: those of the waiting that ran
    before. output_tps, prompt_tps: tokens a second; prompt tokens count when their request starts, cached ones included.
    hit_rate: the part of these prompt tokens that was found in the cache, 0 to 1. Latencies: of requests that ended lately.
    used, cached: parts of all blocks that are held, by one sequence or several, and that are cached. busy: the part of its time
    that the scheduler spent in its core. `deploy.status.history` has the windows.
    """

    t: float
    epoch: int | None = None
    running: int | None = None
    waiting: int | None = None
    preempted: int | None = None
    output_tps: float | None = None
    prompt_tps: float | None = None
    hit_rate: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p99_ms: float | None = None
    used: float | None = None
    cached: float | None = None
    busy: float | None = None


class ExpertsLine(msgspec.Struct, frozen=True):
    """How evenly a group's tokens are spread over the experts of its model, lately: tokens of a layer's busiest expert over the
    mean of all; 1 is even. layers: that have experts. mean: over them. most: in the least even one, whose numbers `layer` and
    `expert` are."""

    layers: int
    mean: float
    most: float
    layer: int
    expert: int


class GroupLine(msgspec.Struct, frozen=True):
    """One group; state: "up", "draining" or "down"; epoch: -1 while it is down.

    Its blocks are counted once each: held by one sequence, shared by several, cached by none, or free.
    step_ms, step_tokens: mean duration of a step, and tokens it computed, over the last seconds; None without a step.
    map: the pool, see `deploy.status.maps`; None if the group is down. experts: None where there are none, or nothing ran.
    """

    group: int
    state: str
    total: int
    free: int
    held: int
    shared: int
    cached: int
    running: int
    starved: int
    backlog_tokens: int
    evictions: int
    step_ms: float | None
    step_tokens: float | None
    map: str | None
    epoch: int = -1
    experts: ExpertsLine | None = None


class Totals(msgspec.Struct, frozen=True):
    """Since the scheduler's start. started_tokens = cached_tokens + the four misses, exactly."""

    requests: int = 0
    finished: int = 0
    refused: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    started_tokens: int = 0
    cached_tokens: int = 0
    miss_inside_block: int = 0
    miss_routed: int = 0
    miss_evicted: int = 0
    miss_cold: int = 0


class StatusDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer.

    phase: as `ClusterStatus.phase`, "failed" if the start did, or "unreachable" if not even that is known. connected: this
    front end has its stream to the scheduler. starting: groups that are coming up. blocks_per_cell: what one cell of each map
    stands for. now: the newest sample. columns: names of a sample's fields, in order. history: the samples before it, oldest
    first; left out on request. models: names of all that this endpoint serves, the first one first.
    """

    phase: str
    connected: bool
    model: str
    block_size: int
    progress: tuple[str, ...]
    starting: tuple[GroupStart, ...]
    uptime_s: float
    front_ends: int
    target_groups: int
    oldest_wait_s: float
    waiting_tokens: int
    totals: Totals
    blocks_per_cell: int
    groups: tuple[GroupLine, ...]
    now: Sample
    columns: tuple[str, ...] = Sample.__struct_fields__
    history: tuple[Sample, ...] = ()
    models: tuple[str, ...] = ()
