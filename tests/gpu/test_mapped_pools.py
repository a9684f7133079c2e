"""Two processes with pools on one GPU: the receiver reads the sender's, and outlives it whatever it was about to read."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest
import torch

from kvcache.layout import BlockLayout
from scheduler.protocol.leaders import Receive, Send
from tests.gpu.works import GPU
from tests.workers.moving.movers import PATIENCE_S, TOKEN, Said, Site, ids, random_pool
from workers.moving import mapped
from workers.moving.lane import LaneAbort
from workers.moving.mapped import DeviceMemory, MappedWire
from workers.moving.mover import BlockMover
from workers.moving.pairs import PairWire
from workers.moving.side import copy_rows
from workers.moving.transport import SocketTransport

pytestmark = GPU

LAYOUT = BlockLayout(block_size=256, layers=28, kv_heads=8, head_dim=128, dtype="bfloat16")  # 29 MB a block
BLOCKS, SENDER = 24, 1
AGAIN = 400
"""Times that a transfer is copied where a sender goes in its midst: 0.3 TB, read and written, on one GPU."""


def site(group: int) -> Site:
    pool = random_pool(BLOCKS, seed=group, layout=LAYOUT, device="cuda")
    wire = MappedWire(PairWire(pool.device), DeviceMemory(pool.device))
    transport = SocketTransport(wire, host="127.0.0.1", token=TOKEN, group=group, epoch=0, rank=0)
    said = Said()
    return Site(group, 0, pool, BlockMover(pool, None, transport, said.add, rank=0, epoch=0), transport, said)


def serve(group: int, pipe: Pipe) -> None:
    """A sender: takes movements until None comes, and says when each is over."""
    here = site(group)
    assert here.transport is not None
    pipe.send((here.transport.address, here.rows[:8]))
    while (movement := pipe.recv()) is not None:
        here.take(movement)
        pipe.send(here.said.wait(movement.transfer).message)
    here.mover.close()


@pytest.fixture
def sender() -> Iterator[Any]:
    """Starts one of a group: its process and the pipe to it."""
    context, processes = multiprocessing.get_context("spawn"), []

    def start(group: int) -> tuple[Any, Pipe]:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(group, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def receiver() -> Iterator[Site]:
    one = site(2)
    yield one
    one.mover.close()


def fetch(receiver: Site, pipe: Pipe, transfer: int, group: int, address: str, blocks: list[int], to: list[int]) -> None:
    pipe.send(Send(transfer, ids(blocks), receiver.group, 0))
    receiver.take(Receive(transfer, ids(to), group, 0, (address,)))


def test_blocks_of_another_process_are_read_in_its_pool(sender: Any, receiver: Site) -> None:
    """NCCL, which refuses two ranks on one GPU, has no part in it."""
    _, pipe = sender(SENDER)
    address, theirs = pipe.recv()
    before = receiver.rows
    for transfer, (blocks, to) in enumerate([([1, 2, 3, 7], [4, 5, 6, 0]), ([5], [9]), ([0, 2], [2, 1])], 1):
        fetch(receiver, pipe, transfer, SENDER, address, blocks, to)
        assert receiver.said.wait(transfer).ok
        assert pipe.recv() == ""
        before[to] = theirs[blocks]
    assert torch.equal(receiver.rows, before)
    pipe.send(None)


def test_a_sender_that_is_killed_while_it_is_read_takes_nothing_along(
    sender: Any, receiver: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its receiver's device goes on, its memory comes back, and the next sender is read as it was."""
    torch.cuda.empty_cache()
    alone = torch.cuda.mem_get_info()[0]
    process, pipe = sender(SENDER)
    address, _ = pipe.recv()
    began = threading.Event()

    def long(source: torch.Tensor, rows: list[int], target: torch.Tensor, targets: list[int], abort: LaneAbort) -> None:
        for turn in range(AGAIN):
            copy_rows(source, rows, target, targets, abort)
            if turn == 1:
                began.set()

    monkeypatch.setattr(mapped, "copy_rows", long)
    fetch(receiver, pipe, 1, SENDER, address, list(range(BLOCKS)), list(range(BLOCKS)))
    assert began.wait(PATIENCE_S)
    begun_s = time.monotonic()
    os.kill(process.pid, 9)
    moved = receiver.said.wait(1)
    print(f"told {1e3 * (time.monotonic() - begun_s):.0f} ms after it was killed: {moved.message}")
    assert not moved.ok
    torch.cuda.synchronize()
    process.join()
    with_it, deadline = torch.cuda.mem_get_info()[0], time.monotonic() + PATIENCE_S
    while torch.cuda.mem_get_info()[0] < alone - LAYOUT.block_bytes and time.monotonic() < deadline:
        time.sleep(0.05)
    free = torch.cuda.mem_get_info()[0]
    print(f"free: {alone / 1e9:.2f} GB before it came, {with_it / 1e9:.2f} as it went, {free / 1e9:.2f} in the end")
    assert free >= alone - LAYOUT.block_bytes
    monkeypatch.undo()
    _, pipe = sender(3)
    address, theirs = pipe.recv()
    fetch(receiver, pipe, 2, 3, address, [5, 6], [1, 3])
    assert receiver.said.wait(2).ok
    assert torch.equal(receiver.rows[[1, 3]], theirs[[5, 6]])
