"""Groups that outlive their scheduler: what they say of their pools is what the next one knows of them, and is all true."""

import numpy as np
import pytest

from kvcache.ids import BlockId, GroupId, host_of
from kvcache.standing import Standing
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Copy
from scheduler.state.resident import ProtocolError
from tests.scheduler.cluster import Cluster, filled

HERE = GroupId(0)


def known(core: SchedulerCore, group: GroupId = HERE) -> set[tuple[str, bytes]]:
    """What the core knows of a group's pool: each published block by its salt and all tokens up to its end."""
    index, found = core.table.index, set()
    for node in index.blocks[group]:
        tokens, at = b"", node
        while index.parents[at]:
            tokens, at = index.contents[at] + tokens, index.parents[at]
        found.add((index.salts[at], tokens))
    return found


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("hash_stride", [0, 2])
def test_the_next_scheduler_knows_what_the_last_one_knew(depth: int, hash_stride: int) -> None:
    """Of a group at rest: prompts and outputs, whole blocks and parts, of all tenants, computed, hit, adopted and copied."""
    cluster = Cluster((24,), depth=depth, hash_stride=hash_stride, max_num_batched_tokens=7)
    for salt in ("", "tenant"):
        cluster.submit(filled(0, 1), salt=salt, n=2)
        cluster.submit([*filled(0, 1), 0, 0, 0], salt=salt)
        cluster.run()
        cluster.submit([*filled(0, 1), 0, 0, 1], salt=salt)
        cluster.run()
    before = known(cluster.core)
    cluster.lose_scheduler([HERE])
    after = known(cluster.core)
    assert after <= before
    # Of two ends of which one begins with the other, the longer one serves for both; the last core has seen them come in time.
    assert all(any(it[0] == salt and it[1].startswith(tokens) for it in after) for salt, tokens in before)
    assert len(after) > 6
    assert hash_stride or after == before
    (stream,) = cluster.submit(filled(0, 1, 1), salt="tenant")
    cluster.run()
    assert cluster.cached_tokens(stream) >= 8


def test_the_next_scheduler_knows_what_the_last_one_knew_of_host_memory() -> None:
    """Also of what is in the pool no more, and of what has come from there and gone back."""
    cluster = Cluster((12,), host_blocks=40)
    prompts = [[*filled(first, second, third), 0] for first in (0, 1) for second in (0, 1) for third in (0, 1)]
    for prompt in [*prompts, *prompts]:
        cluster.submit(prompt, max_tokens=2)
        cluster.run()
    assert cluster.core.counters.loaded_tokens
    before, host = known(cluster.core), known(cluster.core, host_of(HERE))
    assert len(host) > len(before)
    cluster.lose_scheduler([HERE])
    assert known(cluster.core) == before
    assert known(cluster.core, host_of(HERE)) == host
    (stream,) = cluster.submit(prompts[0], max_tokens=1)
    cluster.run()
    assert cluster.cached_tokens(stream) == 12
    assert cluster.core.counters.loaded_tokens


def test_what_is_under_way_stays_as_far_as_it_is_computed() -> None:
    cluster = Cluster((8,), max_num_batched_tokens=4)
    (lost,) = cluster.submit(filled(0, 1, 1), max_tokens=8)
    cluster.step(times=4)
    tokens = lost.tokens
    assert tokens
    cluster.lose_scheduler([HERE])
    (again,) = cluster.submit([*filled(0, 1, 1), *tokens], max_tokens=8)
    cluster.run()
    assert cluster.cached_tokens(again) == 12


def test_the_target_of_a_copy_whose_start_never_came_is_not_told() -> None:
    cluster = Cluster((6,), hash_stride=2)
    for salt in ("a", "b"):
        cluster.submit([*filled(1), 1, 1, 1], max_tokens=1, salt=salt)
        cluster.run()
    cluster.submit([*filled(0), 0, 0, 0], max_tokens=4)
    cluster.step(times=1)
    cluster.submit([*filled(0), 0, 0, 1], max_tokens=1)  # a part of what runs goes to a block of one that has ended
    group = cluster.groups[HERE]
    assert isinstance(group.down[0], Copy)
    group.deliver(1)
    group.turn()
    cluster.lose_scheduler([HERE])  # which compares what is told with what stands there
    assert ("b", np.array(filled(1), np.int32).tobytes()) in known(cluster.core)


def test_the_last_used_is_evicted_last_and_leaves_before_parents() -> None:
    cluster = Cluster((6,))
    prompts = [filled(0, 0, value) for value in (0, 1)]
    for prompt in (*prompts, prompts[0]):
        cluster.submit(prompt, max_tokens=1)
        cluster.run()
    cluster.lose_scheduler([HERE])
    assert len(known(cluster.core)) == 4
    cluster.submit([1, 0, 1, 0, 1, 0, 1, 0, 1], max_tokens=1)  # takes the two that are free, and one that is cached
    cluster.run()
    (first,) = cluster.submit([*prompts[0], 1], max_tokens=1)
    cluster.run()
    assert cluster.cached_tokens(first) == 12
    (second,) = cluster.submit([*prompts[1], 1], max_tokens=1)
    cluster.run()
    assert cluster.cached_tokens(second) == 8


def test_a_group_that_has_been_started_anew_is_empty() -> None:
    cluster = Cluster((8, 8))
    cluster.submit(filled(0, 1, 1))
    cluster.run()
    cluster.lose_scheduler([])
    for group in range(2):
        cluster.bring_up(group)
    assert not known(cluster.core)


def test_without_prefix_caching_nothing_is_taken_in() -> None:
    cluster = Cluster((8,), enable_prefix_caching=False)
    cluster.submit(filled(0, 1, 1))
    cluster.run()
    assert cluster.lose_scheduler([HERE]) > 0
    assert not known(cluster.core)


FULL = np.zeros(4, np.int32).tobytes()
NONSENSE = [
    [Standing(BlockId(9), None, "", FULL)],
    [Standing(BlockId(-1), None, "", FULL)],
    [Standing(BlockId(1), None, "", FULL), Standing(BlockId(1), None, "other", FULL)],
    [Standing(BlockId(1), None, "", FULL[:8]), Standing(BlockId(1), None, "other", FULL[:8])],
    [Standing(BlockId(1), BlockId(2), "", FULL)],
    [Standing(BlockId(1), BlockId(1), "", FULL)],
    [Standing(BlockId(1), None, "", FULL[:8]), Standing(BlockId(2), BlockId(1), "", FULL)],
    [Standing(BlockId(1), None, "", b"")],
    [Standing(BlockId(1), None, "", FULL[:7])],
    [Standing(BlockId(1), None, "", FULL + FULL)],
]


@pytest.mark.parametrize("standing", NONSENSE)
def test_a_group_that_says_what_cannot_be_is_not_taken_in(standing: list[Standing]) -> None:
    cluster = Cluster((8, 8))
    cluster.lose(0)
    with pytest.raises(ProtocolError, match="group 0 says of its pool what cannot be"):
        cluster.core.group_up(HERE, 7, 8, 4, standing=standing)
    cluster.settle()
    with pytest.raises(ProtocolError, match="group 0 says of its pool what cannot be"):
        cluster.core.group_up(HERE, 8, 8, 4, host_blocks=8, host_standing=standing)
    cluster.settle()
    assert list(cluster.core.groups) == [1]
    cluster.core.group_up(HERE, 9, 8, 4)
