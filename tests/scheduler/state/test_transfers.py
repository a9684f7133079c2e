"""Blocks that move: a prefix is fetched from another group, kept in host memory and loaded.

The cluster checks every token, and after every event that what the index names stands in the blocks.
"""

import numpy as np

from kvcache.ids import GroupId, host_of
from scheduler.protocol.leaders import Cut, Load, Moved, Offload, Receive, Send, Start
from scheduler.state.sequence import State
from tests.scheduler.cluster import Cluster, Stream, filled

PREFIX = filled(0, 1, 0, 1, 1)
ZERO, ONE = GroupId(0), GroupId(1)


def busy_holder(**options: int) -> tuple[Cluster, Stream]:
    """Group 0 has PREFIX in its cache and its only row taken; group 1 is idle. Returns the one who takes the row."""
    cluster = Cluster((16, 16), max_num_seqs=1, fetch=True, hash_stride=2, **options)  # type: ignore[arg-type]
    cluster.submit([*PREFIX, 1], max_tokens=1)
    cluster.run()
    busy = cluster.submit([*PREFIX, 0], max_tokens=12)[0]
    holder = cluster.sequence(busy).blocks
    assert holder is not None
    assert holder.group == ZERO
    cluster.step()
    return cluster, busy


def commands(cluster: Cluster, group: int, *kinds: type) -> list[object]:
    return [command for command in cluster.groups[GroupId(group)].down if isinstance(command, kinds)]


def blocks_of(buffer: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(buffer, np.int32).tolist()
    return ids


def begun(cluster: Cluster) -> int:
    """The one transfer, once both sides have begun it."""
    for group in (0, 1):
        cluster.deliver(group)
        cluster.turn(group)
    (transfer,) = cluster.moves()
    return transfer


def test_a_prefix_is_fetched_where_its_holder_has_no_row() -> None:
    cluster, busy = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    sequence = cluster.sequence(stream)
    assert sequence.state is State.FETCHING
    assert sequence.blocks is not None
    (send,) = commands(cluster, 0, Send)
    (receive,) = commands(cluster, 1, Receive)
    assert isinstance(send, Send)
    assert isinstance(receive, Receive)
    assert send.transfer == receive.transfer
    assert (send.group, receive.group) == (ONE, ZERO)
    holder = cluster.sequence(busy).blocks
    assert holder is not None
    assert blocks_of(send.blocks) == holder.blocks[:5]
    assert blocks_of(receive.blocks) == sequence.blocks.blocks[:5]
    assert not commands(cluster, 1, Start), "it starts when its prefix is there"
    cluster.run()
    assert cluster.cached_tokens(stream) == 20
    counters = cluster.core.counters
    assert (counters.fetches, counters.fetched_tokens, counters.failed_transfers) == (1, 20, 0)
    again = cluster.submit([*PREFIX, 1, 1], max_tokens=1)[0]
    cluster.run()
    assert cluster.cached_tokens(again) >= 20
    assert counters.fetches == 1, "the copy is a copy like any other"


def test_the_last_block_of_a_conversation_comes_along() -> None:
    cluster = Cluster((16, 16), max_num_seqs=1, fetch=True, hash_stride=2)
    cluster.submit([*PREFIX, 1, 0, 1], max_tokens=1)
    cluster.run()
    blocker = cluster.sequence(cluster.submit(filled(1, 1), max_tokens=16)[0]).blocks
    assert blocker is not None
    assert blocker.group == ZERO
    stream = cluster.submit([*PREFIX, 1, 0, 1, 1, 1], max_tokens=1)[0]
    cluster.run()
    assert cluster.core.counters.fetched_tokens == 23
    assert cluster.cached_tokens(stream) == 23


def test_what_does_not_arrive_is_computed() -> None:
    cluster, _ = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.move(begun(cluster), ok=False)
    cluster.run()
    assert cluster.cached_tokens(stream) == 0
    assert cluster.core.counters.failed_transfers == 1


def test_a_source_that_is_lost_cuts_the_fetch_and_the_sequence_computes_its_prefix() -> None:
    cluster, busy = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.deliver(1)
    cluster.turn(1)
    cluster.lose(0)
    assert commands(cluster, 1, Cut) == [Cut(ZERO, 0)]
    assert cluster.sequence(stream).state is State.FETCHING, "its blocks may still be written to until the cut is answered"
    cluster.run()
    assert len(stream.tokens) == 2
    assert len(busy.tokens) == 12


def test_a_source_that_fails_and_is_lost_then_cuts_the_fetch_too() -> None:
    """As one does whose rank broke: its mover says that nothing was sent, then its leader goes."""
    cluster, busy = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.groups[ZERO].answer(begun(cluster), ok=False)
    cluster.arrive(0)
    cluster.lose(0)
    assert commands(cluster, 1, Cut) == [Cut(ZERO, 0)], "else the target would wait for it as long as for a slow one"
    cluster.run()
    assert len(stream.tokens) == 2
    assert len(busy.tokens) == 12


def test_a_target_that_fails_and_is_lost_then_cuts_the_fetch_too() -> None:
    cluster, _ = busy_holder()
    cluster.submit([*PREFIX, 0, 0], max_tokens=2)
    cluster.groups[ONE].answer(begun(cluster), ok=False)
    cluster.arrive(1)
    cluster.lose(1)
    assert commands(cluster, 0, Cut) == [Cut(ONE, 0)]
    cluster.run()
    assert cluster.core.groups[ZERO].sending == 0


def test_a_target_that_is_lost_takes_nothing_with_it() -> None:
    cluster, _ = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.lose(1)
    assert cluster.sequence(stream).state is State.WAITING
    assert cluster.core.groups[ZERO].sending == 5, "the source has not answered yet"
    cluster.run()
    assert cluster.core.groups[ZERO].sending == 0


def test_blocks_stay_held_on_both_sides_until_each_has_answered() -> None:
    cluster, busy = busy_holder()
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.abort(busy)
    cluster.abort(stream)
    assert cluster.held(0) == 5
    assert cluster.held(1) == 6
    for group in (0, 1):
        cluster.deliver(group)
        cluster.turn(group)
    cluster.move(cluster.moves()[0])
    cluster.arrive(1)
    assert (cluster.held(0), cluster.held(1)) == (5, 0)
    cluster.arrive(0)
    assert cluster.held(0) == 0
    assert cluster.core.counters.fetched_tokens == 20, "what arrived for nobody is cached all the same"


def test_an_answer_of_a_stale_epoch_or_of_nothing_changes_nothing() -> None:
    cluster, _ = busy_holder()
    cluster.submit([*PREFIX, 0, 0], max_tokens=2)
    for epoch, transfer in ((7, 0), (0, 99)):
        cluster.core.moved(ONE, Moved(epoch, transfer, True))
        cluster.settle()
    assert cluster.core.groups[ONE].receiving == 5
    cluster.run()


def test_groups_without_ports_or_with_other_ranks_do_not_exchange() -> None:
    cluster = Cluster((16, 16), max_num_seqs=1)
    cluster.submit([*PREFIX, 1], max_tokens=1)
    cluster.run()
    cluster.submit([*PREFIX, 0], max_tokens=12)
    stream = cluster.submit([*PREFIX, 0, 0], max_tokens=2)[0]
    cluster.run()
    assert cluster.core.counters.fetches == 0
    assert cluster.cached_tokens(stream) == 0


# ---- host memory


def test_what_was_evicted_comes_back_from_host_memory() -> None:
    cluster = Cluster((24,), host_blocks=32)
    first = cluster.submit([*PREFIX, 1], max_tokens=1)[0]
    cluster.run()
    assert cluster.core.counters.offloaded_tokens == 20
    assert cluster.core.table.pools[host_of(ZERO)].cached == 5
    cluster.submit([1] * 95, max_tokens=1)
    cluster.run()
    again = cluster.submit([*PREFIX, 1], max_tokens=1)[0]
    assert cluster.sequence(again).state is State.FETCHING
    assert commands(cluster, 0, Load)
    cluster.run()
    assert cluster.cached_tokens(again) == 20
    assert again.tokens == first.tokens
    assert (cluster.core.counters.loads, cluster.core.counters.loaded_tokens) == (1, 20)


def test_only_what_is_new_is_offloaded() -> None:
    cluster = Cluster((24,), host_blocks=32)
    for last in (0, 1):
        cluster.submit([*PREFIX, *[last] * 5], max_tokens=1)
        cluster.run()
    assert cluster.core.counters.offloaded_tokens == 20 + 4 + 4


def test_a_preemption_does_not_wait_for_an_offload() -> None:
    cluster = Cluster((6,), host_blocks=16, grant_ahead=1)
    cluster.submit(filled(0, 0), max_tokens=12)
    cluster.submit(filled(1), max_tokens=12)
    for _ in range(20):
        cluster.step()
        if cluster.core.counters.preemptions:
            break
    assert cluster.core.counters.preemptions == 1
    assert not commands(cluster, 0, Offload)
    cluster.run()


def test_host_memory_goes_with_its_group() -> None:
    cluster = Cluster((8,), host_blocks=16)
    cluster.submit([*PREFIX, 1], max_tokens=1)
    cluster.run()
    cluster.lose(0, returning=True)
    assert not cluster.core.table.pools
    cluster.bring_up(0)
    again = cluster.submit([*PREFIX, 1], max_tokens=1)[0]
    cluster.run()
    assert cluster.cached_tokens(again) == 0
