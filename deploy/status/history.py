"""From what a cluster is to what it does: rates and latencies over the last seconds, and a short memory of both.

Pure; time is an argument. Imports the stats.
"""

from collections import deque
from dataclasses import dataclass

from deploy.observing.tally import TPOT, TTFT, Histogram
from deploy.status.document import Sample
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats

KEPT_SAMPLES = 300
RATE_WINDOW_S = 5.0
LATENCY_WINDOW_S = 30.0
"""Long enough that a p99 rests on more than a few requests."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """What had been counted by `at_s`."""

    at_s: float
    epoch: int
    engine: EngineStats
    uptime_s: float
    busy_s: float
    ttft: Histogram
    tpot: Histogram


class History:
    """Samples of the last minutes, made from readings of the last seconds. A restarted scheduler counts anew; so does this."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._readings: deque[_Reading] = deque()

    def observe(self, status: ClusterStatus, unix_s: float, now_s: float) -> Sample:
        """Takes the next status in. unix_s: for people; now_s: for the rates, by a clock that never jumps."""
        sample = Sample(t=round(unix_s, 2))
        if status.engine is None:
            self._readings.clear()
        else:
            sample = self._measure(sample.t, self._read(status, status.engine, now_s))
        self.samples.append(sample)
        return sample

    def step(self, group: GroupStats) -> tuple[float | None, float | None]:
        """Mean milliseconds and tokens of the group's steps over the last seconds; None without a step."""
        past = self._since(RATE_WINDOW_S).engine.groups
        old = next((each for each in past if (each.group, each.epoch) == (group.group, group.epoch)), None)
        steps = group.steps - old.steps if old is not None else 0
        if old is None or steps <= 0:
            return None, None
        return 1e3 * (group.step_s - old.step_s) / steps, (group.step_tokens - old.step_tokens) / steps

    def _read(self, status: ClusterStatus, engine: EngineStats, now_s: float) -> _Reading:
        reading = _Reading(
            now_s, status.epoch, engine, status.uptime_s, status.busy_s,
            Histogram.read(status.tallies, TTFT), Histogram.read(status.tallies, TPOT),
        )  # fmt: skip
        readings = self._readings
        if readings and (readings[-1].epoch != reading.epoch or engine.requests < readings[-1].engine.requests):
            readings.clear()
        readings.append(reading)
        while len(readings) > 2 and readings[1].at_s <= now_s - LATENCY_WINDOW_S:
            readings.popleft()
        return reading

    def _since(self, window_s: float) -> _Reading:
        """The newest reading that is at least that old; without one, the oldest."""
        horizon_s = self._readings[-1].at_s - window_s
        return next((reading for reading in reversed(self._readings) if reading.at_s <= horizon_s), self._readings[0])

    def _measure(self, t: float, new: _Reading) -> Sample:
        recent, earlier = self._since(RATE_WINDOW_S), self._since(LATENCY_WINDOW_S)
        engine, past = new.engine, recent.engine
        blocks = sum(group.total_blocks for group in engine.groups if group.up)
        ttft, tpot = new.ttft.since(earlier.ttft), new.tpot.since(earlier.tpot)
        return Sample(
            t=t,
            epoch=new.epoch,
            running=sum(group.running for group in engine.groups),
            waiting=engine.waiting,
            preempted=engine.preempted,
            output_tps=_ratio(engine.output_tokens - past.output_tokens, new.at_s - recent.at_s, 1),
            prompt_tps=_ratio(engine.started_tokens - past.started_tokens, new.at_s - recent.at_s, 1),
            hit_rate=_ratio(
                engine.cached_tokens - earlier.engine.cached_tokens, engine.started_tokens - earlier.engine.started_tokens, 4
            ),
            ttft_p50_ms=_milliseconds(ttft.quantile(0.5)),
            ttft_p99_ms=_milliseconds(ttft.quantile(0.99)),
            tpot_p50_ms=_milliseconds(tpot.quantile(0.5)),
            tpot_p99_ms=_milliseconds(tpot.quantile(0.99)),
            used=_ratio(sum(group.held_blocks for group in engine.groups), blocks, 4),
            cached=_ratio(sum(group.cached_blocks for group in engine.groups), blocks, 4),
            busy=_ratio(new.busy_s - recent.busy_s, new.uptime_s - recent.uptime_s, 4),
        )


def _ratio(part: float, whole: float, digits: int) -> float | None:
    return round(part / whole, digits) if whole > 0 else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
