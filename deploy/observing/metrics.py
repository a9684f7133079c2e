"""The clusters of an endpoint's models in Prometheus' text format. What each metric means, in its unit, stands here and in
`deploy.observing.tally`.

Any replica renders them whole: the engines' facts as the schedulers know them, and the requests of all replicas as they have
summed them up. So of several scraped replicas, take the maximum, model by model. Imports the stats, `tally` and
prometheus_client.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric as Family

from deploy.observing.tally import REQUEST_METRICS, Histogram, RequestMetric
from scheduler.protocol.messages import TalliedMetric
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Metric(Generic[T]):
    """A gauge, or a counter if its name ends with `_total`. read: how to read it; with a label, by the label's value."""

    name: str
    help: str
    read: Callable[[T], float] | Mapping[str, Callable[[T], float]]
    label: str = ""

    def readings(self, facts: T) -> list[tuple[list[str], float]]:
        """([] or [the label's value], value)."""
        if isinstance(self.read, Mapping):
            return [([value], read(facts)) for value, read in self.read.items()]
        return [([], self.read(facts))]


CLUSTER_METRICS: tuple[Metric[ClusterStatus], ...] = (
    Metric("manta_scheduler_epoch", "Counts schedulers: one more each time the scheduler began anew.", lambda s: s.epoch),
    Metric("manta_scheduler_uptime_seconds_total", "Seconds since the scheduler began.", lambda s: s.uptime_s),
    Metric("manta_scheduler_busy_seconds_total", "Seconds of them that the scheduler's core has worked.", lambda s: s.busy_s),
    Metric("manta_front_ends", "Front ends connected to the scheduler.", lambda s: s.front_ends),
    Metric("manta_groups_target", "Groups of workers that there should be.", lambda s: s.target_groups),
)

ENGINE_METRICS: tuple[Metric[EngineStats], ...] = (
    Metric("manta_groups_up", "Groups of workers that are up.", lambda e: sum(group.up for group in e.groups)),
    Metric(
        "manta_sequences_waiting", "Sequences (choices of requests) that wait for a group, newcomers or preempted.",
        {"new": lambda e: e.waiting - e.preempted, "preempted": lambda e: e.preempted}, "kind",
    ),
    Metric("manta_waiting_tokens", "Tokens of the waiting sequences, prompt and output so far.", lambda e: e.waiting_tokens),
    Metric("manta_tenants_waiting", "Tenants (API keys or users) with a waiting sequence.", lambda e: e.waiting_tenants),
    Metric("manta_oldest_wait_seconds", "How long the longest-waiting newcomer has waited.", lambda e: e.oldest_wait_s),
    Metric("manta_submitted_requests_total", "Prompts that the scheduler took in.", lambda e: e.requests),
    Metric(
        "manta_resumed_sequences_total",
        "Sequences (choices) taken up where another scheduler, or connection, was lost, or by clients that came back.",
        lambda e: e.resumed,
    ),
    Metric(
        "manta_refused_requests_total", "Prompts turned away: the queue was full, or longer than their deadline.",
        lambda e: e.refused,
    ),
    Metric("manta_sequences_expired_total", "Sequences whose deadline passed before they ended.", lambda e: e.expired),
    Metric("manta_starts_skipped_total", "Starts before one that found no room when its turn came.", lambda e: e.skipped),
    Metric("manta_sequences_aged_total", "Sequences that waited so long that they went before others.", lambda e: e.aged),
    Metric("manta_sequences_finished_total", "Sequences that have ended, for whatever reason.", lambda e: e.finished),
    Metric("manta_prompt_tokens_total", "Prompt tokens submitted.", lambda e: e.prompt_tokens),
    Metric("manta_output_tokens_total", "Tokens sampled.", lambda e: e.output_tokens),
    Metric(
        "manta_prefix_cache_queried_tokens_total",
        "Prompt tokens of the sequences that have started: hits and misses of all reasons sum up to it.",
        lambda e: e.started_tokens,
    ),
    Metric("manta_prefix_cache_hit_tokens_total", "Of these, found in the KV cache.", lambda e: e.cached_tokens),
    Metric("manta_prefix_cache_part_tokens_total", "Of the hits, found inside a block.", lambda e: e.part_tokens),
    Metric(
        "manta_prefix_cache_parts_total", "Blocks that end a hit inside: copied, or taken over from nobody.",
        {"copied": lambda e: e.parts_copied, "taken": lambda e: e.parts_taken}, "how",
    ),
    Metric(
        "manta_transfers_total", "Prefixes that arrived: fetched from another group, or loaded from host memory.",
        {"fetch": lambda e: e.fetches, "load": lambda e: e.loads}, "kind",
    ),
    Metric(
        "manta_transfer_tokens_total", "Tokens whose KV was fetched, loaded from host memory, or offloaded to it.",
        {"fetch": lambda e: e.fetched_tokens, "load": lambda e: e.loaded_tokens, "offload": lambda e: e.offloaded_tokens},
        "kind",
    ),
    Metric("manta_transfers_failed_total", "Transfers of blocks that did not arrive.", lambda e: e.failed_transfers),
    Metric("manta_migrations_total", "Running sequences that moved to another group with their KV.", lambda e: e.migrations),
    Metric(
        "manta_prefix_cache_miss_tokens_total",
        "Of these, to be computed: never seen, evicted since, cached in another group, or in the last, partly filled block.",
        {
            "cold": lambda e: e.miss_cold,
            "evicted": lambda e: e.miss_evicted,
            "routed_away": lambda e: e.miss_routed,
            "inside_block": lambda e: e.miss_inside_block,
        },
        "reason",
    ),
    Metric("manta_preemptions_total", "Sequences that had to give their blocks back and begin again.", lambda e: e.preemptions),
    Metric(
        "manta_sequences_given_up_total", "Sequences that no token could follow: logits not finite, or their grammar.",
        lambda e: e.given_up,
    ),
    Metric("manta_recomputed_tokens_total", "Tokens whose KV preemptions threw away.", lambda e: e.recomputed_tokens),
    Metric(
        "manta_routing_decisions_total", "First starts in the group with the longest cached prefix, or in the least loaded.",
        {"prefix": lambda e: e.routed_by_prefix, "load": lambda e: e.routed_by_load}, "reason",
    ),
)  # fmt: skip

GROUP_METRICS: tuple[Metric[GroupStats], ...] = (
    Metric("manta_group_up", "1 if the group is up.", lambda g: g.up),
    Metric("manta_group_epoch", "Counts the group's starts, from 0; -1 before the first.", lambda g: g.epoch),
    Metric("manta_group_draining", "1 if the group takes no new sequences.", lambda g: g.draining),
    Metric("manta_sequences_running", "Sequences that hold a lease in the group.", lambda g: g.running),
    Metric("manta_sequences_fetching", "Sequences whose prefix is on its way to the group.", lambda g: g.fetching),
    Metric("manta_sequences_starved", "Running sequences that sit out: no block to grow into.", lambda g: g.starved),
    Metric("manta_sequence_starts_total", "Starts of sequences in the group, restarts included.", lambda g: g.starts),
    Metric("manta_lease_waits_total", "Times that a sequence found no block to grow into.", lambda g: g.lease_waits),
    Metric("manta_prefill_backlog_tokens", "Tokens of started sequences not computed yet.", lambda g: g.backlog_tokens),
    Metric(
        "manta_kv_blocks", "KV blocks by state; the states sum up to the pool.",
        {"free": lambda g: g.free_blocks, "held": lambda g: g.held_blocks, "cached": lambda g: g.cached_blocks}, "state",
    ),
    Metric("manta_kv_blocks_shared", "Held blocks that more than one sequence holds.", lambda g: g.shared_blocks),
    Metric("manta_kv_block_evictions_total", "Cached blocks given up for new content.", lambda g: g.evictions),
    Metric(
        "manta_kv_narrow_blocks", "KV blocks of layers that see a window beside others that see all, by state.",
        {
            "free": lambda g: g.narrow_free_blocks, "held": lambda g: g.narrow_held_blocks,
            "cached": lambda g: g.narrow_blocks - g.narrow_free_blocks - g.narrow_held_blocks,
        }, "state",
    ),
    Metric(
        "manta_kv_narrow_block_evictions_total", "Cached ones of these given up for new content.", lambda g: g.narrow_evictions
    ),
)  # fmt: skip

STEP_SECONDS = "manta_step_seconds"
STEP_TOKENS = "manta_step_tokens"
EXPERT_IMBALANCE = "manta_expert_imbalance"


def render(told: Mapping[str, ClusterStatus]) -> bytes:
    """Everything known at this moment of the cluster of each model, by its name, as `CONTENT_TYPE` says. Each sample has the
    label `model`.

    While no scheduler answers, counters are left out rather than shown as 0: Prometheus would take that for a restart, and
    their return for a burst.
    """
    return generate_latest(_Rendered(told))


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A `prometheus_client` collector of one status for each model."""

    told: Mapping[str, ClusterStatus]

    def collect(self) -> Iterator[Family]:
        """Each family once, with the samples of all models."""
        merged: dict[str, Family] = {}
        for model, status in self.told.items():
            for family in _families(status):
                samples = [sample._replace(labels=sample.labels | {"model": model}) for sample in family.samples]
                known = merged.setdefault(family.name, family)
                known.samples = samples if known is family else [*known.samples, *samples]
        return iter(merged.values())


def _families(status: ClusterStatus) -> Iterator[Family]:
    """Of one model."""
    yield GaugeMetricFamily("manta_ready", "1 if at least one group is up and the scheduler answers.", float(status.ready))
    info = GaugeMetricFamily("manta_info", "1: what is served, and tokens in a KV block.", labels=["block_size"])
    info.add_metric([str(status.block_size)], 1.0)
    yield info
    if status.engine is None:
        return
    yield from (_family(metric, [([], status)]) for metric in CLUSTER_METRICS)
    yield from (_family(metric, [([], status.engine)]) for metric in ENGINE_METRICS)
    groups = [([str(group.group)], group) for group in status.engine.groups]
    yield from (_family(metric, groups, ["group"]) for metric in GROUP_METRICS)
    yield from _steps(status.engine.groups)
    yield _experts(status.engine.groups)
    for observed in REQUEST_METRICS:
        yield _histogram(observed, status.tallies) if observed.bounds else _counter(observed, status.tallies)


def _family(metric: Metric[T], sources: Iterable[tuple[list[str], T]], labels: Iterable[str] = ()) -> Family:
    """sources: label values, and the facts to read with them."""
    names = [*labels, *([metric.label] if metric.label else [])]
    counter = metric.name.endswith("_total")
    family = (CounterMetricFamily if counter else GaugeMetricFamily)(metric.name, metric.help, labels=names)
    for values, facts in sources:
        for value, reading in metric.readings(facts):
            family.add_metric([*values, *value], float(reading))
    return family


def _steps(groups: Iterable[GroupStats]) -> Iterator[Family]:
    """Sum and count of each group's steps: their rates give the mean step time and batch size."""
    seconds = SummaryMetricFamily(STEP_SECONDS, "Duration of the group's steps.", labels=["group"])
    tokens = SummaryMetricFamily(STEP_TOKENS, "Batch size: tokens computed in a step, prefill and decode.", labels=["group"])
    for group in groups:
        seconds.add_metric([str(group.group)], group.steps, group.step_s)
        tokens.add_metric([str(group.group)], group.steps, group.step_tokens)
    yield seconds
    yield tokens


def _experts(groups: Iterable[GroupStats]) -> Family:
    """Of models with experts alone."""
    family = GaugeMetricFamily(
        EXPERT_IMBALANCE, "Tokens of the layer's busiest expert over the mean of all, lately; 1 is even.",
        labels=["group", "layer"],
    )  # fmt: skip
    for group in groups:
        for layer, imbalance in zip(group.expert_layers, group.expert_imbalance, strict=False):  # the latter is told later
            family.add_metric([str(group.group), str(layer)], imbalance)
    return family


def _histogram(metric: RequestMetric, tallies: Iterable[TalliedMetric]) -> Family:
    histogram = Histogram.read(tallies, metric)
    below, buckets = 0, []
    for bound, count in zip([*(f"{bound:g}" for bound in metric.bounds), "+Inf"], histogram.buckets, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(metric.name, metric.help, buckets=buckets, sum_value=histogram.total)


def _counter(metric: RequestMetric, tallies: Iterable[TalliedMetric]) -> Family:
    """Every value of its label, 0 where nothing was counted yet, so that rates see the first one."""
    totals = dict.fromkeys(metric.values or ("",), 0.0)
    for tallied in tallies:
        if tallied.name == metric.name:
            totals[dict(tallied.labels).get(metric.label, "")] = tallied.total
    family = CounterMetricFamily(metric.name, metric.help, labels=[metric.label] if metric.label else [])
    for value, total in totals.items():
        family.add_metric([value] if metric.label else [], total)
    return family
