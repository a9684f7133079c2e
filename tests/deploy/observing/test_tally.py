"""An ended request as increments; percentiles out of their sums."""

import random
import statistics

import pytest

from deploy.frontend.service.observation import PromptUse
from deploy.observing.tally import (
    E2E,
    OUTCOMES,
    QUEUE,
    REQUEST_METRICS,
    REQUESTS,
    TPOT,
    TTFT,
    Histogram,
    RequestMetric,
    increments,
)
from scheduler.protocol.messages import TalliedMetric
from scheduler.server.tallies import Tallies
from tests.deploy.frontend.observations import observation


def test_a_served_request_is_in_every_histogram_once() -> None:
    made = list(increments(observation()))
    histograms = {metric.name: metric for metric in made if metric.buckets}
    assert set(histograms) == {metric.name for metric in REQUEST_METRICS if metric.bounds}
    assert all(sum(metric.buckets) == 1 for metric in histograms.values())
    assert histograms[TTFT.name].total == 0.5
    assert histograms[QUEUE.name].total == 0.1
    assert histograms[E2E.name].total == 1.5
    assert histograms[TPOT.name].total == pytest.approx(0.1)
    assert [metric for metric in made if not metric.buckets] == [TalliedMetric(REQUESTS.name, (("outcome", "stop"),), (), 1.0)]


def test_a_refusal_is_no_fast_answer() -> None:
    refused = observation(outcome="overloaded", ttft_s=None, queued_s=None, output_tokens=0, e2e_s=0.001)
    assert list(increments(refused)) == [REQUESTS.count(value="overloaded")]
    assert "overloaded" in OUTCOMES


def test_an_aborted_stream_still_tells_how_long_its_first_token_took() -> None:
    names = [metric.name for metric in increments(observation(outcome="abort", queued_s=None))]
    assert names == [REQUESTS.name, TTFT.name]


def test_choices_grow_side_by_side() -> None:
    two = observation(output_tokens=22, prompts=(PromptUse(300, b"", (11, 11)),))
    assert two.tpot_s == observation().tpot_s == pytest.approx(0.1)


@pytest.mark.parametrize("metric", [metric for metric in REQUEST_METRICS if metric.bounds], ids=lambda m: m.name)
def test_buckets_hold_their_upper_bound_as_prometheus_wants_it(metric: type) -> None:
    assert isinstance(metric, type(TTFT))
    assert list(metric.bounds) == sorted(set(metric.bounds))
    for at, bound in enumerate(metric.bounds):
        assert metric.observe(bound).buckets.index(1) == at
        assert metric.observe(bound * 1.0001).buckets.index(1) == at + 1


def test_percentiles_are_close_to_the_true_ones() -> None:
    draw = random.Random(7)
    seconds = [draw.lognormvariate(-1.5, 0.8) for _ in range(5000)]
    sums = Tallies()
    sums.add(TTFT.observe(each) for each in seconds)
    histogram = Histogram.read(sums.snapshot(), TTFT)
    cuts = statistics.quantiles(seconds, n=100)
    assert histogram.count == 5000
    for percent in (10, 50, 90, 99):
        assert histogram.quantile(percent / 100) == pytest.approx(cuts[percent - 1], rel=0.1)


def test_percentiles_interpolate_inside_a_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0), (0, 4, 4, 0), 20.0)
    assert [histogram.quantile(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert Histogram((1.0, 2.0), (0, 0, 3), 30.0).quantile(0.5) == 2.0, "nothing is known beyond the last bound"
    assert Histogram.read((), TTFT).quantile(0.5) is None


def test_a_window_is_the_difference_of_two_sums() -> None:
    earlier, later = Histogram((1.0,), (3, 1), 5.0), Histogram((1.0,), (5, 1), 6.0)
    assert later.since(earlier) == Histogram((1.0,), (2, 0), 1.0)
    assert earlier.since(later) == earlier, "a scheduler that began anew counts from nothing"


def test_buckets_of_another_version_are_none_of_this_one() -> None:
    """They may be in the sums while both serve; a page of metrics is not to fail for that."""
    metric = RequestMetric("ttft", "", (1.0, 2.0))
    other = TalliedMetric("ttft", (), (4, 5), 9.0)
    assert Histogram.read([other], metric).buckets == (0, 0, 0)
    assert Histogram.read([other, metric.observe(1.5)], metric).buckets == (0, 1, 0)
