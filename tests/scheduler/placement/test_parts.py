"""Reuse inside a block, through the core and simulated groups: the cluster checks tokens, the tests how much was computed."""

import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.protocol.leaders import Copy, Start
from scheduler.server.stats import snapshot
from scheduler.state.sequence import State
from tests.scheduler.cluster import Cluster, Stream, filled


def cluster_of_parts(*pools: int, **options: int | bool) -> Cluster:
    return Cluster(pools or (8,), hash_stride=2, **options)  # type: ignore[arg-type]


def finish(cluster: Cluster, prompt: list[int], max_tokens: int = 1) -> Stream:
    stream = cluster.submit(prompt, max_tokens=max_tokens)[0]
    cluster.run()
    return stream


def issued(cluster: Cluster, kind: type, group: int = 0) -> list[object]:
    return [command for command in cluster.groups[GroupId(group)].down if isinstance(command, kind)]


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    cluster = cluster_of_parts()
    first = finish(cluster, [0, 1, 1], max_tokens=4)
    said = [0, 1, 1, *first.tokens]
    second = cluster.submit([*said, 1, 0], max_tokens=2)[0]
    assert not issued(cluster, Copy), "nobody uses the last block of the first turn: the second goes on in it"
    cluster.run()
    assert cluster.cached_tokens(second) == 6, "all but the last token of the first turn, whose KV was never written"
    third = finish(cluster, [*said, 1, 0, *second.tokens, 0])
    assert cluster.cached_tokens(third) == 10


def test_a_prompt_that_diverges_inside_a_block_of_a_running_sequence_copies_what_they_share() -> None:
    cluster = cluster_of_parts()
    author = cluster.submit([0, 1, 1], max_tokens=8)[0]
    cluster.step()
    reader = cluster.submit([0, 1, 1, 0, 1], max_tokens=3)[0]
    copy, start = cluster.groups[GroupId(0)].down
    assert isinstance(start, Start)
    assert isinstance(copy, Copy)
    blocks = np.frombuffer(start.blocks, np.int32)
    assert (start.cached_tokens, copy.tokens, copy.target) == (3, 3, blocks[0])
    held = cluster.sequence(author).blocks
    assert held is not None
    assert copy.source == held.blocks[0] != copy.target
    cluster.run()
    assert cluster.cached_tokens(reader) == 3


def test_a_source_that_is_granted_again_at_once_is_copied_before_it_is_overwritten() -> None:
    cluster = cluster_of_parts(3)
    finish(cluster, [*filled(0, 1), 1])
    reader = cluster.submit([*filled(0), 1, 1, 1, 0], max_tokens=1)[0]
    assert issued(cluster, Copy)
    cluster.abort(reader)
    other = cluster.submit([1] * 11, max_tokens=2)[0]  # takes every block, the source and the target too
    cluster.run()
    assert cluster.cached_tokens(other) == 0


def test_choices_of_one_prompt_share_its_last_block_too() -> None:
    cluster = cluster_of_parts(8)
    cluster.submit([*filled(0), 1, 0, 1], n=3, max_tokens=4)
    cluster.run()
    counters = cluster.core.counters
    assert (counters.started_tokens, counters.cached_tokens, counters.part_tokens) == (21, 12, 4)
    assert counters.parts_copied == 2


def test_a_preempted_sequence_goes_on_in_the_block_where_it_was() -> None:
    cluster = cluster_of_parts(5, grant_ahead=1)
    old = cluster.submit(filled(0, 0), max_tokens=12)[0]
    young = cluster.submit([1, 1, 1], max_tokens=8)[0]
    while not cluster.core.counters.preemptions:
        cluster.step()
    assert cluster.core.counters.recomputed_tokens > 0
    lost = cluster.sequence(young)
    assert lost.preemptions == 1
    cluster.run()
    assert len(old.tokens) == 12
    assert len(young.tokens) == 8


def test_what_was_dropped_in_the_middle_of_a_block_is_found_by_its_successor() -> None:
    cluster = cluster_of_parts()
    gone = cluster.submit([*filled(1), 0, 0], max_tokens=8)[0]
    cluster.step(times=2)
    cluster.abort(gone)
    again = finish(cluster, [*filled(1), 0, 0, 1, 0])
    assert cluster.cached_tokens(again) == 6


def test_the_part_goes_where_the_sequence_goes() -> None:
    """Each group is asked for what it has itself: a part in a busy group does not count for an idle one."""
    cluster = cluster_of_parts(8, 8, max_num_seqs=1)
    busy = cluster.sequence(cluster.submit([0, 0, 1], max_tokens=8)[0]).blocks
    cluster.step()
    other = cluster.submit([0, 0, 1, 1], max_tokens=1)[0]
    blocks = cluster.sequence(other).blocks
    assert busy is not None
    assert blocks is not None
    assert busy.group != blocks.group
    cluster.run()
    assert cluster.cached_tokens(other) == 0


@pytest.mark.parametrize("stride", [0, 2])
def test_hits_and_misses_sum_up_with_and_without_parts(stride: int) -> None:
    cluster = Cluster((4, 4), hash_stride=stride)
    for prompt in ([0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0], [0, 1, 0, 0], [1] * 9, [1] * 10, [0, 1, 1, 0, 1, 1, 1]):
        finish(cluster, prompt, max_tokens=2)
    stats = snapshot(cluster.core)
    missed = stats.miss_cold + stats.miss_evicted + stats.miss_routed + stats.miss_inside_block
    assert stats.cached_tokens + missed == stats.started_tokens == 42
    assert (stats.part_tokens > 0) == (stride > 0)


def test_a_prompt_whose_own_log_probabilities_are_wanted_takes_no_part() -> None:
    cluster = cluster_of_parts()
    finish(cluster, [0, 1, 1])
    stream = cluster.submit([0, 1, 1, 0], max_tokens=1, prompt_logprobs=0)[0]
    cluster.run()
    assert cluster.cached_tokens(stream) == 0


def test_what_a_running_sequence_has_decoded_of_its_block_is_found_when_somebody_asks() -> None:
    cluster = cluster_of_parts(12, block_size=8)
    author = cluster.submit([0, 1, 1], max_tokens=20)[0]
    cluster.step(times=3)
    assert not cluster.core.table.index.heads.newest, "nothing of its block is published as long as nobody asks"
    computed = [0, 1, 1, *author.tokens[:-1]]
    reader = cluster.submit([*computed, 1 - author.tokens[-1], 0], max_tokens=2)[0]
    assert cluster.sequence(reader).cached_tokens == len(computed) == 5
    cluster.step(times=8)
    computed = [0, 1, 1, *author.tokens[:-1]]
    assert len(computed) > 8, "the author has turned to another block, which it has not filled"
    later = cluster.submit([*computed, 0, 0], max_tokens=2)[0]
    assert cluster.sequence(later).cached_tokens == len(computed)
    cluster.run()


def test_a_running_sequence_shows_nothing_to_a_prompt_that_goes_on_differently() -> None:
    cluster = cluster_of_parts(12, block_size=8)
    author = cluster.submit([0, 1, 1, 0], max_tokens=3)[0]
    cluster.step()
    cluster.submit([0, 0, 1, 0, 1], max_tokens=2)
    blocks = cluster.sequence(author).blocks
    assert blocks is not None
    assert not blocks.tail
    cluster.run()


def test_a_burst_of_prompts_that_share_less_than_a_block_computes_it_once() -> None:
    cluster = cluster_of_parts(16, block_size=8)
    common = [0, 1, 1, 0, 0]
    streams = [cluster.submit([*common, end, end], max_tokens=2)[0] for end in (0, 1, 0, 1)]
    states = [cluster.sequence(stream).state for stream in streams]
    assert states == [State.RUNNING, State.DEFERRED, State.DEFERRED, State.DEFERRED]
    cluster.step()
    assert {cluster.sequence(stream).state for stream in streams} == {State.RUNNING}
    cluster.run()
    cached = [cluster.cached_tokens(stream) for stream in streams]
    assert cached[0] == 0
    assert cached[1] == len(common)
    assert min(cached[2:]) >= len(common)


def test_a_burst_waits_for_the_block_in_which_its_prompts_part_not_for_the_whole_first_prompt() -> None:
    cluster = cluster_of_parts(16, block_size=4, max_num_batched_tokens=4)
    long = cluster.submit([*filled(0), 1, 1, 0, *filled(1, 1, 0, 1)], max_tokens=2)[0]
    other = cluster.submit([*filled(0), 1, 1, 1, 1], max_tokens=2)[0]
    assert cluster.sequence(other).state is State.DEFERRED
    cluster.step(times=2)
    assert cluster.sequence(other).state is State.RUNNING
    assert not long.tokens, "the first one still computes its prompt"
    cluster.run()
    assert cluster.cached_tokens(other) == 6


def test_little_in_common_is_not_waited_for() -> None:
    cluster = cluster_of_parts(16, block_size=8)
    streams = [cluster.submit([0, 1, 1, end, end, 0], max_tokens=2)[0] for end in (0, 1)]
    assert {cluster.sequence(stream).state for stream in streams} == {State.RUNNING}
    cluster.run()


@pytest.mark.parametrize("how", ["abort", "group lost"])
def test_whoever_waits_for_a_part_goes_on_when_its_author_leaves(how: str) -> None:
    cluster = cluster_of_parts(8, 8, block_size=8)
    author = cluster.submit([0, 1, 1, 0, 0], max_tokens=2)[0]
    other = cluster.submit([0, 1, 1, 0, 0, 1], max_tokens=2)[0]
    assert cluster.sequence(other).state is State.DEFERRED
    home = cluster.sequence(author).blocks
    assert home is not None
    if how == "abort":
        cluster.abort(author)
        assert cluster.sequence(other).state is State.RUNNING
    else:
        cluster.lose(home.group)
    cluster.run()
    assert len(other.tokens) == 2
