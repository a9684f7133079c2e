"""Every communicator computes the same sums, and none waits for ever for a peer that has gone."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from workers.parallel.communicator import Communicator
from workers.parallel.connect import (
    PeerLost,
    SharedMemoryGroup,
    Solo,
    ThreadGroup,
    TorchGroup,
    connect,
    join_memory,
    sum_in_rank_order,
)
from workers.parallel.shared_memory import create_segment, is_supported

CPU = torch.device("cpu")
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([__name__])  # or each rank would import torch anew
SHAPES = [(1,), (3, 7), (1, 1024), (140, 1024), (0, 8)]  # the fourth is summed together and overflows a slot
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
needs_shared_memory = pytest.mark.skipif(not is_supported(), reason="needs Linux on x86")


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    """Ranks that are threads must not share out their small sums over more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank * 1000 + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)


def collect(comm: Communicator) -> dict[str, Tensor]:
    """All collectives on all shapes and dtypes, twice, with other numbers: whatever a buffer held before shows."""
    results = {}
    for turn in range(2):
        for dtype in DTYPES:
            for shape in SHAPES:
                mine = part(comm.rank + turn, shape, dtype)
                results[f"gather {turn} {dtype} {shape}"] = comm.all_gather(mine).clone()
                results[f"reduce {turn} {dtype} {shape}"] = comm.all_reduce(mine).clone()
    return results


def expected(size: int) -> dict[str, Tensor]:
    results = {}
    for turn in range(2):
        for dtype in DTYPES:
            for shape in SHAPES:
                parts = [part(rank + turn, shape, dtype) for rank in range(size)]
                results[f"gather {turn} {dtype} {shape}"] = torch.stack(parts)
                results[f"reduce {turn} {dtype} {shape}"] = sum_in_rank_order(parts, torch.empty_like(parts[0]))
    return results


def check(results: dict[str, Tensor], size: int) -> None:
    wanted = expected(size)
    assert results.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(results[name], wanted[name])] == []


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_sums_are_rounded_once() -> None:
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    assert sum_in_rank_order(parts, torch.empty_like(parts[0])).item() == 260.0  # 256 + 1 is 256 in bf16


def test_solo() -> None:
    solo: Communicator = Solo()
    x = torch.randn(3)
    assert torch.equal(solo.all_reduce(x.clone()), x)
    assert torch.equal(solo.all_gather(x), x[None])
    assert isinstance(connect(0, 1, device=CPU, address="unused:0"), Solo)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_sum(size: int) -> None:
    if size == 1:
        x = torch.randn(3)
        assert torch.equal(ThreadGroup.create(1)[0].all_reduce(x), x)
        return
    with ThreadPoolExecutor(size) as threads:
        for results in threads.map(collect, ThreadGroup.create(size)):
            check(results, size)


def test_threads_abort() -> None:
    first, second = ThreadGroup.create(2)
    timer = threading.Timer(0.05, second.abort, ["rank 1 was fenced"])
    timer.start()
    with pytest.raises(PeerLost, match="rank 1 was fenced"):
        first.all_reduce(torch.ones(1))
    with pytest.raises(PeerLost, match="rank 1 was fenced"):
        second.all_gather(torch.ones(1))
    timer.join()


def shared_threads(size: int, **options: Any) -> list[SharedMemoryGroup]:
    """The ranks of a shared-memory group, all in this process."""
    section_bytes = options.pop("section_bytes", 1 << 16)
    descriptor = create_segment(size, section_bytes)
    options.setdefault("timeout_s", 60.0)
    groups = [SharedMemoryGroup(rank, size, descriptor, section_bytes=section_bytes, **options) for rank in range(size)]
    os.close(descriptor)
    return groups


@pytest.mark.few(1)
@needs_shared_memory
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shared_memory_in_small_sections(size: int) -> None:
    """Slots smaller than the tensors, and one result used while the next is under way."""
    with ThreadPoolExecutor(size) as threads:
        for results in threads.map(collect, shared_threads(size)):
            check(results, size)


@needs_shared_memory
def test_shared_memory_abort_reaches_every_rank() -> None:
    first, second, third = shared_threads(3)
    timer = threading.Timer(0.05, first.abort, ["fenced"])
    timer.start()
    with pytest.raises(PeerLost, match="another rank aborted it"):
        second.all_reduce(torch.ones(1))
    timer.join()
    with pytest.raises(PeerLost, match="fenced"):
        first.all_reduce(torch.ones(1))
    with pytest.raises(PeerLost):
        third.all_gather(torch.ones(1))


@needs_shared_memory
def test_shared_memory_notices_the_dead_and_the_silent() -> None:
    alive = {"yes": True}
    group, _ = shared_threads(2, alive=lambda: alive["yes"])
    timer = threading.Timer(0.1, alive.update, kwargs={"yes": False})
    timer.start()
    with pytest.raises(PeerLost, match="process has ended"):
        group.all_reduce(torch.ones(1))
    timer.join()
    group, _ = shared_threads(2, timeout_s=0.2)
    with pytest.raises(PeerLost, match="rank 1 did not answer"):
        group.all_reduce(torch.ones(1))


@needs_shared_memory
def test_a_rank_may_close_while_others_finish() -> None:
    groups = shared_threads(3)

    def reduce_and_leave(comm: Communicator) -> float:
        time.sleep(0.1 * comm.rank)
        total = comm.all_reduce(torch.ones(1)).item()
        comm.close()
        return total

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(reduce_and_leave, groups)) == [3.0] * 3
    with pytest.raises(PeerLost, match="closed"):
        groups[1].all_reduce(torch.ones(1))


@needs_shared_memory
@pytest.mark.parametrize("make", [ThreadGroup.create, shared_threads])
def test_one_that_was_aborted_says_so_when_it_is_asked(make: Callable[[int], Sequence[Communicator]]) -> None:
    group, *_ = make(2)
    group.check()
    group.abort("a peer has gone")
    with pytest.raises(PeerLost, match="a peer has gone"):
        group.check()


# ---- ranks that are processes ----------------------------------------------------------------------------------------


def _join(rank: int, size: int, address: str, hosts: list[str], job: Callable[..., object], pipe: Any) -> None:
    torch.set_num_threads(1)
    comm = connect(rank, size, device=CPU, address=address, timeout_s=60.0, host=hosts[rank])
    try:
        pipe.send((type(comm).__name__, job(comm, pipe)))
        pipe.recv()  # until the test has what it wants: nobody leaves first
    except PeerLost as error:
        pipe.send(("lost", str(error)))
    comm.close()


class Processes:
    """`size` processes, ranks, doing `job(comm, pipe)`, of which each sends (group type, result) or ("lost", message)."""

    def __init__(self, size: int, job: Callable[..., object], hosts: list[str] | None = None) -> None:
        address, self.pipes, self.processes = free_address(), [], []
        for rank in range(size):
            here, there = FORKS.Pipe()
            arguments = (rank, size, address, hosts or [""] * size, job, there)
            process = FORKS.Process(target=_join, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def receive(self, rank: int) -> Any:
        assert self.pipes[rank].poll(120), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def release(self) -> None:
        for pipe in self.pipes:
            pipe.send("done")
        for process in self.processes:
            process.join(60)
            assert process.exitcode == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Processes]]:
    running: list[Processes] = []

    def launch(*arguments: Any, **options: Any) -> Processes:
        running.append(Processes(*arguments, **options))
        return running[-1]

    yield launch
    for group in running:
        for process in group.processes:
            process.kill()
            process.join()


def _check_all(comm: Communicator, _pipe: object) -> None:
    check(collect(comm), comm.size)


def test_processes_of_one_host(start: Callable[..., Processes]) -> None:
    size = 3  # two are below, on two hosts
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    group = start(size, _check_all)
    kind = "SharedMemoryGroup" if is_supported() else "TorchGroup"
    assert [group.receive(rank) for rank in range(size)] == [(kind, None)] * size
    group.release()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "tensor-parallel" in name}


def test_processes_of_two_hosts(start: Callable[..., Processes]) -> None:
    group = start(2, _check_all, ["one", "another"])
    assert [group.receive(rank) for rank in range(2)] == [("TorchGroup", None)] * 2
    group.release()


def _reduce_for_ever(comm: Communicator, pipe: Any) -> None:
    pipe.send("started")
    while True:
        comm.all_reduce(torch.ones(8, 64))


@pytest.mark.parametrize("hosts", [["", "", ""], ["a", "b", "c"]], ids=["shared memory", "gloo"])
def test_the_others_notice_a_killed_rank(start: Callable[..., Processes], hosts: list[str]) -> None:
    group = start(3, _reduce_for_ever, hosts)
    for rank in range(3):
        assert group.receive(rank) == "started"
    time.sleep(0.1)
    group.processes[1].kill()
    for rank in (0, 2):
        kind, message = group.receive(rank)
        assert kind == "lost"
        assert f"rank {rank} of 3" in message


def _abort_from_a_thread(comm: Communicator, pipe: Any) -> None:
    if comm.rank == 1:
        pipe.recv()  # never comes to the collective
        return
    threading.Timer(0.1, comm.abort, ["the leader said so"]).start()
    comm.all_reduce(torch.ones(4))


def test_gloo_abort(start: Callable[..., Processes]) -> None:
    group = start(2, _abort_from_a_thread, ["a", "b"])
    kind, message = group.receive(0)
    assert kind == "lost"
    assert "the leader said so" in message


def test_a_rank_that_never_comes() -> None:
    with pytest.raises(PeerLost, match="rank 1 of 2 could not join its group at 127"):
        connect(1, 2, device=CPU, address=free_address(), timeout_s=0.5)


def test_two_groups_in_one_process() -> None:
    """Threads as ranks of two gloo groups: nothing global is left behind or in the way."""

    def rank_of(group: int, rank: int, address: str) -> tuple[str, float]:
        comm = connect(rank, 2, device=CPU, address=address, timeout_s=60, host=f"host {rank}")
        assert isinstance(comm, TorchGroup)
        return type(comm).__name__, comm.all_reduce(torch.full((1,), float(10 * group + rank))).item()

    addresses = [free_address(), free_address()]
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(rank_of, group, rank, addresses[group]) for group in (0, 1) for rank in (0, 1)]
        assert [job.result()[1] for job in jobs] == [1.0, 1.0, 21.0, 21.0]
    assert not torch.distributed.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_alone() -> None:
    """One GPU is a group of one, but every call of the real backend is made, also under capture in a CUDA graph."""
    device = torch.device("cuda", 0)
    comm = TorchGroup(0, 1, HashStore(), device, 60.0)
    for dtype in (torch.float32, torch.bfloat16):
        x = part(0, (3, 7), dtype).to(device)
        assert torch.equal(comm.all_gather(x), x[None])
        assert torch.equal(comm.all_reduce(x.clone()), x)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device=device)
    with torch.cuda.graph(graph):
        y = comm.all_reduce(x) + 1
    x.fill_(2.0)
    graph.replay()
    assert y.tolist() == [3.0] * 4
    comm.abort("enough")
    with pytest.raises(PeerLost, match="enough"):
        comm.all_reduce(x)


@pytest.mark.parametrize(
    ("reached", "right", "why"),
    [((True, True), (True, True), ""), ((True, False), (True, True), "no way there"), ((True, True), (False, True), "a number"),
     ((True, True), (True, None), "no kernel")],
    ids=["right", "one rank does not reach the other's memory", "one rank's sums are wrong", "one rank cannot sum"],
)  # fmt: skip
def test_ranks_sum_through_joined_memory_all_or_none(
    reached: tuple[bool, bool], right: tuple[bool | None, bool | None], why: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    peer_memory = pytest.importorskip("workers.parallel.peer_memory")
    tried = []

    class Memory:
        def __init__(self, rank: int, *_: object) -> None:
            if not reached[rank]:
                raise RuntimeError("no way there")
            self.rank = rank

        def fault(self, patience_s: float) -> str:
            tried.append(patience_s)
            if right[self.rank] is None:
                raise ValueError("no kernel")
            return "" if right[self.rank] else "a number got lost"

    monkeypatch.setattr(peer_memory, "PeerMemory", Memory)
    store = HashStore()
    with caplog.at_level("INFO"), ThreadPoolExecutor(2) as pool:
        joined = list(pool.map(lambda rank: join_memory(rank, 2, store, CPU, 60.0), range(2)))
    if all(reached) and all(right):
        assert [memory and vars(memory)["rank"] for memory in joined] == [0, 1]
    else:
        assert joined == [None, None]
        assert why in caplog.text
    assert len(tried) == (2 if all(reached) else 0)
