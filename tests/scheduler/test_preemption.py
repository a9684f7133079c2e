"""Too little memory: who gives way, who waits, and that nothing emitted is lost."""

import pytest

from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler import leases
from scheduler.leases import find_victim
from scheduler.protocol.leaders import Start
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State
from tests.scheduler.cluster import Cluster, filled

HERE = GroupId(0)


def test_the_victim_is_always_younger_and_the_oldest_always_progresses(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, int]] = []

    def watch(table: BlockTable, group: ResidentGroup, needy: Sequence) -> Sequence | None:
        victim = find_victim(table, group, needy)
        if victim is not None:
            chosen.append((needy.number, victim.number))
        return victim

    monkeypatch.setattr(leases, "find_victim", watch)
    cluster = Cluster((6,))
    streams = [cluster.submit([token, token], max_tokens=20)[0] for token in (0, 1, 0, 1)]
    done = 0
    while cluster.core.sequences:
        oldest = min(cluster.core.sequences.values())
        length = len(streams[oldest.number].tokens)
        cluster.step()
        assert len(streams[oldest.number].tokens) == length + 1
        done += 1
    assert chosen
    assert all(victim > needy for needy, victim in chosen)
    assert done <= 4 * 20 + 4
    cluster.run()


def test_whoever_others_keep_the_blocks_of_gives_way_first() -> None:
    cluster = Cluster((24, 24), max_num_seqs=8)
    core = cluster.core
    for other in (GroupId(1), HERE):  # both get the same two blocks
        core.groups[other].set_draining(True)
        cluster.submit([*filled(0, 1), 1], max_tokens=1)
        cluster.run()
        core.groups[other].set_draining(False)
    core.groups[GroupId(1)].set_draining(True)
    needy = cluster.submit([1], max_tokens=8)[0]
    known = cluster.submit([*filled(0, 1), 0], max_tokens=8)[0]
    alone = [cluster.submit([*filled(1, 0), 0], max_tokens=8, salt=salt)[0] for salt in ("one", "other")]
    cluster.step(times=2)
    group = core.groups[HERE]
    assert find_victim(core.table, group, cluster.sequence(needy)) is cluster.sequence(known), "the other group has its blocks"
    cluster.lose(1)
    assert find_victim(core.table, group, cluster.sequence(needy)) is cluster.sequence(alone[1]), "now equal: the youngest"
    assert find_victim(core.table, group, cluster.sequence(alone[0])) is cluster.sequence(alone[1])
    assert find_victim(core.table, group, cluster.sequence(alone[1])) is None
    cluster.run()


def test_blocks_shared_with_the_others_of_the_group_are_neither_lost_nor_freed() -> None:
    cluster = Cluster((24,), max_num_seqs=8)
    cluster.submit([*filled(0, 1), 1], max_tokens=1)
    cluster.run()
    needy = cluster.submit([*filled(0, 1), 1], max_tokens=8)[0]
    sharing = cluster.submit([*filled(0, 1), 0], max_tokens=8)[0]  # one private block
    cluster.step()
    alone = cluster.submit([*filled(1, 1), 0], max_tokens=8)[0]  # three
    group, core = cluster.core.groups[HERE], cluster.core
    first = cluster.sequence(needy)
    assert find_victim(core.table, group, first) is cluster.sequence(alone), "it has computed nothing yet"
    cluster.step(times=2)
    assert find_victim(core.table, group, first) is cluster.sequence(sharing), "its one block is less full than those three"
    cluster.run()


def test_a_preempted_sequence_hits_its_own_blocks_when_it_starts_again() -> None:
    cluster = Cluster((8,))
    old = cluster.submit([0], max_tokens=23)[0]  # at most 6 blocks
    young = cluster.submit([1], max_tokens=18)[0]
    while not cluster.sequence(young).preemptions:
        cluster.step()
    emitted, told = cluster.sequence(young).committed, len(young.tokens)
    assert emitted == 1 + told
    cluster.deliver()
    while cluster.sequence(young).state is not State.RUNNING:
        cluster.step()
    start = next(command for command in [*cluster.groups[HERE].down] if isinstance(command, Start))
    assert start.cached_tokens >= 4, "what old did not take is still there"
    assert start.prompt_tokens == 1, "penalties and limits go on counting from the prompt"
    assert start.max_tokens == 18
    assert len(start.tokens) == 4 * emitted
    cluster.run()
    assert young.finished is not None
    assert young.finished.cached_tokens == 0, "what counts is the first start"
    assert old.finished is not None


def test_a_sequence_without_a_grant_sits_out_and_is_served_first() -> None:
    cluster = Cluster((5,), grant_ahead=1)
    old = cluster.submit([0], max_tokens=16)[0]
    young = cluster.submit([1], max_tokens=16)[0]
    cluster.step(times=2)
    group = cluster.core.groups[HERE]
    while not group.starved:
        cluster.step()
    assert group.starved == [cluster.sequence(young)]
    before = len(young.tokens)
    batch = cluster.groups[HERE].rank.batch
    row = cluster.sequence(young).row
    for _ in range(3):
        if not group.starved:
            break
        cluster.step()  # `SimulatedGroup.turn` checks that it writes to no slot that it was not granted
        assert batch.computed[row] <= batch.granted[row]
    assert len(young.tokens) <= before + 3
    refused = cluster.submit([1, 1], max_tokens=2)[0]
    if group.starved:
        assert cluster.sequence(refused).state is State.WAITING
    cluster.run()
    assert (len(old.tokens), len(young.tokens)) == (16, 16)


def test_nothing_is_preempted_for_one_that_only_waits() -> None:
    cluster = Cluster((4,))
    runs = cluster.submit(filled(0, 1), max_tokens=8)[0]
    waits = cluster.submit(filled(1, 1, 1), max_tokens=2)[0]
    while runs.finished is None:
        assert cluster.sequence(waits).state is State.WAITING
        cluster.step()
    cluster.run()
    assert cluster.core.counters.preemptions == 0


@pytest.mark.few
@pytest.mark.parametrize(("depth", "steps"), [(0, 1), (1, 1), (1, 3)])
@pytest.mark.parametrize("pool", [6, 7, 8])
def test_every_token_is_right_under_pressure(pool: int, depth: int, steps: int) -> None:
    cluster = Cluster((pool, pool), depth=depth, steps=steps, max_num_batched_tokens=5, grant_ahead=1)
    for number in range(12):
        cluster.submit(filled(0) if number % 2 else [1] * (number % 3 + 1), max_tokens=16, n=1 + number % 2)
    cluster.run()
    assert cluster.core.counters.output_tokens == 18 * 16
    assert cluster.core.counters.preemptions > 0
