"""Blocks that the receiver reads in the sender's memory; where it cannot; and a sender that goes meanwhile."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.workers.moving.movers import PATIENCE_S, SameProcess, Site, World
from workers.moving import mapped
from workers.moving.connection import MAPPED, Connection, Mapped, PairOffer, Readable
from workers.moving.lane import LaneAbort
from workers.moving.mapped import SAMPLE_BYTES
from workers.moving.side import copy_rows


@pytest.fixture
def world() -> Iterator[World]:
    one = World("mapped")
    yield one
    one.close()


def move(here: Site, there: Site, transfer: int, blocks: list[int], to: list[int]) -> None:
    wanted = here.rows[blocks]
    here.send(transfer, there, blocks)
    there.receive(transfer, here, to)
    assert there.said.wait(transfer).ok
    assert here.said.wait(transfer).ok
    assert torch.equal(there.rows[to], wanted)


def test_a_pool_is_mapped_once_and_let_go_with_its_group(world: World) -> None:
    memory = SameProcess()
    here, there = world.site(1), world.site(2, memory=memory)
    move(here, there, 1, [3, 4, 9], [0, 1, 7])
    move(here, there, 2, [5], [2])
    assert memory.asked == 1
    here.mover.enter(1)
    here.epoch = 1
    move(here, there, 3, [6], [8])
    assert memory.asked == 2


@pytest.mark.parametrize("fault", ["broken", "wrong"])
def test_where_it_cannot_be_read_the_blocks_come_by_a_communicator_all_the_same(world: World, fault: str) -> None:
    """It is tried once."""
    memory = SameProcess(broken=fault == "broken", wrong=fault == "wrong")
    here, there = world.site(1), world.site(2, memory=memory)
    move(here, there, 1, [3, 4], [0, 7])
    move(here, there, 2, [5], [2])
    assert memory.asked == 1


def test_another_host_s_memory_is_not_asked_for(world: World) -> None:
    memory = SameProcess("there")
    here, there = world.site(1), world.site(2, memory=memory)
    move(here, there, 1, [3, 4], [0, 7])
    assert memory.asked == 0


def test_a_sender_that_goes_while_its_blocks_are_read_spoils_the_transfer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks may be granted again once it has said that the transfer failed. The next one is as good as the first."""
    began, go_on = threading.Event(), threading.Event()

    def slow(source: torch.Tensor, rows: list[int], target: torch.Tensor, targets: list[int], abort: LaneAbort) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        copy_rows(source, rows, target, targets, abort)

    monkeypatch.setattr(mapped, "copy_rows", slow)
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    there.receive(1, here, [20])
    assert began.wait(PATIENCE_S)
    here.mover.enter(1)
    assert not here.said.wait(1).ok
    go_on.set()
    moved = there.said.wait(1)
    assert (moved.ok, moved.message) == (False, "the other side has gone")
    here.epoch = 1
    move(here, there, 2, [3], [4])


@pytest.mark.parametrize("blocks", [[40], [-1], [1, 2]], ids=["beyond", "before", "too many"])
def test_a_sender_that_names_blocks_that_are_not_there_is_not_believed(world: World, blocks: list[int]) -> None:
    here, there = world.site(1), world.site(2)
    shared = SameProcess().share(here.pool)
    raw = here.pool.raw

    class Lying:
        """A wire that agrees as it should and then names other blocks."""

        def agree(self, *_: object) -> int:
            return MAPPED

        def send(self, connection: Connection, *_: object) -> None:
            first = raw[blocks[0] % len(raw), :SAMPLE_BYTES].numpy().tobytes()
            connection.send(Readable(shared, np.array(blocks, np.int32).tobytes(), first))
            if not connection.receive(Mapped).ok:
                connection.send(PairOffer(0))

        def close(self) -> None: ...

    assert here.transport is not None
    here.transport._wire = Lying()  # type: ignore[attr-defined]
    before = there.rows
    here.send(1, there, [5])
    there.receive(1, here, [6])
    assert not there.said.wait(1).ok
    assert torch.equal(there.rows, before)


def test_rows_that_follow_one_another_on_both_sides_are_one_copy() -> None:
    from workers.moving.side import _stretches

    assert list(_stretches([3, 4, 5, 9, 10, 2], [0, 1, 2, 3, 4, 7])) == [(3, 0, 3), (9, 3, 2), (2, 7, 1)]
    assert list(_stretches([], [])) == []
    assert len(list(_stretches(range(4), range(4)))) == 1
