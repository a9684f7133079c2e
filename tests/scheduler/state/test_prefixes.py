"""Sharing: what is a hit, what is not yet one, who holds a shared block. The cluster checks the tokens as they come."""

import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Remap, Report
from scheduler.protocol.messages import Request
from scheduler.protocol.sampling import SamplingParams
from scheduler.state.sequence import State
from tests.scheduler.cluster import Cluster, filled


def test_a_stale_hash_entry_is_not_hit_after_its_block_was_reused() -> None:
    cluster = Cluster((4,))
    cluster.submit([*filled(0, 1), 0], max_tokens=2)
    cluster.run()
    other = cluster.submit([*filled(1, 1), 1], max_tokens=8)[0]  # takes all blocks, those of the first prompt too
    cluster.run()
    again = cluster.submit([*filled(0, 1), 0], max_tokens=2)[0]
    cluster.run()
    assert cluster.cached_tokens(other) == 0
    assert cluster.cached_tokens(again) == 0


def test_a_prompt_whose_every_block_is_cached_still_computes_its_last_token() -> None:
    cluster = Cluster((8,))
    first = cluster.submit(filled(0, 1, 0), max_tokens=2)[0]
    cluster.run()
    again = cluster.submit(filled(0, 1, 0), max_tokens=2)[0]
    assert cluster.core.groups[GroupId(0)].pending[cluster.sequence(again).row] == 4
    cluster.run()
    assert cluster.cached_tokens(again) == 8
    assert again.tokens == first.tokens


def test_a_prompt_may_hit_what_another_one_s_output_filled() -> None:
    cluster = Cluster((8,))
    first = cluster.submit(filled(0), max_tokens=9)[0]
    cluster.run()
    again = cluster.submit([*filled(0), *first.tokens], max_tokens=1)[0]
    cluster.run()
    assert cluster.cached_tokens(again) == 12


def test_without_prefix_caching_nothing_is_published() -> None:
    cluster = Cluster((8,), enable_prefix_caching=False)
    for _ in range(2):
        stream = cluster.submit(filled(0, 1), max_tokens=6)[0]
        cluster.run()
        assert cluster.cached_tokens(stream) == 0
    assert cluster.core.table.pools[GroupId(0)].cached == 0


def test_tenants_do_not_hit_each_other_s_blocks() -> None:
    cluster = Cluster((8,))
    for salt, hit in (("a", 0), ("b", 0), ("a", 4), ("", 0)):
        stream = cluster.submit([*filled(0), 1], salt=salt, max_tokens=1)[0]
        cluster.run()
        assert cluster.cached_tokens(stream) == hit


def test_twins_in_one_batch_compute_both_and_the_second_adopts_the_first_one_s_blocks() -> None:
    cluster = Cluster((8,), wait_for_prefix=False)
    first, second = (cluster.submit([*filled(0, 1), 0], max_tokens=2)[0] for _ in range(2))
    cluster.deliver()
    assert cluster.held() == 6
    cluster.turn()
    cluster.arrive()
    blocks = [cluster.sequence(stream).blocks for stream in (first, second)]
    assert blocks[0] is not None
    assert blocks[1] is not None
    assert blocks[0].blocks[:2] == blocks[1].blocks[:2]
    assert [command.index for command in cluster.groups[GroupId(0)].down if isinstance(command, Remap)] == [0, 1]
    assert cluster.held() == 4
    cluster.run()
    assert cluster.cached_tokens(second) == 0


def test_a_second_request_with_the_same_new_prefix_waits_and_then_hits() -> None:
    cluster = Cluster((8,), max_num_batched_tokens=4)
    first, second = (cluster.submit([*filled(0, 1), tail], max_tokens=2)[0] for tail in (0, 1))
    assert cluster.sequence(second).state is State.DEFERRED
    cluster.step()
    assert cluster.sequence(second).state is State.DEFERRED, "the first shared block is there, the second is not"
    cluster.step()
    assert cluster.sequence(second).state is State.RUNNING
    cluster.run()
    assert cluster.cached_tokens(first) == 0
    assert cluster.cached_tokens(second) == 8


def test_siblings_start_once_the_first_one_s_prompt_is_published() -> None:
    cluster = Cluster((8,), max_num_batched_tokens=4)
    streams = cluster.submit([*filled(0, 1), 0], n=3, max_tokens=3)
    states = [cluster.sequence(stream).state for stream in streams]
    assert states == [State.RUNNING, State.DEFERRED, State.DEFERRED]
    cluster.step(times=2)
    assert {cluster.sequence(stream).state for stream in streams} == {State.RUNNING}
    cluster.run()
    assert [cluster.cached_tokens(stream) for stream in streams] == [0, 8, 8]


def test_siblings_of_a_prompt_shorter_than_a_block_start_at_once() -> None:
    cluster = Cluster((8,))
    streams = cluster.submit([0, 1], n=3, max_tokens=3)
    assert {cluster.sequence(stream).state for stream in streams} == {State.RUNNING}
    cluster.run()


@pytest.mark.parametrize(("queued", "shared", "waits"), [
    pytest.param(10, 1, True, id="soon there"),
    pytest.param(30, 1, False, id="long to come"),
    pytest.param(30, 8, True, id="long to come, but much"),
])  # fmt: skip
def test_what_is_long_in_coming_is_computed_where_nothing_is_queued(queued: int, shared: int, waits: bool) -> None:
    cluster = Cluster((64, 64), max_num_batched_tokens=4)
    cluster.lose(1, returning=True)
    cluster.submit([1, 0] * (queued // 2), max_tokens=1)
    prefix = [at // 4 % 2 for at in range(4 * shared)]
    cluster.submit([*prefix, 1, 0], max_tokens=1)
    cluster.bring_up(1)
    other = cluster.submit([*prefix, 1, 1], max_tokens=1)[0]
    assert (cluster.sequence(other).state is State.DEFERRED) == waits
    third = cluster.submit([*prefix, 1, 1], max_tokens=1)[0]
    assert cluster.sequence(third).state is State.DEFERRED, "soon there, be it from the idle group"
    cluster.run()
    assert cluster.cached_tokens(other) == (4 * shared if waits else 0)


def test_what_is_long_in_coming_is_waited_for_if_there_is_nowhere_else_to_go() -> None:
    cluster = Cluster((64,), max_num_batched_tokens=4)
    cluster.submit([1, 0] * 15, max_tokens=1)
    cluster.submit([*filled(0), 1], max_tokens=1)
    other = cluster.submit([*filled(0), 0], max_tokens=1)[0]
    assert cluster.sequence(other).state is State.DEFERRED
    cluster.run()
    assert cluster.cached_tokens(other) == 4


@pytest.mark.parametrize("how", ["abort", "stop", "front end gone", "group lost"])
def test_whoever_waits_for_an_author_goes_on_when_it_leaves(how: str) -> None:
    cluster = Cluster((8, 8), max_num_batched_tokens=4)
    author = cluster.submit([*filled(0, 1, 1), 0], front_end=0)[0]
    waiters = [cluster.submit([*filled(0, 1, 1), 1], front_end=1, max_tokens=2)[0] for _ in range(2)]
    cluster.step()
    home = cluster.sequence(author).blocks
    assert home is not None
    if how == "abort":
        cluster.abort(author)
    elif how == "stop":
        cluster.end(author, 0)
    elif how == "front end gone":
        cluster.front_end_down(0)
    else:
        cluster.lose(home.group)
    state = {cluster.sequence(waiter).state for waiter in waiters}
    if how == "group lost":
        assert state == {State.DEFERRED}, "the author, older, has started again and is waited for again"
    else:
        assert state == {State.RUNNING, State.DEFERRED}, "one of them is the author now"
    cluster.run()


def test_whoever_waits_for_an_author_goes_on_when_it_is_preempted() -> None:
    cluster = Cluster((7,), max_num_batched_tokens=2)
    cluster.submit([0], max_tokens=28)
    cluster.step(times=7)
    author = cluster.submit([*filled(1, 1), 1], max_tokens=3)[0]
    waiter = cluster.submit([*filled(1, 1), 0], max_tokens=3)[0]
    while not cluster.sequence(author).preemptions:
        assert cluster.sequence(waiter).state is State.DEFERRED
        cluster.step()
    assert cluster.sequence(waiter).state is State.WAITING
    cluster.run()


def test_a_waiter_that_was_aborted_stays_ended_when_the_block_comes() -> None:
    cluster = Cluster((8,), max_num_batched_tokens=4)
    cluster.submit([*filled(0, 1), 0], max_tokens=2)
    waiter = cluster.submit([*filled(0, 1), 1], max_tokens=2)[0]
    cluster.abort(waiter)
    cluster.run()
    assert waiter.tokens == []


def test_equal_hashes_of_different_blocks_cost_a_wait_and_nothing_else() -> None:
    """As if xxhash collided throughout: the tokens decide what is a hit, and nobody waits for ever."""
    cluster = Cluster((16,))
    core, group = cluster.core, cluster.groups[GroupId(0)]
    prompts = [filled(0, 1, 0), filled(0, 1, 1), filled(1, 1, 1), filled(1, 1, 1)]
    for stream, prompt in enumerate(prompts):
        hashes = np.full(len(prompt) // 4, 7, np.uint64).tobytes()
        tokens = np.array(prompt, np.int32).tobytes()
        core.submit(0, Request(stream, tokens, hashes, SamplingParams(max_tokens=1)))
        assert core.sequences[0, stream].hashes == [7, 7, 7]
    for _ in range(20):
        for _, batch in core.take_logs():
            group.take(batch)
        group.deliver()
        group.turn()
        while group.up:
            report = group.up.popleft()
            assert isinstance(report, Report)
            core.report(GroupId(0), report)
    assert not core.sequences
    finished = [end for _, deltas in core.outbox.drain() for end in deltas.finished]
    assert sorted(end.cached_tokens for end in finished)[:2] == [0, 0]
    assert max(end.cached_tokens for end in finished) <= 8
    assert core.table.pools[GroupId(0)].held == 0


def test_shared_blocks_are_held_until_the_last_holder_ends() -> None:
    cluster = Cluster((16,))
    cluster.submit([*filled(0, 1), 0], max_tokens=1)
    cluster.run()
    short = cluster.submit([*filled(0, 1), 0], max_tokens=2)[0]
    longer = cluster.submit([*filled(0, 1), 1], max_tokens=8)[0]
    table = cluster.core.table
    assert table.pools[GroupId(0)].shared == 2
    blocks = cluster.sequence(longer).blocks
    assert blocks is not None
    assert [table.pools[GroupId(0)].refs[block] for block in blocks.blocks[:2]] == [2, 2]
    cluster.step(times=3)
    assert short.finished is not None
    assert table.pools[GroupId(0)].shared == 0
    assert [table.pools[GroupId(0)].refs[block] for block in blocks.blocks[:2]] == [1, 1]
    cluster.abort(longer)
    assert cluster.held() == 0
    cluster.run()


def test_a_wrong_number_of_hashes_is_not_trusted() -> None:
    core = SchedulerCore(CoreConfig(block_size=4))
    core.group_up(GroupId(0), 0, 8, 4)
    core.submit(0, Request(0, np.array(filled(0, 1), np.int32).tobytes(), b"\0" * 8, SamplingParams()))
    assert len(core.sequences[0, 0].hashes) == 2
    core.check()
