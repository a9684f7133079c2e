"""Rates and latencies of the last seconds, from counters that only grow, or begin anew."""

import pytest

from deploy.observing.tally import TPOT, TTFT
from deploy.status.history import KEPT_SAMPLES, LATENCY_WINDOW_S, RATE_WINDOW_S, History
from scheduler.protocol.messages import TalliedMetric
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats
from scheduler.server.tallies import Tallies


def status(
    epoch: int = 0, busy_s: float = 0.0, uptime_s: float = 0.0, tallies: tuple[TalliedMetric, ...] = (), **counters: int
) -> ClusterStatus:
    groups = (GroupStats(0, True, 100, 30, 50, 20, 7), GroupStats(1, False, 100, 0, 0, 0, 0))
    engine = EngineStats(groups=groups, waiting=4, preempted=1, **counters)
    return ClusterStatus(phase="ready", epoch=epoch, engine=engine, busy_s=busy_s, uptime_s=uptime_s, tallies=tallies)


def test_rates_are_over_the_last_seconds() -> None:
    history = History()
    for second in range(20):
        tokens = 1000 * second if second < 10 else 9000 + 200 * (second - 9)
        sample = history.observe(status(output_tokens=tokens, started_tokens=50 * second), 1e9 + second, second)
    assert sample.output_tps == 200.0
    assert sample.prompt_tps == 50.0
    assert sample.t == 1e9 + 19
    assert RATE_WINDOW_S == 5.0


def test_the_first_sample_has_levels_but_no_rates() -> None:
    sample = History().observe(status(output_tokens=500), 0.0, 0.0)
    assert (sample.running, sample.waiting, sample.preempted, sample.epoch) == (7, 4, 1, 0)
    assert (sample.used, sample.cached) == (0.5, 0.2)  # of the groups that are up
    assert sample.output_tps is None
    assert sample.busy is None


def test_hit_rate_is_of_the_tokens_that_started_lately() -> None:
    history = History()
    history.observe(status(started_tokens=1000, cached_tokens=0), 0.0, 0.0)
    assert history.observe(status(started_tokens=1000, cached_tokens=0), 1.0, 1.0).hit_rate is None
    assert history.observe(status(started_tokens=1400, cached_tokens=300), 2.0, 2.0).hit_rate == 0.75


def test_busy_is_a_part_of_the_schedulers_own_time() -> None:
    history = History()
    history.observe(status(uptime_s=100.0, busy_s=10.0), 0.0, 0.0)
    assert history.observe(status(uptime_s=104.0, busy_s=11.0), 0.0, 4.0).busy == 0.25


def test_latencies_are_of_requests_that_ended_lately() -> None:
    history, tallies = History(), Tallies()
    tallies.add([TTFT.observe(50.0)] * 100)  # long ago
    history.observe(status(tallies=tallies.snapshot()), 0.0, 0.0)
    tallies.add([*[TTFT.observe(0.012)] * 98, *[TTFT.observe(0.9)] * 2, TPOT.observe(0.03)])
    sample = history.observe(status(tallies=tallies.snapshot()), 1.0, 1.0)
    assert sample.ttft_p50_ms is not None
    assert 10.0 <= sample.ttft_p50_ms <= 15.0
    assert sample.ttft_p99_ms is not None
    assert 700.0 <= sample.ttft_p99_ms <= 1000.0
    assert sample.tpot_p50_ms is not None
    later = [history.observe(status(tallies=tallies.snapshot()), s, s) for s in range(2, int(LATENCY_WINDOW_S) + 3)]
    assert later[-1].ttft_p50_ms is None
    assert later[-1].tpot_p99_ms is None


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_restarted_scheduler_counts_anew(epoch: int) -> None:
    """Even where the epoch does not tell, counters that fall do."""
    history = History()
    for second in range(8):
        history.observe(status(requests=100 + second, output_tokens=10_000 * second), second, second)
    first = history.observe(status(epoch=epoch, requests=1, output_tokens=10), 8.0, 8.0)
    assert first.output_tps is None
    assert history.observe(status(epoch=epoch, requests=2, output_tokens=110), 9.0, 9.0).output_tps == 100.0


def test_an_absent_scheduler_is_a_gap() -> None:
    history = History()
    history.observe(status(output_tokens=5), 0.0, 0.0)
    gone = history.observe(ClusterStatus(phase="starting"), 1.0, 1.0)
    assert (gone.epoch, gone.running, gone.output_tps) == (None, None, None)
    assert history.observe(status(output_tokens=500), 2.0, 2.0).output_tps is None  # nothing is known of the time between


def test_memory_is_bounded() -> None:
    history = History()
    for second in range(KEPT_SAMPLES + 50):
        history.observe(status(), second, second)
    assert len(history.samples) == KEPT_SAMPLES
    assert len(history._readings) <= LATENCY_WINDOW_S + 2


def test_steps_are_those_of_this_groups_epoch() -> None:
    def group(epoch: int, steps: int) -> GroupStats:
        return GroupStats(0, True, 10, 10, 0, 0, 0, epoch=epoch, steps=steps, step_s=0.02 * steps, step_tokens=64 * steps)

    history = History()
    for second, (epoch, steps) in enumerate([(0, 100), (0, 150), (1, 5), (1, 10)]):
        one = group(epoch, steps)
        history.observe(ClusterStatus(phase="ready", engine=EngineStats(groups=(one,))), second, second)
        if second == 1:
            assert history.step(one) == pytest.approx((20.0, 64.0))
    assert history.step(group(1, 10)) == (None, None)  # five seconds ago it was another epoch
