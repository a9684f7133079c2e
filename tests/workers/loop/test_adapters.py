"""Who has a slot for its adapter and who waits for one: the same on every rank, and nobody holds up others, or for ever."""

import math
import random
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from scheduler.protocol.leaders import Adapted, Adapts, Command, Drop, End, Grant, LeaseId, Moved, Refused, Report, Start
from scheduler.protocol.messages import Adapter
from tests.shared.simulated import SimulatedExecutor
from tests.workers.loop.test_batch import lease, start
from workers.loop.adapters import AdapterRead, GatheredReads, OnRead, Residency
from workers.loop.batch import NO_ADAPTER, ResidentBatch
from workers.loop.leader import follow, lead
from workers.loop.rank import Rank
from workers.loop.reports import Reporter

A, B, C = (Adapter(name, f"version of {name}", f"/adapters/{name}") for name in "abc")


class Shelf:
    """A store that reads when the test says so. asked: (load, slot, adapter)."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, Adapter]] = []
        self.reads: dict[int, OnRead] = {}

    def begin(self, load: int, slot: int, adapter: Adapter, read: OnRead) -> None:
        self.asked.append((load, slot, adapter))
        self.reads[load] = read

    def read(self, load: int, failure: str = "") -> None:
        self.reads.pop(load)(AdapterRead(load, failure))

    def close(self) -> None: ...


class Bench:
    """A residency alone. Rows are admitted as a batch would."""

    def __init__(self, slots: int) -> None:
        self.batch = ResidentBatch(8, 4, 64, 32)
        self.shelf = Shelf()
        self.residency = Residency(self.batch, slots, self.shelf)

    def admit(self, row: int, adapter: Adapter) -> None:
        self.batch.lease[row] = lease(1, row)
        self.residency.admit(row, adapter)

    def loaded(self, failure: str = "") -> None:
        """The last that was asked for."""
        self.residency.read(Adapted(self.shelf.asked[-1][0], failure))

    @property
    def names(self) -> list[str]:
        """Of what was asked for."""
        return [adapter.name for *_, adapter in self.shelf.asked]


def test_a_row_is_in_no_step_before_its_adapter_is_read() -> None:
    bench = Bench(2)
    bench.admit(0, A)
    assert (bench.batch.unready, bench.names) == ({0}, ["a"])
    bench.admit(1, A)
    bench.loaded()
    assert not bench.batch.unready
    assert bench.batch.adapter[0] == bench.batch.adapter[1] != NO_ADAPTER
    bench.admit(2, A)
    assert not bench.batch.unready, "it is resident"
    assert bench.names == ["a"], "it is read once"


def test_the_least_recently_used_leaves() -> None:
    bench = Bench(2)
    for row, adapter in ((0, A), (1, B)):
        bench.admit(row, adapter)
        bench.loaded()
    bench.residency.release(1)
    bench.residency.release(0)
    bench.admit(2, C)
    slots = {adapter.name: slot for _, slot, adapter in bench.shelf.asked}
    assert slots["c"] == slots["b"] != slots["a"]
    bench.loaded()
    bench.admit(3, A)
    assert bench.batch.unready == set(), "it has stayed"


def test_another_version_of_the_same_name_is_another_adapter() -> None:
    bench = Bench(2)
    bench.admit(0, A)
    bench.loaded()
    bench.admit(1, msgspec.structs.replace(A, version="another"))
    bench.loaded()
    assert bench.batch.adapter[0] != bench.batch.adapter[1]


def test_a_busy_adapter_does_not_keep_others_waiting_for_ever() -> None:
    """Newcomers of the busy one wait behind whoever waits; those who wait for the same come together."""
    bench = Bench(1)
    bench.admit(0, A)
    bench.loaded()
    bench.admit(1, B)
    bench.admit(2, A)
    bench.admit(3, B)
    assert bench.batch.unready == {1, 2, 3}
    bench.residency.release(0)
    bench.loaded()
    assert bench.batch.unready == {2}
    bench.residency.release(1)
    assert bench.names == ["a", "b"]
    bench.residency.release(3)
    bench.loaded()
    assert (bench.batch.unready, bench.names) == (set(), ["a", "b", "a"])


def test_who_leaves_before_its_turn_holds_up_nobody() -> None:
    bench = Bench(1)
    bench.admit(0, A)
    bench.loaded()
    bench.admit(1, B)
    bench.admit(2, A)
    bench.residency.release(1)
    assert not bench.batch.unready, "the other one's adapter is resident"


def test_a_slot_that_is_being_read_is_given_to_nobody_else() -> None:
    bench = Bench(1)
    bench.admit(0, A)
    bench.residency.release(0)
    bench.admit(1, B)
    assert bench.names == ["a"]
    bench.loaded()
    assert bench.names == ["a", "b"]


def test_an_adapter_that_cannot_be_read_is_said_of_its_leases_alone() -> None:
    bench = Bench(1)
    bench.admit(0, A)
    bench.admit(1, A)
    bench.admit(2, B)
    bench.loaded("no such file")
    [(leases, why)] = bench.residency.refusals()
    assert leases == (lease(1, 0), lease(1, 1))
    assert "'a'" in why
    assert "no such file" in why
    assert not bench.residency.refusals(), "once"
    assert bench.names == ["a", "b"], "the slot is free"
    assert bench.batch.unready == {0, 1, 2}
    bench.loaded()
    for row in (0, 1):
        bench.residency.release(row)
    assert not bench.batch.unready
    bench.admit(3, A)
    bench.residency.release(2)
    assert bench.names == ["a", "b", "a"], "it is tried again"


def test_who_has_waited_is_told_once_and_nobody_who_has_not() -> None:
    bench = Bench(1)
    bench.admit(0, A)
    assert bench.residency.waited() == ()
    bench.loaded()
    assert bench.residency.waited() == (lease(1, 0),)
    bench.admit(1, A)
    assert bench.residency.waited() == (), "it was resident"
    for row in (2, 3):
        bench.admit(row, B)
    bench.residency.release(3)
    bench.residency.give_way()
    bench.loaded()
    assert bench.residency.waited() == (lease(1, 2),)
    bench.residency.release(2)
    bench.loaded()
    assert not bench.batch.unready
    assert bench.residency.waited() == (), "they had begun before"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_whatever_comes_and_goes_nobody_is_forgotten(slots: int) -> None:
    for seed in range(60):
        chance, bench, rows = random.Random(seed), Bench(slots), dict[int, Adapter]()
        loading: list[int] = []

        def check() -> None:
            batch = bench.batch  # noqa: B023
            for row in range(8):
                assert (batch.adapter[row] == NO_ADAPTER) or row in rows  # noqa: B023
            ready = [row for row in rows if row not in batch.unready]  # noqa: B023
            for one in ready:
                for other in ready:
                    assert (batch.adapter[one] == batch.adapter[other]) == (rows[one] == rows[other])  # noqa: B023

        for _ in range(60):
            known = len(bench.shelf.asked)
            if rows and chance.random() < 0.4:
                row = chance.choice([*rows])
                del rows[row]
                bench.residency.release(row)
            elif len(rows) < 8:
                row = chance.choice([row for row in range(8) if row not in rows])
                rows[row] = chance.choice([A, B, C])
                bench.admit(row, rows[row])
            loading += [load for load, *_ in bench.shelf.asked[known:]]
            if loading and chance.random() < 0.5:
                known = len(bench.shelf.asked)
                bench.residency.read(Adapted(loading.pop(0)))
                loading += [load for load, *_ in bench.shelf.asked[known:]]
            check()
        for _ in range(200):
            known = len(bench.shelf.asked)
            if loading:
                bench.residency.read(Adapted(loading.pop(0)))
            ready = [row for row in rows if row not in bench.batch.unready]
            for row in ready:
                del rows[row]
                bench.residency.release(row)
            loading += [load for load, *_ in bench.shelf.asked[known:]]
        assert not rows, "each has had its turn"


# ---- in the loop


class Script:
    """A scheduler link whose turns are functions of what has been sent so far."""

    def __init__(self, *turns: list[Command]) -> None:
        self.turns = list(turns)
        self.sent: list[Report | Moved | Refused | Adapts] = []
        self.woken = 0

    def receive(self, *, wait_s: float) -> list[Command]:
        if self.turns:
            return self.turns.pop(0)
        assert wait_s < math.inf or self.woken, "an idle group would sleep for ever"
        self.woken -= wait_s == math.inf
        return []

    def send(self, message: Report | Moved | Refused | Adapts) -> None:
        self.sent.append(message)

    def wake(self) -> None:
        self.woken += 1


class Feed:
    """A peer feed and that peer's inbox. fed: called after each turn, with how many there were."""

    def __init__(self, fed: Callable[[int], None]) -> None:
        self.turns: list[tuple[list[Command], Sequence[int]]] = []
        self._fed = fed

    def send(self, commands: Sequence[Command], held: Sequence[int]) -> None:
        self.turns.append((list(commands), held))
        self._fed(len(self.turns))

    def receive(self) -> tuple[list[Command], Sequence[int]]:
        return self.turns.pop(0)


def adapted(name: LeaseId, adapter: Adapter, blocks: tuple[int, ...] = (0, 1), **fields: int) -> Start:
    return msgspec.structs.replace(start(name, blocks=blocks, **fields), adapter=adapter)  # type: ignore[arg-type]


def a_rank(depth: int, shelf: Shelf, on_read: OnRead) -> Rank:
    batch = ResidentBatch(3, 4, 64, 32)
    rank = Rank(batch, SimulatedExecutor(8, 4, 3, 5), depth)
    rank.adapters = Residency(batch, 1, shelf, on_read)
    return rank


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("failure", ["", "it has gone"])
def test_ranks_make_the_same_turns_while_one_reads_and_others_go_on(depth: int, failure: str) -> None:
    shelf, reads = Shelf(), GatheredReads(2)
    leader = a_rank(depth, shelf, reads.add)
    waits = adapted(lease(1, 0), A, max_tokens=2)
    script = Script([waits, start(lease(2, 1), blocks=(2, 3), max_tokens=4)], *[[] for _ in range(12)],
                    [Drop(lease(1, 0)), End("done")])  # fmt: skip

    def fed(turns: int) -> None:
        if turns == 3:
            shelf.read(1)
        elif turns == 5:
            reads.add(AdapterRead(1, failure))  # as a peer says it

    feed = Feed(fed)
    assert lead(leader, script, feed, Reporter(7), reads) == "done"
    told = [command for commands, _ in feed.turns for command in commands if isinstance(command, Adapted)]
    assert told == [Adapted(1, failure)]
    refused = [message for message in script.sent if isinstance(message, Refused)]
    waited = [message for message in script.sent if isinstance(message, Adapts)]
    assert waited == ([] if failure else [Adapts(7, (lease(1, 0),))])
    reports = [message for message in script.sent if isinstance(message, Report)]
    leases = [name for report in reports for name in np.frombuffer(report.leases, np.int64).tolist()]
    assert lease(2, 1) in leases, "who has no adapter goes on meanwhile"
    if failure:
        assert [(message.epoch, message.leases) for message in refused] == [(7, (lease(1, 0),))]
        assert lease(1, 0) not in leases
    else:
        assert not refused
        assert leases.index(lease(1, 0)) > leases.index(lease(2, 1))
    assert all(report.applied <= 4 for report in reports), "what the leader says itself is no part of the log"


def test_a_peer_follows_what_the_leader_says_of_adapters() -> None:
    shelves, reads = [Shelf(), Shelf()], GatheredReads(1)
    leader, peer = a_rank(0, shelves[0], reads.add), a_rank(0, shelves[1], lambda _: None)
    script = Script([adapted(lease(1, 0), A, max_tokens=2)], [], [adapted(lease(2, 1), B, (2, 3), max_tokens=2)],
                    *[[] for _ in range(4)], [End("done")])  # fmt: skip

    def fed(_: int) -> None:
        for load in [*shelves[0].reads]:
            shelves[0].read(load)

    feed = Feed(fed)
    assert lead(leader, script, feed, Reporter(0), reads) == "done"
    assert follow(peer, feed) == "done"
    assert shelves[0].asked == shelves[1].asked
    assert [adapter.name for *_, adapter in shelves[1].asked] == ["a", "b"]
    assert (leader.batch.adapter == peer.batch.adapter).all()
    assert (leader.batch.known == peer.batch.known).all()


def test_who_has_the_slot_and_no_block_makes_room_for_who_has_the_blocks() -> None:
    """Otherwise each would wait for the other: the second has what the first needs, and may be served before it."""
    shelf, reads = Shelf(), GatheredReads(1)
    rank = a_rank(0, shelf, reads.add)
    rank.turn([adapted(lease(1, 0), A, (0, 1), max_tokens=8)])  # 6 tokens in 8 slots: it runs dry after 3 more
    shelf.read(1)
    rank.turn(reads.take())
    rank.turn([adapted(lease(2, 1), B, (2, 3), max_tokens=2)])
    for _ in range(4):
        rank.turn([])
    assert [adapter.name for *_, adapter in shelf.asked] == ["a", "b"]
    assert rank.batch.unready == {0, 1}
    shelf.read(2)
    results = [rank.turn(reads.take()), *(rank.turn([]) for _ in range(3))]
    assert [result.finished for result in results if result is not None][-1], "the second one ends"
    assert [adapter.name for *_, adapter in shelf.asked] == ["a", "b", "a"], "then it is the first one's turn again"
    shelf.read(3)
    rank.turn([*reads.take(), Grant(lease(1, 0), (4, 5))])
    assert rank.batch.known[0] > 9
