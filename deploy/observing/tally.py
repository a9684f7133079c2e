"""What front ends observe of requests: the metrics, an `Observation` as increments of them, and what can be read from the sums.

Increments are gathered in a `scheduler.server.tallies.Tallies`, pushed about once a second and summed up by the scheduler, so
that any replica can show the whole cluster's. Pure; imports `service` for `Observation`, and wire types.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from deploy.frontend.errors import Fault
from deploy.frontend.service.observation import Observation
from scheduler.protocol.messages import TalliedMetric

SERVED = ("stop", "length")
FAULTS = (Fault.INVALID, Fault.OVERLOADED, Fault.CANCELLED, Fault.INTERNAL, Fault.UNAVAILABLE, Fault.TIMED_OUT)
OUTCOMES = (*SERVED, "abort", *(fault.name.lower() for fault in FAULTS))
"""Every way in which a request that its door let in can end."""

_SIX_A_DECADE = ("1", "1.5", "2", "3", "5", "7")


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Neighbours are at most 1.67 times apart, so that an interpolated percentile is off by a fifth at most, mostly by less."""
    return tuple(float(f"{step}e{decade}") for decade in range(first, last + 1) for step in _SIX_A_DECADE)


REQUEST_SECONDS = _decades(-3, 2)
"""1 ms to 700 s: a cached prompt on an idle GPU takes milliseconds, and the usual deadline of a request is 600 s."""

TOKEN_SECONDS = _decades(-4, 0)
"""0.1 ms to 7 s: tiny models take less than a millisecond a token, large ones on a crowded CPU more than one second."""

TOKENS = tuple(float(2**power) for power in range(18))
"""1 to 131,072 in powers of two, as blocks and the lengths of models are; the last one is the usual cap of `max_model_len`."""


@dataclass(frozen=True, slots=True)
class RequestMetric:
    """One that front ends observe. bounds: upper ones of a histogram's buckets, the last bucket has none; empty: a counter.

    label, values: a counter's label, if it has one, and all its values; each is shown from the start, with 0.
    """

    name: str
    help: str
    bounds: tuple[float, ...] = ()
    label: str = ""
    values: tuple[str, ...] = ()

    def observe(self, value: float) -> TalliedMetric:
        """One observation of a histogram."""
        bucket = bisect_left(self.bounds, value)
        return TalliedMetric(self.name, (), tuple(int(at == bucket) for at in range(len(self.bounds) + 1)), value)

    def count(self, amount: float = 1.0, value: str = "") -> TalliedMetric:
        """An increment of a counter. value: of its label."""
        return TalliedMetric(self.name, ((self.label, value),) if self.label else (), (), amount)


QUEUE = RequestMetric("manta_request_queue_seconds", "Wait of a request for its first start.", REQUEST_SECONDS)
TTFT = RequestMetric("manta_time_to_first_token_seconds", "From a request's arrival to its first token.", REQUEST_SECONDS)
TPOT = RequestMetric(
    "manta_time_per_output_token_seconds", "Mean time a token after the first, of a request's longest choice.", TOKEN_SECONDS
)
E2E = RequestMetric("manta_request_duration_seconds", "From arrival to the last token of a served request.", REQUEST_SECONDS)
PROMPT_TOKENS = RequestMetric("manta_request_prompt_tokens", "Prompt tokens of a served request.", TOKENS)
OUTPUT_TOKENS = RequestMetric("manta_request_output_tokens", "Output tokens of a served request, all choices.", TOKENS)
REQUESTS = RequestMetric(
    "manta_requests_total", "Requests that have ended, by finish reason or fault; not those that the door refused.",
    label="outcome", values=OUTCOMES,
)  # fmt: skip
REQUEST_LOG_DROPPED = RequestMetric(
    "manta_request_log_dropped_total", "Requests missing from the request log: its disk did not keep up or failed."
)
REQUEST_METRICS = (QUEUE, TTFT, TPOT, E2E, PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS, REQUEST_LOG_DROPPED)


def increments(observation: Observation) -> Iterator[TalliedMetric]:
    """What one ended request adds. Latencies are those of requests that were served so far: a refusal is not a fast answer."""
    yield REQUESTS.count(value=observation.outcome)
    if observation.ttft_s is not None:
        yield TTFT.observe(observation.ttft_s)
        if observation.queued_s is not None:
            yield QUEUE.observe(observation.queued_s)
    if observation.outcome in SERVED:
        yield E2E.observe(observation.e2e_s)
        yield PROMPT_TOKENS.observe(observation.prompt_tokens)
        yield OUTPUT_TOKENS.observe(observation.output_tokens)
        if observation.tpot_s is not None:
            yield TPOT.observe(observation.tpot_s)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram's sum at one moment. buckets: one more than bounds; total: sum of the observations."""

    bounds: tuple[float, ...]
    buckets: tuple[int, ...]
    total: float

    @classmethod
    def read(cls, tallies: Iterable[TalliedMetric], metric: RequestMetric) -> "Histogram":
        """All zeros where nothing has been observed yet, or by front ends of another version only, whose buckets are others."""
        buckets = len(metric.bounds) + 1
        found = next((each for each in tallies if each.name == metric.name and len(each.buckets) == buckets), None)
        if found is None:
            return cls(metric.bounds, (0,) * buckets, 0.0)
        return cls(metric.bounds, found.buckets, found.total)

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def since(self, earlier: "Histogram") -> "Histogram":
        """What has been observed after `earlier`; all of it if a scheduler began anew in between."""
        buckets = tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True))
        return self if min(buckets) < 0 else Histogram(self.bounds, buckets, self.total - earlier.total)

    def quantile(self, q: float) -> float | None:
        """The value below which a share `q` (0 to 1) of the observations lies; None without any.

        Interpolated inside its bucket, as PromQL's `histogram_quantile` does: beyond the last bound, that bound.
        """
        rank = q * self.count
        if not self.count:
            return None
        bucket = next(at for at, below in enumerate(accumulate(self.buckets)) if below >= rank and self.buckets[at])
        if bucket == len(self.bounds):
            return self.bounds[-1]
        low = self.bounds[bucket - 1] if bucket else 0.0
        share = (rank - sum(self.buckets[:bucket])) / self.buckets[bucket]
        return low + (self.bounds[bucket] - low) * share
