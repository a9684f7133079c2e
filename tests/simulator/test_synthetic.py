"""A made trace has the load and the sharing that it was asked for, and is the seed's."""

import numpy as np
import pytest

from simulator.synthetic import BLOCK_TOKENS, Synthetic, make_trace, parse_synthetic
from simulator.traces import TraceError


def test_rates_and_lengths_are_those_asked_for() -> None:
    trace = make_trace(Synthetic(requests=20_000, rate=50.0, prompt=800, output=100, shared=0.25, users=500))
    assert [each.number for each in trace] == list(range(20_000))
    assert trace[0].arrived_s == 0
    assert trace[-1].arrived_s == pytest.approx(400, rel=0.05)
    assert np.mean([each.prompt_tokens for each in trace]) == pytest.approx(800, rel=0.05)
    assert np.mean([each.output_tokens for each in trace]) == pytest.approx(100, rel=0.05)
    shared = sum(len(each.names) * BLOCK_TOKENS for each in trace) / sum(each.prompt_tokens for each in trace)
    assert shared == pytest.approx(0.25, rel=0.1)
    assert len({tuple(each.names.tolist()) for each in trace if len(each.names)}) > 400
    assert min(each.prompt_tokens - len(each.names) * BLOCK_TOKENS for each in trace) >= 1


def test_a_user_s_requests_share_a_beginning_and_no_more() -> None:
    trace = make_trace(Synthetic(requests=50, users=1, prompt=600, shared=0.5))
    first, second = trace[0], trace[1]
    common = len(first.names) * BLOCK_TOKENS
    assert common > 0
    assert (first.tokens()[:common] == second.tokens()[:common]).all()
    assert first.tokens()[common] != second.tokens()[common]


def test_equal_seeds_are_equal_traces_and_a_limit_is_their_beginning() -> None:
    def arrivals(seed: int, limit: int | None = None) -> list[tuple[float, int, int]]:
        made = make_trace(Synthetic(requests=100), seed, limit)
        return [(each.arrived_s, each.prompt_tokens, each.output_tokens) for each in made]

    assert arrivals(1) == arrivals(1) != arrivals(2)
    assert arrivals(1, limit=7) == arrivals(1)[:7]


def test_words() -> None:
    assert parse_synthetic("synthetic:") == Synthetic()
    assert parse_synthetic("synthetic:rate=2.5,users=7") == Synthetic(rate=2.5, users=7)
    for text, words in (
        ("synthetic:user=7", "did you mean users"),
        ("synthetic:rate=fast", "rate must be a number"),
        ("synthetic:rate=0", "above 0"),
        ("synthetic:shared=2", "from 0 to 1"),
        ("synthetic:users=nan", "users must be a number"),
    ):
        with pytest.raises(TraceError, match=words):
            parse_synthetic(text)
