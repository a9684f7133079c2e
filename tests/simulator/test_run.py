"""Whole replays of a small trace: reproducible, complete, and in the order that the policies' knowledge explains."""

from dataclasses import replace

import msgspec
import pytest

from simulator.engines import ClusterShape
from simulator.report import Outcome
from simulator.run import POLICIES, Drain, Outage, Scenario, replay
from simulator.time_model import TimeModel
from simulator.traces import TraceRequest, read_trace
from tests.simulator.excerpts import conversations

SHAPE = ClusterShape(
    groups=3, blocks=200, max_num_seqs=16, max_num_batched_tokens=1024, time=TimeModel(prefill_tokens_per_s=5000.0)
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[TraceRequest]:
    return read_trace(conversations(tmp_path_factory.mktemp("replay") / "trace.jsonl"))


@pytest.fixture(scope="module")
def outcomes(trace: list[TraceRequest]) -> dict[str, Outcome]:
    return {policy: replay(trace, policy, Scenario(SHAPE)) for policy in POLICIES}


def test_every_request_ends_under_every_policy(trace: list[TraceRequest], outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        assert (outcome.requests, outcome.refused) == (len(trace), 0)
        assert outcome.ttft_s.p99 >= outcome.ttft_s.p50 > 0
        assert outcome.tpot_s.p50 >= SHAPE.time.decode_step_s / SHAPE.groups
        assert outcome.core_cpu_s > 0
        assert outcome.busiest_over_mean >= 1


def test_knowledge_is_reuse(outcomes: dict[str, Outcome]) -> None:
    hits = {policy: outcome.token_hit_rate for policy, outcome in outcomes.items()}
    assert hits["infinite"] >= hits["single-pool"] >= hits["manta"] > hits["least-load"]
    assert hits["precise"] > hits["round-robin"]
    assert hits["approximate"] > hits["round-robin"]
    assert outcomes["longest-prefix"].busiest_over_mean > 2 * outcomes["manta"].busiest_over_mean - 1


def test_what_another_group_has_is_fetched_and_the_wait_is_shorter_for_it(outcomes: dict[str, Outcome]) -> None:
    plain, fetching = outcomes["manta"], outcomes["manta-fetch"]
    assert plain.fetched_tokens == 0 < fetching.fetched_tokens
    assert fetching.ttft_s.mean < plain.ttft_s.mean


def test_what_was_evicted_comes_back_from_host_memory(trace: list[TraceRequest]) -> None:
    small = replace(SHAPE, blocks=80, host_blocks=2000)
    fetching, hosting = (replay(trace, policy, Scenario(small)) for policy in ("manta-fetch", "manta-host"))
    assert fetching.loaded_tokens == 0 < hosting.loaded_tokens
    assert hosting.token_hit_rate > fetching.token_hit_rate
    assert hosting.ttft_s.mean < fetching.ttft_s.mean


def test_a_drained_group_s_sequences_go_on_elsewhere_with_their_blocks(trace: list[TraceRequest]) -> None:
    drains = (Drain(0, 8.0), Drain(1, 12.0, 0.5))
    plain, moving = (replay(trace, policy, Scenario(SHAPE, drains=drains)) for policy in ("manta", "manta-fetch"))
    assert plain.requests == moving.requests == len(trace)
    assert plain.migrations == 0 < moving.migrations
    assert moving.preemptions < plain.preemptions


def test_infinite_hits_are_those_of_the_trace(trace: list[TraceRequest], outcomes: dict[str, Outcome]) -> None:
    """Counted by names, with a cache that never forgets: Manta's infinite pool may miss what is still being computed."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for request in trace:
        full = (request.prompt_tokens - 1) // 512
        names = [tuple(request.names[: at + 1].tolist()) for at in range(full)]
        hits += 512 * next((at for at, name in enumerate(names) if name not in seen), full)
        seen.update(names)
    ideal = hits / sum(request.prompt_tokens for request in trace)
    assert ideal * 0.97 <= outcomes["infinite"].token_hit_rate <= ideal + 0.05  # blocks are half a name's block


def test_equal_seeds_are_equal_runs(trace: list[TraceRequest], outcomes: dict[str, Outcome]) -> None:
    def timeless(outcome: Outcome) -> Outcome:
        costs = dict.fromkeys(("core_cpu_s", "core_us_per_request", "core_us_per_group_s", "core_share"), 0.0)
        return msgspec.structs.replace(outcome, **costs)

    for policy in ("manta", "manta-fetch", "lagging"):
        assert timeless(replay(trace, policy, Scenario(SHAPE))) == timeless(outcomes[policy])


@pytest.mark.parametrize("policy", ["manta", "manta-fetch", "manta-host", "round-robin", "precise"])
def test_failures_cost_time_and_lose_nothing(trace: list[TraceRequest], outcomes: dict[str, Outcome], policy: str) -> None:
    outages = (Outage(0, 8.0, 5.0), Outage(1, 9.0, 5.0), Outage(2, 10.0, 5.0))
    outcome = replay(trace, policy, Scenario(SHAPE, outages=outages))
    assert outcome.requests == len(trace)
    assert outcome.ttft_s.mean > outcomes[policy].ttft_s.mean
    if policy != "manta-fetch":  # where a fetch may follow the hit rate can go either way
        assert outcome.token_hit_rate < outcomes[policy].token_hit_rate


def test_load_is_felt(trace: list[TraceRequest], outcomes: dict[str, Outcome]) -> None:
    faster = replay(trace, "manta", Scenario(SHAPE, speed_up=4.0))
    assert faster.virtual_s < outcomes["manta"].virtual_s
    assert faster.ttft_s.mean > outcomes["manta"].ttft_s.mean


def test_what_fits_no_pool_is_refused(trace: list[TraceRequest]) -> None:
    tiny = ClusterShape(groups=2, blocks=20, max_num_seqs=4)
    outcome = replay(trace, "manta", Scenario(tiny))
    assert outcome.refused == sum(each.prompt_tokens + each.output_tokens - 1 > 20 * 256 for each in trace) > 0
    assert outcome.requests == len(trace) - outcome.refused


def test_small_blocks_replay_too(trace: list[TraceRequest]) -> None:
    outcome = replay(trace[:30], "manta", Scenario(ClusterShape(groups=2, blocks=3200, block_size=16, max_num_seqs=16)))
    assert outcome.requests == 30
