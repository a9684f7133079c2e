"""KV that was moved says what computed KV says: real model, from group to group and through host memory."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from scheduler.protocol.leaders import Drop, Load, Movement, Offload, Receive, Send
from tests.shared.checkpoints import make_checkpoint
from tests.workers.loop.test_batch import lease
from tests.workers.moving.movers import TOKEN, Said, ids
from tests.workers.parallel.real_groups import PROMPT, Group, start
from workers.loop.leader import Gathered
from workers.moving.exchange import Exchange, LocalTransport
from workers.moving.mover import BlockMover, Transport
from workers.moving.transport import open_transport

Make = Callable[..., "Movable"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


class Movable:
    """A group whose ranks have movers. exchange: where they meet others; None: by sockets."""

    def __init__(self, number: int, group: Group, exchange: Exchange | None) -> None:
        self.number = number
        self.group = group
        self.said = Said()
        gathered = Gathered(len(group.ranks))
        gathered.send = self.said.add
        transports = []
        for rank, built in enumerate(group.built):
            transport: Transport
            if exchange is not None:
                transport = LocalTransport(exchange, group=number, epoch=0, rank=rank)
            else:
                transport = open_transport(built.pool.device, host="127.0.0.1", token=TOKEN, group=number, epoch=0, rank=rank)
            transports.append(transport)
            mover = BlockMover(built.pool, built.host, transport, gathered.add, rank=rank, epoch=0)
            built.rank.mover = mover
        self.ports = tuple(transport.address for transport in transports)

    def move(self, movement: Movement) -> None:
        self.group.turn(movement)


@pytest.fixture
def make(checkpoint: Path) -> Iterator[Make]:
    made: list[Group] = []

    def movable(number: int, size: int, depth: int, exchange: Exchange | None = None, **options: Any) -> Movable:
        made.append(Group(checkpoint, size, "float32", depth, **options))
        return Movable(number, made[-1], exchange)

    yield movable
    for one in made:
        one.close()


WAYS = [*product(["local", "socket"], [0, 1], [1, 2], ["auto"]), ("socket", 1, 2, "fp8")]


@pytest.mark.parametrize(("kind", "depth", "size", "kv_dtype"), WAYS)
def test_a_prefix_from_another_group(make: Make, kind: str, depth: int, size: int, kv_dtype: str) -> None:
    """Fetched while the sender decodes on, and the receiver runs something else."""
    exchange = Exchange() if kind == "local" else None
    here, there = (make(number, size, depth, exchange, kv_dtype=kv_dtype) for number in (1, 2))
    undisturbed = here.group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    here.group.turn(start(lease(2, 0), (5, 6, 7, 8, 9), tokens=PROMPT[::-1]))
    there.group.turn(start(lease(1, 0), (0, 1, 2, 3, 4), tokens=PROMPT[::-1]))
    here.move(Send(1, ids([0, 1]), 2, 0))
    there.move(Receive(1, ids([11, 7]), 1, 0, here.ports))
    for side in (here, there):
        for _ in range(3):
            side.group.turn()
        moved = side.said.wait(1)
        assert moved.ok, moved.message
        assert moved.bytes == 2 * sum(built.pool.layout.block_bytes for built in side.group.built)
    there.group.turn(Drop(lease(1, 0)))
    name = lease(2, 1)
    assert there.group.output(name, start(name, (11, 7, 6, 8, 9), cached=32)) == undisturbed


@pytest.mark.parametrize("size", [1, 2])
def test_a_prefix_that_was_kept_in_host_memory(make: Make, size: int) -> None:
    one = make(1, size, 1, Exchange(), host_kv_memory=1 << 20)
    assert all(built.host_sizes.blocks == one.group.built[0].host_sizes.blocks > 8 for built in one.group.built)
    undisturbed = one.group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    one.move(Offload(1, ids([0, 1]), ids([6, 3])))
    assert one.said.wait(1).ok
    one.group.output(lease(2, 0), start(lease(2, 0), (0, 1, 2, 3, 4), tokens=PROMPT[::-1]))  # overwrites them
    one.move(Load(2, ids([6, 3]), ids([10, 11])))
    assert one.said.wait(2).ok
    name = lease(3, 0)
    assert one.group.output(name, start(name, (10, 11, 2, 3, 4), cached=32)) == undisturbed
