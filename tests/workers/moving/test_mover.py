"""Blocks between groups and to host memory: every byte where it belongs, every failure said, no thread left behind."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from scheduler.protocol.leaders import Cut, Load, Offload, Send
from tests.workers.moving.movers import BLOCKS, KINDS, LAYOUT, NCCL, PATIENCE_S, Said, World, ids, random_pool
from workers.moving import exchange, mover, side
from workers.moving.lane import LaneAbort, TransferFailed
from workers.moving.mover import BlockMover

Make = Callable[..., World]


@pytest.fixture
def make() -> Iterator[Make]:
    worlds: list[World] = []
    before = set(threading.enumerate())

    def world(kind: str, timeout_s: float = PATIENCE_S) -> World:
        worlds.append(World(kind, timeout_s))
        return worlds[-1]

    yield world
    for one in worlds:
        one.close()
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("manta-")]
    assert not left, f"threads are left: {left}"


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_every_byte_arrives_and_nothing_else_changes(make: Make, kind: str) -> None:
    world = make(kind)
    here, there = world.site(1), world.site(2)
    expected, before = there.rows, here.rows
    sources, targets = [7, 8, 9, 3, 30, 0, 39, 12], [5, 1, 2, 3, 17, 18, 19, 38]
    expected[targets] = before[sources]
    here.send(4, there, sources)
    there.receive(4, here, targets)
    for site in (here, there):
        moved = site.said.wait(4)
        assert (moved.ok, moved.message, moved.bytes) == (True, "", len(sources) * LAYOUT.block_bytes)
        assert moved.elapsed_s > 0.0
    assert torch.equal(there.rows, expected)
    assert torch.equal(here.rows, before)


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_in_all_directions(make: Make, kind: str) -> None:
    """Three groups, each sends to and receives from both others, while they do; commands of a pair in the same order."""
    world = make(kind)
    sites = [world.site(group) for group in range(3)]
    random = np.random.default_rng(3)
    expected = [site.pool.raw.clone() for site in sites]
    commands = []
    for transfer in range(30):
        sender, receiver = random.choice(3, 2, replace=False).tolist()
        count = int(random.integers(1, 5))
        sources = random.choice(BLOCKS // 2, count, replace=False).tolist()  # the lower half is read, the upper written
        targets = [BLOCKS // 2 + at for at in random.choice(BLOCKS // 2, count, replace=False).tolist()]
        commands.append((transfer, sender, receiver, sources, targets))
    free: dict[int, set[int]] = {site: set() for site in range(3)}
    kept = []
    for transfer, sender, receiver, sources, targets in commands:
        if free[receiver].isdisjoint(targets):  # transfers of two pairs may end in any order
            free[receiver].update(targets)
            kept.append((transfer, sender, receiver, sources, targets))
            expected[receiver][targets] = sites[sender].pool.raw[sources]
    assert len(kept) > 10
    for transfer, sender, receiver, sources, _ in kept:
        sites[sender].send(transfer, sites[receiver], sources)
    for transfer, sender, receiver, _, targets in kept:
        sites[receiver].receive(transfer, sites[sender], targets)
    for transfer, sender, receiver, *_ in kept:
        assert sites[sender].said.wait(transfer).ok
        assert sites[receiver].said.wait(transfer).ok
    for site, rows in zip(sites, expected, strict=True):
        assert torch.equal(site.pool.raw, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_fails_what_waits_for_that_epoch_and_nothing_else(make: Make, kind: str) -> None:
    world = make(kind)
    here, there, other = world.site(1), world.site(2), world.site(3)
    here.send(1, there, [0])
    here.send(2, there, [1])
    here.send(3, other, [2])
    other.send(4, here, [3])
    here.take(Cut(2, 0))
    for transfer in (1, 2):
        moved = here.said.wait(transfer)
        assert not moved.ok
        assert "epoch 0 of group 2 has gone" in moved.message
    here.send(5, there, [0])  # it is said of later ones too
    assert not here.said.wait(5).ok
    other.receive(3, here, [20])
    here.receive(4, other, [21])
    assert other.said.wait(3).ok
    assert here.said.wait(4).ok


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_a_newer_epoch_after_a_cut(make: Make, kind: str) -> None:
    world = make(kind)
    here, former = world.site(1), world.site(2)
    here.send(1, former, [0])
    former.receive(1, here, [20])
    assert here.said.wait(1).ok
    here.send(2, former, [0])
    former.mover.close()
    here.take(Cut(2, 0))
    assert not here.said.wait(2).ok
    again = world.site(2, epoch=1)
    here.send(3, again, [4, 5])
    again.receive(3, here, [6, 7])
    assert again.said.wait(3).ok
    assert torch.equal(again.rows[6:8], here.rows[4:6])


def test_whoever_comes_after_a_lane_has_its_place_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the other groups begin anew: a device has few streams, and two lanes of one wait for each other."""
    made: list[side.Side] = []

    class Counted(side.Side):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(mover, "Side", Counted)
    said = Said()
    here = BlockMover(random_pool(), None, None, said.add, rank=0, epoch=0)
    for epoch in range(6):
        here.take(Send(epoch, ids([0]), 2, epoch))
        lane = here._lanes["send", 2, epoch]
        said.wait(epoch)
        here.take(Cut(2, epoch))
        assert lane.join(PATIENCE_S)
        assert lane.side not in [other.side for other in here._lanes.values()]
    assert len(made) <= 2
    here.close()


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_pairs_the_quiet_ones_begin_anew(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "MOST_PAIRS", 1)
    world = make(kind)
    here, others = world.site(0), [world.site(1), world.site(2)]
    for turn in range(3):
        for other in others:
            transfer = 2 * turn + other.group
            here.send(transfer, other, [turn])
            other.receive(transfer, here, [20 + turn])
            assert other.said.wait(transfer).ok
            assert here.said.wait(transfer).ok
    for other in others:
        assert torch.equal(other.rows[20:23], here.rows[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_epoch_is_word_enough_that_the_former_has_gone(make: Make, kind: str) -> None:
    world = make(kind)
    here, former = world.site(1), world.site(2)
    here.send(1, former, [0])
    again = world.site(2, epoch=1)
    here.send(2, again, [4])
    again.receive(2, here, [6])
    assert here.said.wait(2).ok
    assert "epoch 0 of group 2 has gone" in here.said.wait(1).message


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_whom_nobody_answers_says_so_in_time(make: Make, kind: str) -> None:
    world = make(kind, timeout_s=0.2)
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    moved = here.said.wait(1)
    assert not moved.ok
    assert "within 0.2 s" in moved.message
    there.receive(2, here, [20])
    assert not there.said.wait(2).ok


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_after_a_failure_the_pair_goes_on(make: Make, kind: str) -> None:
    world = make(kind)
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    there.receive(1, here, [20])
    assert here.said.wait(1).ok
    here.send(3, there, [0, 1, 2])
    there.receive(3, here, [20, 21])
    assert not here.said.wait(3).ok
    assert not there.said.wait(3).ok
    there.receive(2, here, [22])
    here.send(2, there, [3])
    assert there.said.wait(2).ok
    assert here.said.wait(2).ok
    assert torch.equal(there.rows[22], here.rows[3])


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_a_group_with_another_epoch_begins_anew_at_the_same_address(make: Make, kind: str) -> None:
    world = make(kind)
    here, there = world.site(1), world.site(2)
    here.send(1, there, [3])
    there.receive(1, here, [4])
    assert there.said.wait(1).ok
    here.send(2, there, [5])  # nobody fetches it
    assert here.transport is not None
    address = here.transport.address
    here.mover.enter(6)
    left = here.said.wait(2)
    assert (left.epoch, left.ok) == (0, False)
    assert "the group has left epoch 0" in left.message
    if kind != "local":
        assert here.transport.address == address
        there.receive(3, here, [6])  # it means the epoch that has gone
        assert not there.said.wait(3).ok
    here.epoch = 6
    there.receive(4, here, [7])
    here.send(4, there, [8])
    assert there.said.wait(4).ok
    assert here.said.wait(4).epoch == 6
    assert torch.equal(there.rows[7], here.rows[8])


def test_what_does_not_end_keeps_a_group_from_another_epoch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may write to blocks that are somebody else's by then."""
    world, held = make("local"), threading.Event()
    here, there = world.site(1), world.site(2)
    monkeypatch.setattr(mover, "JOIN_S", 0.05)
    monkeypatch.setattr(exchange, "copy_rows", lambda *_: held.wait(PATIENCE_S))
    here.send(1, there, [3])
    there.receive(1, here, [4])
    while not world.exchange.offers or not next(iter(world.exchange.offers.values())).taken:
        time.sleep(0.001)
    with pytest.raises(TransferFailed, match=r"manta-receive-1\.0-rank0 did not end"):
        there.mover.enter(1)
    held.set()


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_sides_that_do_not_agree_fail_both(make: Make, kind: str) -> None:
    world = make(kind)
    wider = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
    device = "cuda:0" if kind == "nccl" else "cpu"
    here, there = world.site(1), world.site(2, pool=random_pool(layout=wider, device=device))
    here.send(1, there, [0])
    there.receive(1, here, [0])
    for site in (here, there):
        assert not site.said.wait(1).ok


@pytest.mark.parametrize("kind", [*KINDS, NCCL])
def test_closing_fails_what_is_under_way_and_ends_all_threads(make: Make, kind: str) -> None:
    world = make(kind)
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    here.receive(2, there, [1])
    here.mover.close()
    assert not here.said.wait(1).ok
    assert not here.said.wait(2).ok


def test_a_sender_that_withdraws_while_its_blocks_are_read_spoils_the_transfer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks may be granted again once it has said that the transfer failed."""
    began, go_on = threading.Event(), threading.Event()

    def slow(source: Tensor, blocks: list[int], target: Tensor, targets: list[int], abort: LaneAbort) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        side.copy_rows(source, blocks, target, targets, abort)

    monkeypatch.setattr(exchange, "copy_rows", slow)
    world = make("local")
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    there.receive(1, here, [20])
    assert began.wait(PATIENCE_S)
    here.take(Cut(2, 0))
    assert not here.said.wait(1).ok
    go_on.set()
    moved = there.said.wait(1)
    assert (moved.ok, moved.message) == (False, "the sender withdrew")


# ---- host memory


def test_offload_and_load_bring_back_every_byte(make: Make) -> None:
    host = KVPool(LAYOUT, 12, "cpu")
    here = make("local").site(1, host=host)
    before = here.pool.raw.clone()
    here.take(Offload(1, ids([4, 9, 2]), ids([11, 0, 5])))
    moved = here.said.wait(1)
    assert (moved.ok, moved.bytes) == (True, 3 * LAYOUT.block_bytes)
    assert torch.equal(host.raw[[11, 0, 5]], before[[4, 9, 2]])
    here.pool.raw.zero_()
    here.take(Load(2, ids([0, 11]), ids([30, 31])), Offload(3, ids([30]), ids([7])))
    assert here.said.wait(2).ok
    assert here.said.wait(3).ok
    assert torch.equal(here.pool.raw[[30, 31]], before[[9, 4]])
    assert torch.equal(host.raw[7], before[9])
    assert not here.pool.raw[:30].any()


def test_without_host_memory_or_transport_movements_fail_one_by_one() -> None:
    said = Said()
    bare = BlockMover(random_pool(), None, None, said.add, rank=0, epoch=3)
    bare.take(Offload(1, ids([0]), ids([0])))
    bare.take(Send(2, ids([0]), 5, 0))
    assert said.wait(1).message == "this rank keeps no blocks in host memory"
    assert said.wait(2).message == "this rank takes no part in transfers"
    assert {moved.epoch for moved in said.moved} == {3}
    bare.close()


def test_a_block_or_slot_that_is_not_there_fails_its_transfer_alone(make: Make) -> None:
    here = make("socket").site(1, host=KVPool(LAYOUT, 2, "cpu"))
    here.take(
        Offload(1, ids([0]), ids([2])),
        Offload(2, ids([BLOCKS]), ids([1])),
        Load(3, ids([-1]), ids([1])),
        Send(4, ids([BLOCKS + 5]), 2, 0),
        Offload(5, ids([0]), ids([1])),
    )
    for transfer in (1, 2, 3, 4):
        assert "names one that is not among" in here.said.wait(transfer).message
    assert here.said.wait(5).ok


# ---- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LONG_CYCLES = 1 << 30  # about half a second of a GPU's time


@gpu
def test_pool_to_pool_and_pinned_memory_and_back_cuda(make: Make) -> None:
    world = make("local")
    host = KVPool(LAYOUT, 12, "cpu", pinned=True)
    assert host.data.is_pinned()
    here = world.site(1, pool=random_pool(seed=1, device="cuda"), host=host)
    there = world.site(2, pool=random_pool(seed=2, device="cuda"))
    before, expected = here.rows, there.rows
    here.send(1, there, [3, 9, 4])
    there.receive(1, here, [30, 0, 31])
    assert there.said.wait(1).ok
    expected[[30, 0, 31]] = before[[3, 9, 4]]
    assert torch.equal(there.rows, expected)
    here.take(Offload(2, ids([5, 6]), ids([11, 2])))
    assert here.said.wait(2).ok
    assert torch.equal(host.raw[[11, 2]], before[[5, 6]])
    here.take(Load(3, ids([2]), ids([38])))
    assert here.said.wait(3).ok
    assert torch.equal(here.rows[38], before[6])


@gpu
def test_what_is_moved_waits_for_the_steps_before_it_and_they_for_nothing_cuda(make: Make) -> None:
    """A step that takes long writes a block that is then offloaded, and reads one that is then overwritten."""
    host = KVPool(LAYOUT, 4, "cpu", pinned=True)
    here = make("local").site(1, pool=random_pool(seed=1, device="cuda"), host=host)
    before = here.rows
    host.raw.fill_(7)
    torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]
    here.pool.raw[0].fill_(9)
    read = here.pool.raw[1].clone()
    launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
    launched.record()
    here.take(Offload(1, ids([0]), ids([0])), Load(2, ids([3]), ids([1])))
    assert not launched.query(), "the step loop has not waited"  # type: ignore[no-untyped-call]
    assert here.said.wait(1).ok
    assert here.said.wait(2).ok
    assert (host.raw[0] == 9).all()
    assert torch.equal(read.cpu(), before[1])
    assert (here.rows[1] == 7).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_cut_in_the_midst_ends_a_transfer_that_the_device_waits_for_cuda(make: Make) -> None:
    """The receiver's device is busy: the sender's kernel waits there, until its epoch is cut."""
    world = make("nccl")
    here, there = world.site(1), world.site(2)
    here.send(1, there, [0])
    there.receive(1, here, [20])
    assert here.said.wait(1).ok
    assert there.said.wait(1).ok
    with torch.cuda.device("cuda:0"):
        for _ in range(20):  # ten seconds
            torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]
        there.receive(2, here, [21])
    here.send(2, there, [1])
    time.sleep(1.0)  # by now the kernel waits
    here.take(Cut(2, 0))
    moved = here.said.wait(2)
    assert (moved.ok, moved.message) == (False, "epoch 0 of group 2 has gone")
    assert not there.said.wait(2).ok
    assert torch.equal(here.rows[0], there.rows[20])
